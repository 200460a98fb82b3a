"""The router: which of the 2n keys a token uses, and how much.

For each routing head h there are two rows of n key logits, s1_h = w1_h x and s2_h = w2_h x. Sorting them to find the
top k costs time and does not parallelise well, so Monet draws a line instead. BatchNorm makes the logits of a head
standard normal over tokens and keys, and a normal variable exceeds

    cut = Phi^-1(1 - k/n)

with probability k/n: about k of n keys pass. The rest is a softmax of the *raw* logits over those that passed:

    s'_hi  = (s_hi - mean_h) / sqrt(var_h + eps)        one mean and variance per head
    kept   = s'_hi >= min(max_i s'_hi, cut)             the best key always passes, so no row is empty
    g_hi   = softmax of s_hi over kept, 0 elsewhere

g1 and g2 are independent: expert (i, j) has weight sum_h g1_hi g2_hj. (No second top-k over pairs, unlike PEER.)

In evaluation mean and variance are the running ones of the checkpoint, so a token's experts depend on that token alone.
**In training they are the batch's, and the running ones move**: a forward pass under `model.train()` changes how the
model routes afterwards, even without an optimiser step. Call `model.eval()` before measuring anything.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional

from interp.monet.config import MonetConfig


class HeadNorm(nn.BatchNorm1d):
    """BatchNorm of key logits [token, head, key]: statistics per head, over tokens and keys; no scale, no shift.

    It differs from its base in one thing: in training, `forward` only notes the batch's statistics, and `absorb` moves
    the running ones. Gradient checkpointing runs `forward` twice per step, and they must move once.
    """

    def __init__(self, heads: int) -> None:
        super().__init__(heads, affine=False)
        self._noted: tuple[Tensor, Tensor] | None = None

    def forward(self, logits: Tensor) -> Tensor:
        """Normalised logits, same shape [token, head, key]."""
        assert self.running_mean is not None  # for the type checker: the base class may keep none
        assert self.running_var is not None
        if not self.training:
            # written out because the statistics may be stored in another dtype than the logits' (at least float32)
            mean, var = self.running_mean.to(logits), self.running_var.to(logits)
            return (logits - mean[:, None]) * torch.rsqrt(var[:, None] + self.eps)
        var, mean = torch.var_mean(logits.detach(), dim=(0, 2))
        self._noted = (mean, var)
        return functional.batch_norm(logits, None, None, training=True, eps=self.eps)

    @torch.no_grad()
    def absorb(self) -> None:
        """Moves the running statistics towards those of the last batch, once."""
        if self._noted is None:
            return
        noted, self._noted = self._noted, None
        for running, seen in zip((self.running_mean, self.running_var), noted, strict=True):
            running.lerp_(seen.to(running), self.momentum)  # type: ignore[union-attr, arg-type]
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]


class MonetRouter(nn.Module):
    """x [batch, pos, d_model] -> g1, g2, each [batch, pos, head, key], rows summing to 1, at least float32."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.heads = config.moe_heads
        self.w1 = nn.Linear(config.hidden_size, config.moe_heads * config.moe_experts, bias=False)
        self.w2 = nn.Linear(config.hidden_size, config.moe_heads * config.moe_experts, bias=False)
        self.norm1 = HeadNorm(config.moe_heads)
        self.norm2 = HeadNorm(config.moe_heads)
        k, n = config.moe_topk, config.moe_experts
        self.cut = NormalDist().inv_cdf(1 - k / n) if k < n else -math.inf

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._axis(self.w1, self.norm1, x), self._axis(self.w2, self.norm2, x)

    def _axis(self, w: nn.Linear, norm: HeadNorm, x: Tensor) -> Tensor:
        # A threshold decides, and in half precision it would decide otherwise.
        logits = w(x).unflatten(-1, (self.heads, -1))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        normed = norm(logits.flatten(0, 1)).view_as(logits)
        kept = normed >= normed.amax(-1, keepdim=True).clamp(max=self.cut)
        return logits.masked_fill(~kept, -math.inf).softmax(-1)

    def absorb(self) -> None:
        """Moves the running statistics of both axes: once per training step, by the model."""
        self.norm1.absorb()
        self.norm2.absorb()
