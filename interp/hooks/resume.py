"""Running only the part of a forward pass that an edit can change.

Nothing below the first edited layer changes, so its result need not be computed again: `resumed` lets the layers before
`start` pass the stream through untouched and puts the stream that another run left in front of layer `start`. Nothing
after the final norm mixes tokens, so a metric that reads some tokens needs the logits of those only: `narrowed`. The
layers behind one can be left out too, so that it speaks itself: `shortened`.

For the time of the context, the skipped layers' places in the model's own list of layers are taken by `Skipped`, a
module like any other. Whether a family can be run so (one whose late layers look at what early layers computed, besides
the stream, cannot) is for the caller to find out, by comparing an unedited run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = ("hidden_states", "x", "hidden_state", "inputs", "input")


class Skipped(nn.Module):
    """Stands in the place of a layer and hands on its input, or `stream` [batch, pos, d_model], in the layer's form.

    Args:
        layer: the layer that is skipped; what else the model asks of it (its kind of attention, ...), it still answers.
        form: how many values the layer returns; 0 for a bare tensor.
        stream: what to hand on in the place of the input; a tuple is the layer's whole output.
    """

    def __init__(self, layer: nn.Module, form: int, stream: Any = None) -> None:
        super().__init__()
        self.layer, self.form = layer, form
        object.__setattr__(self, "stream", stream)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.stream
        if stream is None:
            stream = args[0] if args else next(kwargs[n] for n in _NAMES if n in kwargs)
        if isinstance(stream, tuple):
            return stream
        return stream if not self.form else (stream, *[None] * (self.form - 1))


@contextmanager
def resumed(layers: nn.ModuleList, start: int, stream: Any, forms: list[int]) -> Iterator[None]:
    """Skips the layers before `start`; layer `start` is given `stream` [batch, pos, d_model], and may write into it.

    Where layers hand on more than the stream (Monet's routing), pass all that layer start - 1 returned, from `outputs`.
    """
    with _skipping(layers, [Skipped(layers[i], forms[i], stream if i == start - 1 else None) for i in range(start)], 0):
        yield


@contextmanager
def shortened(layers: nn.ModuleList, last: int, forms: list[int]) -> Iterator[None]:
    """Skips the layers behind `last`: what it leaves goes straight to the final norm."""
    rest = range(last + 1, len(layers))
    with _skipping(layers, [Skipped(layers[i], forms[i]) for i in rest], last + 1):
        yield


@contextmanager
def _skipping(layers: nn.ModuleList, stand_ins: list[Skipped], first: int) -> Iterator[None]:
    """Puts them in the places of the layers from `first` on, for a while."""
    try:
        for i, one in enumerate(stand_ins, first):
            layers[i] = one
        yield
    finally:
        for i, one in enumerate(stand_ins, first):
            layers[i] = one.layer


@contextmanager
def forms(layers: nn.ModuleList) -> Iterator[list[int]]:
    """Notes, for each layer that runs inside, how many values it returns (0: a bare tensor)."""
    with _noted(layers, lambda output: len(output) if isinstance(output, tuple) else 0, 0) as found:
        yield found


@contextmanager
def outputs(layers: nn.ModuleList) -> Iterator[list[Any]]:
    """Keeps, copied, what each layer that runs inside returns: the stream, and what some families hand on beside it."""
    with _noted(layers, copied, None) as found:
        yield found


def copied(output: Any) -> Any:
    """A layer's output that others may write into."""
    if isinstance(output, tuple):
        return tuple(copied(part) for part in output)
    return output.clone() if isinstance(output, Tensor) else output


@contextmanager
def _noted(layers: nn.ModuleList, what: Callable[[Any], Any], nothing: Any) -> Iterator[list[Any]]:
    """`what` of each layer's output, by layer; of the newest call."""
    found = [nothing] * len(layers)

    def note(index: int, module: nn.Module, args: Any, output: Any) -> None:
        found[index] = what(output)

    handles = [layer.register_forward_hook(partial(note, i)) for i, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def narrowed(hf: Any, wanted: Tensor) -> Iterator[None]:
    """Logits of some tokens only.

    `wanted` [batch], one column for each row: they come out as [batch, 1, vocab]. `wanted` [batch, pos], True at any
    tokens: [1, token, vocab], row by row.
    """
    head = hf.get_output_embeddings()
    if head is None:
        yield
        return

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0]
        here = wanted.to(hidden.device)
        if here.dtype == torch.bool:
            return hidden[here][None], *args[1:]
        return hidden[torch.arange(len(hidden), device=hidden.device), here][:, None], *args[1:]

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Passes:
    """Layers that ran forwards and backwards, each weighed by its rows."""

    forward: float = 0.0
    backward: float = 0.0


@contextmanager
def counted(layers: nn.ModuleList) -> Iterator[Passes]:
    """Counts what runs inside, in forward and backward passes of one row through all of `layers`."""
    passes, each = Passes(), 1 / len(layers)

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        passes.forward += each * len(stream)
        if stream.requires_grad:
            stream.register_hook(lambda g: note(len(g)))

    def note(rows: int) -> None:
        passes.backward += each * rows

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
