"""Steering by experts: switch them off or on, or have the router choose them.

    steermoe      lift or ban experts by how much more often one kind of text uses them
    mote          the few experts with the largest difference of summed weight: off, or forced on
    without       any `interp.experts` set as a map with a strength: 1 is off, .5 half, -1 twice as strong

The last works on Monet's pairs, on routed experts and on neurons alike: ``without(m, experts.select(stats, "law"))``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from interp import experts
from interp.experts.units import units_of
from steering.errors import SteeringError
from steering.nonlinear import Foreign, Route
from steering.vector import Part, SteeringMap


def steermoe(
    m: Any, positive_texts: Any, negative_texts: Any, *, lift: int = 10, ban: int = 10, margin: float = 0.01,
    scope: Any = "all",
) -> SteeringMap:  # fmt: skip
    """Router steering by the difference of activation rates (SteerMoE).

    Delta = p(expert chosen | positive) - p(expert chosen | negative), over all tokens. The `lift` experts of largest
    Delta over all layers get the maximum of their token's router scores + margin, the `ban` of smallest its minimum -
    margin, before the top-k are chosen. Source: Fayyaz et al. 2025 (arXiv:2509.09660), sec. 3.

    Args:
        m: a model with routed experts.
        positive_texts: texts with the behaviour.
        negative_texts: texts without it (the paper: the same prompts, answered the other way).
        lift: how many experts to lift.
        ban: how many to ban.
        margin: in logits.
        scope: to which tokens it is applied.
    """
    stats = _stats(m, positive_texts, negative_texts)
    rate = stats.used / stats.tokens[:, None, None]
    difference = rate[0] - rate[1]  # [router, expert]
    up, down = _first(difference, lift), _first(-difference, ban)
    made = _route(m, stats, up, down, margin, scope, "steermoe")
    ids = {"lifted": _listed(stats, up), "banned": _listed(stats, down)}
    return _recorded(made, {**ids, "margin": margin, "tokens": stats.tokens.tolist()})


def mote(
    m: Any, positive_texts: Any, negative_texts: Any, *, count: int = 10, mode: Literal["off", "force"] = "off",
    margin: float = 0.01, scope: Any = "all",
) -> SteeringMap:  # fmt: skip
    """Mixture of Tunable Experts: the experts that a behaviour's texts use most beyond others, off or forced on.

    The `count` experts are ranked by the mean over texts of the weight summed over tokens, positive less negative
    (fTRI); "off" takes their output away without renormalising, "force" makes the router choose them. Source: Dahlke
    et al. 2025 (arXiv:2502.11096).
    """
    if mode not in ("off", "force"):
        raise SteeringError(f"mode={mode!r}: expected 'off' or 'force'")
    stats = _stats(m, positive_texts, negative_texts)
    summed = stats.mass / stats.documents[:, None, None]
    difference = summed[0] - summed[1]
    chosen = _first(difference, count)
    record = {"experts": _listed(stats, chosen), "mode": mode, "documents": stats.documents.tolist()}
    if mode == "force":
        none = torch.zeros_like(chosen)
        return _recorded(_route(m, stats, chosen, none, margin, scope, "mote"), record)
    ids = {
        layer: chosen[router].nonzero()[:, 0] for layer, router in stats.layers.items() if bool(chosen[router].any())
    }
    return _recorded(without(m, experts.ExpertSet(m, ids, stats.kind), scope=scope), record, "mote")


def without(m: Any, chosen: experts.ExpertSet, *, scope: Any = "all") -> SteeringMap:
    """A set of experts (or neurons) as a map: ``h - strength * their contribution``. Save the set, not this."""
    if not len(chosen):
        raise SteeringError("chosen: the set is empty, so there is nothing to steer with")
    edits = experts.ablate(chosen, scope=scope).as_edits(m)
    parts = tuple(Part(e.site, Foreign(e.map), e.scope, e.gate) for e in edits)
    record = {"experts": {str(k): v.tolist() for k, v in chosen.ids.items()}, "chosen by": chosen.record}
    return SteeringMap(parts, m.fingerprint, m.name, "without", record)


def _stats(m: Any, positive: Any, negative: Any) -> experts.RoutingStats:
    if units_of(m).kind != "routed":
        raise SteeringError(
            f"{m.name} has no router that chooses experts; use steering.without with a set of its units"
        )
    for name, given in (("positive_texts", positive), ("negative_texts", negative)):
        if isinstance(given, str) or not len(given):
            raise SteeringError(f"{name}: expected a list of at least one text, got {given!r:.60}")
    return experts.routing(m, {"positive": list(positive), "negative": list(negative)})


def _first(difference: Tensor, count: int) -> Tensor:
    """True at the `count` largest positive entries of [router, expert]."""
    if not 0 <= count <= difference.numel():
        raise SteeringError(f"count={count}: expected 0..{difference.numel()} experts")
    top = difference.flatten().topk(count).indices
    taken = torch.zeros(difference.numel(), dtype=torch.bool).index_fill_(0, top, True)
    return taken.view_as(difference) & (difference > 0)


def _route(m: Any, stats: Any, up: Tensor, down: Tensor, margin: float, scope: Any, method: str) -> SteeringMap:
    maps = {}
    for layer, router in stats.layers.items():
        lifted, banned = up[router].nonzero()[:, 0], down[router].nonzero()[:, 0]
        if len(lifted) > m.top_k:
            raise SteeringError(
                f"layer {layer}: {len(lifted)} experts would be lifted, and {m.top_k} are chosen; lift fewer"
            )
        if stats.size - len(banned) < m.top_k:
            raise SteeringError(
                f"layer {layer}: banning {len(banned)} leaves fewer than the {m.top_k} chosen; ban fewer"
            )
        if len(lifted) or len(banned):
            maps[f"router_logits[{layer}]"] = Route(lifted, banned, margin)
    return SteeringMap.of(m, maps, method=method, scope=scope)


def _listed(stats: Any, chosen: Tensor) -> dict[str, list[int]]:
    rows = {str(layer): chosen[router].nonzero()[:, 0].tolist() for layer, router in stats.layers.items()}
    return {layer: ids for layer, ids in rows.items() if ids}


def _recorded(made: SteeringMap, record: dict[str, Any], method: str | None = None) -> SteeringMap:
    return SteeringMap(made.parts, made.fingerprint, made.model, method or made.method, record)
