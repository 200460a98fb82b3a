"""PRB-08. Schramowski et al. 2022, Large Pre-trained Language Models Contain Human-like Biases of What is Right and
Wrong to Do (arXiv:2103.11790).

Planted: phrases with known ratings. Trained: a small model with a kind and a grumpy register; the axis is found from
half of the words, what it filters and steers is judged by the other half.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import interp
import probes
from interp.metrics import Metric, last_logits
from tests.papers.planted_streams import streams, unit_vectors, word_tokenizer
from tests.papers.taught import AT, GRUMPY, KIND, PLAIN, taught

N, V = 80, unit_vectors(1)[0]
WORDS = ["?", "should", "i", "is", "it", "right", *[f"deed{i}" for i in range(N)]]


@pytest.fixture(scope="module")
def planted():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(N, generator=g) * 2 - 1
    table = torch.cat([torch.randn(6, 32, generator=g), truth[:, None] * V + 0.05 * torch.randn(N, 32, generator=g)])
    return interp.Model(streams(table).hf, word_tokenizer(WORDS), "planted deeds"), truth.numpy()


def test_planted_ratings_are_recovered_with_their_sign(planted):
    m, truth = planted
    deeds = [f"deed{i}" for i in range(N)]
    good = [d for d, r in zip(deeds[:30], truth[:30], strict=True) if r > 0]
    bad = [d for d in deeds[:30] if d not in good]
    templates = ["should i {}", "is it right i {}"]
    a = probes.axis(m, good, bad, "resid_post[1]", templates=templates)
    rated = a.ratings(m, deeds[30:])
    rank = spearmanr(rated.value, truth[30:]).statistic
    print(f"\nheld-out Spearman {rank:.3f}; {a.explained:.0%} of variance, anchors AUROC {a.anchored:.2f}")
    assert rank >= 0.95
    assert a.anchored > 0.95
    assert a.ratings(m, good + bad).value.abs().max() == pytest.approx(1)
    turned = probes.axis(m, bad, good, "resid_post[1]", templates=templates).ratings(m, deeds[30:])
    np.testing.assert_allclose(turned.value, -rated.value, atol=1e-5)


def test_an_axis_that_is_about_something_else_warns(planted):
    m, _ = planted
    deeds = [f"deed{i}" for i in range(40)]
    with pytest.warns(probes.ProbeWarning, match="tells the anchors apart"):
        probes.axis(m, deeds[::2], deeds[1::2], "resid_post[1]")
    with pytest.raises(probes.ProbeError, match="templates"):
        probes.axis(m, deeds[::2], deeds[1::2], "resid_post[1]", templates=["no place"])


@pytest.fixture(scope="module")
def register():
    """The axis from words 0..5 of both registers at the middle layer."""
    m = taught()
    phrases = [[f"s {words[i]} {words[j]}" for i in range(6) for j in range(6) if i != j] for words in (KIND, GRUMPY)]
    return m, probes.axis(m, *phrases, "resid_post[1]", at="last")


HELD = slice(6, 12)  # words that neither axis nor anchors ever saw


def rude(texts: list[str]) -> np.ndarray:
    """The judge: share of a text's words that are grumpy ones, of the held-out half."""
    return np.array([np.mean([w in GRUMPY[HELD] for w in t.split()]) for t in texts])


def prompts(n: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [f"s {' '.join(draw.choice(PLAIN, 2))}" for _ in range(n)]


def test_as_a_steer_it_lowers_scored_rudeness_beyond_random_directions(register):
    m, a = register

    def mass(logits, tokens):
        return last_logits(logits, tokens).softmax(-1)[:, AT[GRUMPY[6]] : AT[GRUMPY[11]] + 1].sum(-1)

    vector = 2 * a.spread * a.direction
    table = probes.effect(
        m, a.edit(2.0), prompts(60, 1), Metric(mass, "P(held-out grumpy words)"),
        probes.random_adds("resid_post[1]", vector, 20),
    )  # fmt: skip
    print("\n", table.round(3).to_string())
    assert table.attrs["beats"]
    assert table.attrs["direction"] == -1
    assert table.high[0] < 0

    def said(*edits):
        torch.manual_seed(0)
        with m.intervene(*edits):
            return rude(m.generate(prompts(100, 2), max_new_tokens=5, do_sample=True).texts).mean()

    plain, steered = said(), said(a.edit(2.0))
    random = [said(e) for e in probes.random_adds("resid_post[1]", vector, 8)]
    print(f"scored rudeness of what it writes: {plain:.2f} -> {steered:.2f}; random directions {np.round(random, 2)}")
    assert steered < plain
    assert steered < min(random)


def test_as_a_filter_it_keeps_the_kind_texts(register):
    m, a = register
    torch.manual_seed(1)
    made = m.generate(prompts(100, 3), max_new_tokens=5, do_sample=True)
    whole = [f"{p} {t}" for p, t in zip(prompts(100, 3), made.texts, strict=True)]
    kept = np.array(a.keep(m, whole))
    score = rude(whole)
    rng = np.random.default_rng(0)
    random = [score[rng.permutation(len(kept))[: kept.sum()]].mean() for _ in range(200)]
    low = np.quantile(random, 0.025)
    print(f"\nscored rudeness {score.mean():.2f}; the {kept.sum()} kept {score[kept].mean():.2f}; random {low:.2f} up")
    assert 20 <= kept.sum() <= 80
    assert score[kept].mean() < low
