"""Pairs of random tokens on tiny random models, and one-by-one patching through ``m.intervene``: the slow truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import edits
from interp.patching.nodes import Node


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def differing(n: int = 2, width: int = 8, seed: int = 0, changed: tuple[int, ...] = (2, 5)) -> tuple[Tensor, Tensor]:
    """Clean and corrupt ids [pair, pos] that differ at some positions."""
    clean = torch.randint(3, 100, (n, width), generator=torch.Generator().manual_seed(seed))
    corrupt = clean.clone()
    for p in changed:
        corrupt[:, p] = (clean[:, p] + 11 * p) % 97 + 3
    return clean, corrupt


def logit_gap(logits: Tensor) -> Tensor:
    """A metric that reads the last token [batch]."""
    return logits[:, -1, 5] - logits[:, -1, 7]


def one_by_one(
    m: interp.Model, base: Tensor, source: Tensor, metric: Callable[[Tensor], Tensor], sets: list[list[Node]]
) -> Tensor:
    """Effects [set, pair] by one whole forward pass per set under ``m.intervene``."""
    acts = m.capture(source, {str(site.base) for nodes in sets for node in nodes for site in node.sites})
    before, out = metric(m(base)), []
    for nodes in sets:
        patches: list[Any] = []
        for node in nodes:
            scope = "all" if node.position is None else f"window({node.position}, {node.position + 1})"
            patches += [edits.replace(str(site), acts[site], scope=scope) for site in node.sites]
        with m.intervene(*patches):
            out.append(metric(m(base)) - before)
    return torch.stack(out)
