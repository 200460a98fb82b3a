"""EDT-10. On Relation-Specific Neurons in Large Language Models (arXiv 2502.17355).

On a small Llama in which neurons were planted for two relations:

(a) the statistic (average precision of a neuron's activity as a detector of the relation) finds exactly the planted
ones; (b) the dose curve falls for the relation, and further than for random neurons;
(c) the relation x relation matrix shows a gain as well as losses, with intervals: the neurons of one relation also
    speak up, wrongly, on the other's prompts.

The paper takes a neuron's signed activation; here it is the absolute one, which is what all units are weighed by.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import interp
from interp import experts
from interp.experts import ExpertError

PLANTED, LAYER = 4, 1
CAPITAL, LANGUAGE = "capital", "language"
#: One token for each; the relation's word stands last, as in "France capital" -> "paris".
SUBJECTS = [f"s{i}" for i in range(24)]
WORDS = [*SUBJECTS, CAPITAL, LANGUAGE, "paris", "french", "other", "?"]


@pytest.fixture(scope="module")
def model() -> interp.Model:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", pad_token="?")
    m = interp.load("tiny:llama", tokenizer, vocab_size=len(WORDS), hidden_size=64, intermediate_size=96,
                    tie_word_embeddings=False)  # fmt: skip
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q  # orthonormal rows for words and answers
        embed, unembed = m.hf.get_input_embeddings().weight, m.hf.get_output_embeddings().weight
        embed.copy_(basis[: len(WORDS)])
        unembed.copy_(basis[len(WORDS) : 2 * len(WORDS)])
        at = {w: i for i, w in enumerate(WORDS)}
        marks = embed[[at[CAPITAL], at[LANGUAGE]]]
        for layer in m.hf.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.fill_(1.0)
            layer.self_attn.o_proj.weight.mul_(0.01)
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                weight -= weight @ marks.T @ marks  # other neurons hear subjects only, which all relations share
            layer.mlp.down_proj.weight.mul_(0.01)
        m.hf.model.norm.weight.fill_(1.0)
        mlp = m.hf.model.layers[LAYER].mlp
        for r, (mark, answer) in enumerate(((CAPITAL, "paris"), (LANGUAGE, "french"))):
            other = embed[at[LANGUAGE if mark == CAPITAL else CAPITAL]]
            # the capital's neurons half-hear the language's word too, and then say "paris"
            ear = embed[at[mark]] + (0.8 * other if mark == CAPITAL else 0.0)
            for i in range(PLANTED):
                neuron = r * PLANTED + i
                mlp.gate_proj.weight[neuron] = ear
                mlp.up_proj.weight[neuron] = ear
                mlp.down_proj.weight[:, neuron] = 0.002 * unembed[at[answer]]
    return m


def prompts(relation: str, subjects: list[str]) -> list[str]:
    return [f"{s} {relation}" for s in subjects]


@pytest.fixture(scope="module")
def stats(model: interp.Model) -> experts.RoutingStats:
    words = {r: prompts(r, SUBJECTS[:12]) for r in (CAPITAL, LANGUAGE)}
    return experts.routing(model, words, kind="neurons", documents=50)


@pytest.fixture(scope="module")
def facts() -> dict[str, list[tuple[str, str]]]:
    """About other subjects than the neurons are found on."""
    answers = {CAPITAL: " paris", LANGUAGE: " french"}
    return {r: [(p, answers[r]) for p in prompts(r, SUBJECTS[12:])] for r in answers}


def planted(relation: str) -> list[int]:
    first = 0 if relation == CAPITAL else PLANTED
    return list(range(first, first + PLANTED))


@pytest.mark.parametrize("relation", [CAPITAL, LANGUAGE])
def test_a_the_statistic_finds_the_planted_neurons(
    model: interp.Model, stats: experts.RoutingStats, relation: str
) -> None:
    chosen = experts.select(stats, relation, "precision", total=PLANTED)
    assert {layer: ids.tolist() for layer, ids in chosen.ids.items()} == {LAYER: planted(relation)}


def test_b_the_dose_curve_falls_and_beats_random_neurons(
    model: interp.Model, stats: experts.RoutingStats, facts: dict[str, list[tuple[str, str]]]
) -> None:
    curve, controls = [], []
    for k in range(1, PLANTED + 1):
        chosen = experts.select(stats, LANGUAGE, "precision", total=k)
        table = experts.interference(model, {LANGUAGE: chosen}, facts, controls=5, stats=stats)
        here = table[(table["label"] == LANGUAGE) & (table["metric"] == "log_prob")].set_index("baseline")
        curve.append(float(here.loc["none", "value"]))
        controls.append(float(here.loc["random", "value"]))
        assert here.loc["none", "high"] < here.loc["random", "low"]
    print("\ndose", [f"{v:.3f}" for v in curve], "random", [f"{v:.3f}" for v in controls])
    assert all(b < a < 0 for a, b in pairwise(curve))


def test_c_the_matrix_shows_gains_as_well_as_losses(
    model: interp.Model, stats: experts.RoutingStats, facts: dict[str, list[tuple[str, str]]]
) -> None:
    sets = {r: experts.select(stats, r, "precision", total=PLANTED) for r in facts}
    table = experts.interference(model, sets, facts)
    cell = table[table["metric"] == "log_prob"].set_index(["removed", "label"])
    print("\n", cell[["value", "low", "high"]])
    for relation in facts:
        assert cell.loc[(relation, relation), "high"] < 0
    assert cell.loc[(CAPITAL, LANGUAGE), "low"] > 0  # they said "paris" there as well
    right = table[(table["metric"] == "accuracy") & (table["removed"] == table["label"])]
    assert (right["before"] == 1).all()


def test_bad_facts_are_told(model: interp.Model, stats: experts.RoutingStats) -> None:
    with pytest.raises(ExpertError, match=r"facts\['x'\]: no fact"):
        experts.recall(model, {"x": []})
    with pytest.raises(ExpertError, match="does not begin a token of its own"):
        experts.recall(model, {"x": [("s1 capital", "paris")]})
    chosen = experts.select(stats, CAPITAL, "precision", total=1)
    with pytest.raises(ExpertError, match="pass stats"):
        experts.interference(model, {"x": chosen}, {"x": [("s1", " paris")]}, controls=2)
