"""Where a layer's router, routed experts and shared experts are.

The experts module is the one that called our experts function during the probe. Its router is the module beside it
whose weight has one row per expert. A shared expert is known by its name; there is no other mark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from interp.hooks.anatomy import Anatomy, Place

if TYPE_CHECKING:
    from interp.hooks.parts import Layer

ROUTED = ("router_logits", "expert_ids", "expert_weight", "expert_hidden", "expert_out")


def read_experts(anatomy: Anatomy, layer: Layer, experts: list[nn.Module], routed: dict[int, dict[str, int]]) -> None:
    """Enters the expert sites of one layer, or why it has none."""
    from interp.hooks import undecorated

    i = layer.index
    called = [m for m in experts if id(m) in routed]
    adapter = undecorated.find(layer.module) if not called else None
    if adapter is not None:
        undecorated.read(anatomy, i, layer.module, adapter)
        _shared(anatomy, layer, adapter)
        return
    if len(called) != 1:
        why = undecorated.refusal(layer.module) or (
            f"layer {i} is dense: it has no experts"
            if not experts and not undecorated.looks_routed(layer.module)
            else f"layer {i} computes experts in {type(experts[0]).__name__ if experts else 'its own way'}, outside "
            "transformers' experts interface"
            if not called
            else f"layer {i} has {len(called)} sets of experts"
        )
        for name in (*ROUTED, "shared_out", "shared_weight"):
            anatomy.put(name, i, None, why)
        return
    module = called[0]
    size = routed[id(module)]
    for name in ROUTED[1:]:
        width = {"neuron": size["neuron"]} if name == "expert_hidden" else {}
        anatomy.put(name, i, Place("experts", module), "", expert=size["expert"], slot=size["slot"], **width)
    router = find_router(layer, module, size["expert"])
    anatomy.put(
        "router_logits",
        i,
        router,
        f"the router of layer {i} was not found beside its experts",
        expert=_rows(router.module) if router else 0,
    )
    _shared(anatomy, layer, module)


def _rows(module: nn.Module) -> int:
    """Rows of a module's weight: how many things a router scores."""
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else 0


def find_router(layer: Layer, experts: nn.Module, n_experts: int) -> Place | None:
    """The module with one weight row per expert: a plain linear is read at its output, others while they run."""
    from interp.hooks.parts import SHARED

    parents = [m for m in layer.module.modules() if any(child is experts for child in m.children())]
    for home in (*parents, layer.module):
        names = {id(m): name for name, m in home.named_modules()}
        inside = {id(m) for m in experts.modules()}
        for call in layer.calls:
            module, weight = call.module, getattr(call.module, "weight", None)
            name = names.get(id(module))
            if name is None or id(module) in inside or any(SHARED.match(part) for part in name.split(".")):
                continue
            if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == n_experts:
                return _place(module, home)
    return _wider_router(layer, experts, n_experts)


def _place(router: nn.Module, block: nn.Module) -> Place:
    """A plain linear is read at its output, and chosen by in the block around it; other routers do both themselves."""
    plain = type(router).forward is nn.Linear.forward
    return Place("output", router, other=block) if plain else Place("router", router)


def _wider_router(layer: Layer, experts: nn.Module, n_experts: int) -> Place | None:
    """A router that also scores a skip or a shared expert (ZAYA, Inkling): the last linear of the module named so."""
    for name, module in layer.module.named_modules():
        if name.rpartition(".")[2] in ("router", "gate") and module is not experts:
            linears = [
                c.module
                for c in (*layer.inside(module), *(c for c in layer.calls if c.module is module))
                if getattr(getattr(c.module, "weight", None), "ndim", 0) == 2
            ]
            rows = _rows(linears[-1]) if linears else 0
            if n_experts < rows <= 2 * n_experts:
                return _place(linears[-1], layer.module)
    return None


def _shared(anatomy: Anatomy, layer: Layer, experts: nn.Module) -> None:
    from interp.hooks.parts import SHARED

    i = layer.index
    found = [(name, m) for name, m in layer.module.named_modules() if SHARED.match(name.rpartition(".")[2])]
    found = [(name, m) for name, m in found if id(m) in layer.by_module]
    anatomy.put(
        "shared_out",
        i,
        Place("output", found[0][1]) if len(found) == 1 else None,
        f"layer {i} has no shared expert" if not found else f"layer {i} has {len(found)} shared experts",
    )
    gates = [
        m
        for name, m in layer.module.named_modules()
        if name.endswith("shared_expert_gate") and id(m) in layer.by_module
    ]
    anatomy.put(
        "shared_weight", i, Place("sigmoid", gates[0]) if gates else None, f"layer {i} has no gate on a shared expert"
    )
