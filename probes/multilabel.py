"""Several labels at once: a text may be law and German."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from probes.base import as_array
from probes.errors import ProbeError
from probes.linear import LinearProbe


class MultiLabelProbe(BaseEstimator):
    """One logistic probe per label, y [sample, label] of 0 and 1.

    Args:
        C: inverse penalty of each.

    Attributes:
        probes_: one LinearProbe per label; coef_ [label, feature]; intercept_ [label].
    """

    def __init__(self, C: float = 1.0) -> None:
        self.C = C

    def fit(self, X: Any, y: Any) -> MultiLabelProbe:
        X, y = as_array(X), np.asarray(as_array(y))
        if y.ndim != 2 or not np.isin(y, (0, 1)).all():
            raise ProbeError(f"y is {list(y.shape)}; expected [sample, label] of 0 and 1")
        for i in range(y.shape[1]):
            if len(np.unique(y[:, i])) < 2:
                raise ProbeError(f"y[:, {i}] holds one value only; leave that label out")
        self.probes_ = [LinearProbe(C=self.C).fit(X, y[:, i]) for i in range(y.shape[1])]
        self.coef_ = np.concatenate([p.coef_ for p in self.probes_])
        self.intercept_ = np.concatenate([p.intercept_ for p in self.probes_])
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each label [sample, label]."""
        return np.stack([p.predict_proba(X)[:, 1] for p in self.probes_], 1)

    def predict(self, X: Any) -> np.ndarray:
        return (self.predict_proba(X) > 0.5).astype(int)

    def score(self, X: Any, y: Any) -> float:
        """Mean accuracy over labels."""
        return float((self.predict(X) == np.asarray(as_array(y))).mean())
