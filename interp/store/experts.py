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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.activations import ExpertActivations
from interp.store.errors import StoreError
from interp.store.tensors import Shapes, real_tokens, take

_GATHER = 4096  # rows sorted and written at once


class ExpertTable:
    """Collects the expert activations of one shard, then gives them back sorted by expert.

    Args:
        rows: tokens that will come.
        n_experts: experts of the layer.
        dtype: of the neurons on disk; weights stay in float32, they are few.
    """

    def __init__(self, rows: int, n_experts: int, dtype: torch.dtype) -> None:
        self.rows, self.n_experts, self.dtype = rows, n_experts, dtype
        self.filled = 0
        self.ids = self.weights = self.hidden = torch.empty(0)

    def append(self, experts: ExpertActivations, mask: Tensor) -> None:
        """Take in a batch; only tokens where `mask` [batch, pos] is true."""
        if experts.hidden is None:
            raise StoreError(f"expert_hidden[{experts.layer}]: the model gave no neurons of its experts")
        if not self.filled:  # slots and neurons are known now
            slots = experts.ids.shape[2]
            self.ids = torch.empty(self.rows, slots, dtype=torch.int32)
            self.weights = torch.empty(self.rows, slots, dtype=torch.float32)
            self.hidden = torch.empty(self.rows, *experts.hidden.shape[2:], dtype=self.dtype)
        span = slice(self.filled, self.filled + int(mask.sum()))
        for mine, given in (self.ids, experts.ids), (self.weights, experts.weights), (self.hidden, experts.hidden):
            real_tokens(given, mask, mine[span])
        self.filled = span.stop

    def sort(self) -> None:
        """Order the (token, slot) pairs by expert, then by token."""
        ids = self.ids.flatten().numpy()
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
            "hidden": (self.dtype, (n, *self.hidden.shape[2:])),
            "slot": (torch.int16, (n,)),
        }

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """The columns in the order of `shapes`; `hidden` comes in pieces, so that no second copy is ever whole."""
        row, slot = np.divmod(self.order.numpy(), self.ids.shape[1])
        yield "offsets", self.offsets
        yield "token_row", torch.from_numpy(row.astype(np.int32))
        yield "weight", take(self.weights.flatten(), self.order)
        neurons = self.hidden.flatten(0, 1)
        for block in self.order.split(_GATHER):
            yield "hidden", take(neurons, block)
        yield "slot", torch.from_numpy(slot.astype(np.int16))


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
