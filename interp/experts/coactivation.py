"""Which experts work together: how often a token that uses one uses the other too.

    table = experts.coactivation(stats)                the pairs of each layer, strongest first

OLMoE (arXiv 2409.02060, section 5.2) reports N_ij / N_i, of all tokens that use i those that use j as well. That is
large for every j that is used much, so beside it stands `lift`, the same over what independent choices would give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from interp.calls import recorded
from interp.experts.stats import RoutingStats

if TYPE_CHECKING:
    import pandas as pd


@recorded
def coactivation(stats: RoutingStats, label: str | None = None, *, top: int | None = 20) -> pd.DataFrame:
    """The pairs of each layer that are used by the same tokens most.

    Args:
        stats: from ``experts.routing(..., together=True)``.
        label: on the tokens of one label, default of all.
        top: pairs per layer, by value; None for all.

    Returns columns layer, expert, other, tokens (that used both), value (N_ij / N_i, 0..1), lift (N_ij N / N_i N_j).
    """
    import pandas as pd

    together = stats.measured("together")
    at = [stats.index(label)] if label is not None else list(range(len(stats.labels)))
    both, used, tokens = together[at].sum(0), stats.used[at].sum(0), stats.tokens[at].sum()
    parts = []
    for layer, router in stats.layers.items():
        pair = both[router].clone().fill_diagonal_(0.0)
        n = used[router]
        value = pair / n[:, None].clamp_min(1)
        lift = pair * tokens / (n[:, None] * n[None, :]).clamp_min(1)
        order = value.flatten().argsort(descending=True, stable=True)[:top]
        order = order[pair.flatten()[order] > 0]
        i, j = order // stats.size, order % stats.size
        columns = {"expert": i, "other": j, "tokens": pair[i, j].long(), "value": value[i, j], "lift": lift[i, j]}
        parts.append(pd.DataFrame({"layer": layer, **{name: v.numpy() for name, v in columns.items()}}))
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs.update({**stats.about(), "label": label})
    return frame


def matrix(stats: RoutingStats, layer: int, label: str | None = None) -> torch.Tensor:
    """N_ij / N_i of one layer [expert, other], with 1 on the diagonal of every expert that is used."""
    at = [stats.index(label)] if label is not None else list(range(len(stats.labels)))
    router = stats.layers[layer]
    both = stats.measured("together")[at, router].sum(0)
    return both / both.diagonal()[:, None].clamp_min(1)
