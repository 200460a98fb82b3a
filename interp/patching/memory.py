"""Memory, planned beforehand: how many patches fit into one batch.

What a forward pass takes at its peak depends on the family (eager or fused attention, experts, a capped softmax over a
large vocabulary), so it is measured and not guessed: one row runs under a `Meter`, which sees every tensor that is made
and every one that is let go, and the batch is as large as the budget allows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What no tensor shows: buffers of kernels while they run, and freed memory that the allocator keeps.
MARGIN = 1.3


class BudgetError(ValueError):
    """A memory budget that does not hold a single patch."""


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, now and at the peak. A view counts once, with its base."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out if isinstance(out, (tuple, list)) else (out,)):
            if tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen and not _holds((*args, *(kwargs or {}).values()), storage._cdata):
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, which hold them bare or in lists; this runs very often."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _holds(values: Any, key: int) -> bool:
    """Is a storage the one of some tensor among `values`, of which a result is then a view?"""
    return any(tensor.untyped_storage()._cdata == key for tensor in _tensors(values))


def default_budget(device: torch.device) -> int:
    """1 GiB on a processor, half of what is free on a GPU, in bytes."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**30


def nbytes(*tensors: Any) -> int:
    """Bytes that tensors, or the values of mappings of tensors, take."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def human(n: float) -> str:
    return f"{n / 2**20:.1f} MiB" if n >= 2**19 else f"{n / 2**10:.1f} KiB"
