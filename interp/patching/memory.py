"""Memory, planned beforehand: how many patches fit into one batch.

What a forward pass takes at its peak depends on the family (eager or fused attention, experts, a capped softmax over a
large vocabulary), so it is measured and not guessed: one row runs under a `Meter`, which sees every tensor that is made
and every one that is let go, and the batch is as large as the budget allows.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What kernels take for themselves while they run, which no tensor shows.
MARGIN = 1.2


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
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._seen:
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


def default_budget(device: torch.device) -> int:
    """1 GiB on a processor, half of what is free on a GPU, in bytes."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**30


def nbytes(*tensors: Any) -> int:
    """Bytes that tensors, or the values of mappings of tensors, take."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def human(n: float) -> str:
    return f"{n / 2**20:.1f} MiB" if n >= 2**19 else f"{n / 2**10:.1f} KiB"
