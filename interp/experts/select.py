"""Which experts carry a label: rules, each a score (`interp.experts.scores`) and a way to cut it.

    rule          takes the units with                                           source
    skew          score >= `ratio`                                               Monet, section 5.1 (ratio 2)
    lift          score >= `ratio`                                               ours
    contribution  score >= `ratio`                                               skew, weighted by output norm
    correlation   r > `threshold`, and with `fdr` significant                    Monet, section 5.3 (.2, .1, .05)
    auroc         area > `threshold`, significant at `fdr`                       Mann-Whitney, Benjamini-Hochberg
    precision     the largest average precision                                  relation-specific neurons
    rate          the largest difference of selection rates                      SteerMoE
    ftri          the largest, `total` = 10 of the whole model                   MoTE
    esft_gate     the fewest of each router that hold a share `p` of the score   ESFT (p = .1)
    esft_token    the same                                                       ESFT (p = .2)
    reap          the largest saliency                                           REAP
    top           the largest skew                                               where no unit reaches a ratio
    most          the largest mass on the label                                  Monet's OLMoE baseline (count 1)

"The largest" are `count` units of each router, a `share` of each, or `total` units of the whole model, and never a unit
with score 0 or less. What `experts.attribute` or `experts.sweep` measured can be cut in the same way
(`rule="attribution"`).

Score what they choose on other text than the statistics came from; the set's record says which that was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.experts import scores
from interp.experts.scores import correlation, lift, skew
from interp.experts.sets import ExpertSet
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RULES", "correlation", "lift", "select", "select_or_none", "skew"]

#: Below this many tokens of a label its statistics say nothing.
FEWEST = 20


def largest(
    score: Tensor, *, count: int | None = None, share: float | None = None, total: int | None = None
) -> Tensor:  # fmt: skip
    """True at the largest scores [router, unit]; units with a score of 0 or less are never taken.

    Args:
        score: [router, unit].
        count: units of each router.
        share: of a router's units, 0..1.
        total: units of the whole model.

    Raises ExpertError unless exactly one of the three is given, and where it is out of range.
    """
    size = score.shape[-1]
    if sum(x is not None for x in (count, share, total)) != 1:
        raise ExpertError(
            "give exactly one of count (units per router), share (part of a router's units) and total (units of the "
            "whole model)"
        )
    if total is not None:
        if not 1 <= total <= score.numel():
            raise ExpertError(f"total={total}: expected 1..{score.numel()} units of the model")
        flat = score.flatten()
        chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, flat.topk(int(total)).indices, True)
        return chosen.view_as(score) & (score > 0)
    wanted = int(count) if count is not None else max(1, round((share or 0.0) * size))
    if not 1 <= wanted <= size:
        raise ExpertError(f"count={count}, share={share}: expected 1..{size} units per router")
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(wanted).indices, True) & (score > 0)


def smallest_holding(score: Tensor, p: float) -> Tensor:
    """True at the fewest units of each router that together hold a share `p` of its score (ESFT, eq. 8)."""
    if not 0 < p <= 1:
        raise ExpertError(f"p={p}: expected a share, above 0 and at most 1")
    ranked = score.sort(-1, descending=True)
    before = ranked.values.cumsum(-1) - ranked.values
    need = (before < p * score.sum(-1, keepdim=True)) & (ranked.values > 0)
    return torch.zeros_like(need).scatter_(-1, ranked.indices, need)


def significant(p: Tensor, fdr: float) -> Tensor:
    """True where a discovery stands at false-discovery rate `fdr` over all units of the model (Benjamini-Hochberg)."""
    from scipy.stats import false_discovery_control

    if not 0 < fdr < 1:
        raise ExpertError(f"fdr={fdr}: expected a rate between 0 and 1")
    return torch.from_numpy(false_discovery_control(p.flatten().numpy())).view_as(p) <= fdr


def _at_least(ratio: float, score: Callable[[RoutingStats, str], Tensor]) -> Callable[..., Tensor]:
    default = ratio

    def rule(stats: RoutingStats, label: str, ratio: float = default) -> Tensor:
        if ratio <= 1:
            raise ExpertError(f"ratio={ratio}: expected more than 1, or a unit could belong to several labels at once")
        return score(stats, label) >= ratio

    return rule


def _largest(
    score: Callable[..., Tensor], total: int | None = None, contrast: bool = False
) -> Callable[..., Tensor]:  # fmt: skip
    default = total

    def plain(
        stats: RoutingStats, label: str, count: int | None = None, share: float | None = None, total: int | None = None
    ) -> Tensor:  # fmt: skip
        total = default if count is None and share is None and total is None else total
        return largest(score(stats, label), count=count, share=share, total=total)

    def contrasting(
        stats: RoutingStats, label: str, against: str | None = None, count: int | None = None,
        share: float | None = None, total: int | None = None,
    ) -> Tensor:  # fmt: skip
        total = default if count is None and share is None and total is None else total
        return largest(score(stats, label, against), count=count, share=share, total=total)

    return contrasting if contrast else plain


def _by_correlation(
    stats: RoutingStats, label: str, threshold: float = 0.1, against: str | None = None, fdr: float | None = None
) -> Tensor:  # fmt: skip
    above = correlation(stats, label, against) > threshold
    return above if fdr is None else above & significant(scores.correlation_p(stats, label, against), fdr)


def _by_auroc(
    stats: RoutingStats, label: str, threshold: float = 0.5, against: str | None = None, fdr: float = 0.05
) -> Tensor:  # fmt: skip
    area, p = scores.auroc(stats, label, against)
    return (area > threshold) & significant(p, fdr)


def _mass(stats: RoutingStats, label: str) -> Tensor:
    return stats.probability[stats.index(label)]


RULES: dict[str, Callable[..., Tensor]] = {
    "skew": _at_least(2.0, skew),
    "lift": _at_least(4.0, lift),
    "correlation": _by_correlation,
    "contribution": _at_least(2.0, scores.contribution),
    "auroc": _by_auroc,
    "precision": _largest(scores.precision, contrast=True),
    "rate": _largest(scores.rate, contrast=True),
    "ftri": _largest(scores.ftri, total=10, contrast=True),
    "esft_gate": lambda stats, label, p=0.1: smallest_holding(scores.esft_gate(stats, label), p),
    "esft_token": lambda stats, label, p=0.2: smallest_holding(scores.esft_token(stats, label), p),
    "reap": _largest(scores.reap),
    "top": _largest(skew),
    "most": _largest(_mass),
}
_LOOSEN = {
    "skew": "a smaller ratio, or compare with fewer labels",
    "lift": "a smaller ratio",
    "contribution": "a smaller ratio",
    "correlation": "a smaller threshold, or more documents",
    "auroc": "a smaller threshold, a larger fdr, or more documents",
}


def select(
    stats: RoutingStats | pd.DataFrame, label: str, rule: str = "skew", *, force: bool = False, **settings: Any
) -> ExpertSet:  # fmt: skip
    """The units that carry `label`, by one of the rules of this module.

    Args:
        stats: from `routing`; the labels in it are the ones that `label` is set against (`stats.only` narrows them).
            Or, for rule "attribution", a Table of `attribute` or `sweep`.
        label: whose units are wanted.
        rule: one of the table above.
        force: allow a set of every unit of a layer, and a label of a handful of tokens.
        **settings: of the rule: ratio, threshold, fdr, against (one label in place of all others), p, or one of count,
            share and total.

    Raises ExpertError for an unknown label or rule, a label too small to select on, and where no unit, or every unit,
    meets the rule.
    """
    if not isinstance(stats, RoutingStats):
        return _by_attribution(stats, label, rule, settings)
    chosen = _apply(stats, label, rule, settings, force)
    if not bool(chosen.any()):
        best = float(skew(stats, label).max()) if rule == "skew" else None
        near = f" (the largest ratio of any unit is {best:.2f})" if best is not None else ""
        raise ExpertError(
            f"no unit of {stats.name} meets rule {rule!r} {settings or ''} for {label!r}{near}; try "
            f"{_LOOSEN.get(rule, 'a larger count')}"
        )
    return _set(stats, chosen, label, rule, settings, force)


def select_or_none(stats: RoutingStats, label: str, rule: str, settings: dict[str, Any]) -> ExpertSet:
    """`select`, but an empty set where no unit meets the rule: in a sweep that is a result, not a mistake."""
    return _set(stats, _apply(stats, label, rule, settings, False), label, rule, settings, False)


def _apply(stats: RoutingStats, label: str, rule: str, settings: dict[str, Any], force: bool) -> Tensor:
    """True at the units that meet the rule [router, unit]."""
    if rule not in RULES:
        raise ExpertError(f"rule={rule!r}: expected one of {', '.join(RULES)}, or attribution for a Table of attribute")
    tokens = int(stats.tokens[stats.index(label)])
    if tokens < FEWEST and not force:
        raise ExpertError(
            f"label {label!r}: {tokens} tokens are too few to select on (expected {FEWEST} or more, better thousands); "
            "give more text, or pass force=True"
        )
    try:
        return RULES[rule](stats, label, **settings)
    except TypeError as error:
        raise ExpertError(f"rule={rule!r}: {error}") from error


def _set(
    stats: RoutingStats, chosen: Tensor, label: str, rule: str, settings: dict[str, Any], force: bool
) -> ExpertSet:  # fmt: skip
    full = [layer for layer, router in stats.layers.items() if bool(chosen[router].all())]
    if full and not force:
        raise ExpertError(
            f"rule {rule!r} {settings or ''} takes every unit of layer {full[0]}; nothing would be left. Make it "
            "stricter, or pass force=True"
        )
    ids = {layer: chosen[router].nonzero()[:, 0] for layer, router in stats.layers.items()}
    at = stats.index(label)
    record = {
        "rule": rule, "settings": settings, "label": label, "labels": stats.labels, "tokens": int(stats.tokens[at]),
        "documents": int(stats.documents[at]), "data": stats.data,
    }  # fmt: skip
    return ExpertSet._of(stats, ids, record)


def _by_attribution(table: pd.DataFrame, label: str, rule: str, settings: dict[str, Any]) -> ExpertSet:
    """Units whose removal hurts `label` most, beyond what it does to the others on average.

    Settings: count, share or total, and beyond=False to look at the label alone.
    """
    from types import SimpleNamespace

    if rule != "attribution":
        raise ExpertError(f"rule={rule!r}: a Table of attribute or sweep is cut by rule='attribution'")
    about = table.attrs
    if label not in set(table["label"]):
        raise ExpertError(f"label {label!r}: the table has {', '.join(map(str, table['label'].unique()))}")
    wide = table.pivot(index=["layer", "expert"], columns="label", values="value")
    beyond = bool(settings.get("beyond", True)) and wide.shape[1] > 1
    score = wide[label] - (wide.drop(columns=label).mean(axis=1) if beyond else 0.0)
    layers = sorted(score.index.get_level_values("layer").unique())
    values = torch.stack([torch.from_numpy(score.loc[layer].sort_index().to_numpy(float).copy()) for layer in layers])
    try:
        chosen = largest(values, **{k: v for k, v in settings.items() if k != "beyond"})
    except TypeError as error:
        raise ExpertError(f"rule={rule!r}: {error}") from error
    if not bool(chosen.any()):
        raise ExpertError(f"no unit's removal hurts {label!r} more than the other labels; try beyond=False")
    ids = {int(layer): chosen[i].nonzero()[:, 0] for i, layer in enumerate(layers)}
    keys = ("labels", "tokens", "data", "metric", "mode", "method")
    record = {"rule": rule, "settings": settings, "label": label, **{k: about[k] for k in keys if k in about}}
    like = SimpleNamespace(**{k: about[k] for k in ("kind", "size", "fingerprint", "n_layers")}, name=about["model"])
    return ExpertSet._of(like, ids, record)
