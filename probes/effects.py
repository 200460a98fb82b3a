"""Does an edit do more than any edit of its size would? One number per prompt, with and without, beside random edits.

    e = edits.add("resid_post[8]", v)
    table = effect(m, e, held_out, metric, random_adds("resid_post[8]", v, 20))
    table.attrs["beats"]                        the interval of (effect - random effect) leaves out 0

Whatever found the edit, a probe, a difference of means or a latent, was fitted on other prompts than these: then the
interval, over prompts and over random edits, is honest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp import edits
from interp.calls import recorded
from interp.edits import Edit
from interp.metrics import as_metric
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd


def random_adds(site: str, vector: Any, n: int = 20, *, seed: int = 0, **how: Any) -> list[Edit]:
    """`n` Edits that add a random vector with the norm of `vector` [feature] at `site`; `how` as for `edits.add`."""
    v = torch.as_tensor(np.asarray(vector)).float()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.nn.functional.normalize(torch.randn(n, len(v), generator=generator), dim=1) * v.norm()
    return [edits.add(site, draw, **{"name": "random", **how}) for draw in draws]


@recorded
def effect(
    m: Any, edit: Any, inputs: Any, metric: Any, controls: Sequence[Any], *, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """What an edit does to a metric, less what random edits do.

    Args:
        m: the model.
        edit: an Edit, or anything that `m.intervene` takes.
        inputs: texts or Tokens that the edit was not found on.
        metric: of the logits, one number per input.
        controls: edits of the same size, e.g. from `random_adds`.
        draws: of the bootstrap, over inputs and controls.
        seed: of the bootstrap.

    Returns:
        Table: baseline, metric, before, value (mean change), low, high (95 %). The baselines: "none" the edit, "random"
        the controls (their interval is the range of 95 % of them), "difference" the one less the other.
        `.attrs["beats"]`: whether the interval of the difference leaves out 0; `direction` its sign.

    Raises ProbeError without controls.
    """
    import pandas as pd

    if not controls:
        raise ProbeError("effect: no controls; give edits of the same size, e.g. probes.random_adds(site, vector)")
    measure = as_metric(metric)
    tokens = inputs if hasattr(inputs, "mask") else m.tokens(inputs)

    def values(*change: Any) -> np.ndarray:
        with m.intervene(*change):
            return measure(m(tokens), tokens).float().cpu().numpy().astype(np.float64)

    plain = values()
    mine = values(edit) - plain  # [input]
    others = np.stack([values(c) - plain for c in controls])  # [control, input]
    rng = np.random.default_rng(seed)
    at = rng.integers(len(plain), size=(draws, len(plain)))
    of = rng.integers(len(others), size=(draws, len(others)))
    effects = mine[at].mean(1)
    # A draw of controls weighs each control's mean over the drawn inputs by how often it was drawn.
    weight = np.stack([np.bincount(row, minlength=len(others)) for row in of]) / len(others)
    times = np.stack([np.bincount(row, minlength=len(plain)) for row in at]) / len(plain)
    random = np.einsum("dc,ci,di->d", weight, others, times, optimize=True)
    rows = []
    for baseline, value, spread in (
        ("none", mine.mean(), effects), ("random", others.mean(), others.mean(1)),
        ("difference", mine.mean() - others.mean(), effects - random),
    ):  # fmt: skip
        low, high = np.quantile(spread, [0.025, 0.975])
        rows.append({"baseline": baseline, "metric": measure.name, "before": float(plain.mean()),
                     "value": float(value), "low": float(low), "high": float(high)})  # fmt: skip
    table = pd.DataFrame(rows)
    low, high = table.low.iloc[-1], table.high.iloc[-1]
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "inputs": len(plain), "controls": len(others),
                   "seed": seed, "beats": bool(low > 0 or high < 0),
                   "direction": float(np.sign(mine.mean() - others.mean()))}  # fmt: skip
    return table
