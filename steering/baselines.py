"""What a steering effect must be set against: a random direction, a fit on shuffled labels, a prompt.

A single random vector of the same norm often moves a behaviour's likelihood as far as a published method does, so
controls come in numbers, and what counts is whether an effect leaves their spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp.edits import Where
from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.maps import Map, Shift
from steering.vector import Part, SteeringMap, SteeringVector


def random_like(v: SteeringMap, n: int = 20, seed: int = 0) -> list[SteeringMap]:
    """`n` random controls of a map: the same map in a randomly turned frame, ``h -> Q f(Qᵀ h)`` with Q orthogonal.

    Norms, ranks and eigenvalues are the map's own, only the directions are random. A vector so becomes a random
    direction of its norm. Sites, scopes and gates are kept; parts of one width turn alike, as a direction that is
    erased at every layer is one direction.
    """
    if n < 1:
        raise SteeringError(f"n={n}: expected at least one control")
    # not the bare seed: a vector that was itself drawn with seed 0 must not meet itself as its control
    generator = torch.Generator().manual_seed((seed << 20) + 1729)
    return [_turned(v, generator, {"control": "random", "for": v.method, "seed": seed, "draw": i}) for i in range(n)]


def _turned(v: SteeringMap, generator: torch.Generator, record: dict[str, Any]) -> SteeringMap:
    frames: dict[tuple[int, ...], Tensor] = {}
    parts: list[Part] = []
    for part in v.parts:
        if getattr(part.map, "reads_only", False):
            parts.append(part)  # a condition is read as it is; what it lets through is the control
            continue
        width = part.map.width
        if width is None:
            raise SteeringError(
                f"{v.method} at {part.site}: a {part.map.kind} map has no width, so it cannot be turned"
            )
        if isinstance(part.map, Shift):
            # every vector on its own: two layers' vectors of a fit are two directions
            direction = torch.randn(width, generator=generator)
            turned: Map = replace(part.map, b=direction * (part.map.b.norm() / direction.norm()))
        else:
            if width not in frames:
                size = int(torch.tensor(width).prod())
                q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
                frames[width] = q * r.diagonal().sign()  # uniform over rotations and reflections
            turned = Turned(frame=frames[width], inner=part.map)
        parts.append(replace(part, map=turned))
    cls = SteeringVector if isinstance(v, SteeringVector) else SteeringMap
    return cls(tuple(parts), v.fingerprint, v.model, "random", record)


@dataclass(frozen=True, eq=False)
class Turned(Map):
    """``h -> Q f(Qᵀ h)``: a map in another frame. `frame` is Q [d, d]; strength is that of `inner`."""

    kind = "turned"
    frame: Tensor
    inner: Map

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        back = h.flatten(2) @ self.frame
        moved = self.inner(back.view_as(h), where).flatten(2) - back
        return h + (moved @ self.frame.T).view_as(h)

    def scaled(self, k: float) -> Turned:
        return replace(self, inner=self.inner.scaled(k))

    def ready(self, device: torch.device, dtype: torch.dtype) -> Map:
        return replace(self, frame=self.frame.to(device, dtype), inner=self.inner.ready(device, dtype))

    @property
    def width(self) -> tuple[int, ...] | None:
        return self.inner.width


def shuffled(
    fit: Callable[[list[Any]], SteeringMap],
    pairs: Any,
    n: int = 20,
    seed: int = 0,
    norm_of: SteeringVector | None = None,
) -> list[SteeringMap]:
    """`n` fits on pairs of which a random half has its sides swapped: the data without the label.

    Args:
        fit: pairs -> map, e.g. ``lambda pairs: steering.caa(m, pairs, layer=15)``.
        pairs: what the real vector was fitted on.
        n: number of shuffles.
        seed: of the swaps.
        norm_of: brings each control to this vector's norms; differences of means of nothing are short, and a short
            vector does little for that reason alone.
    """
    triples, generator = _pairs.check(pairs), torch.Generator().manual_seed(seed)
    found: list[SteeringMap] = []
    for _ in range(n):
        swap = set(torch.randperm(len(triples), generator=generator)[: len(triples) // 2].tolist())
        v = fit([(p, b, a) if i in swap else (p, a, b) for i, (p, a, b) in enumerate(triples)])
        if norm_of is not None and isinstance(v, SteeringVector):
            v = v.with_norm({site: float(w.norm()) for site, w in norm_of.vectors.items()})
        found.append(replace(v, method="shuffled", record={**v.record, "control": "shuffled", "seed": seed}))
    return found


def instructed(pairs: Any, positive: str, negative: str, multiplier: float) -> list[Any]:
    """Pairs whose prompts begin with an instruction: `positive` where the multiplier is above 0, else `negative`."""
    text = positive if multiplier > 0 else negative
    triples = _pairs.check(pairs)
    if any(not isinstance(prompt, str) for prompt, _, _ in triples):
        raise SteeringError("prompt: the prompts are token ids; an instruction can stand before texts only")
    return [(f"{text}{prompt}", a, b) for prompt, a, b in triples] if multiplier else list(triples)


def as_list(given: SteeringMap | Sequence[SteeringMap], name: str) -> list[SteeringMap]:
    """One map or several as a list, for a baseline called `name`."""
    found = [given] if isinstance(given, SteeringMap) else list(given)
    if not found or not all(isinstance(v, SteeringMap) for v in found):
        raise SteeringError(f"baselines[{name!r}]: expected a steering map or several, got {given!r:.80}")
    return found
