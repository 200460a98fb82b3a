"""How much an expert says about the label of a text, and whether that is more than chance.

Take a token of a label drawn with equal chances, and the expert it is sent to (with the probability that the layer's
routing weights give). How many bits does the expert tell of the label?

    I(label; expert) = sum_e P(e) KL( P(label | e) || uniform )
                     = H( mean_l P(e | l) ) - mean_l H( P(e | l) )        the Jensen-Shannon divergence of the labels

So the layer's divergence is the average of what its experts say, and each expert has a figure of its own. Few documents
always seem to differ, even when labels are dealt out at random; how much, is measured by doing so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError

if TYPE_CHECKING:
    import pandas as pd


@recorded
def specialisation(
    stats: RoutingStats, *, by: str = "layer", shuffles: int = 100, seed: int = 0, weigh: str = "mass"
) -> pd.DataFrame:  # fmt: skip
    """Bits that experts tell of a text's label, beside the same with labels dealt out anew.

    Args:
        stats: statistics of two labels or more, with documents kept if there are to be shuffles.
        by: "layer" for the Jensen-Shannon divergence of each layer, "expert" for each expert's part of it.
        shuffles: how often labels are dealt out among the kept documents; 0 for no chance level.
        seed: of the dealing.
        weigh: "mass" (routing weight) or "used" (every selection counts alike; no chance level).

    Returns columns layer, [expert, share (P(e)),] value (bits, 0 .. log2 of the labels), and with shuffles kept (the
    value over the kept documents alone), chance, low, high (mean and middle 95 % over shuffles of those documents), p.
    Compare `chance` with `kept`, which is over the same documents.
    """
    import pandas as pd

    if by not in ("layer", "expert"):
        raise ExpertError(f"by={by!r}: expected layer or expert")
    if weigh not in ("mass", "used"):
        raise ExpertError(f"weigh={weigh!r}: expected mass or used")
    if len(stats.labels) < 2:
        raise ExpertError("specialisation needs two labels or more")
    share, bits = _bits(stats.mass if weigh == "mass" else stats.used)
    columns = {"value": bits}
    if shuffles and weigh == "mass":
        columns |= _chance(stats, by, shuffles, seed)
    rows = []
    for layer, router in stats.layers.items():
        if by == "layer":
            whole = {"value": float((share[router] * bits[router]).sum())}
            rows.append({"layer": layer, **whole, **{k: float(v[router]) for k, v in columns.items() if k != "value"}})
            continue
        told = {name: values[router].tolist() for name, values in columns.items()}
        rows += [
            {"layer": layer, "expert": e, "share": float(share[router, e]), **{k: v[e] for k, v in told.items()}}
            for e in range(stats.size)
        ]
    frame = pd.DataFrame(rows)
    frame.attrs.update({**stats.about(), "shuffles": shuffles, "seed": seed, "weigh": weigh})
    return frame


def _bits(mass: Tensor) -> tuple[Tensor, Tensor]:
    """P(e), and bits that expert e tells of the label, [router, unit] each; mass [label, router, unit]."""
    p = mass / mass.sum(-1, keepdim=True).clamp_min(1e-300)  # P(e | label)
    share = p.mean(0)
    given = p / p.sum(0).clamp_min(1e-300)  # P(label | e)
    entropy = -(given * given.clamp_min(1e-300).log2()).sum(0)
    bits = torch.log2(torch.tensor(float(len(mass)), dtype=mass.dtype)) - entropy
    return share, torch.where(share > 0, bits, torch.zeros_like(bits))


def _chance(stats: RoutingStats, by: str, shuffles: int, seed: int) -> dict[str, Tensor]:
    """The value over the kept documents, and its distribution when their labels are dealt out anew."""
    kept = stats.sample
    if kept is None or len(kept) < 2:
        raise ExpertError("the chance level needs documents; pass documents=200 to experts.routing, or shuffles=0")
    mass = (kept.mean.double() * kept.tokens[:, None, None]).flatten(1)  # [document, router * unit]
    n, shape = len(stats.labels), kept.mean.shape[1:]
    generator = torch.Generator().manual_seed(seed)

    def value(label: Tensor) -> Tensor:
        sums = mass.new_zeros(n, mass.shape[1]).index_add_(0, label, mass).view(n, *shape)
        share, bits = _bits(sums)
        return bits if by == "expert" else (share * bits).sum(-1)

    own = value(kept.label)
    draws = torch.stack([value(kept.label[torch.randperm(len(kept), generator=generator)]) for _ in range(shuffles)])
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    p = ((draws >= own).sum(0) + 1) / (shuffles + 1)
    return {"kept": own, "chance": draws.mean(0), "low": low, "high": high, "p": p.double()}
