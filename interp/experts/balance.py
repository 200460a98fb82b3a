"""How evenly the experts of a layer are used, and when in training their choice settles.

    experts.load(stats)                             one line per layer and label: entropy, dead experts, worst overload
    experts.saturation({"2k": early, ...}, m, texts)  OLMoE's router saturation: which choices were already made

Load is what Switch and its heirs balance with a loss; a layer that fails to balance leaves experts untrained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError

if TYPE_CHECKING:
    import pandas as pd


@recorded
def load(stats: RoutingStats, labels: list[str] | None = None) -> pd.DataFrame:
    """How a layer's load is spread, per label, and over all labels pooled (label "all").

    Write f_e for the share of a layer's selections that go to expert e. Columns layer, label and

        entropy     - sum f_e log f_e / log E: 1 where all are used alike, 0 where one does all
        max_over_mean  load of the busiest expert, E max f_e
        gini        0 alike .. 1 one for all
        dead        experts that no token used
        switch      E sum f_e P_e with P_e the expert's share of routing weight: 1 at balance (Switch, eq. 4)
    """
    import pandas as pd

    rows = []
    for label in labels or [*stats.labels, "all"]:
        at = list(range(len(stats.labels))) if label == "all" else [stats.index(label)]
        used, mass = stats.used[at].sum(0), stats.mass[at].sum(0)  # [router, unit]
        for layer, router in stats.layers.items():
            f = used[router] / used[router].sum().clamp_min(1)
            p = mass[router] / mass[router].sum().clamp_min(1e-300)
            ordered = f.sort().values
            rank = torch.arange(1, len(f) + 1, dtype=f.dtype)
            rows.append({
                "layer": layer, "label": label,
                "entropy": float(-(f * f.clamp_min(1e-300).log()).sum() / torch.tensor(float(len(f))).log()),
                "max_over_mean": float(len(f) * f.max()),
                "gini": float((2 * rank - len(f) - 1) @ ordered / len(f)),
                "dead": int((f == 0).sum()), "switch": float(len(f) * (f * p).sum()),
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs.update(stats.about())
    return frame


@recorded
def saturation(
    earlier: Mapping[str, Any],
    model: Any,
    texts: Labelled | Corpus,
    *,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
) -> pd.DataFrame:
    """Share of the experts chosen by `model` that an earlier checkpoint chose too, token by token.

    OLMoE's router saturation (arXiv 2409.02060, section 5.1): 1/N sum over tokens |E_t and E_T| / k.

    Args:
        earlier: name -> checkpoint of the same architecture, as a Model.
        model: the last one.
        texts: label -> documents; all labels are pooled.
        max_tokens: per label.
        batch_tokens: tokens run at once.

    Returns columns checkpoint, layer, value, chance (k / E: what two routers that know nothing of each other share).
    Raises ExpertError for checkpoints of another shape.
    """
    import pandas as pd

    layers = model.anatomy.having("expert_ids")
    if not layers:
        raise ExpertError(f"{model.name} has no routed experts; experts.split makes some of a dense model's MLPs")
    for name, other in earlier.items():
        if (other.n_experts, other.top_k, other.anatomy.having("expert_ids")) != (model.n_experts, model.top_k, layers):
            raise ExpertError(
                f"earlier[{name!r}]: {other.n_experts} experts, top-{other.top_k}; the model has {model.n_experts}, "
                f"top-{model.top_k}"
            )
    data = corpus(model, texts, max_tokens)
    shared = {(name, layer): 0.0 for name in earlier for layer in layers}
    for batch in data.batches(model, batch_tokens):
        last = _chosen(model, batch.tokens, layers)
        for name, other in earlier.items():
            first = _chosen(other, batch.tokens, layers)
            for layer in layers:
                shared[name, layer] += float((first[layer][:, :, None] == last[layer][:, None, :]).sum())
    rows = [
        {"checkpoint": name, "layer": layer, "value": total / (data.n_tokens * model.top_k),
         "chance": model.top_k / model.n_experts}
        for (name, layer), total in shared.items()
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs.update({"model": model.name, "tokens": data.n_tokens})
    return frame


def _chosen(model: Any, tokens: Any, layers: list[int]) -> dict[int, Tensor]:
    """layer -> experts chosen [token, slot]."""
    acts = model.capture(tokens, [f"expert_ids[{layer}]" for layer in layers], check=False)
    return {layer: acts[f"expert_ids[{layer}]"][acts.mask] for layer in layers}
