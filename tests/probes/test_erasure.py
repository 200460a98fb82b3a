"""Erasers: what they remove, and how little else."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import check_estimator

import interp
import probes


def planted(n: int = 4000, d: int = 12, classes: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d))
    y = rng.integers(classes, size=n)
    return rng.normal(size=(n, d)) @ mix + 2 * rng.normal(size=(classes, d))[y], y


def literal_leace(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Belrose et al. 2023, theorem 4.3, with scipy's matrix functions: x - W^+ P W (x - mean)."""
    from scipy.linalg import fractional_matrix_power, pinv

    x, z = X - X.mean(0), np.eye(y.max() + 1)[y]
    whiten = np.real(fractional_matrix_power(x.T @ x / len(x), -0.5))
    columns = whiten @ (x.T @ (z - z.mean(0)) / len(x))
    project = columns @ pinv(columns, rtol=1e-10)  # one-hot columns sum to 0: of the last there is rounding alone
    return X - x @ (pinv(whiten) @ project @ whiten).T


def test_leace_equals_its_formula():
    X, y = planted()
    mine = probes.Leace(shrinkage=False, tol=0).fit(X, y)
    np.testing.assert_allclose(mine.transform(X), literal_leace(X, y), atol=1e-6)
    assert mine.rank_ == 2  # three classes span two directions


@pytest.mark.parametrize("eraser", [probes.Leace(), probes.MeanProjection(), probes.INLP(steps=2)],
                         ids=lambda e: type(e).__name__)  # fmt: skip
def test_keeps_scikit_learns_contract(eraser):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = check_estimator(eraser, on_fail=None)
    assert [(r["check_name"], str(r["exception"])) for r in done if r["status"] == "failed"] == []


def test_it_is_the_same_map_that_steering_makes():
    from steering import leace_map

    X, y = planted()
    x = torch.from_numpy(X).float()
    theirs = leace_map(x, torch.from_numpy(y), trace_guard=False)
    mine = probes.Leace(shrinkage=False).fit(x, y).transform(x)
    np.testing.assert_allclose(mine, theirs(x[None], None)[0].numpy(), atol=1e-4)


def test_leace_leaves_a_fresh_probe_at_chance_on_held_out_data():
    X, y = planted(n=8000)
    half = slice(0, 4000), slice(4000, None)
    before = probes.LinearProbe().fit(X[half[0]], y[half[0]]).score(X[half[1]], y[half[1]])
    e = probes.Leace().fit(X[half[0]], y[half[0]])
    Z = e.transform(X)
    after = probes.LinearProbe().fit(Z[half[0]], y[half[0]]).score(Z[half[1]], y[half[1]])
    assert before > 0.8
    assert after < np.bincount(y).max() / len(y) + 0.03


def test_leace_moves_less_than_projecting_the_means_out_would_need():
    """Both make the class means equal; among such maps Leace's has the least mean square change (in x's own norm)."""
    X, y = planted()
    moved = {}
    for name in ("Leace", "MeanProjection"):
        e = getattr(probes, name)().set_params(**({"shrinkage": False, "tol": 0} if name == "Leace" else {})).fit(X, y)
        Z = e.transform(X)
        means = np.stack([Z[y == c].mean(0) for c in range(3)])
        np.testing.assert_allclose(means - means[0], 0, atol=1e-6)
        moved[name] = ((Z - X) ** 2).sum(1).mean()
    assert moved["Leace"] <= moved["MeanProjection"] + 1e-9


def test_inlp_stops_at_chance_and_is_a_projection():
    X, y = planted(classes=2)
    e = probes.INLP(steps=12).fit(X, y)
    np.testing.assert_allclose(e.matrix_ @ e.matrix_, e.matrix_, atol=1e-8)
    Z = e.transform(X)
    assert probes.LinearProbe().fit(Z, y).score(Z, y) < 0.56


def test_continuous_concepts():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2000, 8))
    size = X[:, 0] * 3 + rng.normal(size=2000) * 0.1 + 0.5
    Z = probes.Leace(shrinkage=False).fit(X, size).transform(X)
    assert np.abs(np.corrcoef(Z.T, size)[-1, :-1]).max() < 1e-6


def test_the_edit_is_the_transform():
    m = interp.load("tiny:llama")
    ids = torch.randint(0, m.d_vocab, (6, 9), generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    e = probes.Leace().fit(rng.normal(size=(200, m.d_model)), rng.integers(2, size=200))
    before = m.capture(ids, "resid_post[0]")["resid_post[0]"]
    with m.intervene(e.edit("resid_post[0]")):
        after = m.capture(ids, "resid_post[0]")["resid_post[0]"]
    expected = e.transform(before.flatten(0, 1)).reshape(before.shape)
    np.testing.assert_allclose(after.numpy(), expected, atol=1e-5)


def test_bad_input():
    X, y = planted(n=50)
    with pytest.raises(probes.ProbeError, match="one class only"):
        probes.Leace().fit(X, np.zeros(50))
    with pytest.raises(probes.ProbeError, match="one set of class labels"):
        probes.INLP().fit(X, np.stack([y, y], 1))
