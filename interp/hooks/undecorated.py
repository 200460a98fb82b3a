"""MoE families whose experts do not go through transformers' interface: small adapters, or a clear refusal.

Setting an experts implementation on them changes nothing and says nothing, so they are never counted as open unless one
of these adapters knows them:

    DBRX, LongCat-Flash, Step 3.7   an experts module called with (hidden, chosen, weights): the choice and weights are
                                    tapped on the way in; if insides are wanted, its result is computed again from parts
    JetMoE                          two grouped linears inside the block, rows sorted by expert: tapped there, in place

Llama 4 multiplies an expert's *input* by its weight, so "weight x output" does not exist there; it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from interp.hooks.anatomy import Anatomy, Place
from interp.hooks.experts import by_choice
from interp.hooks.tap import Tap


@dataclass(frozen=True)
class Adapter:
    """One family's experts: how many, how wide, and what each computes."""

    experts: Callable[[Any], int]
    width: Callable[[Any], int]
    up: Callable[[Any, int, Tensor], Tensor]
    down: Callable[[Any, int, Tensor], Tensor]
    weights: Callable[[Any, int], list[Tensor]]


def _dbrx(module: Any, name: str, expert: int) -> Tensor:
    return getattr(module.mlp, name).view(-1, module.ffn_hidden_size, module.hidden_size)[expert]


def _swiglu(module: Any, expert: int, x: Tensor) -> Tensor:
    gate, up = linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
    limit = getattr(module, "swiglu_limit", None) or getattr(module, "limit", None)
    gate = module.act_fn(gate)
    if limit is not None:  # Step 3.7 clamps both factors on some layers
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return gate * up


_CALLED = {
    "DbrxExperts": Adapter(
        lambda m: m.num_experts,
        lambda m: m.ffn_hidden_size,
        lambda m, e, x: m.mlp.activation_fn(x @ _dbrx(m, "w1", e).T) * (x @ _dbrx(m, "v1", e).T),
        lambda m, e, h: h @ _dbrx(m, "w2", e),
        lambda m, e: [_dbrx(m, "w2", e)],
    ),
    "LongcatFlashExperts": Adapter(
        lambda m: m.total_experts,
        lambda m: m.intermediate_size,
        _swiglu,
        lambda m, e, h: linear(h, m.down_proj[e]),
        lambda m, e: [m.down_proj[e]],
    ),
    "Step3p7Experts": Adapter(
        lambda m: m.num_experts,
        lambda m: m.down_proj.shape[2],
        _swiglu,
        lambda m, e, h: linear(h, m.down_proj[e]),
        lambda m, e: [m.down_proj[e]],
    ),
}
_JETMOE = "JetMoeMoE"
#: MoE blocks that cannot be shown as weight x output, and why.
REFUSED = {
    "Llama4TextMoe": "Llama 4 multiplies an expert's input by its weight, so no weight x output exists; edit the "
    "mlp_out or shared_out instead",
}


def find(layer: nn.Module) -> nn.Module | None:
    """The experts module of this layer that an adapter knows."""
    return next((m for m in layer.modules() if type(m).__name__ in _CALLED or type(m).__name__ == _JETMOE), None)


def refusal(layer: nn.Module) -> str:
    """Why the experts of this layer cannot be shown, where that is known."""
    return next((REFUSED[type(m).__name__] for m in layer.modules() if type(m).__name__ in REFUSED), "")


def looks_routed(layer: nn.Module) -> bool:
    """True where a router sits in a layer whose experts nobody knows."""
    return any("router" in name.split(".") for name, _ in layer.named_modules())


def read(anatomy: Anatomy, index: int, layer: nn.Module, module: Any) -> None:
    """Enters the expert sites of one layer with an adapter."""
    if type(module).__name__ == _JETMOE:
        n, width, router, slots = (
            module.output_linear.num_experts,
            module.hidden_size,
            module.router.layer,
            module.router.top_k,
        )
        block: nn.Module = module
    else:
        adapter = _CALLED[type(module).__name__]
        n, width = adapter.experts(module), adapter.width(module)
        block = next(m for m in layer.modules() if any(child is module for child in m.children()))
        gate: Any = getattr(block, "router", None) or block.gate
        slots = getattr(block, "top_k", None) or gate.top_k
        router = getattr(gate, "layer", gate)
    plain = type(router).forward is nn.Linear.forward
    scored = Place("output", router, other=block) if plain else Place("router", router)
    anatomy.put("router_logits", index, scored, expert=n)
    reading = Place("undecorated", module)
    for name in ("expert_ids", "expert_weight", "expert_hidden", "expert_out"):
        anatomy.put(
            name, index, reading, expert=n, slot=slots, **({"neuron": width} if name == "expert_hidden" else {})
        )


def place_taps(module: nn.Module, taps: dict[str, Tap]) -> list[Any]:
    """Hooks for the taps of one experts module."""
    return _jetmoe_taps(module, taps) if type(module).__name__ == _JETMOE else _called_taps(module, taps)


