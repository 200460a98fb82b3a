"""Sets of experts to switch off, layer by layer, and how to apply them.

    law = MonetMask.from_ids(model, {3: [17, 4711]})         expert id = i * n + j, as in the paper's figures
    law |= MonetMask.full_rows(model, {1: [5]}, by="group")  every (5, j), in all layers that share router 1
    with masked(model, law):                                 until the end of the block
        model(ids)
    model.set_expert_mask(law)                               for good: checkpoints of the model carry it

Switching (i, j) off in layer l takes W_ij E_ij(x), output biases included, out of that layer's sum; the other
weights stay as they were (nothing is renormalised), and nothing else of the model changes. An empty mask leaves the
model bit for bit as it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

FORMAT = "interp.monet.mask/1"
By = Literal["layer", "group"]


class MaskError(ValueError):
    """A mask that names experts the model lacks, or that was made for a model of another shape."""


@dataclass(frozen=True, eq=False)
class MonetMask:
    """A set of (layer, i, j): the experts that are switched off.

    Supports `|`, `&`, `-`, `~` (all others), `==`, `len()`, `bool()` and `(layer, i, j) in mask`.

    Attributes:
        n: length of a key axis (config.moe_experts); a layer has n^2 experts.
        n_layers: number of layers.
        off: layer -> bool [n, n], True = switched off. Layers without any are left out.
    """

    n: int
    n_layers: int
    off: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        for layer, matrix in self.off.items():
            _check_layer(layer, self.n_layers)
            if tuple(matrix.shape) != (self.n, self.n) or matrix.dtype != torch.bool:
                raise MaskError(f"off[{layer}]: {_wrong_matrix(matrix, self.n)}")
        object.__setattr__(self, "off", {la: m.cpu() for la, m in sorted(self.off.items()) if bool(m.any())})

    # -- making them -------------------------------------------------------------------------------------------
    # `like` is the model or its configuration; `by` says whether the keys are layers or groups of layers.

    @classmethod
    def none(cls, like: Any) -> MonetMask:
        """The empty set."""
        return cls.from_keep(like, {})

    @classmethod
    def from_pairs(
        cls, like: Any, pairs: Mapping[int, Iterable[tuple[int, int]] | Tensor], by: By = "layer"
    ) -> MonetMask:
        """Experts given as (i, j), i on the axis of g1 and j on that of g2."""

        def fill(off: Tensor, chosen: Any) -> None:
            ij = _indices(chosen, 2)
            _check_range(ij, len(off), "pair with key", "key")
            off[ij[:, 0], ij[:, 1]] = True

        return cls._filled(like, pairs, by, fill)

    @classmethod
    def from_ids(cls, like: Any, ids: Mapping[int, Iterable[int] | Tensor], by: By = "layer") -> MonetMask:
        """Experts given as i * n + j."""

        def fill(off: Tensor, chosen: Any) -> None:
            flat = _indices(chosen)
            _check_range(flat, off.numel(), "expert id", "expert")
            off.view(-1)[flat] = True

        return cls._filled(like, ids, by, fill)

    @classmethod
    def full_rows(cls, like: Any, rows: Mapping[int, Iterable[int] | Tensor], by: By = "layer") -> MonetMask:
        """Every (i, j) of some i: all n experts that use part i of the first axis."""

        def fill(off: Tensor, chosen: Any) -> None:
            _check_range(_indices(chosen), len(off), "row", "key")
            off[_indices(chosen)] = True

        return cls._filled(like, rows, by, fill)

    @classmethod
    def full_cols(cls, like: Any, cols: Mapping[int, Iterable[int] | Tensor], by: By = "layer") -> MonetMask:
        """Every (i, j) of some j: all n experts that use part j of the second axis."""

        def fill(off: Tensor, chosen: Any) -> None:
            _check_range(_indices(chosen), len(off), "column", "key")
            off[:, _indices(chosen)] = True

        return cls._filled(like, cols, by, fill)

    @classmethod
    def from_keep(cls, like: Any, keep: Mapping[int, Tensor], by: By = "layer") -> MonetMask:
        """From matrices [n, n] that are True where the expert is *kept*."""

        def fill(off: Tensor, matrix: Tensor) -> None:
            if matrix.shape != off.shape or matrix.dtype != torch.bool:
                raise MaskError(f"keep: {_wrong_matrix(matrix, len(off))}")
            off.copy_(~matrix)

        return cls._filled(like, keep, by, fill)

    @classmethod
    def _filled(cls, like: Any, what: Mapping[int, Any], by: By, fill: Callable[[Tensor, Any], None]) -> MonetMask:
        config = _config(like)
        n, off = config.moe_experts, {}
        for key, chosen in what.items():
            matrix = torch.zeros(n, n, dtype=torch.bool)
            fill(matrix, chosen)
            for layer in _layers(config, key, by):
                off[layer] = matrix
        return cls(n, config.num_hidden_layers, off)

    # -- the algebra of sets -----------------------------------------------------------------------------------
    def __or__(self, other: MonetMask) -> MonetMask:
        return self._with(other, torch.logical_or)

    def __and__(self, other: MonetMask) -> MonetMask:
        return self._with(other, torch.logical_and)

    def __sub__(self, other: MonetMask) -> MonetMask:
        return self._with(other, lambda a, b: a & ~b)

    def __invert__(self) -> MonetMask:
        """Every expert of every layer that is not in this set."""
        return MonetMask(self.n, self.n_layers, {la: ~self.matrix(la) for la in range(self.n_layers)})

    def _with(self, other: MonetMask, operation: Callable[[Tensor, Tensor], Tensor]) -> MonetMask:
        if not isinstance(other, MonetMask):
            return NotImplemented
        if (self.n, self.n_layers) != (other.n, other.n_layers):
            raise MaskError(
                f"masks of different models: n = {self.n} and {other.n}, layers {self.n_layers} and {other.n_layers}"
            )
        layers = {*self.off, *other.off}
        return MonetMask(self.n, self.n_layers, {la: operation(self.matrix(la), other.matrix(la)) for la in layers})

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, MonetMask)
            and (self.n, self.n_layers, [*self.off]) == (other.n, other.n_layers, [*other.off])
            and all(torch.equal(m, other.off[la]) for la, m in self.off.items())
        )

    __hash__ = None  # type: ignore[assignment]  # matrices can change in place

    def __len__(self) -> int:
        """Number of experts switched off, over all layers."""
        return sum(int(m.sum()) for m in self.off.values())

    def __contains__(self, expert: tuple[int, int, int]) -> bool:
        layer, i, j = expert
        return layer in self.off and bool(self.off[layer][i, j])

    def __repr__(self) -> str:
        return f"MonetMask({len(self):,} of {self.n_layers * self.n**2:,} experts off, in layers {[*self.off]})"

    # -- reading and keeping -----------------------------------------------------------------------------------
    def matrix(self, layer: int) -> Tensor:
        """bool [n, n] of a layer, True = switched off."""
        _check_layer(layer, self.n_layers)
        return self.off[layer] if layer in self.off else torch.zeros(self.n, self.n, dtype=torch.bool)

    def pairs(self, layer: int) -> Tensor:
        """Experts off in a layer as (i, j): [expert, 2], in order."""
        return self.matrix(layer).nonzero()

    def ids(self, layer: int) -> Tensor:
        """Experts off in a layer as i * n + j: [expert], in order."""
        return self.matrix(layer).flatten().nonzero()[:, 0]

    def check(self, like: Any) -> None:
        """Raises MaskError unless this mask was made for a model of this shape."""
        config = _config(like)
        if (self.n, self.n_layers) != (config.moe_experts, config.num_hidden_layers):
            raise MaskError(
                f"mask for {self.n_layers} layers of {self.n} x {self.n} experts; the model has "
                f"{config.num_hidden_layers} of {config.moe_experts} x {config.moe_experts}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file: a bool matrix `layers.<l>` per layer, True = switched off."""
        from safetensors.torch import save_file

        tensors = {f"layers.{layer}": m.contiguous().clone() for layer, m in self.off.items()}
        save_file(tensors, path, {"format": FORMAT, "n": str(self.n), "n_layers": str(self.n_layers)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MonetMask:
        """Reads what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise MaskError(f"{os.fspath(path)}: format {about.get('format')!r}; a Monet mask has {FORMAT!r}")
            off = {int(key.removeprefix("layers.")): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return cls(int(about["n"]), int(about["n_layers"]), off)


@contextmanager
def masked(model: Any, mask: MonetMask) -> Iterator[Any]:
    """`model` with the mask's experts off, besides those it already has off; afterwards as before, errors included."""
    before = model.expert_mask
    model.set_expert_mask(before | mask)
    try:
        yield model
    finally:
        model.set_expert_mask(before)


def _config(like: Any) -> Any:
    config = getattr(like, "config", like)
    if not hasattr(config, "moe_experts") or not hasattr(config, "layers_of_group"):
        raise MaskError(f"{type(like).__name__}: expected a Monet model or its MonetConfig")
    return config


def _layers(config: Any, key: int, by: By) -> Iterable[int]:
    if by == "layer":
        _check_layer(key, config.num_hidden_layers)
        return [key]
    if by != "group":
        raise MaskError(f"by={by!r}: expected 'layer' or 'group'")
    if not 0 <= key < config.n_groups:
        raise MaskError(f"group {key}: the model has groups 0..{config.n_groups - 1}")
    return config.layers_of_group(key)


def _check_layer(layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise MaskError(f"layer {layer}: the model has layers 0..{n_layers - 1}")


def _wrong_matrix(matrix: Tensor, n: int) -> str:
    return (
        f"{tuple(matrix.shape)} of {str(matrix.dtype).removeprefix('torch.')}; expected ({n}, {n}) of bool "
        "(moe_experts x moe_experts)"
    )


def _indices(chosen: Any, width: int | None = None) -> Tensor:
    """Whole numbers [item], or [item, width]."""
    listed = torch.as_tensor(chosen if isinstance(chosen, Tensor) else list(chosen))
    if (listed.is_floating_point() and listed.numel()) or listed.dtype == torch.bool:
        raise MaskError(f"experts given as {listed.dtype}: expected whole numbers")
    if width is not None and listed.numel() and (listed.dim() != 2 or listed.shape[1] != width):
        raise MaskError(f"pairs of shape {tuple(listed.shape)}: expected [expert, 2], an (i, j) each")
    return listed.long().reshape(-1) if width is None else listed.long().reshape(-1, width)


def _check_range(indices: Tensor, size: int, what: str, of: str) -> None:
    wrong = indices[(indices < 0) | (indices >= size)] if indices.numel() else indices
    if wrong.numel():
        raise MaskError(f"{what} {int(wrong[0])}: the model has {of}s 0..{size - 1}")
