"""PRB-09. Haemmerl et al. 2023, Speaking Multiple Languages Affects the Moral Bias of Language Models
(arXiv:2211.07733).

Planted: three "languages" whose phrases carry a rating along a direction of their own. Two directions have a cosine of
.6 and the judgements agree in part; the third shares neither.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import probes
from tests.papers.planted_streams import streams, unit_vectors

N, LANGUAGES = 120, ("en", "de", "xx")
V, W, X = unit_vectors(3)
DIRECTIONS = torch.stack([V, 0.6 * V + 0.8 * W, X])


@pytest.fixture(scope="module")
def planted():
    """Token l * 120 + i is phrase i in language l."""
    g = torch.Generator().manual_seed(0)
    one, two, three = torch.rand(3, N, generator=g) * 2 - 1
    truth = torch.stack([one, 0.7 * one + 0.5 * two, three])
    noise = 0.03 * torch.randn(3, N, 32, generator=g)
    offset = torch.randn(3, 1, 32, generator=g)  # every language lies elsewhere
    table = truth[..., None] * DIRECTIONS[:, None] + noise + offset
    phrases = {name: [[i + N * lang] for i in range(N)] for lang, name in enumerate(LANGUAGES)}
    sure = [i for i in range(N) if bool((truth[:, i] > 0).all()) or bool((truth[:, i] < 0).all())]
    anchors = sure[:24]
    positive = [i for i in anchors if truth[0, i] > 0]
    return streams(table.flatten(0, 1)), phrases, positive, [i for i in anchors if i not in positive], truth.numpy()


@pytest.mark.parametrize("method", ["pca", "means"])
def test_the_planted_matrix_comes_back_and_shuffled_pairs_give_nothing(planted, method):
    m, phrases, positive, negative, truth = planted
    found = probes.across(
        m, phrases, positive=positive, negative=negative, site="resid_post[1]", method=method, draws=300
    )
    print(f"\n{method}\n", found.matrix("cosine").round(2), "\n", found.matrix("spearman").round(2))
    wanted = (DIRECTIONS @ DIRECTIONS.T).numpy()
    np.testing.assert_allclose(found.matrix("cosine"), wanted, atol=0.05)
    rest = found.ratings.index.to_numpy()
    planted_ranks = spearmanr(truth[:, rest].T).statistic
    np.testing.assert_allclose(found.matrix("spearman"), planted_ranks, atol=0.05)
    shuffled = found.table[found.table.baseline == "shuffled"]
    assert (shuffled.value.abs() < 0.05).all()
    assert ((shuffled.low < 0) & (shuffled.high > 0)).all()
    real = found.table[(found.table.metric == "spearman") & (found.table.baseline == "none")].set_index(
        ["one", "other"]
    )
    assert real.loc[("en", "de"), "low"] > shuffled.high.max()


def test_signs_are_anchored(planted):
    """With the anchors exchanged in all languages every direction turns, and no comparison changes."""
    m, phrases, positive, negative, _ = planted
    two = {name: phrases[name] for name in ("en", "de")}
    one = probes.across(m, two, positive=positive, negative=negative, site="resid_post[1]", draws=50)
    other = probes.across(m, two, positive=negative, negative=positive, site="resid_post[1]", draws=50)
    for name in two:
        np.testing.assert_allclose(one.axes[name].direction, -other.axes[name].direction, atol=1e-6)
    np.testing.assert_allclose(one.matrix("spearman"), other.matrix("spearman"), atol=1e-9)


def test_bad_input(planted):
    m, phrases = planted[:2]
    with pytest.raises(probes.ProbeError, match="same phrases in the same order"):
        probes.across(m, {"en": [[1]], "de": [[1], [2]]}, positive=[0], negative=[1], site="resid_post[0]")
    with pytest.raises(probes.ProbeError, match="different numbers"):
        probes.across(m, phrases, positive=[0], negative=[0], site="resid_post[0]")
    with pytest.raises(probes.ProbeError, match="one side only"):
        probes.fit_axis(np.ones((3, 2)), np.ones(3, bool))
    with pytest.raises(probes.ProbeError, match="it has no site"):
        probes.fit_axis(np.eye(4), np.array([True, False, True, False]), "means").edit(1.0)
