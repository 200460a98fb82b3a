"""Edits: what to do at a site while the model runs.

An edit is a site, a map ``h -> h'``, a scope (which tokens) and perhaps a gate (how much)::

    edits.zero("z[5, head=3]")                         knock a head out
    edits.add("resid_post[15]", v, scope="generated")  steer
    edits.project_out("resid_post[*]", direction)      directional ablation
    edits.freeze("expert_weight[3]", acts)             replay what another run left there

Steering vectors, patches, ablations, SAE and probe interventions are all only ways to make edits, so everything that
holds here holds for them:

* Edits at one site act in the order in which they were entered: outer contexts first, then from left to right. At
  different sites the order is the model's own.
* Only the tokens of the scope change, bit for bit; padding never does.
* With a gate g in [0, 1] the site becomes ``h + g (h' - h)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as _replace
from typing import Any, Protocol

import torch
from torch import Tensor

from interp.scope import Scope
from interp.sites import Pattern, Site, kind_of


class EditError(ValueError):
    """An edit that does not fit the tensor it meets."""


@dataclass(frozen=True)
class Where:
    """What a map may know besides the activation: where its tokens are.

    Attributes:
        site: the site's text, for messages.
        position: place of each token among its row's real tokens [batch, pos].
        mask: the tokens that this edit may change [batch, pos].
        pos_axis: the axis of the activation that runs over tokens.
        inputs: at a module's output, the arguments by position that the module was given; at a routed site, the chosen
            experts [batch, pos, slot]; else empty.
    """

    site: str
    position: Tensor
    mask: Tensor
    pos_axis: int = 1
    inputs: tuple[Any, ...] = ()


class Map(Protocol):
    """A function of an activation [batch, pos, ...]; it may change all of it, the scope then picks."""

    def __call__(self, h: Tensor, where: Where) -> Tensor: ...


Gate = Callable[[Tensor, Where], Tensor]


@dataclass(frozen=True, eq=False)
class Edit:
    """One intervention. Build it with the functions of this module; combine by passing several to ``intervene``.

    Attributes:
        site: a site or pattern, e.g. ``"resid_post[5]"`` or ``"z[*, head=0]"``.
        map: what happens to the activation.
        scope: which tokens; a `Scope` or its text.
        gate: how much, per token: a function (h, where) -> [batch] or [batch, pos] in [0, 1].
        name: shown in traces and errors.
    """

    site: str
    map: Map
    scope: Scope = field(default_factory=Scope.all)
    gate: Gate | None = None
    name: str = "edit"

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", str(self.site))
        object.__setattr__(self, "scope", Scope.parse(self.scope))

    def within(self, scope: str | Scope | Tensor) -> Edit:
        """The same edit on other tokens."""
        return _replace(self, scope=Scope.parse(scope))

    def gated(self, gate: Gate) -> Edit:
        return _replace(self, gate=gate)

    def __repr__(self) -> str:
        return f"Edit({self.name} at {self.site}, scope={self.scope.text!r}{', gated' if self.gate else ''})"


# -- maps ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Affine:
    """``h -> A h + b`` on the last axis.

    `A` is None (identity), a number or vector (scales), a matrix [out, in], or is given as ``I - U Uᵀ`` by `remove`
    [k, d] with orthonormal rows. `b` is a number, a vector, or one vector per token (see `Replace`). All linear
    interventions of the literature are cases of it.
    """

    A: Tensor | float | None = None
    b: Tensor | float | None = None
    remove: Tensor | None = None

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        out = h
        if self.remove is not None:
            u = _fit(self.remove, h, where, matrix=True)
            out = out - (out @ u.T) @ u
        if isinstance(self.A, Tensor) and self.A.dim() == 2:
            a = _fit(self.A, h, where, matrix=True)
            if a.shape[0] != h.shape[-1]:
                raise EditError(
                    f"{where.site}: the matrix A is {list(a.shape)}; it must be square, of size {h.shape[-1]}"
                )
            out = out @ a.T
        elif isinstance(self.A, Tensor):
            out = out * _fit(self.A, h, where)
        elif self.A is not None:
            out = out * self.A
        if isinstance(self.b, Tensor):
            out = out + _fit(self.b, h, where)
        elif self.b is not None:
            out = out + self.b
        return out


@dataclass(frozen=True, eq=False)
class Replace:
    """``h -> value``: a number, one tensor for every token, or (with as many axes as `h`) one value per token.

    Values per token run along the position axis by *token position*: entry 0 belongs to each row's first real token,
    whatever the padding and whether a cache is in use.
    """

    value: Tensor | float

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        if not isinstance(self.value, Tensor):
            return torch.full_like(h, self.value)
        return _fit(self.value, h, where).expand_as(h)


@dataclass(frozen=True, eq=False)
class Replay:
    """``h -> what acts hold at this very site``, token by token; one map serves a pattern of many sites."""

    acts: Mapping[Any, Tensor]

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        return Replace(self.value(where.site))(h, where)

    def value(self, site: str) -> Tensor:
        """The activation with entry 0 at each row's first real token."""
        value, mask = self.acts[site], getattr(self.acts, "mask", None)
        if mask is None or bool(mask[:, 0].all()):
            return value
        if Site.parse(site).name == "pattern":
            raise EditError(
                f"freeze at {site}: these activations are padded on the left, so their keys have other "
                "columns; capture them padded on the right"
            )
        order = mask.long().argsort(dim=1, descending=True, stable=True)
        return value.gather(1, order.view(*order.shape, *[1] * (value.dim() - 2)).expand_as(value))


