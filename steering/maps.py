"""Maps: what steering does to an activation at one site.

    Shift      h -> h + b                            caa, mean_centre, pca, iti, ...
    PerToken   h_p -> h_p + b_p, p the position      actadd
    Affine     h -> A h + b                          affine, conceptor, Activation Transport without support
    LowRank    h -> h + L (R h) + b                  directional ablation, leace

Maps that are not affine (`steering.nonlinear`) have the same face: they are called like an edit's map, have a
`strength`, and consist of tensors and settings only, so that one routine moves and saves them all. Strength k means

    h -> h + k (f(h) - h)

so k = 0 is nothing, bit for bit, and k = 1 the map as fitted; for a Shift it is the multiplier of the literature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from interp.edits import Where
from steering.errors import SteeringError

#: kind -> class, for everything that can be read back from a file.
KINDS: dict[str, type] = {}
T = TypeVar("T", bound=type)


def savable(kind: str) -> Callable[[T], T]:
    """Registers a frozen dataclass of tensors, numbers, texts and None under a name, so that files can hold it."""

    def register(cls: T) -> T:
        KINDS[kind] = cls
        setattr(cls, "kind", kind)  # noqa: B010 - a ClassVar that the type of a type does not tell
        return cls

    return register


@dataclass(frozen=True, eq=False, kw_only=True)
class Map:
    """Base of all maps; a subclass gives `apply`, its map at strength 1."""

    kind: ClassVar[str]
    strength: float = 1.0

    def apply(self, h: Tensor, where: Where) -> Tensor:
        """f(h), of the shape of `h` [batch, pos, ...]."""
        raise NotImplementedError

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        if self.strength == 0:
            return h
        new = self.apply(h, where)
        return new if self.strength == 1 else h + self.strength * (new - h)

    def scaled(self, k: float) -> Self:
        """The same map k times as strong."""
        return replace(self, strength=self.strength * k)

    def ready(self, device: torch.device, dtype: torch.dtype) -> Map:
        """The map as it is run: its tensors where the model computes, and in its dtype."""
        moved: dict[str, Any] = {k: t.to(device, dtype) for k, t in self.tensors().items() if t.is_floating_point()}
        return replace(self, **moved)

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """(A [d, d], None for the identity; b [d], None for zero), with the strength. SteeringError if not affine."""
        raise SteeringError(f"a {self.kind} map is not affine: it has no A and b")

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    @property
    def width(self) -> tuple[int, ...] | None:
        """The axes of the activation behind the position that this map was made for; None if any will do."""
        return None


@savable("shift")
@dataclass(frozen=True, eq=False)
class Shift(Map):
    """``h -> h + strength * b``; b has the site's axes behind the position, e.g. [d_model]."""

    b: Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        return h + (self.b if self.strength == 1 else self.strength * self.b)

    def ready(self, device: torch.device, dtype: torch.dtype) -> Map:
        return Shift((self.b * self.strength).to(device, dtype))  # multiplied once, not at every token

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        return None, self.b * self.strength

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.b.shape)


@savable("per_token")
@dataclass(frozen=True, eq=False)
class PerToken(Map):
    """``h_p -> h_p + strength * b_p`` for token positions p < T; b [T, d_model]. Other positions stay."""

    b: Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        row = where.position.clamp(max=len(self.b) - 1)
        here = (where.position < len(self.b))[..., None]
        return torch.where(here, h + self.strength * self.b[row], h)

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.b.shape[1:])


@savable("affine")
@dataclass(frozen=True, eq=False)
class Affine(Map):
    """``h -> A h + b``: A [d, d], or [d] for one factor per dimension; b [d] or None."""

    A: Tensor
    b: Tensor | None = None

    def apply(self, h: Tensor, where: Where) -> Tensor:
        out = h @ self.A.T if self.A.dim() == 2 else h * self.A
        return out if self.b is None else out + self.b

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        k, full = self.strength, self.A if self.A.dim() == 2 else torch.diag(self.A)
        return (1 - k) * torch.eye(len(full), dtype=full.dtype) + k * full, None if self.b is None else k * self.b

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.A.shape[-1:])


@savable("low_rank")
@dataclass(frozen=True, eq=False)
class LowRank(Map):
    """``h -> h + left (right h) + b``: left [d, k], right [k, d], b [d] or None."""

    left: Tensor
    right: Tensor
    b: Tensor | None = None

    def apply(self, h: Tensor, where: Where) -> Tensor:
        out = h + (h @ self.right.T) @ self.left.T
        return out if self.b is None else out + self.b

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        eye = torch.eye(len(self.left), dtype=self.left.dtype)
        return eye + self.strength * self.left @ self.right, None if self.b is None else self.strength * self.b

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.right.shape[-1:])


def projection(directions: Tensor) -> LowRank:
    """Directional ablation, ``h -> h - Uᵀ U h``: U an orthonormal basis of the rows of `directions`, [d] or [k, d]."""
    rows = torch.atleast_2d(directions).double()
    _, size, basis = torch.linalg.svd(rows, full_matrices=False)
    if not bool(torch.isfinite(rows).all()) or float(size[0]) == 0:
        raise SteeringError("projection: a direction to remove must be finite and not zero")
    u = basis[size > 1e-6 * size[0]].float()
    return LowRank(-u.T.contiguous(), u.contiguous())


def pack(thing: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A savable thing as (its kind and settings, its tensors). SteeringError for anything else."""
    if type(thing) not in KINDS.values():
        raise SteeringError(
            f"{thing!r:.80} cannot be saved: it is no map or gate that files can hold ({', '.join(sorted(KINDS))}); "
            "save without it, and add it after loading"
        )
    values = {f.name: getattr(thing, f.name) for f in fields(thing)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in values.items() if isinstance(v, Tensor)}
    return {"kind": thing.kind, **{k: v for k, v in values.items() if k not in tensors}}, tensors


def unpack(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    rest = dict(settings)
    kind = rest.pop("kind")
    if kind not in KINDS:
        raise SteeringError(f"the file holds a {kind!r}, which this version does not know ({', '.join(sorted(KINDS))})")
    return KINDS[kind](**rest, **tensors)
