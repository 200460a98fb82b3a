"""Skipping the layers whose result is known: the model's own forward pass, begun in its middle.

Whoever runs one batch many times under edits at layer 15 computes layers 0..14 many times with the same result. Here
the result is kept, and stand-ins in the model's list of layers hand it on. Everything else (embedding, masks,
positions, the final norm, soft caps) is still the model's own code, so no family has to be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


@contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[list[Any]]:
    """What each layer returns in the runs inside, by layer: the newest call's output, copied."""
    outputs: list[Any] = [None] * len(layers)

    def keep(index: int, module: nn.Module, args: Any, output: Any) -> None:
        outputs[index] = _copied(output)

    handles = [layer.register_forward_hook(partial(keep, i)) for i, layer in enumerate(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skipped(layers: nn.ModuleList, outputs: list[Any], start: int) -> Iterator[None]:
    """Layers before `start` return what they returned when `outputs` were recorded; on leaving they are back."""
    own = list(layers)[:start]
    try:
        for i, layer in enumerate(own):
            layers[i] = _StandIn(layer, outputs[i], last=i == start - 1)
        yield
    finally:
        for i, layer in enumerate(own):
            layers[i] = layer


class _StandIn(nn.Module):
    """Returns what its layer returned. Some families ask a layer for attributes before they call it; it has those."""

    def __init__(self, layer: nn.Module, output: Any, last: bool) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a child: its weights are not to be found here
        self.__dict__["output"] = output
        self.__dict__["last"] = last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Whoever comes next may write into it. Nobody reads what the others return.
        return _copied(self.output) if self.last else self.output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple | list):
        return type(output)(_copied(part) for part in output)
    return output
