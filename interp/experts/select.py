"""Which experts carry a label: rules, each named after its source.

    skew          mass on the label at least `ratio` times that on every other label        Monet, section 5.1 (ratio 2)
    lift          mass on the label at least `ratio` times the mean over other labels        ours: what damage over mean
                                                                                              spill asks for
    correlation   Pearson r between a document's mean routing weight and its label,         Monet, section 5.3
                  above `threshold`                                                         (.2, .1, .05)
    top           the `count` (or `share` of all) units of largest skew in each router      for models whose experts
                                                                                            never reach a ratio
    most          the `count` units with the largest mass on the label in each router       Monet's OLMoE baseline (1)

All of them read `RoutingStats` only; score what they choose on other text than the statistics came from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interp.experts.sets import ExpertSet
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError


def skew(stats: RoutingStats, label: str) -> Tensor:
    """Mass per token on `label` over the largest on any other label [router, unit]; 0 / 0 counts as 0.

    Units used on this label alone have infinite skew.
    """
    at, p = stats.index(label), stats.probability
    if len(stats.labels) < 2:
        raise ExpertError(f"labels: only {label!r} is there; a contrast needs at least one other label")
    others = torch.cat([p[:at], p[at + 1 :]]).amax(0)
    return torch.where(p[at] > 0, p[at] / others, torch.zeros_like(others))


def lift(stats: RoutingStats, label: str) -> Tensor:
    """Mass per token on `label` over the mean of all other labels [router, unit]; 0 / 0 counts as 0.

    Skew protects the second-highest label, lift the average one. If what a unit does for a label is in proportion to
    its mass there, then among all sets of a given damage the one of largest lift has the smallest mean spill (the
    lemma of Neyman and Pearson).
    """
    at, p = stats.index(label), stats.probability
    if len(stats.labels) < 2:
        raise ExpertError(f"labels: only {label!r} is there; a contrast needs at least one other label")
    others = torch.cat([p[:at], p[at + 1 :]]).mean(0)
    return torch.where(p[at] > 0, p[at] / others, torch.zeros_like(others))


def correlation(stats: RoutingStats, label: str, against: str | None = None) -> Tensor:
    """Pearson r over documents between mean routing weight and being `label` (1) or not (0) [router, unit].

    Args:
        stats: what was measured.
        label: the ones.
        against: the label of the zeros; default all other labels pooled.

    Units whose weight never varies get r = 0.
    """
    at = stats.index(label)
    zeros = [stats.index(against)] if against else [i for i in range(len(stats.labels)) if i != at]
    if not zeros or at in zeros:
        raise ExpertError(f"against={against!r}: a correlation needs documents of another label than {label!r}")
    n1, n0 = float(stats.documents[at]), float(stats.documents[zeros].sum())
    if min(n1, n0) < 2:
        raise ExpertError(f"label {label!r}: {int(n1)} documents against {int(n0)}; a correlation needs two of each")
    sum1, sum0 = stats.doc_sum[at], stats.doc_sum[zeros].sum(0)
    n, total = n1 + n0, sum1 + sum0
    square = stats.doc_square[at] + stats.doc_square[zeros].sum(0)
    # r = cov(m, y) / sd(m) sd(y) with y in {0, 1}
    covariance = sum1 / n - total / n * (n1 / n)
    variance = (square / n - (total / n).square()).clamp_min(0)
    spread = (variance * (n1 / n) * (n0 / n)).sqrt()
    varies = variance > 1e-12 * (total / n).square()
    return torch.where(varies, covariance / spread.clamp_min(1e-300), torch.zeros_like(spread))


def _by_skew(stats: RoutingStats, label: str, ratio: float = 2.0) -> Tensor:
    if ratio <= 1:
        raise ExpertError(f"ratio={ratio}: expected more than 1, or a unit could belong to two labels at once")
    return skew(stats, label) >= ratio


def _by_lift(stats: RoutingStats, label: str, ratio: float = 4.0) -> Tensor:
    if ratio <= 1:
        raise ExpertError(f"ratio={ratio}: expected more than 1, the mean of the other labels")
    return lift(stats, label) >= ratio


def _by_correlation(
    stats: RoutingStats, label: str, threshold: float = 0.1, against: str | None = None
) -> Tensor:  # fmt: skip
    return correlation(stats, label, against) > threshold


def _by_top(stats: RoutingStats, label: str, count: int | None = None, share: float | None = None) -> Tensor:
    return _largest(skew(stats, label), _count(stats, count, share))


def _by_most(stats: RoutingStats, label: str, count: int | None = None, share: float | None = None) -> Tensor:
    return _largest(stats.probability[stats.index(label)], _count(stats, count, share))


def _count(stats: RoutingStats, count: int | None, share: float | None) -> int:
    if (count is None) == (share is None):
        raise ExpertError("give exactly one of count (units per router) and share (part of a router's units)")
    wanted = int(count) if count is not None else max(1, round((share or 0.0) * stats.size))
    if not 1 <= wanted <= stats.size:
        raise ExpertError(f"count={count}, share={share}: expected 1..{stats.size} units per router")
    return wanted


def _largest(score: Tensor, count: int) -> Tensor:
    """True at the `count` largest of each router [router, unit]; units with score 0 are never taken."""
    top = score.topk(count, dim=-1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top, True) & (score > 0)


RULES: dict[str, Callable[..., Tensor]] = {
    "skew": _by_skew,
    "lift": _by_lift,
    "correlation": _by_correlation,
    "top": _by_top,
    "most": _by_most,
}
_LOOSEN = {
    "skew": "a smaller ratio, or compare with fewer labels",
    "lift": "a smaller ratio",
    "correlation": "a smaller threshold, or more documents",
    "top": "a larger count",
    "most": "a larger count",
}


def select(
    stats: RoutingStats, label: str, rule: str = "skew", *, force: bool = False, **settings: Any
) -> ExpertSet:  # fmt: skip
    """The units that carry `label`, by one of the rules of this module.

    Args:
        stats: from `routing`; the labels in it are the ones that `label` is set against (`stats.only` narrows them).
        label: whose units are wanted.
        rule: skew (ratio), lift (ratio), correlation (threshold, against), top (count or share), most (count or share).
        force: allow a set of every unit of a layer.
        **settings: of the rule, as named above.

    Raises ExpertError for an unknown label or rule, and where no unit, or every unit, meets the rule.
    """
    if rule not in RULES:
        raise ExpertError(f"rule={rule!r}: expected one of {', '.join(RULES)}")
    try:
        chosen = RULES[rule](stats, label, **settings)  # [router, unit]
    except TypeError as error:
        raise ExpertError(f"rule={rule!r}: {error}") from error
    if not bool(chosen.any()):
        best = float(skew(stats, label).max()) if rule == "skew" else None
        near = f" (the largest ratio of any unit is {best:.2f})" if best is not None else ""
        raise ExpertError(
            f"no unit of {stats.name} meets rule {rule!r} {settings or ''} for {label!r}{near}; try {_LOOSEN[rule]}"
        )
    full = [layer for layer, router in stats.layers.items() if bool(chosen[router].all())]
    if full and not force:
        raise ExpertError(
            f"rule {rule!r} {settings or ''} takes every unit of layer {full[0]}; nothing would be left. Make it "
            "stricter, or pass force=True"
        )
    ids = {layer: chosen[router].nonzero()[:, 0] for layer, router in stats.layers.items()}
    record = {
        "rule": rule, "settings": settings, "label": label, "labels": stats.labels,
        "tokens": int(stats.tokens[stats.index(label)]),
    }  # fmt: skip
    return ExpertSet._of(stats, ids, record)


def select_or_none(stats: RoutingStats, label: str, rule: str, settings: dict[str, Any]) -> ExpertSet:
    """`select`, but an empty set where no unit meets the rule: in a sweep that is a result, not a mistake."""
    if rule in RULES and not bool(RULES[rule](stats, label, **settings).any()):
        return ExpertSet._of(stats, {}, {"rule": rule, "settings": settings, "label": label})
    return select(stats, label, rule, **settings)
