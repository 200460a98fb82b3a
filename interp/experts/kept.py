"""What routing statistics keep besides sums, still in bounded memory: some whole documents, the strongest tokens.

Both can be joined with those of another worker, and what is kept does not depend on who measured which documents, or in
which order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """At most `cap` documents of each label, with their own means.

    Which ones is decided by a hash of their tokens (the smallest are kept), so it is a random sample that any number of
    workers agree on.

    Attributes:
        cap: scalar.
        key: the hash [document].
        label: [document].
        tokens: [document].
        mean: mean weight of each unit over the document's tokens [document, router, unit], float32.
    """

    cap: Tensor
    key: Tensor
    label: Tensor
    tokens: Tensor
    mean: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"cap": self.cap, "key": self.key, "label": self.label, "tokens": self.tokens, "mean": self.mean}

    def __len__(self) -> int:
        return len(self.key)

    def __add__(self, other: Documents) -> Documents:
        pairs = zip(list(self.tensors().items())[1:], list(other.tensors().values())[1:], strict=True)
        joined = {name: torch.cat([mine, theirs]) for (name, mine), theirs in pairs}
        return Documents(torch.minimum(self.cap, other.cap), **joined)._smallest()

    def _smallest(self) -> Documents:
        rows = []
        for label in self.label.unique().tolist():
            here = (self.label == label).nonzero()[:, 0]
            rows.append(here[self.key[here].argsort()[: int(self.cap)]])
        return self._rows(torch.cat(rows)) if rows else self

    def _rows(self, rows: Tensor) -> Documents:
        return Documents(self.cap, self.key[rows], self.label[rows], self.tokens[rows], self.mean[rows])

    def relabelled(self, order: Sequence[int]) -> Documents:
        """The documents of some labels; `order` lists old labels by their new number, -1 for none."""
        new = {old: i for i, old in enumerate(order) if old >= 0}
        rows = torch.tensor([i for i, label in enumerate(self.label.tolist()) if label in new], dtype=torch.long)
        kept = self._rows(rows)
        label = torch.tensor([new[label] for label in kept.label.tolist()], dtype=torch.long)
        return Documents(self.cap, kept.key, label, kept.tokens, kept.mean)


def key_of(pieces: Sequence[Sequence[int]]) -> int:
    """A hash of a document's token ids, cut into windows or not: 62 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(torch.tensor(piece, dtype=torch.int32).numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 2


@dataclass(frozen=True, eq=False)
class Examples:
    """The k tokens at which each unit weighs most, with the tokens around them.

    Attributes:
        weight: 0 where a unit has fewer than k [router, unit, k], float32, falling.
        ids: token ids before, at and after; -1 outside the window [router, unit, k, 2 * around + 1].
        label: [router, unit, k].
        position: the token's place in its window [router, unit, k].
    """

    weight: Tensor
    ids: Tensor
    label: Tensor
    position: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "ids": self.ids, "label": self.label, "position": self.position}

    @property
    def around(self) -> int:
        return (self.ids.shape[-1] - 1) // 2

    @classmethod
    def none(cls, routers: int, units: int, k: int, around: int) -> Examples:
        """No example yet."""
        shape, empty = (routers, units, k), torch.zeros(routers, units, k, dtype=torch.int32)
        ids = torch.full((*shape, 2 * around + 1), -1, dtype=torch.int32)
        return cls(torch.zeros(shape), ids, empty, empty.clone())

    def __add__(self, other: Examples) -> Examples:
        """The strongest of both."""
        both = {name: torch.cat([mine, getattr(other, name)], 2) for name, mine in self.tensors().items()}
        return Examples(**both).strongest(min(self.weight.shape[-1], other.weight.shape[-1]))

    def strongest(self, k: int) -> Examples:
        """The k of largest weight. Where weights are equal the context decides, so that no order of joining does."""
        spread = torch.arange(1, self.ids.shape[-1] + 1)
        tie = (self.ids.long() * spread).sum(-1) * 4096 + self.position
        order = tie.argsort(dim=-1, stable=True)
        order = order.gather(-1, self.weight.gather(-1, order).argsort(dim=-1, descending=True, stable=True))[..., :k]
        ids = self.ids.gather(2, order[..., None].expand(*order.shape, len(spread)))
        return Examples(self.weight.gather(2, order), ids, self.label.gather(2, order), self.position.gather(2, order))

    def relabelled(self, order: Sequence[int]) -> Examples:
        """The examples of some labels; `order` lists old labels by their new number, -1 for none."""
        top = int(self.label.max()) + 1 if self.label.numel() else 1
        new = torch.full((max(top, *(o + 1 for o in order)),), -1, dtype=torch.int32)
        for i, old in enumerate(order):
            if old >= 0:
                new[old] = i
        label = new[self.label.long()]
        kept = torch.where(label >= 0, self.weight, torch.zeros_like(self.weight))
        ids = torch.where(kept[..., None] > 0, self.ids, -1)
        return Examples(kept, ids, label.clamp_min(0), self.position).strongest(self.weight.shape[-1])
