"""Linear probes: difference of means, LDA, logistic, ridge, nearest class mean, and k-sparse ones.

    p = LinearProbe(C=0.1).fit(X, y)              X [sample, feature], y [sample]
    p.score(X_test, y_test); p.direction_         accuracy; where in the activation the label lies

They differ in what they assume. Difference of means ignores how features vary together and so finds the direction that
*causes* best when added (Marks & Tegmark 2023, arXiv:2310.06824); LDA whitens it; logistic and ridge take whatever
predicts, correlated features included (Belinkov 2022, arXiv:2102.12452).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils import assert_all_finite

from probes.base import Linear
from probes.errors import ProbeError
from probes.logistic import BLOCK, path


def moments(x: torch.Tensor, standardize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature of x [sample, feature]; the deviation is 1 where a feature never
    changes or is not to be scaled.

    Block by block, in x's own precision with sums in float64. The mean is rounded to x's precision: as it can be
    subtracted from x.
    """
    parts = x.split(BLOCK)
    shift = parts[0].mean(0)  # near the mean, so that sums of squares lose nothing in float32
    total, square = torch.zeros(2, x.shape[1], dtype=torch.float64)
    spare, ones = torch.empty_like(parts[0]), shift.new_ones(len(parts[0]))
    for part in parts:
        centred, one = torch.sub(part, shift, out=spare[: len(part)]), ones[: len(part)]
        total += one @ centred
        square += one @ centred.square_()
    gap = total / len(x)
    mean, deviation = shift + gap, (square / len(x) - gap**2).clamp(min=0).sqrt()
    if standardize:
        still = (deviation < 1e-10 * deviation.max()) | (deviation <= 16 * torch.finfo(shift.dtype).eps * mean.abs())
        deviation[still] = 1.0
    else:
        deviation = torch.ones_like(deviation)
    return mean.to(x.dtype).double(), deviation


class LinearProbe(Linear):
    """Logistic regression: two classes or more.

    Args:
        C: inverse strength of the L2 penalty, as in scikit-learn's LogisticRegression, whose minimum this is.
        standardize: scale each feature to unit variance for the penalty; folded into `coef_` afterwards. Without it,
            the penalty spares the few large dimensions that residual streams have.
        tol, max_iter: of the minimisation, see `probes.logistic`; the objective ends about tol^2 of it above the least.

    Attributes:
        coef_ [class or 1, feature], intercept_ [class or 1], classes_, n_iter_ (passes over the data).

    Raises ProbeError for one class only or labels of the wrong length; warns where there are fewer samples than
    features.
    """

    def __init__(self, C: float = 1.0, standardize: bool = True, tol: float = 1e-3, max_iter: int = 200) -> None:
        self.C = C
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any) -> LinearProbe:
        return self._path(X, y, [self])[0]

    @classmethod
    def path(cls, X: Any, y: Any, Cs: Sequence[float], **settings: Any) -> list[LinearProbe]:
        """A fitted probe for each penalty, as if each had been fitted alone, for little more than the cost of one."""
        probes = [cls(C=C, **settings) for C in Cs]
        return probes[0]._path(X, y, probes)

    def _path(self, X: Any, y: Any, probes: list[LinearProbe]) -> list[LinearProbe]:
        X, numbers = self._data(X, y, finite=False)
        for probe in probes:
            if not probe.C > 0:
                raise ProbeError(f"C={probe.C!r}: the inverse penalty must be positive")
        x = torch.from_numpy(np.require(X, requirements=["C", "W"]))
        centre, deviation = moments(x, self.standardize)
        if not centre.isfinite().all():
            assert_all_finite(X, estimator_name=type(self).__name__, input_name="X")
        fits = path(
            x, torch.from_numpy(numbers), len(self.classes_), [p.C for p in probes], centre, deviation,
            tol=self.tol, max_iter=self.max_iter,
        )  # fmt: skip
        for probe, found in zip(probes, fits, strict=True):
            probe.classes_, probe.n_features_in_ = self.classes_, self.n_features_in_
            if hasattr(self, "feature_names_in_"):
                probe.feature_names_in_ = self.feature_names_in_
            weight = found.weight / deviation
            probe.n_iter_ = found.passes
            probe._set(weight.numpy(), (found.bias - weight @ centre).numpy(), X.dtype)
        return probes


class MeanDifference(Linear):
    """The difference of the class means, threshold halfway; with more classes, each against the others' mean.

    ``coef_ = mu_1 - mu_0``: the same vector that mean-difference steering adds. Source: Marks & Tegmark 2023, section
    4.
    """

    def fit(self, X: Any, y: Any) -> MeanDifference:
        X, numbers = self._data(X, y)
        means = np.stack([X[numbers == c].mean(0, dtype=np.float64) for c in range(len(self.classes_))])
        if len(means) == 2:
            weight, middle = (means[1] - means[0])[None], means.mean(0)[None]
        else:
            rest = (means.sum(0) - means) / (len(means) - 1)
            weight, middle = means - rest, (means + rest) / 2
        self._set(weight, -(weight * middle).sum(1), X.dtype)
        return self


