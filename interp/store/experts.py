"""Per-expert activations on disk: a ragged table, sorted by expert.

A token visits `top_k` of `n_experts` experts, so the neurons of experts are no dense array. Each shard keeps one row
per (token, slot), sorted by expert, and `offsets` [expert + 1]: the rows of expert e are
``offsets[e]:offsets[e + 1]``, one contiguous piece that a memory map reads without touching the rest. Only the neurons
(`hidden`) are kept; the expert's output is ``W_down @ hidden`` and is computed again on reading, which for OLMoE makes
16 KB of 49 per token and layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.activations import ExpertActivations
from interp.store.errors import StoreError
from interp.store.tensors import Shapes, as_items, real_tokens, rows_in, take


class ExpertTable:
    """Collects the expert activations of one shard, then gives them back sorted by expert.

    The batches stay as they came: neurons are moved once, from the batch straight to their place in the sorted table.

    Args:
        n_experts: experts of the layer.
        dtype: of the neurons on disk; weights stay in float32, they are few.
    """

    def __init__(self, n_experts: int, dtype: torch.dtype) -> None:
        self.n_experts, self.dtype = n_experts, dtype
        self.ids: list[Tensor] = []  # of each batch: [row, slot]
        self.weights: list[Tensor] = []  # [row, slot]
        self.hidden: list[Tensor] = []  # [row x slot, neuron]

    def append(self, experts: ExpertActivations, mask: Tensor) -> None:
        """Take in a batch; only tokens where `mask` [batch, pos] is true."""
        if experts.hidden is None:
            raise StoreError(f"expert_hidden[{experts.layer}]: the model gave no neurons of its experts")
        hidden = real_tokens(experts.hidden, mask).to(self.dtype)
        self.slots, self.neurons = hidden.shape[1:]
        self.hidden.append(hidden.flatten(0, 1))
        self.ids.append(real_tokens(experts.ids, mask).int())
        self.weights.append(real_tokens(experts.weights, mask).float())

    @property
    def nbytes(self) -> int:
        """Bytes held by the neurons, which is nearly all."""
        return sum(batch.nbytes for batch in self.hidden)

    def sort(self) -> None:
        """Order the (token, slot) pairs by expert, then by token."""
        ids = torch.cat(self.ids).flatten().numpy()
        # numpy sorts short whole numbers by counting, a hundred times faster than torch.
        narrow = ids.astype(np.int16) if self.n_experts < 1 << 15 else ids
        order = narrow.argsort(kind="stable")
        # Some routers mark a dropped slot with an id that is no expert; such a slot has no neurons to keep.
        valid = (ids[order] >= 0) & (ids[order] < self.n_experts)
        self.order = torch.from_numpy(order[valid])
        counts = np.bincount(ids[order[valid]], minlength=self.n_experts)
        self.offsets = torch.from_numpy(np.concatenate([[0], counts.cumsum()]))

    @property
    def counts(self) -> Tensor:
        """Rows of each expert [expert]."""
        return self.offsets.diff()

    @property
    def shapes(self) -> Shapes:
        n = len(self.order)
        return {
            "offsets": (torch.int64, (self.n_experts + 1,)),
            "token_row": (torch.int32, (n,)),
            "weight": (torch.float32, (n,)),
            "hidden": (self.dtype, (n, self.neurons)),
            "slot": (torch.int16, (n,)),
        }

    def pieces(self, size: int) -> Iterator[tuple[str, Tensor]]:
        """The columns in the order of `shapes`. `hidden` comes in pieces of about `size` bytes, in memory that the next
        piece takes over; after the last the neurons are let go.
        """
        row, slot = np.divmod(self.order.numpy(), self.slots)
        yield "offsets", self.offsets
        yield "token_row", torch.from_numpy(row.astype(np.int32))
        yield "weight", take(torch.cat(self.weights).flatten(), self.order)
        rows = rows_in(size, self.hidden[0])
        buffer = torch.empty(rows, self.neurons, dtype=self.dtype)
        for block in self.order.split(rows):
            self._gather(block.numpy(), buffer)
            yield "hidden", buffer[: len(block)]
        self.hidden.clear()
        yield "slot", torch.from_numpy(slot.astype(np.int16))

    def _gather(self, pairs: Any, buffer: Tensor) -> None:
        """Copy the neurons of some sorted (token, slot) pairs, given by number, to the start of `buffer`."""
        sources, out = [as_items(batch) for batch in self.hidden], as_items(buffer)
        first = np.cumsum([0, *map(len, sources)])  # number of each batch's first pair
        batch = np.searchsorted(first, pairs, side="right") - 1
        index = pairs - first[batch]
        # An expert's pairs from one batch lie together: each such run is one piece of work.
        for start, stop in pairwise([0, *(np.flatnonzero(np.diff(batch)) + 1).tolist(), len(pairs)]):
            np.take(sources[batch[start]], index[start:stop], out=out[start:stop], mode="clip")


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """Everything a dataset holds of one expert: one row per token routed to it.

    Attributes:
        layer: layer of the expert.
        expert: its number.
        hidden: its neurons, the input of its down projection [row, neuron].
        weight: with what weight its output is added to the layer's [row].
        token_row: which row of the dataset (of `ds[site]`, of `ds.frame()`) each belongs to [row].
        slot: which choice of the token it was, 0 the router's first [row].
    """

    layer: int
    expert: int
    hidden: Tensor
    weight: Tensor
    token_row: Tensor
    slot: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def out(self, model: Any) -> Tensor:
        """What the expert put out before its weight, ``W_down @ hidden``, computed with `model` [row, d_model]."""
        hidden = self.hidden.to(device=model.device, dtype=model.dtype)
        out: Tensor = model.expert_output(self.layer, self.expert, hidden)
        return out
