"""What experts are given: hidden states, chosen experts and weights, shown and perhaps widened before they run.

In every family that goes through transformers' interface, and in those with an adapter called alike, experts are a
module called with (hidden [token, d_model], chosen [token, slot], weights [token, slot]). A further slot of weight
0 changes nothing, but the gradient at its weight is what an expert that was *not* chosen would add to the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from interp.hooks.anatomy import Anatomy

#: (layer, hidden, chosen, weights) -> (chosen, weights) to go on with.
Seen = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@contextmanager
def shown(anatomy: Anatomy, layers: Sequence[int], see: Seen) -> Iterator[None]:
    """Calls `see` with what the experts of `layers` are given, whenever they run; they run on what it returns.

    Raises ValueError for experts that are not called with a choice and weights (JetMoE).
    """
    with ExitStack() as stack:
        for layer in layers:
            place = anatomy.places["expert_weight", layer]
            if type(place.module).__name__ == "JetMoeMoE":
                raise ValueError(f"layer {layer}: JetMoE makes its choice inside its experts; it cannot be widened")
            stack.callback(place.module.register_forward_pre_hook(_hook(layer, see)).remove)
        yield


def _hook(layer: int, see: Seen) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, chosen, weights = args[:3]
        return (hidden, *see(layer, hidden, chosen, weights), *args[3:])

    return hook


@contextmanager
def given(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The first argument of each module's newest call, under the module's key."""
    seen: dict[int, Tensor] = {}

    def keep(key: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen.update({key: args[0]})

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_pre_hook(keep(key)).remove)
        yield seen
