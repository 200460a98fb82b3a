"""How far the estimates can be trusted on this model and these prompts: each estimator against exact patching.

A sample of nodes, drawn at random, is patched exactly; what each estimator says of the same nodes is compared with it:

recall@k          share of the sample's true top k (by the mean over pairs of the absolute effect) in the estimator's
relative cost     verifying nodes in the estimator's order, how many must be patched until the true top r are all among
                  them, over r; geometric mean over r, weighted 1 / r (the summary of AtP*, arXiv 2403.00745). 1 is the
                  best there is. What the estimator itself costs is in ``.attrs["cost"]``, in passes of one pair
rank correlation  Spearman's, of scores

Intervals are bootstraps over pairs. Pairs differ more than estimators do, so two estimators are compared by their
difference in the same draws. "random" ranks the nodes at random, which is what an estimator has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.hooks import resume
from interp.patching.attribute import METHODS, Attribution
from interp.patching.nodes import Node, Nodes, expand
from interp.patching.runs import Patcher
from interp.patching.task import Direction, PatchError, without_flash

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

#: Draws of the bootstrap over pairs, and what its intervals hold.
DRAWS, CONFIDENCE = 400, 0.95


@recorded
def report_card(
    m: Model,
    clean: Any,
    corrupt: Any,
    metric: Any,
    nodes: Nodes,
    methods: Sequence[str] = METHODS,
    direction: Direction = "denoise",
    *,
    positions: str | int | Sequence[int] = "each",
    sample: int = 512,
    k: int = 10,
    seed: int = 0,
    budget: int | None = None,
) -> pd.DataFrame:
    """Compares estimators with exact patching on a verified sample of nodes.

    Args:
        m: the model.
        clean: prompts, as for `patch`. Intervals need several pairs.
        corrupt: their corrupt twins.
        metric: as for `attribute`.
        nodes: as for `patch`; of nodes where the two runs differ, the sample is drawn, as many of each kind of site.
        methods: estimators to compare, of `attribute.METHODS`; the first is the one that differences are taken from.
        direction: as for `patch`.
        positions: as for `patch`.
        sample: how many nodes are patched exactly.
        k: of recall@k.
        seed: of the sample, the bootstrap and the random ranking.
        budget: bytes to stay within, as for `patch`.

    Returns:
        A line per method, site name ("all", and each by itself) and measure, with columns method, site, measure, value,
        low, high (95% bootstrap over pairs; missing with one pair), difference, difference_low, difference_high (from
        the first method) and nodes (how many were verified). ``.attrs`` hold cost per method, sample, k, direction,
        metric and model.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise PatchError(f"methods: {unknown[0]!r} is none of {', '.join(METHODS)}")
    if k < 1 or sample < 2:
        raise PatchError(f"k={k}, sample={sample}: expected k of at least 1 and a sample of at least 2 nodes")
    patcher = Patcher(m, clean, corrupt, metric, direction, budget)
    chosen = _draw(patcher, expand(m, nodes, patcher.task.base.tokens, positions), sample, seed)
    truth = patcher.effects([[node] for node in chosen]).abs()
    cost = {"exact": {"forward": patcher.passes / patcher.task.pairs, "backward": 0.0}}
    scores: dict[str, Tensor] = {}
    for method in methods:
        with without_flash(m), resume.counted(m.anatomy.layers) as passes:
            scores[method] = Attribution(patcher.recorded, chosen, method, steps=5, passes=passes).run()[1]
        cost[method] = {key: getattr(passes, key) / patcher.task.pairs for key in ("forward", "backward")}
    draw = torch.Generator().manual_seed(seed)
    scores["random"] = torch.rand(len(chosen), 1, generator=draw).expand_as(truth)
    rows = compared(truth, scores, [node.site.name for node in chosen], k, seed)
    rows.attrs |= {
        "model": m.name,
        "metric": patcher.task.metric.name,
        "direction": direction,
        "pairs": patcher.task.pairs,
        "sample": len(chosen),
        "k": k,
        "seed": seed,
        "cost": cost,
        "shortcuts": dict(patcher.shortcuts),
        "interval": f"{CONFIDENCE:.0%} bootstrap over pairs, {DRAWS} draws",
    }
    return rows


