"""Models whose right answers are known by construction, to check a fit on: `steering.Planted`.

p = Planted()
steering.caa(p.m, p.pairs(), layer=1).cosine(p.direction)      # 1.0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEUTRAL, WITH, AGAINST, COUNT = 10, 40, 70, 30
YES, NO = 5, 6


class Planted:
    """A tiny Llama whose layers add nothing, so that every residual stream is the token's own embedding.

    Tokens 10..39 are neutral. Token 40 + i is neutral token i plus `direction`, token 70 + i is it less `direction`:
    what a behaviour is, and what every fit must find, is written down in the embedding. All of them share `offset`
    times `common`, as the activations of real models share a large mean.

    Args:
        offset: length of what all embeddings share.
        seed: decides every number.
        answers: the model says token YES where the last token has the direction, and NO elsewhere (give an offset
            too: it is what NO is read from). Without it the output matrix is random.
    """

    def __init__(self, offset: float = 0.0, seed: int = 0, answers: bool = False) -> None:
        from interp import load

        self.m: Any = load("tiny:llama", seed=seed)
        g = torch.Generator().manual_seed(seed)
        self.direction = torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0)
        noise = torch.randn(COUNT, 32, generator=g)
        self.common = self._beside(torch.randn(32, generator=g))
        noise = (
            noise - (noise @ self.direction)[:, None] * self.direction - (noise @ self.common)[:, None] * self.common
        )
        with torch.no_grad():
            for layer in self.m.hf.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            table = self.m.hf.model.embed_tokens.weight
            table[NEUTRAL : NEUTRAL + COUNT] = noise + offset * self.common
            table[WITH : WITH + COUNT] = noise + offset * self.common + self.direction
            table[AGAINST : AGAINST + COUNT] = noise + offset * self.common - self.direction
            if answers:
                head = self.m.hf.lm_head.weight
                head.zero_()
                head[YES], head[NO] = 20 * self.direction, 4 * self.common
                self.m.hf.model.norm.weight.fill_(1.0)

    def _beside(self, vector: Tensor) -> Tensor:
        """A unit vector with no part along `direction`."""
        rest = vector - (vector @ self.direction) * self.direction
        return rest / rest.norm()

    @property
    def table(self) -> Tensor:
        """The embeddings [token, d_model]."""
        return self.m.hf.model.embed_tokens.weight.detach()

    def pairs(self, n: int = 24, length: int = 3, seed: int = 1) -> list[tuple[list[int], list[int], list[int]]]:
        """Contrast pairs: neutral prompts; answers of 1 to `length` tokens that differ in the direction only."""
        g = torch.Generator().manual_seed(seed)
        rows = []
        for i in range(n):
            prompt = torch.randint(NEUTRAL, NEUTRAL + COUNT, (2 + i % 4,), generator=g).tolist()
            answer = torch.randint(0, COUNT, (1 + i % length,), generator=g).tolist()
            rows.append((prompt, [WITH + a for a in answer], [AGAINST + a for a in answer]))
        return rows

    def texts(self, start: int, stop: int, last: int) -> list[list[int]]:
        """Texts number start..stop: a neutral token, then token `last` (WITH, AGAINST, NEUTRAL) + the number."""
        return [[NEUTRAL + i, last + i] for i in range(start, stop)]
