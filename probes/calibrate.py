"""Probabilities that mean what they say: one temperature (and, for two classes, a shift), fitted on held-out
examples."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from probes.base import Linear
from probes.errors import ProbeError


def calibrated(probe: Linear, X: Any, y: Any, *, smooth: bool = False) -> Linear:
    """The same linear probe with its scores scaled so that its probabilities fit held-out examples.

    Two classes: Platt's a * score + b (Platt 1999). More: one temperature (Guo et al. 2017, arXiv:1706.04599, section
        4.2).
    The direction does not change; with more classes predictions do not change either.

    Args:
        probe: fitted on other examples.
        X: validation examples [sample, feature]; never the test ones.
        y: their labels [sample].
        smooth: two classes: Platt's targets, (n_1 + 1) / (n_1 + 2) and 1 / (n_0 + 2) in the place of 1 and 0, as if
            each class held one more example of either kind: few separable examples are no reason for certainty.

    Raises ProbeError for a class the probe does not know.
    """
    from scipy.optimize import minimize

    score = probe.decision_function(X)
    y = np.asarray(y)
    if not np.isin(y, probe.classes_).all():
        raise ProbeError(f"y holds {np.setdiff1d(y, probe.classes_)[0]!r}, which the probe was not fitted on")
    numbers = np.searchsorted(probe.classes_, y)
    made = copy.deepcopy(probe)
    if score.ndim == 1:
        n = np.bincount(numbers, minlength=2)
        target = np.array([1 / (n[0] + 2), (n[1] + 1) / (n[1] + 2)])[numbers] if smooth else numbers.astype(float)

        def loss(p: np.ndarray) -> float:
            s = np.exp(p[0]) * score + p[1]
            return float((np.logaddexp(0, s) - target * s).mean())

        found = minimize(
            loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 2000}
        )
        factor, shift = float(np.exp(found.x[0])), float(found.x[1])
    else:
        from scipy.special import log_softmax

        def loss(p: np.ndarray) -> float:
            return float(-log_softmax(np.exp(p[0]) * score, 1)[np.arange(len(y)), numbers].mean())

        found = minimize(
            loss, np.zeros(1), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 2000}
        )
        factor, shift = float(np.exp(found.x[0])), 0.0
    made.coef_ = (probe.coef_ * factor).astype(probe.coef_.dtype)
    made.intercept_ = (probe.intercept_ * factor + shift).astype(probe.intercept_.dtype)
    return made
