"""Muon: momentum whose every matrix is made orthogonal before it is applied.

    M <- mu M + (1 - mu) G           N = mu M + (1 - mu) G        (Nesterov)
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) O(N)     O(U S V^T) = U V^T, nearly

A gradient matrix has a few large singular values and many small ones; O makes them all alike, so that rare directions
are learned as quickly as frequent ones. O is approached by five steps of a Newton-Schulz iteration, which is matrix
products only. The factor makes an update as large as AdamW's (root mean square 0.2): they share learning rates.

torch.optim.Muon is the same method, for single matrices and in bfloat16. This one also takes stacks of matrices, which
is what the experts of transformers' mixtures are, and works in the gradient's own precision: processors without
bfloat16 products need several times as long as a whole training step to imitate them.

Source: Jordan et al., Muon, 2024 (the iteration and its coefficients); Liu et al., arXiv 2502.16982 (the factor).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: Of the polynomial a x + b x^3 + c x^5 that pushes singular values in (0, 1] towards 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T [..., rows, columns], to about 30 % in its singular values."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the products are then of the smaller side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for parameters of shape [..., rows, columns].

    Args:
        params: parameters of two dimensions or more; leading ones are stacks of independent matrices.
        lr: learning rate, on AdamW's scale.
        momentum: mu.
        weight_decay: wd, decoupled.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            if flat := [tuple(p.shape) for p in group["params"] if p.dim() < 2]:
                raise ValueError(f"params: one has shape {flat[0]}, expected [..., rows, columns]; give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            mu = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - mu)
                update = orthogonalise(p.grad.lerp(state["momentum"], mu))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))
        return loss
