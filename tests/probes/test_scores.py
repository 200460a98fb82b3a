"""Splits, intervals, AUROC, calibration and description length against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import probes
from probes.scores import balanced_accuracy


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_split_keeps_groups_whole_and_spreads_classes(seed, classes):
    rng = np.random.default_rng(seed)
    groups = rng.integers(40, size=400)
    y = groups % classes
    s = probes.split(y, groups, seed=seed)
    parts = [set(groups[p]) for p in (s.train, s.validation, s.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert sorted(np.concatenate([s.train, s.validation, s.test]).tolist()) == list(range(400))
    assert all(len(np.unique(y[p])) == classes for p in (s.train, s.validation, s.test))
    assert 0.4 < len(s.train) / 400 < 0.8


def test_leaking_groups_are_found():
    s = probes.Split(np.arange(6), np.arange(6, 8), np.arange(8, 10))
    s.check(None, 10)
    with pytest.raises(probes.ProbeError, match=r"groups stand in train and in test, e\.g\. 'a'"):
        s.check(["a", "b", "c", "d", "e", "f", "g", "h", "a", "i"])
    with pytest.raises(probes.ProbeError, match="rows stand in train and in validation"):
        probes.Split(np.arange(6), np.arange(5, 8), np.arange(8, 10)).check(None, 10)
    with pytest.raises(probes.ProbeError, match="only 1 groups"):
        probes.split([0] * 5 + [1] * 5, ["t"] * 5 + list("abcde"))


def test_auroc_and_accuracy_equal_scikit_learns():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=300)
    score = np.round(y + rng.normal(size=300), 1)  # with ties
    assert probes.auroc(y, score) == pytest.approx(roc_auc_score(y, score))
    assert balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])) == 0.5


def test_intervals_cover_and_groups_widen_them():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        right = rng.random(80) < 0.7
        got = probes.interval(np.ones(80), right.astype(float), draws=200, seed=seed)
        hits += got.low <= 0.7 <= got.high
    assert hits >= 88  # 95 expected
    y, p = np.ones(200), np.repeat(rng.random(20) < 0.7, 10).astype(float)  # 20 documents of ten like tokens
    one, grouped = probes.interval(y, p), probes.interval(y, p, groups=np.repeat(np.arange(20), 10))
    assert grouped.high - grouped.low > 2 * (one.high - one.low)


def test_calibration_of_perfect_and_of_boastful_probabilities():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    y = (rng.random(20_000) < p).astype(int)
    assert probes.calibration(y, p)["ece"] < 0.015
    assert probes.calibration(y, np.ones_like(p))["ece"] == pytest.approx(1 - y.mean())
    assert probes.calibration(y, p)["brier"] == pytest.approx(1 / 6, abs=0.01)


def test_description_length_tells_what_is_there_from_what_is_not():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1500, 10))
    y = (X[:, 0] > 0).astype(int)
    there = probes.description_length(probes.LinearProbe(C=0.1), X, y)
    absent = probes.description_length(probes.LinearProbe(C=0.1), X, rng.permutation(y))
    assert there["compression"] > 3
    assert 0.8 < absent["compression"] <= 1.02
    assert there["bits_per_label"] * 1500 == pytest.approx(there["bits"])
