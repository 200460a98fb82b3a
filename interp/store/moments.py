"""Running mean and second moment of the values as they are stored."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rows are summed in float32 a few at a time, and these sums in float64. So few bfloat16 values lose next to nothing in
# float32 (8 bits of mantissa against 24), and it is three times as fast as turning every value to float64.
_ROWS, _VALUES = 256, 1 << 17
_SERIAL = 1 << 15  # values that torch turns to another type without calling up threads, which the model needs
_local = threading.local()  # each thread's buffer for such a block: it stays in the cache, and new memory is slow


@dataclass
class Moments:
    """Sums over rows of values and of their squares, per dimension; rows with NaN or infinity are counted apart.

    The sums of two sets of rows add up to those of both, so shards can be summed in any number of processes and merged.
    Works in numpy, because it runs beside the model, whose threads torch would take.
    """

    count: int = 0
    nonfinite: int = 0
    first_nonfinite: int | None = None  # number of the row
    total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Take in rows [row, ...] of bfloat16, float16 or float32."""
        flat = rows.flatten(1)
        width = flat.shape[1]
        if not self.total.numel():
            self.total, self.squares = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
        total, squares = self.total.numpy(), self.squares.numpy()  # the same memory
        for block in flat.split(max(1, min(_ROWS, _VALUES // max(1, width)))):
            values = _float32(block)
            square = np.einsum("ij,ij->j", values, values)
            if not np.isfinite(square).all():  # found from the sum: looking at every value would cost a pass of its own
                values = self._finite(values).astype(np.float64)  # also for squares that float32 cannot hold
                square = np.einsum("ij,ij->j", values, values)
            self.count += len(values)
            total += values.sum(0)
            squares += square

    def _finite(self, values: Any) -> Any:
        good = np.isfinite(values).all(1)
        if not good.all():
            if self.first_nonfinite is None:
                self.first_nonfinite = self.count + int(good.argmin())
            self.nonfinite += int((~good).sum())
        return values[good]

    def merge(self, other: Moments) -> None:
        if not self.total.numel():
            self.total, self.squares = torch.zeros_like(other.total), torch.zeros_like(other.squares)
        self.count += other.count
        self.nonfinite += other.nonfinite
        self.total += other.total
        self.squares += other.squares

    def tensors(self, name: str) -> dict[str, Tensor]:
        counts = torch.tensor([self.count, self.nonfinite])
        return {f"{name}/sum": self.total, f"{name}/sum_of_squares": self.squares, f"{name}/counts": counts}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], name: str) -> Moments:
        count, nonfinite = tensors[f"{name}/counts"].tolist()
        return cls(count, nonfinite, None, tensors[f"{name}/sum"], tensors[f"{name}/sum_of_squares"])


def _float32(rows: Tensor) -> Any:
    """Rows [row, value] as a float32 array to read at once: it is theirs, or a buffer that the next call fills anew."""
    if rows.dtype == torch.float32:
        return rows.numpy()
    if not hasattr(_local, "buffer") or _local.buffer.numel() < rows.numel():
        _local.buffer = torch.empty(max(_VALUES, rows.numel()))
    wide = _local.buffer[: rows.numel()].view(rows.shape)
    if rows.dtype == torch.bfloat16:  # numpy lacks it, but it is the upper half of a float32
        bits = wide.numpy().view(np.uint32)
        np.copyto(bits, rows.view(torch.uint16).numpy())
        np.left_shift(bits, 16, out=bits)
    else:
        step = max(1, _SERIAL // max(1, rows.shape[1]))
        for there, here in zip(wide.split(step), rows.split(step), strict=True):
            there.copy_(here)
    return wide.numpy()


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a dataset knows about the values of one site, in float64.

    Attributes:
        count: rows that went in; rows with NaN or infinity are left out and counted in `nonfinite`.
        mean: mean over rows, in the shape of one row.
        second_moment: mean over rows of the square of each value, in the shape of one row.
    """

    count: int
    nonfinite: int
    mean: Tensor
    second_moment: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation of each value over rows (population form)."""
        return (self.second_moment - self.mean.square()).clamp(min=0).sqrt()

    @property
    def rms(self) -> float:
        """Root of the mean squared value over rows and dimensions."""
        return float(self.second_moment.mean().sqrt())
