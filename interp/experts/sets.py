"""ExpertSet: some units of one model, with a record of how they were chosen.

    law = experts.select(stats, "law", rule="skew", ratio=2.0)
    odd = experts.ExpertSet(m, {3: [17, 40]})           by hand: layer -> unit ids (Monet: i * n + j)
    both = law | odd
    both.save("law.json")

Sets of one model support ``|``, ``&``, ``-``, ``==``, ``len()`` and ``(layer, unit) in s``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.experts.units import ExpertError, Units, identity, units_of

FORMAT = "interp.experts.set/1"


@dataclass(frozen=True, eq=False, init=False)
class ExpertSet:
    """Units of a model: layer -> sorted ids.

    Args:
        model: the Model they belong to.
        ids: layer -> unit ids (Monet: ``i * n + j``).
        kind: "monet", "routed", "neurons", or "auto" for what the model has.
        record: how they were chosen; kept in files, merged by set operations.

    Raises ExpertError for a layer or id that the model lacks.
    """

    kind: str
    size: int
    fingerprint: str
    name: str
    n_layers: int
    ids: Mapping[int, Tensor]
    record: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        model: Any,
        ids: Mapping[int, Iterable[int] | Tensor],
        kind: str = "auto",
        record: Mapping[str, Any] | None = None,
    ) -> None:
        units = units_of(model, kind)
        self._fill(units.kind, units.size, identity(model), model.name, model.n_layers, _sorted(ids, units), record)

    def _fill(
        self, kind: str, size: int, fingerprint: str, name: str, n_layers: int,
        ids: Mapping[int, Tensor], record: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        values = {"kind": kind, "size": size, "fingerprint": fingerprint, "name": name, "n_layers": n_layers}
        for key, value in (*values.items(), ("ids", dict(ids)), ("record", dict(record or {}))):
            object.__setattr__(self, key, value)

    @classmethod
    def _of(cls, like: Any, ids: Mapping[int, Tensor], record: Mapping[str, Any]) -> ExpertSet:
        """A set for the model that `like` (a set or statistics) belongs to."""
        self = cls.__new__(cls)
        kept = {layer: chosen for layer, chosen in sorted(ids.items()) if len(chosen)}
        self._fill(like.kind, like.size, like.fingerprint, like.name, like.n_layers, kept, record)
        return self

    # -- reading -----------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        """Units in the set, over all layers."""
        return sum(map(len, self.ids.values()))

    def __contains__(self, unit: tuple[int, int]) -> bool:
        layer, expert = unit
        return layer in self.ids and bool((self.ids[layer] == expert).any())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ExpertSet)
            and self.fingerprint == other.fingerprint
            and [*self.ids] == [*other.ids]
            and all(torch.equal(v, other.ids[k]) for k, v in self.ids.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        what = {"monet": "experts", "routed": "experts", "neurons": "neurons"}[self.kind]
        how = f", {self.record['rule']}" if "rule" in self.record else ""
        return f"ExpertSet({len(self):,} {what} of {self.name} in {len(self.ids)} layers{how})"

    def _repr_html_(self) -> str:
        from interp.display import html

        return html(self)

    @property
    def share(self) -> float:
        """Part of all the model's units of this kind, 0..1, over the layers that have any."""
        return len(self) / max(1, self.size * self.n_layers)

    # -- algebra -----------------------------------------------------------------------------------------------
    def __or__(self, other: ExpertSet) -> ExpertSet:
        return self._with(other, torch.logical_or, "union")

    def __and__(self, other: ExpertSet) -> ExpertSet:
        return self._with(other, torch.logical_and, "intersection")

    def __sub__(self, other: ExpertSet) -> ExpertSet:
        return self._with(other, lambda a, b: a & ~b, "difference")

    def _with(self, other: ExpertSet, combine: Callable[[Tensor, Tensor], Tensor], name: str) -> ExpertSet:
        if not isinstance(other, ExpertSet):
            return NotImplemented
        if (self.fingerprint, self.kind) != (other.fingerprint, other.kind):
            raise ExpertError(
                f"sets of different models or kinds: {self.kind} of {self.name} and {other.kind} of {other.name}"
            )
        ids = {layer: combine(self.mask(layer), other.mask(layer)).nonzero()[:, 0] for layer in {*self.ids, *other.ids}}
        return ExpertSet._of(self, ids, {"rule": name, "of": [self.record, other.record]})

    def mask(self, layer: int) -> Tensor:
        """bool [unit], True = in the set."""
        return torch.zeros(self.size, dtype=torch.bool).index_fill_(0, self.ids.get(layer, _EMPTY), True)

    # -- keeping -----------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """One JSON file: model fingerprint, ids per layer, record."""
        path = Path(path)
        about = {"format": FORMAT, "kind": self.kind, "size": self.size, "n_layers": self.n_layers, "model": self.name}
        ids = {str(layer): chosen.tolist() for layer, chosen in self.ids.items()}
        text = json.dumps({**about, "fingerprint": self.fingerprint, "record": self.record, "ids": ids}, default=str)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text + "\n")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> ExpertSet:
        """Reads what `save` wrote. Raises ExpertError unless it was made for this very model."""
        data = json.loads(Path(path).read_text())
        if data.get("format") != FORMAT:
            raise ExpertError(f"{os.fspath(path)}: format {data.get('format')!r}; an expert set has {FORMAT!r}")
        if data["fingerprint"] != (here := identity(model)):
            raise ExpertError(
                f"{os.fspath(path)}: made for {data['model']} ({data['fingerprint'][:12]}), not for {model.name} "
                f"({here[:12]}); experts of one model mean nothing in another"
            )
        return cls(model, {int(k): v for k, v in data["ids"].items()}, data["kind"], data["record"])

    def recipe(self) -> dict[str, Any]:
        """What `from_recipe` makes it again from: plain values."""
        about = {"kind": self.kind, "size": self.size, "fingerprint": self.fingerprint, "name": self.name}
        ids = {layer: chosen.tolist() for layer, chosen in self.ids.items()}
        return {**about, "n_layers": self.n_layers, "ids": ids, "record": self.record}

    @classmethod
    def from_recipe(cls, data: Mapping[str, Any]) -> ExpertSet:
        self = cls.__new__(cls)
        self._fill(**{**data, "ids": {layer: torch.tensor(chosen) for layer, chosen in data["ids"].items()}})
        return self

    def check(self, model: Any) -> Units:
        """The model's units. Raises ExpertError unless this set was made for it."""
        if (here := identity(model)) != self.fingerprint:
            raise ExpertError(
                f"this set was made for {self.name} ({self.fingerprint[:12]}), not for {model.name} ({here[:12]}); "
                "experts of one model mean nothing in another"
            )
        return units_of(model, self.kind)


_EMPTY = torch.zeros(0, dtype=torch.long)


def _sorted(ids: Mapping[int, Any], units: Units) -> dict[int, Tensor]:
    out = {}
    for layer, chosen in sorted(ids.items()):
        if layer not in units.layers:
            raise ExpertError(f"layer {layer}: the layers with {units.kind} units are {sorted(units.layers)}")
        listed = torch.as_tensor(chosen if isinstance(chosen, Tensor) else list(chosen))
        if listed.numel() and (listed.is_floating_point() or listed.dtype == torch.bool):
            raise ExpertError(f"layer {layer}: ids of {listed.dtype}; expected whole numbers")
        flat = listed.long().reshape(-1).cpu().unique()
        if len(flat) and not 0 <= int(flat[0]) <= int(flat[-1]) < units.size:
            bad = int(flat[0]) if int(flat[0]) < 0 else int(flat[-1])
            raise ExpertError(f"layer {layer}: expert {bad}; a layer has experts 0..{units.size - 1}")
        if len(flat):
            out[layer] = flat
    return out