class NearestMean(Linear):
    """The class whose mean is nearest: ``argmin_c |x - mu_c|``, which is linear in x. Source: scikit-learn's
    NearestCentroid."""

    def fit(self, X: Any, y: Any) -> NearestMean:
        X, numbers = self._data(X, y)
        means = np.stack([X[numbers == c].mean(0, dtype=np.float64) for c in range(len(self.classes_))])
        bias = -0.5 * (means**2).sum(1)
        # The same added to every score; what float32 would lose beside a large common part is kept.
        means, bias = means - means.mean(0), bias - bias.mean()
        if len(means) == 2:
            means, bias = (means[1] - means[0])[None], (bias[1] - bias[0])[None]
        self._set(means, bias, X.dtype)
        return self


class LDA(Linear):
    """Linear discriminant analysis: the difference of means in the metric of the shared covariance, ``S^-1 (mu_1 -
    mu_0)``.

    Args:
        shrinkage: towards a multiple of the identity; "auto" is Ledoit & Wolf's. None needs more samples than features.

    Fitted by scikit-learn's LinearDiscriminantAnalysis (solver lsqr).
    """

    def __init__(self, shrinkage: str | float | None = "auto") -> None:
        self.shrinkage = shrinkage

    def fit(self, X: Any, y: Any) -> LDA:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        X, numbers = self._data(X, y)
        found = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=self.shrinkage).fit(X.astype(np.float64), numbers)
        self._set(found.coef_, found.intercept_, np.float64)  # large common parts of the classes cancel in the score
        return self


class RidgeProbe(Linear):
    """Least squares on labels -1 and +1 with an L2 penalty (one against the rest for more classes): a closed form.

    ``coef_ = (Xc' Xc + alpha I)^-1 Xc' y``, Xc the centred features: scikit-learn's RidgeClassifier.

    Args:
        alpha: strength of the penalty, in units of squared feature size times samples.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def fit(self, X: Any, y: Any) -> RidgeProbe:
        X, numbers = self._data(X, y)
        if self.alpha < 0:
            raise ProbeError(f"alpha={self.alpha!r}: the penalty cannot be negative")
        centre = X.mean(0, dtype=np.float64)
        x = (X - centre).astype(np.float64)
        target = np.where(np.arange(len(self.classes_)) == numbers[:, None], 1.0, -1.0)
        target = target[:, 1:] if len(self.classes_) == 2 else target
        mean = target.mean(0)
        if len(x) >= x.shape[1]:
            weight = np.linalg.solve(x.T @ x + self.alpha * np.eye(x.shape[1]), x.T @ (target - mean)).T
        else:  # the same by the kernel, cheaper with few samples
            weight = (x.T @ np.linalg.solve(x @ x.T + self.alpha * np.eye(len(x)), target - mean)).T
        self._set(weight, mean - weight @ centre, X.dtype)
        return self


class KSparseProbe(Linear):
    """A logistic probe on the k features that separate best: neurons, experts or latents, by name.

    Features are ranked on the training data by the difference of class means over their deviation (for several classes,
    the largest of one against the rest), the best k are kept, and a probe is fitted on them alone.
    Source: Gurnee et al. 2023, "Finding Neurons in a Haystack" (arXiv:2305.01610), section 3, ranking by mean
        difference.

    Args:
        k: how many features may be used.
        C: inverse penalty of the probe on them.

    Attributes:
        support_ [k]: the chosen features, best first.
    """

    def __init__(self, k: int = 16, C: float = 1.0) -> None:
        self.k = k
        self.C = C

    def fit(self, X: Any, y: Any) -> KSparseProbe:
        X, numbers = self._data(X, y)
        if not self.k >= 1:
            raise ProbeError(f"k={self.k!r}: at least one feature is needed")
        self.support_ = separation(X, numbers).argsort(kind="stable")[::-1][: self.k].copy()
        inner = LinearProbe(C=self.C).fit(X[:, self.support_], numbers)
        weight = np.zeros((len(inner.coef_), X.shape[1]))
        weight[:, self.support_] = inner.coef_
        self._set(weight, inner.intercept_, X.dtype)
        return self


def separation(X: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """|difference of means| / standard deviation of each feature [feature], the best class against the rest."""
    spread = X.std(0, dtype=np.float64)
    spread[spread == 0] = np.inf
    best = np.zeros(X.shape[1])
    for c in range(1 if numbers.max() == 1 else 0, int(numbers.max()) + 1):
        inside = numbers == c
        gap = X[inside].mean(0, dtype=np.float64) - X[~inside].mean(0, dtype=np.float64)
        best = np.maximum(best, np.abs(gap) / spread)
    return best
