"""STR-14, Towards reliable evaluation of behaviour steering (Pres et al. 2024, arXiv:2410.17245).

Check: a report is refused where one of the four properties (context, likelihood, scale common to behaviours, baseline)
is missing; steering that does nothing gets an interval that covers 0 in at least 90 % of 200 simulated runs.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from steering import SteeringError
from steering.intervals import bootstrap
from steering.pres import pres, scale
from steering.propensity import slopes
from steering.report import Report


def simulated(rng: np.random.Generator, effect: float = 0.0, items: int = 40) -> pd.DataFrame:
    """Items of differing liking; each reacts to the multiplier by `effect` and by a slope of its own around it."""
    rows = []
    for item in range(items):
        start, own = rng.normal(0, 1), rng.normal(effect, 0.5)
        for k in (-2.0, -1.0, 0.0, 1.0, 2.0):
            value = start + own * k + rng.normal(0, 0.2)
            rows.append({"item": item, "multiplier": k, "baseline": "none", "draw": 0, "positive": -2 + value / 2,
                         "negative": -2 - value / 2, "value": value})  # fmt: skip
    return pd.DataFrame(rows)


def covers(table: pd.DataFrame, seed: int) -> bool:
    low, high = bootstrap(slopes(table).slope, seed=seed, resamples=1000)
    return low <= 0 <= high


def test_null_steering_is_reported_as_null():
    rng = np.random.default_rng(0)
    found = np.mean([covers(simulated(rng), seed) for seed in range(200)])
    power = np.mean([not covers(simulated(rng, effect=0.4), seed) for seed in range(50)])
    print(f"\ninterval of null steering covers 0 in {found:.1%} of 200 runs; an effect of 0.4 is seen in {power:.0%}")
    assert found >= 0.9
    assert power > 0.9  # and it is no interval that covers everything


def test_the_four_properties_are_asked_for():
    columns = ["section", "metric", "baseline", "multiplier", "position"]
    kinds = [("propensity", "none"), ("propensity", "random"), ("promotes", "none"), ("demotes", "none")]
    full = [("on target", *kind) for kind in kinds]
    about = {"context": "a prompt", "method": "m", "model": "x", "verdict": []}

    def made(rows, **changed) -> Report:
        table = pd.DataFrame([dict(zip(columns, (*row, 0.0, np.nan), strict=True)) for row in rows])
        return Report(table, pd.DataFrame(), {**about, **changed})

    assert made(full).missing() == []
    for broken, name in (
        (made(full, context=""), "context"),
        (made([r for r in full if r[1] != "propensity"]), "likelihood"),
        (made([r for r in full if r[1] != "promotes"]), "common scale"),
        (made([r for r in full if r[2] != "random"]), "baseline"),
    ):
        assert name in broken.missing()
        with pytest.raises(SteeringError, match=name):
            broken.to_html()


def test_the_scale_is_common_to_behaviours():
    """Twice the log-likelihoods (longer or rarer answers) give the same normalised shifts."""
    rng = np.random.default_rng(1)
    table = simulated(rng, 0.3)
    table[["positive", "negative"]] -= 1
    double = table.assign(positive=2 * table.positive, negative=2 * table.negative, value=2 * table.value)
    np.testing.assert_allclose(pres(table, 1.0).value, pres(double, 1.0).value)
    own = {s: table[(table.multiplier == 0)][s].to_numpy() for s in ("positive", "negative")}
    assert scale(own) == pytest.approx(abs((own["negative"].max() + own["positive"].min()) / 2))
