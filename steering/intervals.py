"""Intervals: over items by resampling them, over random controls by their spread.

Items (prompts, documents) are what was drawn, so they are what is resampled; all runs are measured on the same
items, so a difference between runs is resampled as a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Any

import numpy as np


def bootstrap(values: Any, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [item]; NaN for a single item."""
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n < 2:
        return nan, nan
    rng, means = np.random.default_rng(seed), []
    for chunk in range(0, resamples, 500):
        draws = rng.integers(n, size=(min(500, resamples - chunk), n))
        means.append(x[draws].mean(1))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def spread(draws: Sequence[float] | Any, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of control draws; with 20 of them close to their extremes. NaN for a single draw."""
    x = np.asarray(draws, dtype=np.float64)
    if len(x) < 2:
        return nan, nan
    tail = 50 * (1 - level)
    low, high = np.percentile(x, [tail, 100 - tail])
    return float(low), float(high)
