"""TCAV: known gradients give 1 and 0; random concepts are rejected at the stated level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind

import interp
import probes
from probes.concepts import from_features, sensitivities


def test_planted_gradients_score_one_and_zero():
    rng = np.random.default_rng(0)
    v = rng.normal(size=16)
    concept, random = rng.normal(size=(40, 16)) + 3 * v, rng.normal(size=(300, 16))
    slopes = rng.random((50, 1)) * v + 0.01 * rng.normal(size=(50, 16))
    up, down = from_features(slopes, concept, random), from_features(-slopes, concept, random)
    assert up.score == 1.0
    assert down.score == 0.0
    assert set(up.frame().baseline) == {"none", "random"}


def test_random_concepts_are_significant_no_more_often_than_stated():
    """At the 5 % level at most 8 % of 100; the test over runs, as published, is far above that."""
    rng = np.random.default_rng(0)
    mine = published = 0
    for seed in range(100):
        random = rng.normal(size=(160, 6)).astype(np.float32)
        slopes = rng.normal(size=(30, 6)) + 0.7  # inputs agree somewhat, so scores vary widely with the direction
        concept = rng.normal(size=(20, 6)).astype(np.float32)
        mine += from_features(slopes, concept, random, runs=2, random_sets=6, seed=seed).p_value < 0.05
        if seed < 20:
            other = from_features(slopes, concept, random, runs=8, random_sets=6, seed=seed)
            published += ttest_ind(other.scores, other.random, equal_var=False).pvalue < 0.05
    assert mine <= 8
    assert published > 4


def test_sensitivities_are_the_slope_of_moving_every_token():
    m = interp.load("tiny:llama")
    ids = torch.randint(0, m.d_vocab, (3, 7), generator=torch.Generator().manual_seed(0))
    metric = interp.metrics.logit_diff(3, 5)
    slopes = sensitivities(m, m.tokens(ids), metric, "resid_post[0]")
    v = torch.randn(m.d_model, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    values = []
    for sign in (1, -1):
        with m.intervene(interp.edits.add("resid_post[0]", sign * step * v)):
            values.append(metric.fn(m(ids), m.tokens(ids)))
    numeric = (values[0] - values[1]) / (2 * step)
    np.testing.assert_allclose(slopes @ v.numpy(), numeric.numpy(), rtol=2e-2, atol=2e-4)


def test_bad_input():
    m = interp.load("tiny:llama")
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(probes.ProbeError, match="no gradient"):
        sensitivities(m, m.tokens(ids), lambda logits: logits[:, -1].argmax(-1).float(), "resid_post[0]")
    with pytest.raises(probes.ProbeError, match="twice as many"):
        from_features(np.ones((3, 4)), np.ones((5, 4)), np.ones((9, 4)))
