"""The weights of a dense MLP, whatever its family calls them.

    plain    h = act(U x + b)               y = D h + c          GPT-2, OPT-like MLP blocks, Phi, NeoX
    gated    h = act(G x) * (U x)           y = D h + c          Llama and its kin

Nothing is known of names. D is the module at whose input the neurons are (`mlp_hidden`); the linears beside it with
as many outputs, or twice as many, are U and G; the activation is a part of the block; and which is which is the
combination that gives the neurons that the block itself computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from interp.experts.units import ExpertError
from interp.hooks.slots import given


@dataclass(frozen=True, eq=False)
class Ffn:
    """One layer's MLP.

    Attributes:
        block: the module that computes it, and `parent`, `name`: where it hangs.
        act: the activation function.
        up, gate: [neuron, d_model], gate None if it is plain; biases [neuron] or None.
        down: [d_model, neuron]; its bias [d_model] or None.
    """

    block: nn.Module
    parent: nn.Module
    name: str
    act: Callable[[Tensor], Tensor]
    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def hidden(self, x: Tensor) -> Tensor:
        """Neurons [..., neuron] of an input [..., d_model]."""
        up = nn.functional.linear(x, self.up, self.up_bias)
        return self.act(up) if self.gate is None else self.act(nn.functional.linear(x, self.gate, self.gate_bias)) * up


def read(model: Any, layer: int) -> Ffn:
    """The MLP of a layer.

    Raises ExpertError for a layer without a dense MLP, and for one that is neither plain nor gated.
    """
    place = model.anatomy.places.get(("mlp_hidden", layer))
    if place is None:
        why = model.anatomy.absent.get(("mlp_hidden", layer), "it has no MLP")
        raise ExpertError(f"layer {layer} of {model.name} cannot be split: {why}")
    root = model.anatomy.layers[layer]
    block = next((m for m in root.modules() if any(child is place.module for child in m.children())), None)
    if block is None or block is root:
        raise ExpertError(
            f"layer {layer} of {model.name} cannot be split: its MLP is no module of its own but part of the layer"
        )
    parent, name = next((m, n) for m in root.modules() for n, child in m.named_children() if child is block)
    down, width = _matrix(place.module), model.anatomy.sizes["mlp_hidden", layer]["neuron"]
    x = torch.randn(16, model.d_model, generator=torch.Generator().manual_seed(0)).to(down)
    truth = _neurons_of(block, place.module, x)
    for up, gate in _candidates(block, place.module, width):
        for act in _activations(block):
            found = Ffn(block, parent, name, act, *up, *gate, down, _bias(place.module))
            try:
                if torch.allclose(found.hidden(x), truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max())):
                    return found
            except (RuntimeError, TypeError):
                continue  # no function of one tensor
    raise ExpertError(
        f"layer {layer} of {model.name} cannot be split: {type(block).__name__} is neither act(U x) nor "
        "act(G x) * (U x)"
    )


@torch.no_grad()
def _neurons_of(block: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    """What the block itself gives its output projection [row, neuron]."""
    with given({0: down}) as seen:
        try:
            block(x[None])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ExpertError(f"{type(block).__name__} cannot be run by itself: {error}") from error
    return seen[0].reshape(len(x), -1)


Part = tuple[Tensor | None, Tensor | None]


def _candidates(block: nn.Module, down: nn.Module, width: int) -> Iterator[tuple[tuple[Tensor, Tensor | None], Part]]:
    """(up, its bias), (gate, its bias) in every way the block's linears can be read."""
    linears = [m for m in block.children() if m is not down and _is_matrix(m)]
    whole = [m for m in linears if _matrix(m).shape[0] == width]
    for module in linears:
        if _matrix(module).shape[0] == 2 * width:
            halves = list(zip(_matrix(module).chunk(2), _halved(_bias(module)), strict=True))
            for gate, up in permutations(halves):
                yield up, gate
    for a, b in permutations(whole, 2):
        yield (_matrix(a), _bias(a)), (_matrix(b), _bias(b))
    for a in whole:
        yield (_matrix(a), _bias(a)), (None, None)


def _halved(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if bias is None:
        return None, None
    first, second = bias.chunk(2)
    return first, second


def _activations(block: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Parts of the block without weights, and functions that it keeps."""
    for module in block.children():
        if not list(module.parameters()) and not isinstance(module, nn.Dropout):
            yield module
    for value in vars(block).values():
        if callable(value) and not isinstance(value, type):
            yield value


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _matrix(module: nn.Module) -> Tensor:
    """Weight [out, in]; GPT-2's Conv1D keeps it transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if type(module).__name__ == "Conv1D" else weight.detach()


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
