"""How large a steering vector is beside the stream that it is added to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interp.calls import recorded
from interp.sites import Site
from steering import pairs
from steering.reading import each_token

if TYPE_CHECKING:
    import pandas as pd

    from steering.vector import SteeringVector


@recorded
def against(v: SteeringVector, m: Any, texts: Any) -> pd.DataFrame:
    """One row per node: norm of the vector, and against every token but the first of `texts` its size and direction.

    Columns: node, layer, norm, stream (mean norm of the activations), ratio (norm / stream), cosine (mean over tokens
    of cos(v, h)), mean_cosine (cos of v with the mean activation). First tokens are left out: in many models they
    have a norm a hundred times that of the others (Sun et al. 2024, arXiv:2402.17762), and no vector is meant for
    them.
    """
    import pandas as pd

    sums = {site: torch.zeros(2, dtype=torch.float64) for site in v.sites}
    means = {site: torch.zeros_like(x, dtype=torch.float64) for site, x in v.vectors.items()}
    counts = dict.fromkeys(v.sites, 0)
    vectors = {site: x.double() for site, x in v.vectors.items()}
    for site, rows in each_token(m, pairs.texts(m, texts), v.sites, skip=1):
        h, unit = rows.double(), vectors[site] / vectors[site].norm()
        norms = h.flatten(1).norm(dim=1)
        cosines = (h * unit).flatten(1).sum(1) / norms.clamp_min(1e-300)
        sums[site] += torch.stack([norms.sum(), cosines.sum()])
        means[site] += h.sum(0)
        counts[site] += len(rows)
    lines = []
    for site, x in vectors.items():
        stream, cosine = (sums[site] / counts[site]).tolist()
        centre = torch.nn.functional.cosine_similarity(x.flatten(), means[site].flatten(), dim=0)
        lines.append(
            {
                "node": site,
                "layer": Site.parse(site).layer,
                "norm": float(x.norm()),
                "stream": stream,
                "ratio": float(x.norm()) / stream,
                "cosine": cosine,
                "mean_cosine": float(centre),
            }
        )
    table = pd.DataFrame(lines)
    table.attrs = {"model": v.model, "method": v.method, "tokens": max(counts.values())}
    return table
