"""STR-06, Entropic Activation Steering (Rahn et al. 2024, arXiv:2406.00244).

Checked here: the weights sum as defined on a case worked out by hand, the vector is the formula on a model's
activations, and the entropy of actions is that of their probabilities. Open: a two-arm bandit on which entropy rises
with beta. SmolLM2 plays the one that was tried at an entropy of 0.690 of at most 0.693 nats, so there was nothing to
raise.
"""

from __future__ import annotations

import pytest
import torch

import steering
from steering.east import action_entropy, east, weighted
from tests.steering.words import worded


def test_by_hand():
    """Two episodes of two steps, entropies 1, 3 and 0, 4."""
    z = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    h = torch.tensor([1.0, 3.0, 0.0, 4.0])
    owner = torch.tensor([0, 0, 1, 1])
    # centred: (-1, 0), (1, 0), (0, 2), (0, -2); weighted sum (2, -8); Z = 8
    assert weighted(z, h, owner).tolist() == [0.25, -1.0]
    assert weighted(z, torch.ones(4), owner).abs().max() == 0  # equal weights point nowhere


def test_it_is_the_formula_on_a_models_activations():
    m = worded()
    episodes = [["How was the film ?", "How was the soup ?"], ["we loved every day", "rain", "the cat sleeps"]]
    entropies = [[0.1, 0.9], [0.3, 0.2, 0.0]]
    v = east(m, episodes, entropies, layer=1)
    total = sum(map(sum, entropies))
    wanted = torch.zeros(m.d_model)
    for episode, weights in zip(episodes, entropies, strict=True):
        z = [m.capture(p, "resid_post[1]")["resid_post[1]"][0, -1] for p in episode]
        mean = torch.stack(z).mean(0)
        wanted += sum(h * (x - mean) for h, x in zip(weights, z, strict=True)) / total
    torch.testing.assert_close(v.vector, wanted, atol=1e-5, rtol=0)


def test_entropy_of_actions():
    m = worded()
    prompts, actions = ["How was the film ?", "rain"], [" good", " bad", " fine"]
    exact = action_entropy(m, prompts, actions)
    ids = [m.tokenizer.convert_tokens_to_ids(a.strip()) for a in actions]
    for i, prompt in enumerate(prompts):
        p = m(prompt)[0, -1, ids].double().softmax(-1)
        assert float(exact[i]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    cold = action_entropy(m, prompts, actions, temperature=0.1)
    assert (cold < exact).all()
    counted = action_entropy(m, ["rain"], ["good", "bad"], samples=8, parse=lambda t: "good", max_new_tokens=1)
    assert counted.tolist() == [0.0]


def test_bad_input():
    m = worded()
    with pytest.raises(steering.SteeringError, match="one number for each"):
        east(m, [["rain"]], [[1.0, 2.0]], layer=1)
    with pytest.raises(steering.SteeringError, match="not all 0"):
        east(m, [["rain", "sun"]], [[0.0, 0.0]], layer=1)
    with pytest.raises(steering.SteeringError, match="two actions"):
        action_entropy(m, ["rain"], ["good"])
