"""The rows of one site as a lazy array over memory-mapped shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from interp.sites import Site
from interp.store.errors import Corrupt
from interp.store.tensors import MEND, take

if TYPE_CHECKING:
    from interp.store.dataset import ActivationDataset


class SiteRows:
    """The rows of one site, as a lazy array [row, ...]: index it with a number, a slice, a list, or a tensor.

    Attributes:
        site: the site.
        shape: rows and the shape of one row.
        dtype: as stored.
    """

    def __init__(self, dataset: ActivationDataset, site: Site) -> None:
        entry = dataset.manifest["sites"][str(site)]
        self.site = site
        self.shape = torch.Size([dataset.n_rows, *entry["shape"]])
        self.dtype: torch.dtype = getattr(torch, entry["dtype"])
        self._dataset = dataset

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Rows as an ordinary tensor of their own: one row for a number, else [row, ...]."""
        n = len(self)
        if isinstance(key, int | np.integer):
            key = int(key)
            if not -n <= key < n:
                raise IndexError(f"{self.site}: row {key} is out of range; there are {n}")
            return self._span(key % n, key % n + 1)[0]
        if isinstance(key, slice):
            start, stop, step = key.indices(n)
            if step == 1:
                return self._span(start, max(start, stop))
            return self.gather(torch.arange(n)[key] if step > 0 else torch.tensor(range(n)[key], dtype=torch.int64))
        index = key if isinstance(key, Tensor) else torch.tensor(key)
        if index.dtype == torch.bool:
            if len(index) != n:
                raise IndexError(f"{self.site}: a mask of {len(index)} for {n} rows")
            index = index.nonzero().flatten()
        return self.gather(index)

    def gather(self, index: Tensor) -> Tensor:
        """Rows in any order [row, ...]; each shard is read once, front to back."""
        index = index.long()
        if index.numel() and not (-len(self) <= int(index.min()) and int(index.max()) < len(self)):
            raise IndexError(f"{self.site}: rows {int(index.min())} to {int(index.max())}; there are {len(self)}")
        index = index % max(1, len(self))
        place = torch.from_numpy(index.numpy().argsort(kind="stable"))
        ordered, starts = index[place], self._dataset.starts
        out = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        bounds = [*torch.searchsorted(ordered, starts).tolist(), len(index)]
        for part, (a, b) in enumerate(pairwise(bounds)):
            if a < b:
                take(self._shard(part), ordered[a:b] - starts[part], out[a:b])
        return take(out, torch.from_numpy(place.numpy().argsort(kind="stable")))  # back into the order asked for

    def _span(self, start: int, stop: int) -> Tensor:
        pieces = [self._shard(p)[a:b] for p, a, b in self._dataset.spans(start, stop)]
        return torch.cat(pieces) if pieces else torch.empty(0, *self.shape[1:], dtype=self.dtype)

    def shards(self) -> Iterator[Tensor]:
        """The rows shard by shard [row, ...] in order, without a copy: do not write into them."""
        return (self._shard(part) for part in range(self._dataset.n_parts))

    def _shard(self, part: int) -> Tensor:
        rows = self._dataset.tensors(part, self.site).get("rows")
        expected = self._dataset.manifest["parts"][part]["rows"]
        if rows is None or len(rows) != expected:
            raise Corrupt(f"{self.site}: shard {part} holds {'no rows' if rows is None else len(rows)}, "
                          f"the manifest says {expected}; {MEND}")
        return rows

    def __repr__(self) -> str:
        return f"SiteRows({self.site}, shape {list(self.shape)}, {self.dtype})"
