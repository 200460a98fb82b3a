"""The two sparse products on a GPU, in Triton: weighted sums of rows, and inner products of chosen pairs.

What torch has for them on a GPU writes more than is asked for: an embedding bag with weights per entry keeps one index
per entry beside its output, and chosen inner products are a gather of both operands, 2 * width numbers an entry, before
a number of each is left. Here an entry's rows are read once and nothing but the result is written. The order of sums is
fixed (no atomic additions: a latent's tokens are a bag of their own), so a resumed run repeats the unbroken one.

Imported where tensors are on a GPU and Triton is installed, which GPU builds of torch bring with them. Tested in
Triton's interpreter, and compiled for two kinds of GPU (tests/sae/test_triton_kernels.py), but not timed on one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns that one program holds at a time


@triton.jit
def _bag(values, ids, starts, table, out, width, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = columns < width
    total = tl.zeros([SIZE], dtype=tl.float32)
    for entry in range(tl.load(starts + bag), tl.load(starts + bag + 1)):
        row = table + tl.load(ids + entry) * width + columns
        total += tl.load(values + entry).to(tl.float32) * tl.load(row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + bag * width + columns, total, mask=inside)


@triton.jit
def _sampled(x, table, rows, ids, out, width, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0).to(tl.int64)
    left = x + tl.load(rows + entry) * width
    right = table + tl.load(ids + entry) * width
    total = tl.zeros([SIZE], dtype=tl.float32)
    for start in range(0, width, SIZE):
        columns = start + tl.arange(0, SIZE)
        inside = columns < width
        total += tl.load(left + columns, mask=inside, other=0.0).to(tl.float32) * tl.load(
            right + columns, mask=inside, other=0.0
        ).to(tl.float32)
    tl.store(out + entry, tl.sum(total, axis=0))


def bag(values: Tensor, ids: Tensor, starts: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum over the entries of bag i of values * table[ids] [bag, width], summed in float32.

    Args:
        values: weight of each entry [entry].
        ids: row of the table of each entry [entry], int64.
        starts: first entry of each bag, and one past the last [bag + 1], int64.
        table: [row, width].
        out: where to write [bag, width].
    """
    width = table.shape[1]
    out = table.new_empty(len(starts) - 1, width) if out is None else out
    size = min(BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(table):
        _bag[(len(out), triton.cdiv(width, size))](
            values.contiguous(), ids.contiguous(), starts.contiguous(), table.contiguous(), out, width, SIZE=size
        )
    return out


def sampled(rows: Tensor, ids: Tensor, x: Tensor, table: Tensor) -> Tensor:
    """Inner products <x[rows], table[ids]> of the entries [entry], summed in float32."""
    out = x.new_empty(len(ids))
    size = min(BLOCK, triton.next_power_of_2(x.shape[1]))
    with torch.cuda.device_of(x):
        _sampled[(len(ids),)](
            x.contiguous(), table.contiguous(), rows.contiguous(), ids.contiguous(), out, x.shape[1], SIZE=size
        )
    return out