def _called_taps(module: Any, taps: dict[str, Tap]) -> list[Any]:
    clock = next(iter(taps.values())).clock
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(mod: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, ids, weights = args[:3]
        chosen = ids.unflatten(0, clock.shape) if ids.dim() == 2 else ids
        if "expert_ids" in taps:
            chosen = taps["expert_ids"](chosen)
        scales = weights.reshape(chosen.shape)
        if "expert_weight" in taps:
            scales = by_choice(taps["expert_weight"], scales, chosen)
        inputs[:] = [(hidden, chosen, scales)]
        return (hidden, chosen.reshape(ids.shape), scales.reshape(weights.shape), *args[3:])

    def after(mod: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        hidden, chosen, scales = inputs.pop()
        if not taps.keys() & {"expert_hidden", "expert_out"}:
            return None
        return _recompute(mod, hidden, chosen, scales, taps).reshape(output.shape).to(output.dtype)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _recompute(module: Any, hidden: Tensor, chosen: Tensor, scales: Tensor, taps: dict[str, Tap]) -> Tensor:
    """The routed sum [batch, pos, d_model], with taps on neurons and outputs."""
    adapter = _CALLED[type(module).__name__]
    rows = hidden.reshape(-1, hidden.shape[-1]).repeat_interleave(chosen.shape[-1], 0)
    flat, width = chosen.flatten(), adapter.width(module)
    real = [e for e in flat.unique().tolist() if e < computing(module)]
    where = {e: (flat == e).nonzero()[:, 0] for e in real}
    neurons = rows.new_zeros(len(rows), width)
    for e in real:
        neurons = neurons.index_copy(0, where[e], adapter.up(module, e, rows[where[e]]))
    neurons = neurons.unflatten(0, chosen.shape)
    if "expert_hidden" in taps:
        neurons = by_choice(taps["expert_hidden"], neurons, chosen)
    out = rows  # experts past the last real one are LongCat's identities
    for e in real:
        out = out.index_copy(0, where[e], adapter.down(module, e, neurons.flatten(0, 2)[where[e]]))
    out = out.unflatten(0, chosen.shape)
    if "expert_out" in taps:
        out = by_choice(taps["expert_out"], out, chosen)
    return (out * scales[..., None]).sum(-2)


def computing(module: Any) -> int:
    """How many experts compute something; LongCat's last ones hand their input through."""
    if type(module).__name__ == _JETMOE:
        return int(module.output_linear.num_experts)
    if type(module).__name__ in _CALLED:
        return int(getattr(module, "num_routed_experts", 0)) or _CALLED[type(module).__name__].experts(module)
    return int(module.down_proj.shape[0])


def _jetmoe_taps(module: Any, taps: dict[str, Tap]) -> list[Any]:
    """JetMoE sorts its rows by expert; the router's output tells the order, so rows can be shown per (token, slot)."""
    clock = next(iter(taps.values())).clock
    now: dict[str, Tensor] = {}

    def shown(rows: Tensor) -> Tensor:
        return rows[now["back"]].unflatten(0, (*clock.shape, -1))

    def routed(mod: nn.Module, args: Any, output: Any) -> Any:
        order, batch_index, gates, sizes, logits = output
        now["order"], now["back"] = order, order.argsort()
        owners = torch.arange(len(sizes), device=order.device).repeat_interleave(
            torch.tensor(sizes, device=order.device)
        )
        chosen, weights = shown(owners), shown(gates)
        if "expert_ids" in taps and (given := taps["expert_ids"](chosen)) is not chosen:
            chosen, order = given, given.flatten().argsort(stable=True)  # other experts: the rows are sorted anew
            now["order"], now["back"] = order, order.argsort()
            batch_index = order // chosen.shape[-1]
            sizes = torch.bincount(chosen.flatten(), minlength=len(sizes)).tolist()
        now["chosen"] = chosen
        if "expert_weight" in taps:
            weights = by_choice(taps["expert_weight"], weights, chosen)
        return order, batch_index, weights.flatten()[order], sizes, logits

    def neurons(mod: nn.Module, args: tuple[Any, ...]) -> Any:
        given = by_choice(taps["expert_hidden"], shown(args[0]), now["chosen"])
        return (given.flatten(0, 2)[now["order"]], *args[1:])

    def outputs(mod: nn.Module, args: Any, output: Tensor) -> Tensor:
        return by_choice(taps["expert_out"], shown(output), now["chosen"]).flatten(0, 2)[now["order"]]

    handles = [module.router.register_forward_hook(routed)]
    if "expert_hidden" in taps:
        handles.append(module.output_linear.register_forward_pre_hook(neurons))
    if "expert_out" in taps:
        handles.append(module.output_linear.register_forward_hook(outputs))
    return handles


def down(module: Any, expert: int, hidden: Tensor) -> Tensor:
    """Output of one expert from its neurons: [row, d_expert] -> [row, d_model]."""
    if type(module).__name__ == _JETMOE:
        return linear(hidden, module.output_linear.weight[expert])
    if expert >= computing(module):
        raise ValueError(
            f"expert {expert} of {type(module).__name__} is an identity: it has no neurons, its output is its input"
        )
    return _CALLED[type(module).__name__].down(module, expert, hidden)


def output_weights(module: Any, expert: int) -> list[Tensor]:
    """The weights that make an expert's output: zero them and it gives nothing."""
    name = type(module).__name__
    if name == _JETMOE:
        return [module.output_linear.weight[expert]]
    if name in _CALLED:
        return _CALLED[name].weights(module, expert)
    bias = getattr(module, "down_proj_bias", None)
    return [module.down_proj[expert], *([bias[expert]] if isinstance(bias, Tensor) else [])]
