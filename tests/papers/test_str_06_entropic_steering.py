"""STR-06, Entropic Activation Steering (Rahn et al. 2024, arXiv:2406.00244).

Check: the weights sum as defined on a case worked out by hand, the vector is the formula on a model's activations, and
the entropy of actions is that of their probabilities. On a two-arm bandit the entropy of a trained player's actions
rises with beta, vectors of shuffled weights are flat, and a temperature sweep is printed beside. (What SmolLM2 does on
a bandit told in words: benchmarks/README.md.)
"""

from __future__ import annotations

import pytest
import torch

import interp
import steering
from steering.east import action_entropy, east, weighted
from steering.intervals import bootstrap
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


ARMS, LOST, WON, ROUND, ROUNDS = (10, 11), 12, 13, 20, 8  # round t is announced by token 20 + t
EXPLORE = torch.tensor([1.0, 1.0, 0.9, 0.6, 0.3, 0.15, 0.05, 0.02])  # share of random choices in each round


def games(n: int, g: torch.Generator) -> torch.Tensor:
    """Games of an epsilon-decreasing player [game, 3 * round]: round, arm, reward; it commits to the arm that won more.

    Arms pay with probability .85 and .15. At first the player tries arms at random, in the end it hardly does.
    """
    ids = torch.zeros(n, 3 * ROUNDS, dtype=torch.long)
    good = torch.randint(0, 2, (n,), generator=g)
    lead = torch.zeros(n)  # wins less losses of arm 1, over those of arm 0
    for t in range(ROUNDS):
        best = torch.where(lead == 0, torch.randint(0, 2, (n,), generator=g), (lead > 0).long())
        arm = torch.where(torch.rand(n, generator=g) < EXPLORE[t], torch.randint(0, 2, (n,), generator=g), best)
        won = torch.rand(n, generator=g) < torch.where(arm == good, 0.85, 0.15)
        lead += (2 * arm - 1) * (2 * won.float() - 1)
        ids[:, 3 * t : 3 * t + 3] = torch.stack([torch.full((n,), ROUND + t), arm + ARMS[0], LOST + won.long()], 1)
    return ids


@pytest.fixture(scope="module")
def player() -> interp.Model:
    """A tiny Llama that learnt to play so, by predicting the arms of such games."""
    m, g = interp.load("tiny:llama"), torch.Generator().manual_seed(0)
    step = torch.optim.Adam(m.hf.parameters(), lr=3e-3)
    for _ in range(300):
        ids = games(64, g)
        logits = m.hf(input_ids=ids).logits[:, 0::3]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1::3].flatten())
        step.zero_grad()
        loss.backward()
        step.step()
    m.hf.eval().requires_grad_(False)
    return interp.Model(m.hf, name="player")


def entropy(m, prompts, *edits, temperature: float = 1.0):
    """Entropy of the choice between the arms behind each prompt [prompt], nats; the prompts are equally long."""
    with m.intervene(*edits):
        logp = (m(torch.tensor(prompts))[:, -1, list(ARMS)].double() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def test_a_players_entropy_rises_with_beta_and_not_under_shuffled_weights(player):
    g = torch.Generator().manual_seed(1)
    seen, held_out = games(40, g), games(60, g)
    episodes = [[row[: 3 * t + 1].tolist() for t in range(ROUNDS)] for row in seen]
    entropies = torch.stack([entropy(player, [e[t] for e in episodes]) for t in range(ROUNDS)], 1)
    print("\nentropy by round:", [round(x, 3) for x in entropies.mean(0).tolist()])
    assert entropies[:, 0].min() > 0.6  # undecided at first, of at most .693 nats
    assert entropies[:, -1].mean() < 0.2  # and decided in the end: there is something to raise
    v = steering.east(player, episodes, entropies.tolist(), layer=2)
    mixed = []
    for _ in range(10):
        shuffled = torch.stack([row[torch.randperm(ROUNDS, generator=g)] for row in entropies])
        mixed.append(steering.east(player, episodes, shuffled.tolist(), layer=2))
    late = [row[: 3 * (ROUNDS - 1) + 1].tolist() for row in held_out]
    betas = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
    own = torch.stack([entropy(player, late, v * b) for b in betas])
    other = torch.stack([torch.stack([entropy(player, late, w * b) for b in betas]) for w in mixed]).mean(0)
    long = torch.stack([entropy(player, late, w.with_norm(v.norm)) for w in mixed]).mean(0)
    for b, mine, theirs in zip(betas, own, other, strict=True):
        print(f"beta {b}: {mine.mean():.3f}, shuffled weights {theirs.mean():.3f}, of at most .693")
    print(f"shuffled weights brought to the vector's own norm, beta 1: {long.mean():.3f}")
    for t in (0.5, 1.0, 2.0, 4.0):
        print(f"temperature {t}: {entropy(player, late, temperature=t).mean():.3f}")
    assert (own.mean(1).diff() > 0).all()  # Spearman 1
    assert bootstrap(own[-1] - other[-1])[0] > 0
    assert abs(other[-1].mean() - other[0].mean()) < 0.1 * (own[-1].mean() - own[0].mean())
    # a long vector of any direction unsettles a model this small, yet less than this one
    assert bootstrap(own[2] - long)[0] > 0