@dataclass(frozen=True, eq=False)
class Noise:
    """``h -> h + std * normal``; a draw belongs to (seed, site, row, position), whatever the cache or batch."""

    std: float
    seed: int = 0
    block = 128

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        if Site.parse(where.site).name == "pattern":
            raise EditError(f"{where.site}: noise is defined for sites with axes [batch, pos, ...]")
        width, rows = h[0, 0].numel(), []
        blocks = int(where.position.max()) // self.block + 1
        for row in range(h.shape[0]):
            draws = [
                torch.randn(self.block, width, generator=self._generator(where.site, row, b)) for b in range(blocks)
            ]
            rows.append(torch.cat(draws)[where.position[row].cpu()])
        return h + self.std * torch.stack(rows).view(h.shape).to(h)

    def _generator(self, site: str, row: int, block: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {site} {row} {block}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _fit(value: Tensor, h: Tensor, where: Where, matrix: bool = False) -> Tensor:
    """`value` checked against `h`, laid out so that it broadcasts over it.

    A value for all tokens (a number, or the axes behind the position) follows h's device and dtype, as the model's
    arithmetic would. A value per token must have them, and is brought to the tokens' columns.
    """
    if not value.is_floating_point() and h.is_floating_point():
        raise EditError(f"{where.site}: the edit's tensor is {value.dtype}; give floating point")
    if not matrix and value.dim() == h.dim() > 1 and value.numel() > 1:
        return _per_token(value, h, where)
    behind = h.shape[where.pos_axis + 1 :]
    ok = value.shape[-1:] == h.shape[-1:] if matrix else value.numel() == 1 or value.dim() <= len(behind)
    if ok and not matrix and value.numel() > 1:
        try:
            ok = torch.broadcast_shapes(value.shape, behind) == behind
        except RuntimeError:
            ok = False
    if not ok:
        raise EditError(
            f"{where.site}: the edit's tensor is {list(value.shape)}, and the activation is {list(h.shape)}; "
            + (
                f"its last axis must be {h.shape[-1]}"
                if matrix
                else f"give {list(behind)} for all tokens alike, or {list(h.shape)} for one value per token"
            )
        )
    if value.is_meta:
        raise EditError(f"{where.site}: the edit's tensor is on the meta device, which holds no values")
    value = value.to(device=h.device, dtype=h.dtype)
    return value.reshape(()) if value.numel() == 1 else value


def _per_token(value: Tensor, h: Tensor, where: Where) -> Tensor:
    """One value per token, by token position, brought to the columns in which those tokens stand."""
    axis = where.pos_axis
    if value.dtype != h.dtype or value.device != h.device:
        raise EditError(
            f"{where.site}: the value is {value.dtype} on {value.device}, the model computes {h.dtype} on "
            f"{h.device}; convert it with .to({str(h.device)!r}, {h.dtype})"
        )
    rest = [i for i in range(h.dim()) if i not in (0, axis)]
    if value.shape[0] not in (1, h.shape[0]) or any(value.shape[i] != h.shape[i] for i in rest):
        raise EditError(f"{where.site}: a value per token must be {list(h.shape)} here, got {list(value.shape)}")
    place = where.position.masked_fill(~where.mask, 0)
    reach = int(place.max())
    if reach >= value.shape[axis]:
        raise EditError(
            f"{where.site}: there are values for {value.shape[axis]} tokens, and the edit reaches token "
            f"{reach}; limit it with scope='prompt'"
        )
    value = value.expand(h.shape[0], *value.shape[1:])
    column = torch.arange(place.shape[1], device=place.device)
    if value.shape == h.shape and bool(((place == column) | ~where.mask).all()):
        return value
    if Site.parse(where.site).name == "pattern":
        raise EditError(
            f"{where.site}: the batch is padded on the left, so its keys have other columns than the value's; "
            "pad it on the right"
        )
    view = [1] * h.dim()
    view[0], view[axis] = place.shape
    return value.gather(axis, place.view(view).expand_as(h))


# -- the words -------------------------------------------------------------------------------------------------
def affine(site: Any, A: Tensor | float | None = None, b: Tensor | float | None = None, **how: Any) -> Edit:
    """``h -> A h + b``; `A` a number, a vector (elementwise) or a square matrix, `b` a number or vector."""
    return Edit(site, Affine(A, b), **{"name": "affine", **how})


def add(site: Any, vector: Tensor | float, **how: Any) -> Edit:
    """``h -> h + vector``: steering."""
    return Edit(site, Affine(b=vector), **{"name": "add", **how})


def scale(site: Any, factor: float | Tensor, **how: Any) -> Edit:
    return Edit(site, Affine(A=factor), **{"name": "scale", **how})


def zero(site: Any, **how: Any) -> Edit:
    """Zero ablation."""
    return Edit(site, Replace(0.0), **{"name": "zero", **how})


def mean(site: Any, value: Tensor, **how: Any) -> Edit:
    """Mean ablation: every token gets `value`, the mean over some reference text (e.g. ``acts.mean(site)``)."""
    return Edit(site, Replace(value), **{"name": "mean", **how})


def replace(site: Any, value: Tensor | float, **how: Any) -> Edit:
    """Put `value` there: a number, one tensor for all tokens, or one per token [batch, pos, ...] by token position."""
    return Edit(site, Replace(value), **{"name": "replace", **how})


def project_out(site: Any, direction: Tensor, **how: Any) -> Edit:
    """Remove a direction [d] or the span of several [k, d]: ``h -> h - U Uᵀ h`` (directional ablation)."""
    rows = torch.atleast_2d(direction if direction.is_floating_point() else direction.float())
    norms = rows.double().norm(dim=-1, keepdim=True)
    if not bool(torch.isfinite(norms).all()) or bool((norms == 0).any()):
        raise EditError(f"project_out at {site}: a direction must be finite and not zero")
    _, size, basis = torch.linalg.svd(rows.double() / norms, full_matrices=False)
    basis = basis[size > 1e-5 * size[0]]  # directions that depend on others span nothing more
    return Edit(site, Affine(remove=basis.to(rows.dtype)), **{"name": "project_out", **how})


def noise(site: Any, std: float, seed: int = 0, **how: Any) -> Edit:
    """Add Gaussian noise of standard deviation `std` (in the activation's units)."""
    return Edit(site, Noise(std, seed), **{"name": "noise", **how})


def freeze(site: Any, acts: Mapping[Any, Tensor], **how: Any) -> Edit:
    """Replay what `acts` (an `Activations`, or any mapping from site) holds at `site`, token by token.

    `site` may be a pattern: each of its sites gets back its own.

    On generated tokens there is nothing to replay, so the scope is the prompt unless you say otherwise.
    """
    pattern, replay = Pattern.parse(str(site)), Replay(acts)
    kind = kind_of(pattern.name)
    if kind.routed and any(key == "expert" for key, _ in pattern.index):
        raise EditError(
            f"freeze at {site}: one expert's rows belong to no fixed tokens; freeze {pattern.name} of the "
            "whole layer, and expert_ids with it"
        )
    if pattern.concrete and not (isinstance(pattern.layers, int) and pattern.layers < 0):
        replay.value(str(site))  # what is missing is missed now, not in the middle of a run
    return Edit(site, replay, **{"name": "freeze", "scope": Scope.prompt(), **how})
