"""Maps that are not affine in h. Each says its formula; all have the face of `steering.maps.Map`.

Transport   elementwise, within a range                     act
Rotate      turns h in a plane, keeping its norm            angular
Control     adds with the sign of the projection            pca (RepE's other operators)
Clamp       sets what one latent reads                      sae_latent
Cross       the smallest step to a probe's goal             probe_edit
Route       lifts and bans experts before they are chosen   steermoe, mote
Foreign     somebody else's map, e.g. Monet's exact removal
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.edits import Where
from steering.crossing import smallest_step
from steering.errors import SteeringError
from steering.maps import Map, savable


@savable("transport")
@dataclass(frozen=True, eq=False)
class Transport(Map):
    """``h -> omega * h + beta`` per unit, only where low <= h <= high: omega, beta, low, high [d].

    Outside the range that was seen of the source a unit is left alone (Rodriguez et al. 2024, arXiv:2410.23054, sec.
    3.2).
    """

    omega: Tensor
    beta: Tensor
    low: Tensor
    high: Tensor

    def apply(self, h: Tensor, where: Where) -> Tensor:
        return torch.where((h >= self.low) & (h <= self.high), h * self.omega + self.beta, h)

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.omega.shape)


@savable("rotate")
@dataclass(frozen=True, eq=False)
class Rotate(Map):
    """Angular steering: the part of h in a plane is turned to a stated angle, its length kept.

    ``h -> h - P h + |P h| (cos t b1 + sin t b2)``, P the projection on span(b1, b2), t = strength * degrees. With
    `adaptive` only where b1 . h > 0. Here the strength scales the angle, and strength 0 is no rotation at all.

    Attributes:
        b1, b2: orthonormal, [d].
        degrees: the angle to b1 that the part of h in the plane gets.
    """

    b1: Tensor
    b2: Tensor
    degrees: float
    adaptive: bool = False

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        if self.strength == 0:
            return h
        x, y = h @ self.b1, h @ self.b2
        t = math.radians(self.strength * self.degrees)
        length = (x.square() + y.square()).sqrt()
        dx, dy = length * math.cos(t) - x, length * math.sin(t) - y
        turned = h + dx[..., None] * self.b1 + dy[..., None] * self.b2
        return torch.where((x > 0)[..., None], turned, h) if self.adaptive else turned

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.b1.shape)


@savable("control")
@dataclass(frozen=True, eq=False)
class Control(Map):
    """The operators of RepE and repeng beside plain addition.

    ``h + strength * sign(h . b) b`` with `signed` (each token is pushed to the side on which it is); with `keep_norm`
    the result is brought back to the length of h. b [d].
    """

    b: Tensor
    signed: bool = False
    keep_norm: bool = False

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        step = self.strength * self.b
        out = h + ((h @ self.b).sign()[..., None] * step if self.signed else step)
        return out * (h.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True)) if self.keep_norm else out

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.b.shape)


@savable("clamp")
@dataclass(frozen=True, eq=False)
class Clamp(Map):
    """``h -> h + (value - a(h)) direction`` with a(h) what one latent of a SAE reads: its reconstruction error is kept.

    a(h) = pre if pre > threshold else 0, with pre = (h - centre) . encoder + bias.

    Attributes:
        direction, encoder, centre: [d].
        bias, threshold, value: of this latent.
    """

    direction: Tensor
    encoder: Tensor
    centre: Tensor
    bias: float
    threshold: float
    value: float

    def apply(self, h: Tensor, where: Where) -> Tensor:
        pre = (h - self.centre) @ self.encoder + self.bias
        reads = torch.where(pre > self.threshold, pre, torch.zeros_like(pre))
        return h + (self.value - reads)[..., None] * self.direction

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.direction.shape)


@savable("cross")
@dataclass(frozen=True, eq=False)
class Cross(Map):
    """The smallest step after which a probe gives class `target` the probability `goal`; none where it does already.

    minimise |d| subject to softmax(weight (h + d) + bias)[target] >= goal. For two classes this is the closed form
    d = (logit goal - w . h - b) w / |w|^2, w the difference of the rows; for more see `steering.crossing`.

    Attributes:
        weight: [class, d].
        bias: [class].
        target: the class wanted.
        goal: its probability, in (0, 1).
    """

    weight: Tensor
    bias: Tensor
    target: int
    goal: float

    def apply(self, h: Tensor, where: Where) -> Tensor:
        rows = h[where.mask]
        step = smallest_step(self.weight, rows @ self.weight.T + self.bias, self.target, self.goal)
        out = h.clone()
        out[where.mask] = rows + step.to(h.dtype)
        return out

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[1:])


@savable("route")
@dataclass(frozen=True, eq=False)
class Route(Map):
    """Router logits [batch, pos, expert]: `lifted` experts get the token's maximum + margin, `banned` ones to its
    minimum - margin, before the top-k are chosen. Strength is not graded: more than 0 is on, less is the opposite.

    (SteerMoE does so to log-softmax scores; a router's softmax does not see the constant by which those differ.)

    Attributes:
        lifted, banned: expert ids [n]; may be empty.
        margin: in logits.
    """

    lifted: Tensor
    banned: Tensor
    margin: float = 0.01

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        up, down = (self.lifted, self.banned) if self.strength >= 0 else (self.banned, self.lifted)
        if self.strength == 0:
            return h
        out = h.clone()
        out[..., up.to(h.device)] = h.amax(-1, keepdim=True) + self.margin
        out[..., down.to(h.device)] = h.amin(-1, keepdim=True) - self.margin
        return out


@dataclass(frozen=True, eq=False)
class Foreign(Map):
    """Any other edit's map, given a strength. It may hold a model's own modules, so files cannot hold it."""

    inner: Any
    kind = "foreign"

    def apply(self, h: Tensor, where: Where) -> Tensor:
        new = self.inner(h, where)
        if not isinstance(new, Tensor):
            raise SteeringError(f"{where.site}: the map returned {type(new).__name__}; expected a tensor")
        return new
