"""What all probes share: scikit-learn's interface, checks of the data, one linear form, and safetensors on disk.

Every linear probe ends as one weight vector per class (one in all for two classes) on the raw activations:

    score = x . coef_ + intercept_                    so that coef_ is a direction of the model's own space

however it was fitted; standardising is folded in. `direction_` is that vector, pointing to `classes_[1]`.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from probes.errors import ProbeError, ProbeWarning


def as_array(x: Any) -> Any:
    """Tensors as arrays of float32 or float64 (numpy has no bfloat16); anything else as it is."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return x.float().numpy() if x.is_floating_point() and x.element_size() < 4 else x.numpy()
    return x


class Probe(ClassifierMixin, BaseEstimator):
    """A classifier on activations [sample, feature]. Subclasses say how it is fitted and scored."""

    def _data(self, X: Any, y: Any, finite: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Checked features and class numbers; sets `classes_`. One class, NaN, wrong lengths are errors.

        Without `finite`, whoever fits asks for NaN himself, in a reading of the features that he makes anyway.
        """
        X, y = as_array(X), as_array(y)
        if isinstance(X, np.ndarray) and isinstance(y, np.ndarray) and len(y) != len(X):
            raise ProbeError(f"y has {len(y)} labels and X {len(X)} rows; give one label per row")
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), ensure_all_finite=finite)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ProbeError(f"y holds one class only ({self.classes_[0]!r}); a probe needs at least two")
        if len(X) < X.shape[1] and type(self).__name__ in _NEEDS_SAMPLES:
            warnings.warn(
                f"{len(X)} samples for {X.shape[1]} features: any labels can be fitted. Trust the held-out score and "
                "the shuffled control only, and keep the penalty",
                ProbeWarning,
                stacklevel=3,
            )
        return X, numbers

    def _features(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, as_array(X), dtype=(np.float64, np.float32), reset=False)

    def decision_function(self, X: Any) -> np.ndarray:
        raise NotImplementedError

    def predict(self, X: Any) -> np.ndarray:
        score = self.decision_function(X)
        return self.classes_[(score > 0).astype(int) if score.ndim == 1 else score.argmax(1)]


_NEEDS_SAMPLES = {"LinearProbe", "RidgeProbe"}


class Linear(Probe):
    """A probe that is ``x @ coef_.T + intercept_`` once fitted."""

    coef_: np.ndarray
    intercept_: np.ndarray

    def _set(self, weight: np.ndarray, bias: np.ndarray, dtype: Any) -> None:
        self.coef_, self.intercept_ = np.asarray(weight, dtype), np.asarray(bias, dtype)

    @property
    def direction_(self) -> np.ndarray:
        """The unit vector [feature] along which the score for `classes_[1]` rises. Two classes only."""
        check_is_fitted(self)
        if len(self.coef_) != 1:
            raise ProbeError(
                f"a probe of {len(self.classes_)} classes has one vector per class; take coef_[i], or fit two classes"
            )
        return self.coef_[0] / np.linalg.norm(self.coef_[0])

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores [sample], positive for `classes_[1]`, or [sample, class]."""
        score = self._features(X) @ self.coef_.T + self.intercept_
        return score[:, 0] if len(self.coef_) == 1 else score

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [sample, class]: the logistic function of the scores, or their softmax."""
        from scipy.special import expit, softmax

        score = self.decision_function(X)
        if score.ndim == 1:
            p = expit(score)
            return np.stack([1 - p, p], 1)
        return softmax(score, 1)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        return np.log(self.predict_proba(X))
