"""How good a probe is, with its interval: accuracy, AUROC, calibration, description length.

Intervals are bootstraps over *groups* (documents, templates, or single examples where there are none), because tokens
of
one document are alike: drawing them one by one would make every interval too narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from probes.errors import ProbeError

Score = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Interval:
    """A value and its interval at 95 %."""

    value: float
    low: float
    high: float


def accuracy(y: np.ndarray, predicted: np.ndarray) -> float:
    return float((y == predicted).mean())


def balanced_accuracy(y: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over classes of the share that was recognised: chance is 1 / classes, however unequal they are."""
    return float(np.mean([(predicted[y == c] == c).mean() for c in np.unique(y)]))


def auroc(y: np.ndarray, score: np.ndarray) -> float:
    """Chance that a positive example scores above a negative one; ties count half. `y` is 0 or 1."""
    from scipy.stats import rankdata

    positive = y.astype(bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m))


def interval(
    y: np.ndarray, predicted: np.ndarray, score: Score = accuracy, groups: np.ndarray | None = None, *,
    draws: int = 500, seed: int = 0,
) -> Interval:  # fmt: skip
    """A score on held-out examples with its 95 % bootstrap interval over groups.

    Args:
        y: labels [sample].
        predicted: what the probe says: classes, or scores for AUROC [sample].
        score: of labels and predictions.
        groups: to which group each example belongs [sample]; None takes each for itself.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    members = _members(groups, len(y))
    found = []
    for _ in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        found.append(score(y[rows], predicted[rows]))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return Interval(score(y, predicted), float(low), float(high))


def _members(groups: np.ndarray | None, n: int) -> list[np.ndarray]:
    if groups is None:
        return list(np.arange(n)[:, None])
    _, number = np.unique(groups, return_inverse=True)
    order = number.argsort(kind="stable")
    return np.split(order, np.unique(number[order], return_index=True)[1][1:])


def calibration(y: np.ndarray, p: np.ndarray, bins: int = 10) -> dict[str, float]:
    """Is a probability of .7 right seven times in ten?

    Args:
        y: 0 or 1 [sample].
        p: probability of 1 [sample].
        bins: how many, of equal width.

    Returns: "ece", the expected calibration error: mean over bins of equal width of |share of ones - mean p|, weighted
        by
    size (Guo et al. 2017, arXiv:1706.04599, eq. 3); "brier", mean (p - y)^2.
    """
    where = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(y[where == b].mean() - p[where == b].mean()) * (where == b).mean() for b in np.unique(where)]
    return {"ece": float(np.sum(gaps)), "brier": float(((p - y) ** 2).mean())}


def description_length(probe: Any, X: np.ndarray, y: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """Bits to send the labels given the features, each block coded by a probe fitted on all blocks before it.

    The first block goes at log2(classes) a label; blocks grow by halves up to the whole: .1, .2, .4, .8, 1.6, 3.2,
    6.25, 12.5, 25, 50 and 100 per cent. A representation that makes a label easy needs few examples, so few bits;
    accuracy alone does not tell. Source: Voita & Titov 2020 (arXiv:2003.12298), online code, section 2.2.

    Returns: "bits", "bits_per_label" and "compression" (uniform code / online code; 1 or less: nothing is there).
    """
    from itertools import pairwise

    from sklearn.base import clone

    order = np.random.default_rng(seed).permutation(len(y))
    X, y = X[order], y[order]
    classes = np.unique(y)
    if len(classes) < 2:
        raise ProbeError("description length: one class only; nothing has to be sent")
    cuts = sorted({int(len(y) * share / 100) for share in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50, 100)})
    cuts = [c for c in cuts if c and all((y[:c] == k).any() for k in classes)]  # a probe needs every class once
    first = cuts[0] if cuts else len(y)
    bits = first * np.log2(len(classes))
    for start, stop in pairwise(cuts):
        fitted = clone(probe).fit(X[:start], y[:start])
        p = fitted.predict_proba(X[start:stop])[np.arange(stop - start), np.searchsorted(classes, y[start:stop])]
        bits += float(-np.log2(np.clip(p, 1e-12, 1)).sum())
    uniform = len(y) * np.log2(len(classes))
    return {"bits": float(bits), "bits_per_label": float(bits / len(y)), "compression": float(uniform / bits)}
