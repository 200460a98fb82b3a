"""The two routing losses that make Monet's experts both used and definite.

    uniformity   L_unif = -1/(2 H n) sum_h [ sum_i log G1_hi + sum_j log G2_hj ],       G = mean of g over tokens
    ambiguity    L_amb  =  1/(2 H)   sum_h [ (1 - max_i g1_hi) + (1 - max_j g2_hj) ],   averaged over tokens

Uniformity is the cross-entropy of the mean routing with the uniform distribution, so its least value is log n, when all
keys share the tokens. Ambiguity is 0 when each token uses one key per head and axis. They pull against each other: all
keys used, but few at a time. The whole objective is L_LM + coef (L_unif + L_amb) with coef = 1e-3 in the paper, which
averages them over routers.

The paper's equation 16 has no average over tokens, but g has zeros, so the logarithm of a single token's g
diverges; its reported values just above log 512 fit the batch mean. Source: Monet, arXiv 2412.04139.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: A key whose mean weight is below this counts as this: in a small batch some keys serve no token.
FLOOR = 1e-10


def uniformity(g1: Tensor, g2: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_unif of one router, in nats: g1, g2 [batch, pos, head, n], mask [batch, pos] of real tokens -> scalar."""
    means = torch.stack([_token_mean(g, mask) for g in (g1, g2)])  # [axis, head, n]
    return -means.clamp_min(FLOOR).log().mean()


def ambiguity(g1: Tensor, g2: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_amb of one router, in [0, 1): g1, g2 [batch, pos, head, n], mask [batch, pos] of real tokens -> scalar."""
    return torch.stack([_token_mean(1 - g.amax(-1), mask) for g in (g1, g2)]).mean()


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of the mask: [batch, pos, ...] -> [...]."""
    return values.flatten(0, 1).mean(0) if mask is None else values[mask.bool()].mean(0)
