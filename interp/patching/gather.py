"""From one number per place to one number per node.

A site's *map* has an entry per pair, position and index (head, neuron, expert). Nodes of one site are looked up in it
all at once, which is what makes a million neurons as cheap as their activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.patching.nodes import Node, Part
from interp.sites import Site


@dataclass(frozen=True, eq=False)
class Group:
    """Nodes that are entries of one map.

    Attributes:
        base: the whole site.
        keys: the index keys of the map's axes behind [pair, pos].
        node, position: number of each node, and its position; the width stands for all positions together.
        index: per key the index of each node.
        part: the part of the activation that is meant, one for all.
    """

    base: Site
    keys: tuple[str, ...]
    node: Tensor
    position: Tensor
    index: tuple[Tensor, ...]
    part: Part | None = None

    def look_up(self, values: Tensor) -> Tensor:
        """Entries of a map [pair, pos, *keys] for the group's nodes [entry, pair]."""
        whole = torch.cat([values, values.sum(1, keepdim=True)], 1)
        where: Any = (slice(None), self.position, *self.index)
        return whole[where].T

    def reduce(self, product: Tensor) -> Tensor:
        """Sums [pair, ...] in the site's axes over what no key names: the map [pair, pos, *keys]."""
        kind = self.base.kind
        axes = list(kind.axes)
        kept = [kind.axes[kind.pos_axis], *(kind.index[key] for key in self.keys)]
        gone = [i for i, axis in enumerate(axes) if i and axis not in kept]
        reduced = product.sum(gone) if gone else product
        left = [axis for i, axis in enumerate(axes) if i not in gone]
        return reduced.permute(0, *(left.index(axis) for axis in kept))


def grouped(nodes: Sequence[Node], width: int, device: torch.device) -> list[Group]:
    """The nodes' sites (a joint node has several) as groups."""
    found: dict[tuple[Site, tuple[str, ...], Part | None], list[tuple[int, Node, Site]]] = {}
    for i, node in enumerate(nodes):
        for site in node.sites:
            found.setdefault((site.base, tuple(key for key, _ in site.index), node.part), []).append((i, node, site))

    def tensor(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=device)

    return [
        Group(
            base,
            keys,
            tensor(i for i, _, _ in entries),
            tensor(width if node.position is None else node.position for _, node, _ in entries),
            tuple(tensor(site.index[axis][1] for _, _, site in entries) for axis in range(len(keys))),
            part,
        )
        for (base, keys, part), entries in found.items()
    ]


def gather(groups: Sequence[Group], n_nodes: int, n_pairs: int, of: Callable[[Group], Tensor | None]) -> Tensor:
    """Sum over each node's sites of its map's entry [node, pair]; groups whose map is None count 0."""
    out: Tensor | None = None
    for group in groups:
        if (values := of(group)) is not None:
            out = torch.zeros(n_nodes, n_pairs, device=values.device) if out is None else out
            out.index_add_(0, group.node, group.look_up(values.float()))
    return torch.zeros(n_nodes, n_pairs) if out is None else out
