"""Writing many patches into one stacked batch.

Row r of the batch is one patch of one pair. At each site that any of them touches stands one write, which gives every
row its own: ``where(mask, source of the row's pair, h)``. The writes stand where edits stand and see the same tensors.

Experts are switched in slots of their own. An expert that is patched may not be among the chosen ones of a token, so
the layer is given one more slot per patched expert; in the slots that the router gave, that expert's weight becomes 0.
The sum over slots is then exactly the sum with this one expert's weight (or weight x output) exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.activations import ExpertActivations, narrow
from interp.patching.nodes import Part
from interp.sites import Site


@dataclass(eq=False)
class Entry:
    """One patch at one site: which row of the batch, what of it, at which position (None: all)."""

    row: int
    site: Site
    position: int | None
    part: Part | None = None


@dataclass(eq=False)
class Swap:
    """Writes `there` [pair, pos, ...] over rows of a whole site.

    Attributes:
        site: the whole site.
        there: what the source run has here.
        pairs: the pair of each row of the batch [row].
        entries: the patches.
    """

    site: Site
    there: Tensor
    pairs: Tensor
    entries: list[Entry]

    def __post_init__(self) -> None:
        rows = list(dict.fromkeys(e.row for e in self.entries if e.part is None))
        place = {row: i for i, row in enumerate(rows)}
        self.rows = torch.tensor(rows, dtype=torch.long, device=self.there.device)
        picked = {self.site.kind.index[key] for e in self.entries for key, _ in e.site.index}
        positions = self.site.kind.axes[self.site.kind.pos_axis]
        shape = [
            size if axis in picked or axis == positions else 1
            for axis, size in zip(self.site.kind.axes[1:], self.there.shape[1:], strict=True)
        ]
        self.mask = torch.zeros(len(rows), *shape, dtype=torch.bool, device=self.there.device)
        for e in self.entries:
            if e.part is None:
                self._at(self.mask[place[e.row]], e, 0).fill_(True)

    def _at(self, row: Tensor, e: Entry, behind: int) -> Tensor:
        """The view of one row [pos, ...] that an entry names; `behind` columns are not in this call."""
        view = narrow(row[None], e.site)[0]
        if e.position is None:
            return view
        gone = {self.site.kind.index[key] for key, _ in e.site.index}
        axis = [a for a in self.site.kind.axes if a not in gone].index(self.site.kind.axes[self.site.kind.pos_axis]) - 1
        return view.select(axis, e.position - behind)

    def __call__(self, h: Tensor, clock: Any, ids: Tensor | None = None, inputs: Any = ()) -> Tensor:
        axis = self.site.kind.pos_axis
        behind = self.there.shape[axis] - h.shape[axis]  # columns of a cached prefix, which nothing here touches
        there = self.there.narrow(axis, behind, h.shape[axis])
        out = h.clone()
        if len(self.rows):
            mask = self.mask.narrow(axis, behind, h.shape[axis])
            out[self.rows] = torch.where(mask, there[self.pairs[self.rows]].to(h.dtype), h[self.rows])
        for e in self.entries:
            if e.part is not None:
                mixed = e.part(h[e.row], there[self.pairs[e.row]].to(h.dtype))
                self._at(out[e.row], e, behind).copy_(self._at(mixed, e, behind))
        return out


@dataclass(eq=False)
class Switch:
    """Patches of one MoE layer's experts; its three writes stand at expert_ids, expert_weight and expert_out.

    Attributes:
        layer: the layer.
        there: the layer's experts in the source run.
        pairs: the pair of each row of the batch [row].
        entries: the patches; their sites are expert_weight or expert_out with an expert.
    """

    layer: int
    there: ExpertActivations
    pairs: Tensor
    entries: list[Entry]
    chosen: Tensor | None = None  # what the router chose in the running call [row, pos, slot]

    def __post_init__(self) -> None:
        slots: dict[int, list[Entry]] = {}
        for e in self.entries:
            slots.setdefault(e.row, []).append(e)
        n, width, device = len(self.pairs), self.there.ids.shape[1], self.there.ids.device
        most = max(map(len, slots.values()))
        self.ids = torch.zeros(n, most, dtype=torch.long, device=device)
        self.on = torch.zeros(n, width, most, dtype=torch.bool, device=device)
        self.weight = torch.zeros(n, width, most, dtype=self.there.weights.dtype, device=device)
        self.out: dict[tuple[int, int], Tensor] = {}  # (row, slot) -> what the expert adds in the source run
        for row, patches in slots.items():
            for slot, e in enumerate(patches):
                expert, pair = dict(e.site.index)["expert"], self.pairs[row]
                self.ids[row, slot] = expert
                self.on[row, slice(None) if e.position is None else e.position, slot] = True
                hit = (self.there.ids[pair] == expert) * self.there.weights[pair]  # [pos, slot]
                if e.site.name == "expert_weight":
                    self.weight[row, :, slot] = hit.sum(-1)
                else:
                    assert self.there.out is not None
                    self.weight[row, :, slot] = 1.0
                    self.out[row, slot] = (hit[..., None].to(self.there.out.dtype) * self.there.out[pair]).sum(1)

    def writes(self) -> list[Write]:
        names = ["expert_ids", "expert_weight", *(["expert_out"] if self.out else [])]
        return [Write(Site(name, self.layer), self) for name in names]

    def widen_ids(self, ids: Tensor) -> Tensor:
        self.chosen = ids
        extra = self.ids[:, None].expand(-1, ids.shape[1], -1)
        return torch.cat([ids, extra.to(ids.dtype)], -1)

    def widen_weights(self, weights: Tensor) -> Tensor:
        assert self.chosen is not None
        behind = self.on.shape[1] - weights.shape[1]
        on, new = self.on[:, behind:], self.weight[:, behind:]
        patched = (self.chosen[..., None] == self.ids[:, None, None]) & on[:, :, None]  # [row, pos, slot, patch]
        return torch.cat([weights.masked_fill(patched.any(-1), 0), (new * on).to(weights.dtype)], -1)

    def exchange(self, out: Tensor) -> Tensor:
        """`out` [row, pos, slot, d_model] with the added slots' outputs from the source run."""
        out, first = out.clone(), out.shape[2] - self.ids.shape[1]
        for (row, slot), value in self.out.items():
            out[row, :, first + slot] = value[value.shape[0] - out.shape[1] :].to(out.dtype)
        return out


