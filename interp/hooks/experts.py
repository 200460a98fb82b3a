"""The third door: transformers' ALL_EXPERTS_FUNCTIONS.

Fused experts are one module with 3-D weights, called with (hidden [token, d_model], chosen experts [token, slot], their
weights [token, slot]). The choice and the weights are tapped where it is called; that costs next to nothing. What goes
on inside no hook can see: there is no submodule. What there is, for every family that uses the interface, is a function
with these arguments that can be put in another's place. Ours computes the experts one by one::

    hidden_s = act(gate_e x) * (up_e x)        neurons of the expert in slot s         expert_hidden
    out_s    = down_e hidden_s                 its output                              expert_out
    y        = sum_s weight_s * out_s          what the MoE block goes on with
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp.hooks.attention import PREFIX, configs_of
from interp.hooks.lending import lent, original
from interp.hooks.tap import Tap

NAME = PREFIX + "experts"
ATTRIBUTE = "_experts_implementation_internal"
_live: dict[int, dict[str, Tap]] = {}
_observers: dict[int, dict[int, dict[str, int]]] = {}


def delegate(module: nn.Module) -> Callable[..., Tensor]:
    """The implementation that would have run: the registered one, or the family's own loop ("eager")."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = original(module.config, ATTRIBUTE) or "eager"
    if name in ALL_EXPERTS_FUNCTIONS:
        return ALL_EXPERTS_FUNCTIONS[name]
    return inspect.unwrap(type(module).forward)


def _mix(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands where an experts implementation stands."""
    if id(module) in _observers:
        _observers[id(module)][id(module)] = sizes(module) | {"slot": ids.shape[-1]}
    taps = _live.get(id(module))
    if taps is None:
        return delegate(module)(module, hidden, ids, weights, *args, **kwargs)
    frame = _frame(module, taps, ids)
    return by_expert(module, hidden, ids, weights, taps, frame).to(hidden.dtype)


def _frame(module: nn.Module, taps: dict[str, Tap], ids: Tensor) -> tuple[int, int]:
    """(batch, pos), which the rows of tokens are unfolded to."""
    batch, width = next(iter(taps.values())).clock.shape
    if len(ids) != batch * width:
        raise ValueError(
            f"{type(module).__name__} was given {len(ids)} rows for {batch} x {width} tokens; "
            "interp needs one row per token"
        )
    return batch, width


def choice_hook(taps: dict[str, Tap]) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    """A forward pre-hook for an experts module, that taps the choice and the weights it is called with."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden, ids, weights = args[:3]
        frame = _frame(module, taps, ids)
        seen = chosen = ids.unflatten(0, frame)
        if "expert_ids" in taps:
            chosen = taps["expert_ids"](seen)
        rows = given = weights.unflatten(0, frame)
        if "expert_weight" in taps:
            given = by_choice(taps["expert_weight"], rows, chosen)
        if chosen is seen and given is rows and not given.requires_grad:
            return None
        return (hidden, chosen.flatten(0, 1), given.flatten(0, 1), *args[3:])

    return hook


def by_choice(tap: Tap, h: Tensor, chosen: Tensor) -> Tensor:
    """A tap on routed rows [batch, pos, slot, ...]; an edit finds the `chosen` experts in ``where.inputs``."""
    tap.inputs = (chosen,)
    try:
        return tap(h, chosen)
    finally:
        tap.inputs = ()


def by_expert(
    module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor, taps: dict[str, Tap], frame: tuple[int, int]
) -> Tensor:
    """The routed sum [token, d_model], with taps on neurons and outputs of each (token, slot)."""
    slots = ids.shape[-1]
    flat = ids.flatten()
    order = flat.argsort(stable=True)  # rows of one expert lie together
    back = order.argsort()
    counts = torch.bincount(flat, minlength=sizes(module)["expert"]).tolist()
    chosen = ids.unflatten(0, frame)

    def through(name: str, rows: Tensor) -> Tensor:
        if name not in taps:
            return rows
        seen = rows[back].unflatten(0, (*frame, slots))
        given = by_choice(taps[name], seen, chosen)
        return rows if given is seen and not given.requires_grad else given.flatten(0, 2)[order]

    neurons = through(
        "expert_hidden",
        torch.cat([up(module, e, rows) for e, rows in enumerate(hidden[order // slots].split(counts)) if len(rows)]),
    )
    out = through(
        "expert_out", torch.cat([down(module, e, rows) for e, rows in enumerate(neurons.split(counts)) if len(rows)])
    )
    return (out[back].unflatten(0, (-1, slots)) * weights[..., None]).sum(1)


def up(module: Any, expert: int, rows: Tensor) -> Tensor:
    """Neurons of one expert: [row, d_model] -> [row, d_expert]."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    projected = _linear(module, name, expert, rows)
    return module._apply_gate(projected) if module.has_gate else module.act_fn(projected)


def down(module: Any, expert: int, neurons: Tensor) -> Tensor:
    """Output of one expert: [row, d_expert] -> [row, d_model]."""
    out = _linear(module, "down_proj", expert, neurons)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def _linear(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(rows, weight.T if module.is_transposed else weight, bias)


def sizes(module: Any) -> dict[str, int]:
    """Number of experts and of neurons in one expert, from the weights."""
    weight = module.down_proj
    if not isinstance(weight, Tensor) or weight.dim() != 3 or not weight.is_floating_point():
        raise ValueError(
            f"{type(module).__name__}: its expert weights are {type(weight).__name__}, not a plain 3-D tensor; "
            "load the model without quantisation"
        )
    return {"expert": weight.shape[0], "neuron": weight.shape[1 if module.is_transposed else 2]}


@contextmanager
def implementation(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts our function in the place of the experts implementation that these modules look up, and back."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, _mix)
    with ExitStack() as stack:
        for config in configs_of(modules, ATTRIBUTE):
            stack.enter_context(lent(config, ATTRIBUTE, NAME))
        yield


@contextmanager
def tapped(taps: dict[nn.Module, dict[str, Tap]]) -> Iterator[None]:
    """Puts taps on experts modules. `taps`: module -> {site name: tap}."""
    inside = {module: named for module, named in taps.items() if named.keys() & {"expert_hidden", "expert_out"}}
    with ExitStack() as stack:
        for module, named in taps.items():
            if named.keys() & {"expert_ids", "expert_weight"}:
                stack.callback(module.register_forward_pre_hook(choice_hook(named)).remove)
        for module, named in inside.items():
            _live[id(module)] = named
            stack.callback(_live.pop, id(module), None)
        stack.enter_context(implementation(inside))
        yield


@contextmanager
def observed(hf: nn.Module) -> Iterator[dict[int, dict[str, int]]]:
    """Notes which experts modules of `hf` really call the interface, with their sizes, by module identity."""
    seen: dict[int, dict[str, int]] = {}
    modules = [m for m in hf.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")]
    try:
        _observers.update({id(m): seen for m in modules})
        with implementation(modules):
            yield seen
    finally:
        for module in modules:
            _observers.pop(id(module), None)
