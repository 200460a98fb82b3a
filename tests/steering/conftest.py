"""Models whose right answers are known by construction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import interp
from interp.model import Model


class Planted:
    """A tiny Llama whose layers add nothing, so every residual stream is the token's own embedding.

    Tokens 10..39 are neutral. Token 40 + i is neutral token i's embedding plus `direction`, token 70 + i minus it. So
    what a behaviour is, and what every fit must find, is written down in the embedding. All embeddings share
    `offset`.
    """

    def __init__(self, offset: float = 0.0, seed: int = 0) -> None:
        self.m: Model = interp.load("tiny:llama", seed=seed)
        g = torch.Generator().manual_seed(seed)
        self.direction = torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0)
        with torch.no_grad():
            for layer in self.m.hf.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            table = self.m.hf.model.embed_tokens.weight
            noise = torch.randn(30, 32, generator=g)
            noise -= (noise @ self.direction)[:, None] * self.direction
            self.common = torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0)
            self.common -= (self.common @ self.direction) * self.direction
            common = offset * self.common
            table[10:40] = noise + common
            table[40:70] = noise + common + self.direction
            table[70:100] = noise + common - self.direction

    @property
    def table(self) -> Tensor:
        return self.m.hf.model.embed_tokens.weight.detach()

    def pairs(self, n: int = 24, length: int = 3) -> list[tuple[list[int], list[int], list[int]]]:
        """Prompts of neutral tokens; answers that differ in the direction only."""
        g = torch.Generator().manual_seed(1)
        rows = []
        for i in range(n):
            prompt = torch.randint(10, 40, (2 + i % 4,), generator=g).tolist()
            answer = torch.randint(0, 30, (1 + i % length,), generator=g).tolist()
            rows.append((prompt, [40 + a for a in answer], [70 + a for a in answer]))
        return rows


@pytest.fixture
def planted() -> Planted:
    return Planted()


@pytest.fixture
def planted_offset() -> Planted:
    """The same with a large offset that all tokens share."""
    return Planted(offset=30.0)


@pytest.fixture
def refusing() -> Planted:
    """Answers token 5 where the last token has the direction, and token 6, which all embeddings call for, elsewhere."""
    made = Planted(offset=3.0)
    with torch.no_grad():
        head = made.m.hf.lm_head.weight
        head.zero_()
        head[5], head[6] = 20 * made.direction, 4 * made.common
        made.m.hf.model.norm.weight.fill_(1.0)
    return made
