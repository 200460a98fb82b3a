"""Routing statistics: how much of each kind of text each expert handles.

One pass over labelled documents (`interp.experts.collect`) keeps sums only, so memory does not grow with the text and
results of several workers add up (``a + b``). Per label, router and unit there are always

    mass          sum over tokens of the unit's routing weight; divided by the tokens, its routing probability there
    used          tokens that used it at all
    doc_sum       sum over documents of the document's mean weight,
    doc_square    of its square, and
    doc_used      of the share of the document's tokens that used it: enough for what weighs documents alike

and, where they were asked for,

    out_norm      sum over the tokens that used it of the norm of its output
    contribution  the same of weight x output, what it adds to the layer's sum
    positions     mass by the token's place in its window: 0, 1, 2-3, 4-7, ... [label, router, unit, bin]
    together      tokens that used both units of a pair [label, router, unit, unit]
    documents     a bounded number of documents with their own means: for rules that rank documents, and for chance
    examples      the tokens at which each unit weighs most, with their context
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.kept import Documents, Examples
from interp.experts.units import ExpertError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "interp.experts.routing/2"
SUMS = ("tokens", "documents", "mass", "used", "doc_sum", "doc_square", "doc_used")
_ABOUT = ("kind", "size", "fingerprint", "name", "n_layers", "labels", "data")


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """Sums over labelled text, in the order of `labels`.

    Attributes:
        layers: layer -> router; layers that share a router share its row.
        tokens, documents: [label].
        mass, used, doc_sum, doc_square, doc_used: [label, router, unit], float64.
        more: further sums by name, the label on their first axis; see the module.
        sample: documents kept with their own means, or None.
        examples: the strongest tokens of each unit, or None.
        data: digests of the texts that were measured.
    """

    kind: str
    size: int
    fingerprint: str
    name: str
    n_layers: int
    layers: dict[int, int]
    labels: list[str]
    tokens: Tensor
    documents: Tensor
    mass: Tensor
    used: Tensor
    doc_sum: Tensor
    doc_square: Tensor
    doc_used: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)
    sample: Documents | None = None
    examples: Examples | None = None
    data: list[str] = field(default_factory=list)

    # -- reading -----------------------------------------------------------------------------------------------
    @property
    def probability(self) -> Tensor:
        """Mean weight per token [label, router, unit]: Monet's routing probability, summed over heads."""
        return self.mass / self.tokens[:, None, None]

    @property
    def rate(self) -> Tensor:
        """Share of tokens that used the unit [label, router, unit]: SteerMoE's selection rate."""
        return self.used / self.tokens[:, None, None]

    def __repr__(self) -> str:
        tokens = ", ".join(f"{label} {int(n):,}" for label, n in zip(self.labels, self.tokens, strict=True))
        more = f"; {', '.join(sorted(self.more))}" if self.more else ""
        units = f"{self.kind}, {len(self.layers)} layers x {self.size:,}"
        return f"RoutingStats({units} of {self.name}; tokens: {tokens}{more})"

    def index(self, label: str) -> int:
        if label not in self.labels:
            raise ExpertError(f"label {label!r}: the statistics have {', '.join(self.labels)}")
        return self.labels.index(label)

    def measured(self, name: str) -> Tensor:
        """One of the further sums. Raises ExpertError, with the argument to pass, where it was not asked for."""
        if name not in self.more:
            ask = {"out_norm": "norms", "contribution": "norms", "position_tokens": "positions"}.get(name, name)
            raise ExpertError(f"{name} was not measured; pass {ask}=True to experts.routing")
        return self.more[name]

    def contrast(self, label: str, against: str | None = None) -> tuple[int, list[int]]:
        """Index of `label` and of those it is set against: one of them, or all others.

        Raises ExpertError where there is no other.
        """
        at = self.index(label)
        others = [self.index(against)] if against else [i for i in range(len(self.labels)) if i != at]
        if not others or at in others:
            raise ExpertError(f"against={against!r}: {label!r} needs at least one other label to be set against")
        return at, others

    # -- joining -----------------------------------------------------------------------------------------------
    def only(self, labels: Sequence[str]) -> RoutingStats:
        """The statistics of some labels, in the given order: what 'the second-highest domain' is taken among."""
        rows = torch.tensor([self.index(label) for label in labels])
        kept = [getattr(self, name)[rows] for name in SUMS]
        more = {name: value[rows] for name, value in self.more.items()}
        sample = self.sample.relabelled(rows.tolist()) if self.sample else None
        examples = self.examples.relabelled(rows.tolist()) if self.examples else None
        return self._like(list(labels), kept, more, sample, examples, self.data)

    def __add__(self, other: RoutingStats) -> RoutingStats:
        """Statistics over both texts; labels need not be the same, but the same must have been measured."""
        if (self.fingerprint, self.kind) != (other.fingerprint, other.kind):
            raise ExpertError(f"statistics of different models: {self.name} and {other.name}")
        for name in {*self.more} ^ {*other.more}:
            raise ExpertError(f"{name} was measured in one of the two statistics only")
        if (self.sample is None) != (other.sample is None) or (self.examples is None) != (other.examples is None):
            raise ExpertError("one of the two statistics kept documents or examples, the other did not")
        labels = list(dict.fromkeys([*self.labels, *other.labels]))
        parts = [(s, torch.tensor([labels.index(label) for label in s.labels])) for s in (self, other)]

        def total(values: list[Tensor]) -> Tensor:
            out = values[0].new_zeros(len(labels), *values[0].shape[1:])
            for value, (_, rows) in zip(values, parts, strict=True):
                out.index_add_(0, rows, value)
            return out

        sums = [total([getattr(s, name) for s, _ in parts]) for name in SUMS]
        more = {name: total([s.more[name] for s, _ in parts]) for name in self.more}
        order = [[s.labels.index(label) if label in s.labels else -1 for label in labels] for s, _ in parts]
        sample = examples = None
        if self.sample and other.sample:
            sample = self.sample.relabelled(order[0]) + other.sample.relabelled(order[1])
        if self.examples and other.examples:
            examples = self.examples.relabelled(order[0]) + other.examples.relabelled(order[1])
        return self._like(labels, sums, more, sample, examples, list(dict.fromkeys([*self.data, *other.data])))

    def _like(
        self, labels: list[str], sums: Sequence[Tensor], more: Mapping[str, Tensor], sample: Documents | None,
        examples: Examples | None, data: list[str],
    ) -> RoutingStats:  # fmt: skip
        named: dict[str, Any] = dict(zip(SUMS, sums, strict=True))
        return replace(self, labels=labels, more=more, sample=sample, examples=examples, data=data, **named)

    # -- as tables ---------------------------------------------------------------------------------------------
    @recorded
    def frame(self, labels: Sequence[str] | None = None) -> pd.DataFrame:
        """One line per layer, expert and label: layer, router, expert, label, mass (per token), used (share of tokens).

        Where norms were measured also out_norm (mean over the tokens that used the expert) and contribution (norm of
        weight x output, per token). A line per pair and label is much for a Monet of 262,144 experts a layer: pass
        `labels`, or read the tensors.
        """
        columns = {"mass": self.probability, "used": self.rate}
        if "out_norm" in self.more:
            columns["out_norm"] = self.more["out_norm"] / self.used.clamp_min(1)
            columns["contribution"] = self.more["contribution"] / self.tokens[:, None, None]
        return self.table(columns, labels)

    @recorded
    def profile(self, labels: Sequence[str] | None = None) -> pd.DataFrame:
        """Mean weight by the token's place in its window: layer, router, expert, label, position, mass.

        A position is where its bin begins; bins are 0, 1, 2-3, 4-7, ...: a place tells most about the first few tokens.
        """
        import pandas as pd

        mass, tokens = self.measured("positions"), self.measured("position_tokens")
        rows = []
        for at in range(mass.shape[-1]):
            here = mass[..., at] / tokens[:, None, None, at].clamp_min(1)
            rows.append(self.table({"mass": here}, labels).assign(position=2 ** (at - 1) if at else 0))
        frame = pd.concat(rows, ignore_index=True)
        frame.attrs.update(self.about())
        return frame[["layer", "router", "expert", "label", "position", "mass"]]

    def table(self, columns: Mapping[str, Tensor], labels: Sequence[str] | None = None) -> pd.DataFrame:
        """Values [label, router, unit] as columns beside layer, router, expert and label."""
        import pandas as pd

        parts = []
        for label in labels or self.labels:
            at = self.index(label)
            for layer, router in self.layers.items():
                about = {"layer": layer, "router": router, "expert": range(self.size), "label": label}
                parts.append(pd.DataFrame({**about, **{name: v[at, router].numpy() for name, v in columns.items()}}))
        frame = pd.concat(parts, ignore_index=True)
        frame.attrs.update(self.about())
        return frame

    def about(self) -> dict[str, Any]:
        """What every table of these statistics says of where it comes from."""
        tokens = [int(n) for n in self.tokens]
        return {"model": self.name, "fingerprint": self.fingerprint, "kind": self.kind, "labels": self.labels,
                "tokens": tokens, "data": self.data}  # fmt: skip

    # -- keeping -----------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """One safetensors file."""
        from safetensors.torch import save_file

        path = Path(path)
        about = {name: getattr(self, name) for name in _ABOUT}
        about["layers"] = list(self.layers.items())
        tensors = {name: getattr(self, name) for name in SUMS}
        tensors |= {f"more.{name}": value for name, value in self.more.items()}
        tensors |= {f"sample.{k}": v for k, v in (self.sample.tensors() if self.sample else {}).items()}
        tensors |= {f"examples.{k}": v for k, v in (self.examples.tensors() if self.examples else {}).items()}
        partial = path.with_name(f".{path.name}.partial")
        meta = {"format": FORMAT, "about": json.dumps(about)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, meta)
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingStats:
        """Reads what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise ExpertError(f"{os.fspath(path)}: format {meta.get('format')!r}; expected {FORMAT!r}")
            about = json.loads(meta["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        about["layers"] = {int(k): v for k, v in about["layers"]}
        sums = {name: tensors[name] for name in SUMS}
        sample, examples = part("sample."), part("examples.")
        return cls(
            **about, **sums, more=part("more."), sample=Documents(**sample) if sample else None,
            examples=Examples(**examples) if examples else None,
        )  # fmt: skip
