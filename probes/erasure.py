"""Erasure: take a label out of activations, so that no linear probe finds it, and change as little else as possible.

    e = Leace().fit(X, y)
    e.transform(X_test)                     features without it
    e.edit("resid_post[5]")                 the same as an Edit

Three erasers, all affine maps ``x -> x - A (x - mean)``:

* Leace: the least change that removes *every* linear trace. Belrose et al. 2023 (arXiv:2306.03819), theorem 4.3:
  ``A = W^+ P W``, W = (Sigma_xx^1/2)^+ whitens, P projects on the columns of ``W Sigma_xz``. Exact on the data it was
  fitted on; on others up to sampling.
* MeanProjection: projects out the span of the class means' differences. Removes the difference of means along it, moves
  what correlates with it too.
* INLP: fits a probe, projects its direction out, and again. Ravfogel et al. 2020 (arXiv:2004.07667).
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from interp import edits
from interp.edits import Edit
from probes.base import as_array
from probes.errors import ProbeError
from probes.leace import leace


class Eraser(TransformerMixin, BaseEstimator):
    """``x -> x - A (x - mean)``. Attributes once fitted: `matrix_` A [feature, feature], `mean_` [feature], `rank_`."""

    matrix_: np.ndarray
    mean_: np.ndarray

    def fit(self, X: Any, y: Any) -> Self:
        """Args: X [sample, feature]; y class labels, or numbers [sample] or [sample, concept] to be made
        unpredictable."""
        X, y = as_array(X), as_array(y)
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), multi_output=True)
        z = _concepts(y)
        self.mean_ = X.mean(0, dtype=np.float64)
        self.matrix_ = self._matrix(X.astype(np.float64) - self.mean_, z, y)
        self.rank_ = int(np.linalg.matrix_rank(self.matrix_, tol=1e-8 * max(1.0, np.abs(self.matrix_).max())))
        return self

    def _matrix(self, x: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def transform(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, as_array(X), dtype=(np.float64, np.float32), reset=False)
        return (X - (X - self.mean_) @ self.matrix_.T).astype(X.dtype)

    def edit(self, site: Any, **how: Any) -> Edit:
        """The map as an Edit at `site`: ``h -> (I - A) h + A mean``."""
        check_is_fitted(self)
        a = torch.from_numpy(np.eye(len(self.mean_)) - self.matrix_).float()
        b = torch.from_numpy(self.matrix_ @ self.mean_).float()
        return edits.affine(site, a, b, **{"name": type(self).__name__, **how})


def _concepts(y: np.ndarray) -> np.ndarray:
    """Labels as one column per class (but one), numbers as they are, centred [sample, concept]."""
    if y.ndim == 1 and (y.dtype.kind in "OUSb" or np.array_equal(y, y.astype(int))):
        classes = np.unique(y)
        if len(classes) < 2:
            raise ProbeError(f"y holds one class only ({classes[0]!r}); there is nothing to erase")
        z = (y[:, None] == classes[1:]).astype(np.float64)
    else:
        z = np.atleast_2d(y.T).T.astype(np.float64)
    return z - z.mean(0)


class Leace(Eraser):
    """Least-squares concept erasure.

    Args:
        tol: singular values of ``W Sigma_xz`` below this share count as none; sampling noise is not a concept.
        shrinkage: Ledoit & Wolf's for Sigma_xx, which needs it where samples are few.
        trace_guard: never let the total variance grow, see `probes.leace`.
    """

    def __init__(self, tol: float = 0.01, shrinkage: bool = True, trace_guard: bool = False) -> None:
        self.tol = tol
        self.shrinkage = shrinkage
        self.trace_guard = trace_guard

    def _matrix(self, x: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        found = leace(
            torch.from_numpy(x), torch.from_numpy(z), tolerance=self.tol, shrink=self.shrinkage,
            trace_guard=self.trace_guard,
        )  # fmt: skip
        return (found.left @ found.right).numpy()


class MeanProjection(Eraser):
    """Orthogonal projection off the span of the differences between class means."""

    def _matrix(self, x: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        u, s, _ = np.linalg.svd(x.T @ z, full_matrices=False)
        u = u[:, s > 1e-10 * max(s.max(), 1e-30)]
        return u @ u.T


class INLP(Eraser):
    """Iterative null-space projection: fit a probe, project its directions out, until it is at chance or `steps` are
    done.

    Args:
        steps: how many probes at most.
        C: inverse penalty of each.
    """

    def __init__(self, steps: int = 20, C: float = 0.1) -> None:
        self.steps = steps
        self.C = C

    def _matrix(self, x: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        from probes.linear import LinearProbe

        if y.ndim != 1:
            raise ProbeError("INLP erases one set of class labels [sample]; give several to Leace")
        majority = np.unique(y, return_counts=True)[1].max() / len(y)
        found = np.zeros((x.shape[1], 0))
        rest = x
        for _ in range(self.steps):
            probe = LinearProbe(C=self.C, standardize=False).fit(rest, y)
            if probe.score(rest, y) <= majority + 1e-9:
                break
            found = np.linalg.qr(np.concatenate([found, probe.coef_.T.astype(np.float64)], 1))[0]
            if found.shape[1] >= x.shape[1]:
                break
            rest = x - (x @ found) @ found.T
        return found @ found.T
