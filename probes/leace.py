"""LEACE: the affine map that removes all linear trace of a concept and changes the states least.

    r(x) = x - W+ P W (x - mean),   W = (Sigma_xx^1/2)+,   P the projection on the columns of W Sigma_xz

No linear probe can do better on r(x) than a constant. Source: Belrose et al. 2023 (arXiv:2306.03819), theorem 4.3.
`probes.Leace` is this as an estimator, `steering.leace` as a map for a model's states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Erasure:
    """``x - left @ right @ (x - mean)``: left [feature, rank], right [rank, feature], mean [feature], in float64."""

    left: Tensor
    right: Tensor
    mean: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def leace(x: Tensor, z: Tensor, *, tolerance: float = 0.01, shrink: bool = False, trace_guard: bool = False) -> Erasure:
    """Fits the eraser.

    Args:
        x: states [row, feature].
        z: what is to be made unpredictable [row, concept]; classes as one column each.
        tolerance: singular values of the whitened cross-covariance up to this are taken for sampling noise.
        shrink: shrink the covariance towards a multiple of the identity (Ledoit & Wolf 2004), for few rows.
        trace_guard: mix in the orthogonal projection where the oblique one would make the states' total variance
            larger.

    Rank 0 where nothing linear is there, or where the states do not vary.
    """
    h, mean, z = x.double(), x.double().mean(0), z.double()
    h, z = h - mean, z - z.mean(0)
    xx, xz = h.T @ h / len(h), h.T @ z / len(h)
    if shrink:
        xx = _ledoit_wolf(h, xx)
    value, vector = torch.linalg.eigh(xx)
    kept = value > value[-1].clamp_min(0) * len(xx) * torch.finfo(torch.float64).eps * 1e3
    value, vector = value[kept], vector[:, kept]
    whiten, unwhiten = vector @ (vector / value.sqrt()).T, vector @ (vector * value.sqrt()).T
    u, size, _ = torch.linalg.svd(whiten @ xz, full_matrices=False)
    u = u[:, size > max(tolerance, 1e-12)]
    left, right = unwhiten @ u, u.T @ whiten
    if trace_guard and u.shape[1]:
        left, right = _guarded(left, right, xx)
    return Erasure(left, right, mean)


def _guarded(left: Tensor, right: Tensor, xx: Tensor) -> tuple[Tensor, Tensor]:
    """`left right`, or its mixture with the orthogonal projection that just keeps the trace of the covariance.

    Both erase (both annihilate Sigma_xz), so every mixture does; the trace is quadratic in its weight.
    """
    eye = torch.eye(len(xx), dtype=xx.dtype)
    basis = torch.linalg.qr(left).Q
    p, q = eye - left @ right, eye - basis @ basis.T
    w, x = xx.trace(), (p @ xx @ p.T).trace()
    if x <= w:
        return left, right
    y, z = (p @ xx @ q.T).trace(), (q @ xx @ q.T).trace()
    # a^2 x + 2 a (1 - a) y + (1 - a)^2 z = w, for the larger root a in [0, 1)
    a2, a1, a0 = x - 2 * y + z, 2 * (y - z), z - w
    a = float(((-a1 + (a1.square() - 4 * a2 * a0).clamp_min(0).sqrt()) / (2 * a2)).clamp(0, 1))
    return torch.cat([a * left, (1 - a) * basis], 1), torch.cat([right, basis.T])


def _ledoit_wolf(centred: Tensor, covariance: Tensor) -> Tensor:
    """Covariance shrunk towards its mean variance times the identity (Ledoit and Wolf 2004)."""
    n, d = centred.shape
    mu = covariance.trace() / d
    spread = (covariance - mu * torch.eye(d, dtype=covariance.dtype)).square().sum()
    noise = (centred.square().sum(1).square().sum() / n - covariance.square().sum()) / n
    weight = float((noise / spread).clamp(0, 1)) if float(spread) > 0 else 0.0
    return (1 - weight) * covariance + weight * mu * torch.eye(d, dtype=covariance.dtype)
