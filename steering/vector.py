"""SteeringMap and SteeringVector: what every fit returns, and what everything else takes.

    v = steering.caa(m, pairs, layer=15)            a SteeringVector
    with m.intervene(v * 2.0): ...                  twice as strong
    both = v + w                                    sums at each site
    first = erase.then(v)                           erase acts before v where they meet

A SteeringMap is a tuple of parts, each a map at a site with a scope (which tokens) and perhaps a gate (how much).
Parts at one site act in their order, parts at different sites in the model's. A SteeringVector is the additive case,
and only it can be added up. Both belong to the model they were fitted on and say so: `on` moves one to another model
of that shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from interp.calls import recorded
from interp.edits import Edit, Gate
from interp.scope import Scope
from interp.sites import Site
from steering.errors import SteeringError
from steering.maps import Map, Shift

if TYPE_CHECKING:
    import pandas as pd

#: From the last token of the prompt on: the first place where a prediction can change without changing the prompt.
AFTER_PROMPT = "last | generated"


@dataclass(frozen=True, eq=False)
class Part:
    """One map at one site.

    Attributes:
        site: a concrete site, e.g. ``"resid_post[15]"``.
        map: what happens there.
        scope: to which tokens.
        gate: how much, per token: a function (h, where) -> [batch] or [batch, pos] in [0, 1].
    """

    site: str
    map: Map
    scope: Scope
    gate: Gate | None = None


@dataclass(frozen=True, eq=False, repr=False)
class SteeringMap:
    """Parts of one model, in the order in which they act.

    Attributes:
        parts: the maps with their sites, scopes and gates.
        fingerprint, model: the model that they were fitted on.
        method: the fit's name.
        record: its settings and data, JSON values.
    """

    parts: tuple[Part, ...]
    fingerprint: str
    model: str
    method: str
    record: dict[str, Any]

    @classmethod
    def of(
        cls, m: Any, maps: Mapping[Any, Any], *, method: str = "by hand", scope: str | Scope | Tensor = AFTER_PROMPT,
        record: Mapping[str, Any] | None = None, gate: Gate | None = None,
    ) -> Self:  # fmt: skip
        """One part per entry of `maps`, site -> Map (for a SteeringVector: site -> tensor).

        Raises SiteError for a site that `m` lacks, SteeringError for values that are not finite or of another width.
        """
        parsed = Scope.parse(scope)
        parts = []
        for text, map_ in maps.items():
            made = Shift(map_.detach().float()) if isinstance(map_, Tensor) else map_
            parts += [Part(str(site), made, parsed, gate) for site in m.resolve(text)]
        return cls(tuple(parts), m.fingerprint, m.name, method, dict(record or {}))._checked(m)

    def _checked(self, m: Any) -> Self:
        if not self.parts:
            raise SteeringError(f"{self.method}: there is no part; give at least one site")
        for part in self.parts:
            for name, tensor in part.map.tensors().items():
                odd = torch.isnan(tensor)
                if Site.parse(part.site).name != "router_logits":  # there -inf and +inf ban and choose an expert
                    odd |= torch.isinf(tensor)
                if bool(odd.any()):
                    value = tensor[odd].flatten()[0].item()
                    what = "NaN" if math.isnan(value) else f"{value:g}"
                    raise SteeringError(
                        f"{self.method} at {part.site}: {name} holds {what}; is the data finite and varied?"
                    )
            self._fits(m, part)
        return self

    def _fits(self, m: Any, part: Part) -> None:
        site = Site.parse(part.site)
        sizes = m.anatomy.sizes.get((site.name, site.layer), {})
        want = tuple(m.d_model if axis == "d_model" else sizes.get(axis) for axis in site.axes[2:])
        have = part.map.width
        if have is not None and None not in want and have != want:
            raise SteeringError(
                f"{self.method} at {part.site}: the map is for width {list(have)}, and {m.name} has {list(want)} "
                "there; a vector belongs to the model that it was fitted on"
            )

    # -- applying ----------------------------------------------------------------------------------------------
    def as_edits(self, model: Any) -> list[Edit]:
        """The edits of this map on `model`. Raises SteeringError unless it was fitted there (see `on`)."""
        if self.fingerprint != model.fingerprint:
            raise SteeringError(
                f"this {self.method} was fitted on {self.model} ({self.fingerprint[:12]}), not on {model.name} "
                f"({model.fingerprint[:12]}); fit it there, or take it over with .on(model)"
            )
        return [
            Edit(p.site, p.map.ready(model.device, model.dtype), p.scope, p.gate, f"{self.method} at {p.site}")
            for p in self.parts
        ]

    def on(self, model: Any) -> Self:
        """The same for another model of these widths (another precision, a fine-tuned sister); it is recorded."""
        for site in self.sites:
            model.resolve(site)
        record = {**self.record, "from": self.model}
        moved = replace(self, fingerprint=model.fingerprint, model=model.name, record=record)
        return moved._checked(model)

    def within(self, scope: str | Scope | Tensor) -> Self:
        """The same on other tokens."""
        parsed = Scope.parse(scope)
        return self._each(lambda p: replace(p, scope=parsed))

    def gated(self, gate: Gate | None) -> Self:
        """The same with a gate; None takes it off."""
        return self._each(lambda p: replace(p, gate=gate))

    def only(self, *layers: int) -> Self:
        """The parts in some layers."""
        kept = tuple(p for p in self.parts if Site.parse(p.site).layer in layers)
        if not kept:
            raise SteeringError(f"only{layers}: there are parts in layers {self.layers}")
        return replace(self, parts=kept)

    def changed(self, change: Callable[[Part], dict[str, Any]]) -> Self:
        """The same with some fields of each part replaced (``map``, ``scope``, ``gate``)."""
        return self._each(lambda p: replace(p, **change(p)))

    def _each(self, change: Callable[[Part], Part]) -> Self:
        return replace(self, parts=tuple(change(p) for p in self.parts))

    # -- combining ---------------------------------------------------------------------------------------------
    def __mul__(self, k: float) -> Self:
        """k times as strong: ``h + k (f(h) - h)``."""
        if not isinstance(k, int | float):
            return NotImplemented
        if not math.isfinite(k):
            raise SteeringError(f"multiplier {k}: expected a finite number, such as 2 or -0.5")
        return self._each(lambda p: replace(p, map=p.map.scaled(float(k))))

    __rmul__ = __mul__

    def __truediv__(self, k: float) -> Self:
        return self * (1 / k)

    def __neg__(self) -> Self:
        return self * -1.0

    def then(self, other: SteeringMap) -> SteeringMap:
        """This, and behind it `other`: where both act at one site, `other` sees what this one left."""
        self._same_model(other)
        record = {"then": [{"method": x.method, **x.record} for x in (self, other)]}
        name = f"{self.method}, then {other.method}"
        return SteeringMap(self.parts + other.parts, self.fingerprint, self.model, name, record)

    def _same_model(self, other: SteeringMap) -> None:
        if self.fingerprint != other.fingerprint:
            raise SteeringError(
                f"{self.method} was fitted on {self.model} ({self.fingerprint[:12]}), {other.method} on {other.model} "
                f"({other.fingerprint[:12]}); only what belongs to one model can be combined"
            )

    # -- reading -----------------------------------------------------------------------------------------------
    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(p.site for p in self.parts))

    @property
    def layers(self) -> list[int]:
        found = {Site.parse(s).layer for s in self.sites}
        return sorted(layer for layer in found if layer is not None)

    @property
    def scope(self) -> Scope:
        """The scope of the first part (fits give all parts one)."""
        return self.parts[0].scope

    @property
    def gate(self) -> Gate | None:
        return self.parts[0].gate

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __repr__(self) -> str:
        at = self.sites[0] if len(self.sites) == 1 else f"{len(self.sites)} sites in layers {_span(self.layers)}"
        kinds = "+".join(dict.fromkeys(p.map.kind for p in self.parts))
        gated = ", gated" if any(p.gate for p in self.parts) else ""
        what = self._norms() if isinstance(self, SteeringVector) else kinds
        return f"{type(self).__name__}({self.method} at {at} of {self.model}: {what}, scope={self.scope.text!r}{gated})"

    def _repr_html_(self) -> str:
        from interp.display import html

        return html(self)

    def _norms(self) -> str:
        sizes = [float(p.map.tensors()["b"].norm()) * abs(p.map.strength) for p in self.parts]
        return f"norm {sizes[0]:.3g}" if len(sizes) == 1 else f"norms {min(sizes):.3g}..{max(sizes):.3g}"

    # -- keeping -----------------------------------------------------------------------------------------------
    def save(self, path: Any, **card: Any) -> Path:
        """``path.safetensors`` and ``path.card.json``; see `steering.disk.save`."""
        from steering.disk import save

        return save(self, path, **card)

    @classmethod
    def load(cls, path: Any, model: Any = None) -> SteeringMap:
        """What `save` wrote, checked against `model` if one is given."""
        from steering.disk import load

        return load(path, model)


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector(SteeringMap):
    """The additive case: one vector per site. Adding, subtracting, cosines and norms are defined."""

    @property
    def vectors(self) -> dict[str, Tensor]:
        """site -> vector, strength included; each has the site's axes behind the position, e.g. [d_model]."""
        return {p.site: p.map.tensors()["b"] * p.map.strength for p in self.parts}

    @property
    def vector(self) -> Tensor:
        """The only vector. SteeringError where there are several."""
        if len(self.parts) != 1:
            raise SteeringError(
                f"this {self.method} has {len(self.parts)} vectors; take .vectors[site] or .only(layer)"
            )
        return next(iter(self.vectors.values()))

    @property
    def norm(self) -> float:
        """Euclidean norm of the only vector."""
        return float(self.vector.norm())

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        self._same_model(other)
        if {p.scope.text for p in (*self.parts, *other.parts)} != {self.scope.text}:
            raise SteeringError(
                f"adding vectors of different scopes ({self.scope.text!r}, {other.scope.text!r}): "
                "give both one with .within(scope), or apply both: m.intervene(v, w)"
            )
        if any(p.gate is not self.gate for p in (*self.parts, *other.parts)):
            raise SteeringError("adding vectors with different gates: apply both instead, m.intervene(v, w)")
        mine, theirs = self.vectors, other.vectors
        for site in mine.keys() & theirs.keys():
            if mine[site].shape != theirs[site].shape:
                raise SteeringError(f"{site}: widths {list(mine[site].shape)} and {list(theirs[site].shape)} differ")
        total = {s: sum(v[s] for v in (mine, theirs) if s in v) for s in [*mine, *(t for t in theirs if t not in mine)]}
        parts = tuple(Part(s, Shift(torch.as_tensor(v)), self.scope, self.gate) for s, v in total.items())
        record = {"sum": [{"method": x.method, **x.record} for x in (self, other)]}
        method = self.method if self.method == other.method else f"{self.method} + {other.method}"
        return SteeringVector(parts, self.fingerprint, self.model, method, record)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + -other

    def unit(self) -> SteeringVector:
        """Each vector at norm 1."""
        return self.with_norm(1.0)

    def with_norm(self, norm: float | Mapping[str, float]) -> SteeringVector:
        """Each vector at the given norm (one for all, or by site)."""
        parts = []
        for site, vector in self.vectors.items():
            if float(vector.norm()) == 0:
                raise SteeringError(f"{self.method} at {site}: the vector is zero and has no direction")
            wanted = norm[site] if isinstance(norm, Mapping) else norm
            parts.append(vector * (wanted / vector.norm()))
        return replace(
            self, parts=tuple(replace(p, map=Shift(v)) for p, v in zip(self.parts, parts, strict=True))
        )  # fmt: skip

    def cosine(self, other: SteeringVector | Tensor) -> float:
        """Cosine with another vector, over the sites that both have, taken as one long vector; -1..1."""
        mine = self.vectors
        theirs = {self.sites[0]: other} if isinstance(other, Tensor) and len(mine) == 1 else {}
        if isinstance(other, SteeringVector):
            theirs = other.vectors
        shared = [s for s in mine if s in theirs]
        if not shared:
            raise SteeringError(f"cosine: no site in common ({self.sites} and {[*theirs]})")
        a, b = (torch.cat([v[s].double().flatten() for s in shared]) for v in (mine, theirs))
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    def against(self, m: Any, texts: Any) -> pd.DataFrame:
        """How large the vector is beside what flows there: one row per node.

        Columns: node, layer, norm (of the vector), stream (mean norm of the activations), ratio, cosine (mean over
        tokens of cos(v, h)), mean_cosine (with the mean activation).
        """
        from steering.norms import against

        return against(self, m, texts)


def equalise(vectors: list[SteeringVector]) -> list[SteeringVector]:
    """Vectors of several behaviours brought to one norm per site, the mean of theirs, as CAA does before comparing.

    Source: Rimsky et al. 2024 (arXiv:2312.06681), normalise_vectors; nothing is rescaled across layers.
    """
    sites = vectors[0].sites
    if any(v.sites != sites for v in vectors):
        raise SteeringError("equalise: the vectors live at different sites")
    mean = {s: float(torch.stack([v.vectors[s].norm() for v in vectors]).mean()) for s in sites}
    return [v.with_norm(mean) for v in vectors]


@recorded
def cosines(vectors: Mapping[str, SteeringVector]) -> pd.DataFrame:
    """Cosine of every vector with every other, as a square table with their names on both sides."""
    import pandas as pd

    rows = {a: {b: v.cosine(w) for b, w in vectors.items()} for a, v in vectors.items()}
    return pd.DataFrame(rows).T.loc[list(vectors), list(vectors)]


def _span(layers: list[int]) -> str:
    return f"{layers[0]}..{layers[-1]}" if layers else "none"
