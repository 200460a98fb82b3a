"""EVL-03, Questioning the survey responses of LLMs (Dominguez-Olmedo et al. 2024, arXiv:2306.07951): letter bias.

Check: a model that always says A scores one half in both orders together, 1 and 0 in each alone, and its bias of one
half is printed beside; a model that binds letters has none.
"""

from __future__ import annotations

import pytest
import torch

from steering import SteeringVector
from steering.lettered import ab
from tests.steering.words import worded

ITEMS = [
    ("How was the film ?", "good", "bad"),
    ("How was the soup ?", "great", "poor"),
    ("Is this right ?", "yes", "no"),
]


def always_a():
    """Every residual stream lies on one side of a direction that the unembedding gives to A."""
    m = worded()
    a = m.tokenizer.convert_tokens_to_ids("A")
    u = torch.nn.functional.normalize(torch.randn(m.d_model), dim=0)
    with torch.no_grad():
        for layer in m.hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        m.hf.model.embed_tokens.weight += 30 * u
        m.hf.model.norm.weight.fill_(1)
        m.hf.lm_head.weight[a] += 5 * u
    return m


def test_always_a_scores_one_half():
    m = always_a()
    v = SteeringVector.of(m, {"resid_post[1]": 0.1 * torch.randn(m.d_model)})
    table = ab(m, v, ITEMS, [-1, 0, 1]).set_index(["multiplier", "order", "metric"]).value
    for k in (-1.0, 0.0, 1.0):
        assert table[k, "both", "p_positive"] == pytest.approx(0.5, abs=1e-3)
        assert table[k, "positive first", "p_positive"] > 0.99
        assert table[k, "negative first", "p_positive"] < 0.01
        assert table[k, "both", "letter_bias"] == pytest.approx(0.5, abs=0.01)
        assert table[k, "both", "letter_mass"] > 0.9
        print(f"\nmultiplier {k:+g}: P(positive) {table[k, 'both', 'p_positive']:.3f}, letter bias "
              f"{table[k, 'both', 'letter_bias']:+.3f}")  # fmt: skip


def test_numbers_are_the_softmax_at_the_letters():
    m = worded()
    zero = SteeringVector.of(m, {"resid_post[1]": torch.zeros(m.d_model)})
    table = ab(m, zero, ITEMS, [0]).set_index(["order", "metric"]).value
    a, b = (m.tokenizer.convert_tokens_to_ids(x) for x in "AB")
    first, second, mass = [], [], []
    for question, positive, negative in ITEMS:
        for one, two in ((positive, negative), (negative, positive)):
            text = f"{question}\n\nChoices:\n (A) {one}\n (B) {two}\n\nAnswer: ("
            p = m(text)[0, -1].softmax(-1)
            share = float(p[a] / (p[a] + p[b]))
            (first if one is positive else second).append(share if one is positive else 1 - share)
            mass.append(float(p[a] + p[b]))
    assert table["positive first", "p_positive"] == pytest.approx(sum(first) / 3, abs=1e-5)
    assert table["negative first", "p_positive"] == pytest.approx(sum(second) / 3, abs=1e-5)
    assert table["both", "p_positive"] == pytest.approx(sum(first + second) / 6, abs=1e-5)
    bias = sum(x - 0.5 for x in first) / 6 + sum((1 - x) - 0.5 for x in second) / 6
    assert table["both", "letter_bias"] == pytest.approx(bias, abs=1e-5)
    assert table["both", "letter_mass"] == pytest.approx(sum(mass) / 6, abs=1e-5)
