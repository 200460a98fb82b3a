"""The Kneser-Ney baseline against the equations written out with dictionaries."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from interp.monet.train.ngram import KneserNey, discounts

V = 5


def literal(runs: list[list[int]], order: int, history: tuple[int, ...], word: int) -> float:
    """p(word | history), recursively, as in the module's docstring."""
    grams = Counter(tuple(run[i : i + order]) for run in runs for i in range(len(run) - order + 1))
    counts = {order: grams}
    for k in range(order - 1, 0, -1):  # continuation counts
        counts[k] = Counter(gram[1:] for gram in counts[k + 1])

    def p(k: int, h: tuple[int, ...]) -> float:
        if k == 0:
            return 1 / V
        c = counts[k]
        n = Counter(c.values())
        y = n[1] / (n[1] + 2 * n[2]) if n[1] + n[2] else 0.0
        d = {i: i - (i + 1) * y * n[i + 1] / n[i] if n[i] else 0 for i in (1, 2, 3)}
        d = {i: x if 0 < x < i else 0.5 for i, x in d.items()}
        after = {w: c[(*h, w)] for w in range(V) if c[(*h, w)]}
        total = sum(after.values())
        if not total:
            return p(k - 1, h[1:])
        gamma = sum(d[min(count, 3)] for count in after.values()) / total
        own = after.get(word, 0)
        return (own - d[min(own, 3)] if own else 0) / total + gamma * p(k - 1, h[1:])

    k = min(order, len(history) + 1)
    return p(k, history[len(history) - k + 1 :])


@pytest.fixture(scope="module")
def runs() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.choice(V - 1, size=n, p=[0.5, 0.3, 0.15, 0.05]).tolist() for n in (60, 3, 40, 1)]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_the_literal_formula(order: int, runs: list[list[int]]) -> None:
    model = KneserNey([np.array(run) for run in runs], V, order)
    text = np.random.default_rng(2).integers(V, size=80)  # token 4 was never seen
    expected = [np.log(literal(runs, order, tuple(text[:i].tolist()), int(text[i]))) for i in range(len(text))]
    np.testing.assert_allclose(model.log_probs(text), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_sum_to_one_after_every_history(order: int, runs: list[list[int]]) -> None:
    model = KneserNey([np.array(run) for run in runs], V, order)
    for length in range(order + 1):
        for history in product(range(V), repeat=length):
            p = [np.exp(model.log_probs(np.array([*history, word]))[-1]) for word in range(V)]
            assert sum(p) == pytest.approx(1, abs=1e-12)
            assert min(p) > 0


def test_discounts_are_those_of_the_paper() -> None:
    counts = np.repeat([1, 2, 3, 4], [10, 5, 3, 2])
    y = 10 / 20
    np.testing.assert_allclose(discounts(counts), [0, 1 - 2 * y * 0.5, 2 - 3 * y * 0.6, 3 - 4 * y * 2 / 3])


def test_a_real_vocabulary_fits() -> None:
    text = np.random.default_rng(0).integers(4096, size=2000)
    model = KneserNey([text], 4096)
    assert model.log_probs(text).mean() > model.log_probs(text[::-1]).mean() + 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 80 bits, expected 1 to 63; orders up to 3 fit"):
        KneserNey([np.arange(9)], 65536)
    with pytest.raises(ValueError, match="none has 5 tokens"):
        KneserNey([np.arange(3)], V)
    with pytest.raises(ValueError, match=r"ids 0\.\.5, expected 0\.\.4"):
        KneserNey([np.arange(5)], V).log_probs(np.arange(6))
