"""Logistic regression on activations: the objective of scikit-learn, minimised in far fewer passes over the data.

For labels y and features x the binary probe minimises

    F(w, b) = 1/2 |w|^2 + C sum_i log(1 + exp(-y_i (w x_i + b))),        y in {-1, +1}

and the multinomial one the softmax form with a weight vector per class: scikit-learn's LogisticRegression, intercept
unpenalised. Activations are badly conditioned (a few directions are a thousand times as large as most), which costs a
quasi-Newton method hundreds of passes over them. Three things save most of that:

1. Curvature. We minimise over u with w = P u, P P' = H^-1, where H = I + C X' diag(p (1 - p)) X is the Hessian where
   the search begins (for several classes its diagonal blocks). Seen from u every direction is about equally steep.
2. A rough fit first. With many rows a few thousand of them, drawn at random, give a start close to the minimum and an
   H that is off by a quarter at most: both cost a tenth of a pass. L-BFGS (scipy's) on all rows then needs some five.
3. One reading a pass. Scores and gradient are taken block by block, while the block is still in the processor's cache.

The minimum is the same, whatever the start and H; tests compare it with scikit-learn's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probes.errors import ProbeWarning

BLOCK = 2048  # rows: some 5 MB of a residual stream
ROUGH = 8192  # rows of the rough fit, or eight times the features where that is more


@dataclass(frozen=True)
class Fit:
    """A minimum: weights [class or 1, feature], intercepts [class or 1], how many passes it took, and if it
    converged."""

    weight: Tensor
    bias: Tensor
    passes: int
    converged: bool


def minimise(x: Tensor, y: Tensor, n_classes: int, C: float = 1.0, *, tol: float = 1e-5, max_iter: int = 200) -> Fit:
    """Minimises F.

    Args:
        x: features [sample, feature], float; centred columns make it quicker and change nothing else.
        y: class numbers [sample], 0 .. n_classes - 1.
        n_classes: 2 gives the binary probe with one weight vector, for class 1.
        C: inverse strength of the penalty, as in scikit-learn.
        tol: on the largest entry of the gradient in u, relative to its value at w = 0.
        max_iter: L-BFGS iterations; a warning says so when they do not suffice.
    """
    return path(x, y, n_classes, [C], tol=tol, max_iter=max_iter)[0]


def path(
    x: Tensor, y: Tensor, n_classes: int, Cs: Sequence[float], *, tol: float = 1e-5, max_iter: int = 200
) -> list[Fit]:
    """The minimum for each of several penalties, in the order given; each begins where the last weaker one ended."""
    if len(x) < x.shape[1]:  # the minimum lies in the span of the samples: solve there, with as many weights as samples
        basis = torch.linalg.qr(x.T)[0]
        inner = path(x @ basis, y, n_classes, Cs, tol=tol, max_iter=max_iter)
        return [Fit(f.weight @ basis.T.double(), f.bias, f.passes, f.converged) for f in inner]
    problem, found, last = _Problem(x, y, n_classes), {}, None
    for C in sorted(set(Cs)):
        found[C] = last = problem.solve(C, last, tol, max_iter)
        if not last.converged:
            warnings.warn(
                f"logistic probe: {max_iter} iterations did not reach tol={tol:g}; raise max_iter, or lower C={C:g} "
                "(separable data has no minimum without a penalty)",
                ProbeWarning,
                stacklevel=4,
            )
    return [found[C] for C in Cs]


class _Problem:
    """Features and labels, and a sample of their rows where there are many."""

    def __init__(self, x: Tensor, y: Tensor, n_classes: int) -> None:
        self.x, self.y, self.n_classes, self.d = x, y, n_classes, x.shape[1]
        self.rows = 1 if n_classes == 2 else n_classes
        self.rough: _Problem | None = None
        size = max(ROUGH, 8 * self.d)
        if len(x) >= 2 * size:
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:size].sort().values
            if len(y[chosen].unique()) == n_classes:
                self.rough = _Problem(x[chosen], y[chosen], n_classes)

    def solve(self, C: float, start: Fit | None, tol: float, max_iter: int) -> Fit:
        from scipy.optimize import minimize

        share = 1.0
        near = self
        if self.rough is not None:
            near, share = self.rough, len(self.x) / len(self.rough.x)
            start = near.solve(C * share, start, max(tol, 1e-3), max_iter)
        w = torch.zeros(self.rows, self.d + 1, dtype=torch.float64)
        zero = near.slope(w, C * share)[1]
        if start is not None:
            w = torch.cat([start.weight, start.bias[:, None]], 1)
        lower = near.curvature(w, C * share)  # H = L L'; u = L' w

        def to_u(gradient: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(lower, gradient[..., None], upper=False)[..., 0]

        def to_w(u: np.ndarray, scale: float) -> Tensor:
            step = torch.from_numpy(u * scale).view(self.rows, self.d + 1, 1)
            return w + torch.linalg.solve_triangular(lower.mT, step, upper=True)[..., 0]

        goal = tol * max(float(to_u(zero).abs().max()), 1e-30)
        value, gradient = self.slope(w, C)
        first = to_u(gradient)
        # In units of the first gradient's length scipy's first step, of length one, is Newton's.
        scale = max(float(first.norm()), 1e-300)
        passes, known = 1, (value, first)

        def value_and_gradient(u: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal passes
            now, slope = known
            if u.any():
                passes += 1
                now, g = self.slope(to_w(u, scale), C)
                slope = to_u(g)
            return (now - value) / scale**2, (slope / scale).reshape(-1).numpy()

        if float(first.abs().max()) <= goal:
            return Fit(w[:, : self.d].contiguous(), w[:, self.d].contiguous(), passes, True)
        rounding = torch.finfo(self.x.dtype).eps * len(self.x) ** -0.5 * abs(value) / scale**2  # of F; less is no gain
        found = minimize(
            value_and_gradient, np.zeros(w.numel()), jac=True, method="L-BFGS-B",
            options={"maxiter": max_iter, "gtol": goal / scale, "ftol": rounding, "maxcor": 20},
        )  # fmt: skip
        w = to_w(found.x, scale)
        if self.rows > 1:  # what all classes share changes no probability, only the penalty: at the minimum it is 0
            w = w - w.mean(0)
        return Fit(w[:, : self.d].contiguous(), w[:, self.d].contiguous(), passes, found.nit < max_iter)

    def slope(self, w: Tensor, C: float) -> tuple[float, Tensor]:
        """F and its gradient [class or 1, feature + 1] at weights with their intercepts, in one reading of the data."""
        weight, bias = w[:, : self.d].to(self.x), w[:, self.d].to(self.x)
        total, out = 0.0, torch.zeros_like(w)
        for part, label in zip(self.x.split(BLOCK), self.y.split(BLOCK), strict=True):
            score = torch.addmm(bias, part, weight.T)
            if self.rows == 1:
                margin = score[:, 0] * (1 - 2 * label)  # > 0: on the wrong side
                total += float(torch.nn.functional.softplus(margin).sum(dtype=torch.float64))
                error = (score[:, 0].sigmoid() - label)[:, None]
            else:
                logp = score.log_softmax(-1)
                total -= float(logp.gather(1, label[:, None]).sum(dtype=torch.float64))
                error = logp.exp()
                error[torch.arange(len(label)), label] -= 1
            out[:, : self.d] += error.T @ part
            out[:, self.d] += error.sum(0, dtype=torch.float64)
        out *= C
        out[:, : self.d] += w[:, : self.d]
        return 0.5 * float((w[:, : self.d] ** 2).sum()) + C * total, out

    def curvature(self, w: Tensor, C: float) -> Tensor:
        """Lower Cholesky factors of the Hessian's diagonal blocks [class or 1, feature + 1, feature + 1]."""
        weight, bias = w[:, : self.d].to(self.x), w[:, self.d].to(self.x)
        gram = torch.zeros(self.rows, self.d + 1, self.d + 1, dtype=torch.float64)
        for part in self.x.split(BLOCK):
            score = torch.addmm(bias, part, weight.T)
            p = score.sigmoid() if self.rows == 1 else score.softmax(-1)
            root = (p * (1 - p)).clamp(min=1e-4).sqrt()
            one = torch.cat([part, part.new_ones(len(part), 1)], 1)
            for k in range(self.rows):
                scaled = one * root[:, k, None]
                gram[k] += scaled.T @ scaled
        hessian = C * gram
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        diagonal[:, : self.d] += 1
        # Rounding of a float32 product must not make it indefinite.
        diagonal += 1e-7 * diagonal.mean(1, keepdim=True)
        return torch.linalg.cholesky(hessian)
