"""The first door: module boundaries, by PyTorch's forward hooks.

Seven ways to stand at a boundary:

    output   what a module returns (first element of a tuple)
    grouped  the same where the last axis is heads or parts side by side, which the site has on an axis of their own
    sum      what two modules return together, where the layer adds them itself
    input    what it is given
    argument what it is given beside that, by position
    stream   what it is given *and* what the residual path keeps: the same tensor, so it is written in place
    scale    the divisor of a norm, recomputed from its input; writing s' multiplies the output by s / s'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from interp.hooks.anatomy import Place, first
from interp.hooks.tap import Tap

Handle = Any
_INPUT_NAMES = ("hidden_states", "x", "hidden_state", "inputs", "input")


def place_tap(place: Place, tap: Tap) -> list[Handle]:
    """Hooks that let `tap` read and write at `place`; call ``.remove()`` on each to take them away."""
    return _WAYS[place.how](place, tap)


def _at_output(place: Place, tap: Tap) -> list[Handle]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        tap.inputs = args
        try:
            return _with_first(output, tap.framed)
        finally:
            tap.inputs = ()

    return [place.module.register_forward_hook(hook)]


def _at_grouped(place: Place, tap: Tap) -> list[Handle]:
    armed = [place.other is None]

    def arm(module: nn.Module, args: Any) -> None:
        armed[0] = True

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not armed[0]:  # somebody asks for one expert's output meanwhile, which is no part of the forward pass
            return None
        armed[0] = place.other is None
        return tap(output.unflatten(-1, (place.groups, -1))).flatten(-2)

    around = [] if place.other is None else [place.other.register_forward_pre_hook(arm)]
    return [*around, place.module.register_forward_hook(hook)]


def _at_sum(place: Place, tap: Tap) -> list[Handle]:
    before: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        before[:] = [first(output)]  # type: ignore[list-item]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        other = before.pop()
        return _with_first(output, lambda own: tap.framed(other + own) - other)

    assert place.other is not None
    return [place.other.register_forward_hook(keep), place.module.register_forward_hook(hook)]


def _at_input(place: Place, tap: Tap) -> list[Handle]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, put = _find_input(args, kwargs)
        given = tap.framed(value)
        return None if given is value else put(given)

    return [place.module.register_forward_pre_hook(hook, with_kwargs=True)]


def _at_argument(place: Place, tap: Tap) -> list[Handle]:
    which = place.argument

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        # Layers may share the tensor. Under gradients each gets an alias of its own, whose gradient is its own share.
        value = args[which].view_as(args[which]) if args[which].requires_grad else args[which]
        given = tap(value)
        return None if given is args[which] else (*args[:which], given, *args[which + 1 :])

    return [place.module.register_forward_pre_hook(hook)]


def _at_stream(place: Place, tap: Tap) -> list[Handle]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value, _ = _find_input(args, kwargs)
        if tap.edits or value.requires_grad:  # a copy is read and written back, so that gradients pass through it
            value.copy_(tap.framed(value.clone()))
        else:
            tap.framed(value)

    return [place.module.register_forward_pre_hook(hook, with_kwargs=True)]


def _at_scale(place: Place, tap: Tap) -> list[Handle]:
    norm: Any = place.module
    eps = next(
        (float(getattr(norm, n)) for n in ("variance_epsilon", "eps", "norm_eps", "epsilon") if hasattr(norm, n)), 0.0
    )

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        value, _ = _find_input(args, kwargs)
        x = value.float()
        if place.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt().to(value.dtype)
        # Under gradients the output must depend on the very tensor that is read: free * s / s', both s from the input.
        seen = scale.clone() if scale.requires_grad else scale
        given = tap.framed(seen)
        if given is scale:
            return None
        bias = getattr(norm, "bias", None)
        free = output - bias if isinstance(bias, Tensor) else output
        free = free * (scale / given)
        return free + bias if isinstance(bias, Tensor) else free

    return [norm.register_forward_hook(hook, with_kwargs=True)]


def _at_sigmoid(place: Place, tap: Tap) -> list[Handle]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        gate = output.sigmoid()
        given = tap.framed(gate)
        if given is gate and not gate.requires_grad:
            return None
        if bool(((given < 0) | (given > 1)).any()):
            raise ValueError(
                f"{tap.site}: a gate lies in [0, 1]; the edit gave {float(given.min()):.3g}.."
                f"{float(given.max()):.3g}. Scale shared_out instead"
            )
        return given.logit()

    return [place.module.register_forward_hook(hook)]


def _at_logits(place: Place, tap: Tap) -> list[Handle]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return _with_first(output, tap)
        output.logits = tap(output.logits)
        return output

    return [place.module.register_forward_hook(hook)]


_WAYS: dict[str, Callable[[Place, Tap], list[Handle]]] = {
    "output": _at_output,
    "grouped": _at_grouped,
    "sum": _at_sum,
    "input": _at_input,
    "argument": _at_argument,
    "stream": _at_stream,
    "scale": _at_scale,
    "sigmoid": _at_sigmoid,
    "logits": _at_logits,
}


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with its leading tensor changed; None (leave it) if nothing changed."""
    if isinstance(output, Tensor):
        given = change(output)
        return None if given is output else given
    head = output[0]
    given = change(head)
    return None if given is head else type(output)([given, *output[1:]])


def _find_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor a module works on, and how to call it with another."""
    if args and isinstance(args[0], Tensor):
        return args[0], lambda t: ((t, *args[1:]), kwargs)
    name = next((n for n in _INPUT_NAMES if isinstance(kwargs.get(n), Tensor)), None)
    name = name or next(n for n, v in kwargs.items() if isinstance(v, Tensor) and torch.is_floating_point(v))
    return kwargs[name], lambda t: (args, {**kwargs, name: t})
