"""PRB-13. Cao et al. 2022, Can Prompt Probe Pretrained Language Models? (arXiv:2203.12258).

Planted: the model knows 80 % of the facts of each label; each prompt prefers one answer more than the facts weigh, and
so does each answer word. Seven instances in ten have the first label.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
import probes
from probes.prompting import cloze_scores, from_scores
from tests.papers.planted_streams import streams, unit_vectors, word_tokenizer

KNOWN, N = 0.8, 100
FACT, TASTE, WORD, SIZE = unit_vectors(4)
NAMES = [f"n{i}" for i in range(N)]
TASTES = {"p0": 3.0, "p1": -3.0, "p2": 1.5, "p3": -1.5}
WORDS = ["?", *NAMES, *TASTES, "yes", "aye", "no", "nay"]
VERBAL = {"A": ["yes", "aye"], "B": ["no", "nay"]}


@pytest.fixture(scope="module")
def planted():
    """Prompts are "name prompt-word"; one head with an even pattern brings what the name says to the last token."""
    y = np.array([1] * 70 + [-1] * 30)
    knows = np.array([1] * 56 + [-1] * 14 + [1] * 24 + [-1] * 6)
    at = {w: i for i, w in enumerate(WORDS)}
    table = 40 * SIZE.repeat(len(WORDS), 1)  # what all share makes the norms, and so the sums, nearly equal
    for i, name in enumerate(NAMES):
        table[at[name]] += float(y[i] * knows[i]) * FACT
    for word, taste in TASTES.items():
        table[at[word]] += taste * TASTE
    readout = torch.zeros(len(WORDS), 32)
    for word, sign, own in (("yes", 1, 1), ("aye", 1, -1), ("no", -1, -1), ("nay", -1, 1)):
        readout[at[word]] = 40 * (sign * (FACT + TASTE) + own * 0.02 * SIZE)
    m = interp.Model(streams(table, readout).hf, word_tokenizer(WORDS), "planted prompts")
    attention = m.hf.model.layers[0].self_attn
    with torch.no_grad():
        m.hf.model.layers[0].input_layernorm.weight.fill_(1.0)
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        attention.v_proj.weight.zero_()
        attention.v_proj.weight[0] = FACT
        attention.o_proj.weight[:, 0] = 2 * 40 / 32**0.5 * FACT  # undoes the norm and the mean over two tokens
    facts = [(name, "A" if y[i] > 0 else "B") for i, name in enumerate(NAMES)]
    return m, facts, [f"{{}} {p}" for p in TASTES]


def test_bias_is_detected_and_averaging_removes_it(planted):
    m, facts, prompts = planted
    table = probes.prompt_probe(m, facts, prompts, VERBAL, draws=200)
    print("\n", table.round(3).to_string(), "\n", table.attrs)
    accuracy = table[table.metric == "accuracy"].set_index(["method", "prompt", "sample"]).value
    for prompt in prompts:  # alone, each prompt says its favourite to everybody
        assert accuracy["prompt", prompt, "balanced"] == pytest.approx(0.5, abs=0.01)
    assert accuracy["prompt", prompts[0], "raw"] == pytest.approx(0.7, abs=0.01)  # the sample flatters one
    assert accuracy["prompt", prompts[1], "raw"] == pytest.approx(0.3, abs=0.01)
    assert table.attrs["biased"] == sorted(prompts)
    assert abs(accuracy["averaged", "all", "balanced"] - KNOWN) <= 0.01
    assert abs(accuracy["averaged", "all", "raw"] - KNOWN) <= 0.01
    taste = table[(table.metric == "preference") & (table.label == "A")].set_index("prompt").value
    np.testing.assert_allclose(taste, [w * 32**0.5 for w in TASTES.values()], rtol=0.1)


def test_where_tastes_do_not_cancel_only_centring_removes_them(planted):
    m, facts, prompts = planted
    table = probes.prompt_probe(m, facts, [prompts[0], prompts[2]], VERBAL, draws=50)
    accuracy = table[(table.metric == "accuracy") & (table["sample"] == "balanced")].set_index("method").value
    assert accuracy["averaged"] == pytest.approx(0.5, abs=0.01)
    assert abs(accuracy["centred"] - KNOWN) <= 0.01


def test_scores_average_over_names_and_words(planted):
    m, _, prompts = planted
    both = cloze_scores(m, [(("n3", "n80"), "A")], prompts, VERBAL)
    each = [cloze_scores(m, [(name, "A")], prompts, VERBAL) for name in ("n3", "n80")]
    np.testing.assert_allclose(both, np.mean(each, 0), atol=1e-5)
    logp = m("n3 p0")[0, -1].log_softmax(-1)
    words = [WORDS.index("yes"), WORDS.index("aye")]
    assert each[0][0, 0, 0] == pytest.approx(float(logp[words].mean()), abs=1e-5)


def test_unbiased_prompts_are_not_called_biased():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], 50)
    called = []
    for i in range(60):
        drawn = rng.standard_normal((100, 1, 2)) + np.eye(2)[truth][:, None]
        called.append(bool(from_scores(drawn, truth, ["p"], ["a", "b"], draws=200, seed=i).attrs["biased"]))
    assert np.mean(called) <= 0.15  # 5 % by construction of the interval


def test_bad_input(planted):
    m, facts, prompts = planted
    with pytest.raises(probes.ProbeError, match=r"expected \{\} once"):
        probes.prompt_probe(m, facts, ["what?"], VERBAL)
    with pytest.raises(probes.ProbeError, match="label 'A' has no verbaliser"):
        probes.prompt_probe(m, facts, prompts, {"B": ["no"], "C": ["yes"]})
    with pytest.raises(probes.ProbeError, match="begin with the same token 'yes'"):
        probes.prompt_probe(m, facts, prompts, {"A": ["yes"], "B": ["yes"]})
