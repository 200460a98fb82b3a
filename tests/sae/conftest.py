"""Small planted dictionaries: activations whose sparse parts are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Planted:
    x: Tensor  # [row, d]
    directions: Tensor  # [feature, d], norm 1
    codes: Tensor  # [row, feature]


def planted(rows: int = 4096, d: int = 16, features: int = 24, active: float = 2.0, seed: int = 0) -> Planted:
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d, generator=g), dim=1)
    on = torch.rand(rows, features, generator=g) < active / features
    codes = on * (1 + 3 * torch.rand(rows, features, generator=g))
    x = codes @ directions + 0.5 + 0.01 * torch.randn(rows, d, generator=g)
    return Planted(x, directions, codes)


@pytest.fixture(scope="session")
def data() -> Planted:
    return planted()


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Matrices this small are no work to share: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
