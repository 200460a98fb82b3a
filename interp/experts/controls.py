"""Random controls: as many other units of the same layers, used as often.

Switching units off does some harm whichever they are, more if they are much used. So an effect means something only
beside that of random units of the same layers and the same frequency, here the mean routing weight over all labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interp.experts.sets import ExpertSet
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError


def matched(stats: RoutingStats, chosen: ExpertSet, generator: torch.Generator, near: int = 10) -> ExpertSet:
    """A random set with as many units per layer, each close in frequency to one of `chosen`, none of them in it.

    Layers that share a router and a choice share the control too, as they share the choice.

    Args:
        stats: where frequencies come from.
        chosen: the set to stand beside.
        generator: of the random draws.
        near: each unit's stand-in is drawn from about 2 * near unchosen units around it in the order of frequency.

    Raises ExpertError where a layer has fewer unchosen units than chosen ones.
    """
    if stats.fingerprint != chosen.fingerprint or stats.kind != chosen.kind:
        raise ExpertError("the statistics are of another model or kind of units than the set")
    frequency = stats.probability.mean(0)  # [router, unit]
    done: dict[tuple[int, bytes], Tensor] = {}
    ids = {}
    for layer, units in chosen.ids.items():
        router = stats.layers[layer]
        key = (router, units.numpy().tobytes())
        if key not in done:
            done[key] = _stand_ins(frequency[router], units, generator, near)
        ids[layer] = done[key]
    return ExpertSet._of(chosen, ids, {"rule": "random", "matched": "layer and frequency", "for": chosen.record})


def has_controls(stats: RoutingStats, chosen: ExpertSet) -> bool:
    """True if every layer has as many unchosen units as chosen ones, so that `matched` can draw."""
    size = stats.probability.shape[-1]
    return all(2 * len(units) <= size for units in chosen.ids.values())


def frequency(stats: RoutingStats, chosen: ExpertSet) -> float:
    """Routing mass of a set, per token and layer, averaged over labels: what controls are matched on."""
    p = stats.probability.mean(0)
    return sum(float(p[stats.layers[layer]][units].sum()) for layer, units in chosen.ids.items()) / len(stats.layers)


def _stand_ins(frequency: Tensor, chosen: Tensor, generator: torch.Generator, near: int) -> Tensor:
    """Unchosen units, one for each chosen one, close to it in the order of frequency: [unit] sorted."""
    free = torch.ones(len(frequency), dtype=torch.bool)
    free[chosen] = False
    if int(free.sum()) < len(chosen):
        raise ExpertError(
            f"{len(chosen)} of {len(frequency)} units of a layer are chosen; too few are left as controls"
        )
    # ties (units that are never used) in random order, so that none of them is preferred
    shuffle = torch.randperm(len(frequency), generator=generator)
    order = shuffle[frequency[shuffle].sort(stable=True).indices]
    ranked = order[free[order]]  # free units by frequency
    place = torch.searchsorted(frequency[ranked].contiguous(), frequency[chosen].contiguous())
    taken = torch.zeros(len(ranked), dtype=torch.bool)
    waiting = place.clamp_max(len(ranked) - 1)[torch.randperm(len(place), generator=generator)]
    while len(waiting):
        low, high = (waiting - near).clamp_min(0), (waiting + near).clamp_max(len(ranked) - 1)
        wish = low + (torch.rand(len(waiting), generator=generator) * (high - low + 1)).long()
        # the first to wish a free unit gets it, the others wish again from a wider neighbourhood
        first = torch.full((len(ranked),), len(wish)).scatter_reduce_(0, wish, torch.arange(len(wish)), "amin")
        won = (first[wish] == torch.arange(len(wish))) & ~taken[wish]
        taken[wish[won]] = True
        waiting, near = waiting[~won], min(2 * near, len(ranked))
    return ranked[taken].sort().values