@dataclass(eq=False)
class Write:
    """One of a `Switch`'s writes, at its site."""

    site: Site
    switch: Switch

    def __call__(self, h: Tensor, clock: Any, ids: Tensor | None = None, inputs: Any = ()) -> Tensor:
        if self.site.name == "expert_ids":
            return self.switch.widen_ids(h)
        if self.site.name == "expert_weight":
            return self.switch.widen_weights(h)
        return self.switch.exchange(h)


@dataclass(eq=False)
class Given:
    """Gives every row of the batch its pair's `value` [pair, pos, d_model]: the corrupt run's noised embeddings."""

    site: Site
    value: Tensor
    pairs: Tensor

    def __call__(self, h: Tensor, clock: Any, ids: Tensor | None = None, inputs: Any = ()) -> Tensor:
        value = self.value[self.pairs, self.value.shape[1] - h.shape[1] :].to(h.dtype)
        return value + 0 * h if h.requires_grad else value  # the graph begins at the embedding


def writes(
    entries: Sequence[Entry], pairs: Tensor, there: dict[Site, Tensor], experts: dict[int, ExpertActivations]
) -> list[Any]:
    """The writes of a stacked batch, one per site (three per MoE layer whose experts are patched)."""
    plain: dict[Site, list[Entry]] = {}
    switched: dict[int, list[Entry]] = {}
    for e in entries:
        if e.site.kind.routed:
            assert e.site.layer is not None
            switched.setdefault(e.site.layer, []).append(e)
        else:
            plain.setdefault(e.site.base, []).append(e)
    made: list[Any] = [Swap(site, there[site], pairs, group) for site, group in plain.items()]
    for layer, group in switched.items():
        made += Switch(layer, experts[layer], pairs, group).writes()
    return made
