"""PRB-11. Shah et al. 2023, Numeric Magnitude Comparison Effects in Large Language Models (arXiv:2305.10782).

Planted: numbers on a logarithmic scale, so that the cosine of two is a power of their ratio, exactly. Words and digits
get embeddings of their own; in a third notation the same embeddings stand for permuted numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
import probes
from probes.quantities import EFFECTS, effects
from tests.papers.planted_streams import streams

NUMBERS = np.arange(1, 21)


def logarithmic(power: float) -> np.ndarray:
    """Vectors [20, 20] with cosine (max / min)^-power: the covariance of a process that forgets with log(n)."""
    gram = np.exp(-power * np.abs(np.log(NUMBERS[:, None] / NUMBERS)))
    size, basis = np.linalg.eigh(gram)
    return basis * np.sqrt(np.maximum(size, 0))


@pytest.fixture(scope="module")
def planted():
    table = torch.zeros(60, 32)
    order = np.random.default_rng(0).permutation(20)
    for i, X in enumerate((logarithmic(0.5), logarithmic(0.7), logarithmic(0.5)[order])):
        table[20 * i : 20 * (i + 1), :20] = torch.from_numpy(X)
    notations = {name: {int(n): [20 * i + int(n) - 1] for n in NUMBERS} for i, name in
                 enumerate(("digits", "words", "permuted"))}  # fmt: skip
    return streams(table), notations


def test_the_planted_scale_is_found_at_each_layer_and_shuffling_destroys_it(planted):
    m, notations = planted
    table = probes.magnitude(m, notations)
    print("\n", table[table.node == "resid_post[1]"].round(3).to_string())
    value = table.set_index(["node", "label", "effect", "baseline"])
    for layer in range(m.n_layers):
        for label in ("digits", "words"):
            at = (f"resid_post[{layer}]", label)
            assert value.loc[(*at, "joint", "none"), "value"] >= 0.95
            assert value.loc[(*at, "ratio", "none"), "value"] >= 0.95
            assert value.loc[(*at, "distance", "none"), "slope"] < 0
            assert value.loc[(*at, "size", "none"), "slope"] > 0
            assert value.loc[(*at, "ratio", "none"), "slope"] < 0
            for effect in EFFECTS:
                assert value.loc[(*at, effect, "shuffled"), "value"] < 0.1
                assert value.loc[(*at, effect, "none"), "value"] > value.loc[(*at, effect, "shuffled"), "high"]
        assert value.loc[(f"resid_post[{layer}]", "permuted", "joint", "none"), "value"] < 0.1


def test_regressions_equal_a_library_s():
    from scipy.optimize import curve_fit
    from sklearn.linear_model import LinearRegression

    X = logarithmic(0.7) + 0.1 * np.random.default_rng(1).standard_normal((20, 20))
    found = {r["effect"]: r["value"] for r in effects(X, NUMBERS, shuffles=2) if r["baseline"] == "none"}
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    pairs = [(a, b) for a in range(20) for b in range(a + 1, 20)]
    s = np.array([unit[a] @ unit[b] for a, b in pairs])
    columns = np.array([[b - a, a + 1, np.log((b + 1) / (a + 1))] for a, b in pairs], float)
    assert found["distance"] == pytest.approx(LinearRegression().fit(columns[:, :1], s).score(columns[:, :1], s))
    assert found["joint"] == pytest.approx(LinearRegression().fit(columns, s).score(columns, s))
    near = columns[:, 0] == 1
    size = columns[near][:, 1:2]
    assert found["size"] == pytest.approx(LinearRegression().fit(size, s[near]).score(size, s[near]))
    ratio = np.exp(columns[:, 2])
    (c, k, r), _ = curve_fit(lambda x, c, k, r: c + k * np.exp(-r * (x - 1)), ratio, s, p0=(0, 1, 0.5))
    left = s - (c + k * np.exp(-r * (ratio - 1)))
    assert found["ratio"] == pytest.approx(1 - left.var() / s.var(), abs=1e-3)


def test_a_model_of_random_weights_shows_no_more_than_shuffling():
    m = interp.load("tiny:gpt2")
    table = probes.magnitude(m, {"ids": {int(n): [int(n) + 30] for n in NUMBERS}}, "resid_post[0]")
    joint = table[table.effect == "joint"].set_index("baseline")
    assert joint.loc["none", "value"] < joint.loc["shuffled", "high"] + 0.05


def test_bad_input():
    with pytest.raises(probes.ProbeError, match="five or more, positive"):
        effects(np.eye(6), [0, 1, 2, 3, 4, 5])
    with pytest.raises(probes.ProbeError, match="template='a number'"):
        probes.magnitude(None, {}, template="a number")
