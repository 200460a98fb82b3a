"""Logistic regression on activations: the objective of scikit-learn, minimised in far fewer passes over the data.

For labels y and features x the binary probe minimises

    F(w, b) = 1/2 |w|^2 + C sum_i log(1 + exp(-y_i (w x_i + b))),        y in {-1, +1}

and the multinomial one the softmax form with a weight vector per class: scikit-learn's LogisticRegression, intercept
unpenalised. Activations are badly conditioned (a few directions are a thousand times as large as most), which costs a
quasi-Newton method hundreds of passes. But the Hessian has a bound that does not depend on w (Boehning & Lindsay 1988):

    binary       H  <=  B = I + C/4 X'X          (every p(1-p) <= 1/4)
    multinomial  H  <=  B = I + C/2 X'X          (for each class, Boehning 1992)

X'X is one matrix product, so we minimise over u with w = P u, P P' = B^-1: there the Hessian lies between 0 and 1, and
L-BFGS (scipy's) needs some ten to thirty passes. The minimum is the same; tests compare it with scikit-learn's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.errors import ProbeWarning


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
        tol: on the largest entry of the gradient in u, relative to its value at the start.
        max_iter: L-BFGS iterations; a warning says so when they do not suffice.
    """
    import numpy as np
    from scipy.optimize import minimize

    d = x.shape[1]
    if len(x) < d:  # the minimum lies in the span of the samples: solve there, with as many weights as samples
        basis = torch.linalg.qr(x.T)[0]
        inner = minimise(x @ basis, y, n_classes, C, tol=tol, max_iter=max_iter)
        return Fit(inner.weight @ basis.T.double(), inner.bias, inner.passes, inner.converged)
    rows = 1 if n_classes == 2 else n_classes
    # With the column of ones the intercept is one more weight; its penalty is 0, so B needs no identity there.
    gram = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    for part in x.split(16384):
        one = torch.cat([part, part.new_ones(len(part), 1)], 1)
        gram += (one.T @ one).double()
    bound = C * gram / (4 if rows == 1 else 2)
    bound.diagonal()[:d] += 1
    bound.diagonal().add_(1e-7 * bound.diagonal().mean())  # rounding of a float32 product must not make it indefinite
    # u = L' w with B = L L'; w = L'^-1 u.
    lower = torch.linalg.cholesky(bound)

    target = y.to(x) * 2 - 1 if rows == 1 else y

    def value_and_gradient(u: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.linalg.solve_triangular(lower.T, torch.from_numpy(u).view(rows, d + 1).T, upper=True).T
        weight, bias = w[:, :d].to(x), w[:, d].to(x)
        total, slope, slope_bias = (
            0.0,
            torch.zeros(rows, d, dtype=torch.float64),
            torch.zeros(rows, dtype=torch.float64),
        )
        for part, label in zip(x.split(65536), target.split(65536), strict=True):
            score = part @ weight.T + bias
            if rows == 1:
                margin = label[:, None] * score
                total += float(torch.nn.functional.softplus(-margin).sum(dtype=torch.float64))
                error = -label[:, None] * torch.sigmoid(-margin)
            else:
                total += float(torch.nn.functional.cross_entropy(score, label, reduction="sum").double())
                error = score.softmax(-1)
                error[torch.arange(len(label)), label] -= 1
            slope += (error.T @ part).double()
            slope_bias += error.sum(0, dtype=torch.float64)
        value = 0.5 * float((w[:, :d] ** 2).sum()) + C * total
        gradient = torch.cat([w[:, :d] + C * slope, C * slope_bias[:, None]], 1)
        return value, torch.linalg.solve_triangular(lower, gradient.T, upper=False).T.contiguous().view(-1).numpy()

    start = np.zeros(rows * (d + 1))
    first = max(float(np.abs(value_and_gradient(start)[1]).max()), 1e-30)
    found = minimize(
        value_and_gradient, start, jac=True, method="L-BFGS-B",
        options={"maxiter": max_iter, "gtol": tol * first, "ftol": 1e-12, "maxcor": 20},
    )  # fmt: skip
    if found.nit >= max_iter:
        warnings.warn(
            f"logistic probe: {max_iter} iterations did not reach tol={tol:g}; raise max_iter, or lower C={C:g} "
            "(separable data has no minimum without a penalty)",
            ProbeWarning,
            stacklevel=3,
        )
    w = torch.linalg.solve_triangular(lower.T, torch.from_numpy(found.x).view(rows, d + 1).T, upper=True).T
    return Fit(w[:, :d].contiguous(), w[:, d].contiguous(), int(found.nfev), found.nit < max_iter)
