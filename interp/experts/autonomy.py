"""Would the experts have chosen themselves as the router did?

In an Autonomy-of-Experts model (arXiv 2501.13074) there is no router: every expert begins to work on every token, and
those whose internal activations are largest go on. In a model that does have one, the question is how far the two
agree: per token, Kendall's tau between the router's scores of all experts and the norms of what they would have in
    their neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.divergence import mean_with_interval
from interp.experts.units import ExpertError, units_of
from interp.hooks.slots import given

if TYPE_CHECKING:
    import pandas as pd


@recorded
@torch.no_grad()
def autonomy(
    model: Any,
    texts: Labelled | Corpus,
    *,
    max_tokens: int | None = None,
    batch_tokens: int = 1024,
    seed: int = 0,
) -> pd.DataFrame:
    """Kendall's tau between the router's order of experts and that of their internal norms, per layer.

    Args:
        model: a Mixture of Experts whose experts are fused (transformers' interface).
        texts: label -> documents; all labels are pooled.
        max_tokens: per label.
        batch_tokens: tokens run at once; every expert is computed for each.
        seed: of the bootstrap.

    Returns columns layer, value (mean over tokens, -1..1), low, high (95 % over documents), overlap (share of the
    top-k by norm that the router chose), chance (k / E).
    """
    import pandas as pd

    units = units_of(model, "routed")
    layers = list(units.layers)
    modules = {}
    for layer in layers:
        place = model.anatomy.places["expert_weight", layer]
        if place.how != "experts" or ("router_logits", layer) not in model.anatomy.places:
            raise ExpertError(f"layer {layer} of {model.name}: its experts cannot be run on tokens they were not given")
        modules[layer] = place.module
    data = corpus(model, texts, max_tokens)
    n = len(data.documents)
    taus, hits = (torch.zeros(len(layers), n, dtype=torch.float64) for _ in range(2))
    counts = torch.zeros(n, dtype=torch.float64)
    for batch in data.batches(model, batch_tokens):
        with given(modules) as inputs:
            acts = model.capture(batch.tokens, [f"{s}[{la}]" for la in layers for s in ("router_logits", "expert_ids")],
                                 check=False, logits=True)  # fmt: skip
        mask = batch.tokens.mask
        document = batch.document[:, None].expand_as(mask)[mask.cpu()]
        counts.index_add_(0, document, torch.ones(len(document), dtype=torch.float64))
        for i, layer in enumerate(layers):
            norms = internal_norms(modules[layer], inputs[layer].flatten(0, -2)[mask.flatten()])
            scores = acts[f"router_logits[{layer}]"][mask][:, : units.size]
            ids = acts[f"expert_ids[{layer}]"][mask]
            best = norms.topk(ids.shape[-1], dim=-1).indices
            shared = (best[:, :, None] == ids[:, None]).any(-1).double().mean(-1)
            taus[i].index_add_(0, document, kendall(scores, norms).cpu())
            hits[i].index_add_(0, document, shared.cpu())
    rows = []
    for i, layer in enumerate(layers):
        overlap = {"overlap": float(hits[i].sum() / counts.sum()), "chance": model.top_k / units.size}
        rows.append({"layer": layer, **mean_with_interval(taus[i], counts, seed=seed), **overlap})
    frame = pd.DataFrame(rows)
    frame.attrs.update({"model": model.name, "tokens": data.n_tokens, "seed": seed})
    return frame


def internal_norms(module: Any, x: Tensor) -> Tensor:
    """Norm of the neurons of every expert at every row, chosen or not: [row, expert]; x [row, d_model]."""
    from interp.hooks import experts

    return torch.stack(
        [experts.up(module, e, x).float().norm(dim=-1) for e in range(experts.sizes(module)["expert"])], -1
    )


def kendall(a: Tensor, b: Tensor, rows: int = 256) -> Tensor:
    """Kendall's tau-a of each row of a and b: [row, item] -> [row], float64."""
    n = a.shape[-1]
    out = []
    for p, q in zip(a.double().split(rows), b.double().split(rows), strict=True):
        order = (p[:, :, None] - p[:, None]).sign() * (q[:, :, None] - q[:, None]).sign()
        out.append(order.sum((1, 2)) / (n * (n - 1)))
    return torch.cat(out)