def _draw(patcher: Patcher, nodes: list[Node], sample: int, seed: int) -> list[Node]:
    """Nodes at which the runs differ for some pair, at most `sample`, evenly by kind of site, in their own order."""
    patcher.recorded.prepare(nodes)
    moving = [node for node in nodes if bool(patcher.recorded.differs(node).any())]
    if len(moving) < 2:
        raise PatchError(f"nodes: the two runs differ at {len(moving)} of these {len(nodes)}; give more to compare")
    draw, groups = torch.Generator().manual_seed(seed), dict[str, list[int]]()
    for i in torch.randperm(len(moving), generator=draw).tolist():
        groups.setdefault(moving[i].site.name, []).append(i)
    turns = zip_longest(*groups.values())  # one of each kind at a time, as long as there are any
    taken = [i for turn in turns for i in turn if i is not None][:sample]
    return [moving[i] for i in sorted(taken)]


def compared(truth: Tensor, scores: dict[str, Tensor], sites: Sequence[str], k: int, seed: int = 0) -> pd.DataFrame:
    """The card's lines from absolute effects and scores [node, pair]."""
    import pandas as pd

    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        f"recall@{k}": lambda t, s: recall(t, s, k),
        "relative cost": relative_cost,
        "rank correlation": rank_correlation,
    }
    names = dict.fromkeys(["all", *sites]) if len(set(sites)) > 1 else {"all": None}
    pairs, rows = truth.shape[1], []
    # Draw 0 is the pairs as they are; every method and measure sees the same draws, so differences can be taken.
    draws = torch.randint(pairs, (DRAWS if pairs > 1 else 0, pairs), generator=torch.Generator().manual_seed(seed))
    draws = torch.cat([torch.arange(pairs)[None], draws])
    for name in names:
        at = [i for i, site in enumerate(sites) if name in ("all", site)]
        first: dict[str, Tensor] = {}
        for method, given in scores.items():
            true, made = (t[at][:, draws].nanmean(-1).T.nan_to_num(0.0) for t in (truth, given))  # [draw, node]
            for measure, of in measures.items():
                found = of(true, made).double()
                gain = found - first.setdefault(measure, found)
                rows.append(
                    {
                        "method": method,
                        "site": name,
                        "measure": measure,
                        **dict(zip(("value", "low", "high"), _interval(found), strict=True)),
                        **dict(zip(("difference", "difference_low", "difference_high"), _interval(gain), strict=True)),
                        "nodes": len(at),
                    }
                )
    return pd.DataFrame(rows)


def _interval(found: Tensor) -> list[float]:
    """The value of the pairs as they are, and the quantiles of the other draws [draw]."""
    if len(found) < 2:
        return [float(found[0]), float("nan"), float("nan")]
    edge = (1 - CONFIDENCE) / 2
    return [float(found[0]), *torch.nanquantile(found[1:], found.new_tensor([edge, 1 - edge])).tolist()]


def recall(truth: Tensor, scores: Tensor, k: int) -> Tensor:
    """Share of the k largest of `truth` [..., node] among the k largest of `scores` [..., node]: [...]."""
    k = min(k, truth.shape[-1])
    best, found = (torch.zeros_like(t).scatter(-1, t.topk(k).indices, 1) for t in (truth, scores))
    return (best * found).sum(-1) / k


def relative_cost(truth: Tensor, scores: Tensor) -> Tensor:
    """exp(sum_r w_r log(c_r / r)), w_r ~ 1 / r: c_r nodes by `scores` hold the top r of `truth` [..., node]: [...]."""
    place = scores.argsort(descending=True, stable=True).argsort().double() + 1  # rank by the estimator
    order = truth.argsort(descending=True, stable=True)
    ranks = torch.arange(1, truth.shape[-1] + 1, dtype=torch.double)
    needed = place.gather(-1, order).cummax(-1).values
    weight = 1 / ranks
    return ((needed / ranks).log() * weight).sum(-1).div(weight.sum()).exp()


def rank_correlation(truth: Tensor, scores: Tensor) -> Tensor:
    """Spearman's rank correlation [...] of two [..., node]; ties share their mean rank, NaN where one is constant."""
    a, b = (_ranks(t) for t in (truth, scores))
    a, b = (t - t.mean(-1, keepdim=True) for t in (a, b))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def _ranks(values: Tensor) -> Tensor:
    """Mean ranks, as those who are equal share them [..., node]."""
    order = values.sort(-1).values.contiguous()
    below, upto = (torch.searchsorted(order, values.contiguous(), right=side) for side in (False, True))
    return (below + upto + 1).double() / 2
