"""caa and mean_centre against their formulas, written out over single forward passes."""

from __future__ import annotations

import pytest
import torch

import interp
import steering
from interp.sites import SiteError
from steering import SteeringError
from steering import pairs as P
from steering.reading import read


def literal_caa(m, pairs, layer, pick):
    total = torch.zeros(m.d_model, dtype=torch.float64)
    for prompt, positive, negative in pairs:
        for sign, side in ((1, positive), (-1, negative)):
            h = m.capture(torch.tensor([prompt + side]), f"resid_post[{layer}]")[f"resid_post[{layer}]"][0].double()
            total += sign * pick(h, len(prompt))
    return total / len(pairs)


@pytest.mark.parametrize(
    ("at", "pick"),
    [
        ("answer", lambda h, n: h[n:].mean(0)),
        (-2, lambda h, n: h[-2]),
        ("last", lambda h, n: h[-1]),
        ("answer_start", lambda h, n: h[n]),
        ("all", lambda h, n: h.mean(0)),
    ],
)
def test_caa_is_its_formula(planted, at, pick):
    m = interp.load("tiny:llama")  # layers that do mix tokens
    pairs = planted.pairs()
    for batch_tokens in (16, 4096):
        v = steering.caa(m, pairs, layer=1, at=at, batch_tokens=batch_tokens)
        torch.testing.assert_close(v.vector.double(), literal_caa(m, pairs, 1, pick), atol=1e-6, rtol=1e-5)


def test_caa_finds_the_planted_direction(planted):
    v = steering.caa(planted.m, planted.pairs(), layer=1)
    assert v.cosine(planted.direction) > 0.9999
    torch.testing.assert_close(v.vector, 2 * planted.direction, atol=1e-5, rtol=0)


def test_all_layers_are_read_in_one_pass_and_equal_single_ones(planted):
    m = interp.load("tiny:llama")
    every = steering.caa(m, planted.pairs(), layer="*")
    assert every.layers == [0, 1, 2]
    for layer in every.layers:
        torch.testing.assert_close(every.only(layer).vector, steering.caa(m, planted.pairs(), layer=layer).vector)


def test_caa_reads_under_open_edits(planted):
    m = interp.load("tiny:llama")
    with m.intervene(interp.edits.zero("mlp_out[0]")):
        edited = steering.caa(m, planted.pairs(), layer=1)
    assert edited.cosine(steering.caa(m, planted.pairs(), layer=1)) < 0.9999


def test_mean_centring_is_its_formula_over_all_tokens():
    m = interp.load("tiny:llama")
    target, background = [[3, 4, 5], [6, 7]], [[8, 9, 10, 11], [12]]
    site = "resid_post[2]"

    def mean(rows):
        return torch.cat([m.capture(torch.tensor([r]), site)[site][0] for r in rows]).double().mean(0)

    v = steering.mean_centre(m, target, background, layer=2)
    torch.testing.assert_close(v.vector.double(), mean(target) - mean(background), atol=1e-6, rtol=1e-5)
    late = steering.mean_centre(m, target, background, layer=2, skip=1)
    want = mean([target[0]]) * 3 - m.capture(torch.tensor([target[0]]), site)[site][0, 0].double()
    want = (want + m.capture(torch.tensor([target[1]]), site)[site][0, 1].double()) / 3
    rest = mean([background[0]]) * 4 - m.capture(torch.tensor([background[0]]), site)[site][0, 0].double()
    torch.testing.assert_close(late.vector.double(), want - rest / 3, atol=1e-6, rtol=1e-5)
    plain = steering.mean_centre(m, target, None, layer=2)
    torch.testing.assert_close(plain.vector.double(), mean(target), atol=1e-6, rtol=1e-5)


def test_centring_finds_what_the_common_offset_hides(planted_offset):
    p = planted_offset
    target = [[40 + i] for i in range(30)]
    background = [[10 + i] for i in range(30)]
    assert steering.mean_centre(p.m, target, background, layer=0).cosine(p.direction) > 0.999
    assert abs(steering.mean_centre(p.m, target, None, layer=0).cosine(p.direction)) < 0.3


def test_bad_pairs_are_named(planted):
    m = planted.m
    for pairs, what in (
        ([], "there is none"),
        ([([3], [4], [4])], r"pairs\[0\]: both sides are equal"),
        ([("a", "b", "c"), ("x", " yes", "yes ")], r"pairs\[1\]: both sides are equal"),
        ([("a", "b")], r"pairs\[0\]: expected \(prompt, positive_text, negative_text\)"),
        (["abc"], r"pairs\[0\]: expected"),
        ([("a", "", "c")], r"pairs\[0\]: the positive text is empty"),
    ):
        with pytest.raises(SteeringError, match=what):
            steering.caa(m, pairs, layer=1)
    with pytest.raises(SiteError, match=r"has layers 0\.\.2"):
        steering.caa(m, planted.pairs(), layer=3)
    with pytest.raises(SteeringError, match="at='letter': expected one of"):
        steering.caa(m, planted.pairs(), layer=1, at="letter")
    with pytest.raises(SteeringError, match="has only"):
        steering.caa(m, planted.pairs(), layer=1, at=-20)
    with pytest.raises(SteeringError, match="chat=True needs texts"):
        steering.caa(m, planted.pairs(), layer=1, chat=True)
    with pytest.raises(SteeringError, match="target_texts: the list is empty"):
        steering.mean_centre(m, [], [[3]], layer=1)


def test_activations_that_are_not_finite_are_refused(planted):
    with torch.no_grad():
        planted.m.hf.model.embed_tokens.weight[40:] = float("nan")
    with pytest.raises(SteeringError, match="not finite"):
        steering.caa(planted.m, planted.pairs(), layer=1)


def test_positions_of_several_tokens_get_an_axis(planted):
    rows = [P.Passage((3, 4, 5, 6), 4), P.Passage((7, 8, 9), 3)]
    got = read(planted.m, rows, ["resid_post[0]"], [-2, -1, 0])["resid_post[0]"]
    want = planted.table[torch.tensor([[5, 6, 3], [8, 9, 7]])]
    torch.testing.assert_close(got, want)


@pytest.mark.smollm2
def test_prompt_and_answer_meet_at_a_token_border(smollm2):
    for prompt, answer in (("The sky is", " blue"), ("The sky is ", "blue"), ("The sky i", "s blue"), ("", "blue")):
        made = P.passage(smollm2, prompt, answer)
        text = smollm2.tokenizer.decode(made.ids)
        assert text == prompt + answer
        assert smollm2.tokenizer.decode(made.ids[made.answer :]).strip() == answer.strip()
        assert smollm2.tokenizer.decode(made.prompt) == prompt.rstrip()


@pytest.mark.smollm2
def test_chat_template_is_used_and_its_lack_told(smollm2):
    made = P.passage(smollm2, "Hello", " yes", chat=True, system="Be brief.")
    assert smollm2.tokenizer.decode(made.prompt).endswith("<|im_start|>assistant\n")
    assert "Be brief." in smollm2.tokenizer.decode(made.prompt)
    bare = interp.Model(smollm2.hf, None, "bare")
    with pytest.raises(SteeringError, match="bare has no tokenizer"):
        P.passage(bare, "Hello", " yes", chat=True)
    with pytest.raises(SteeringError, match="only a chat template has a system turn"):
        P.passage(smollm2, "Hello", " yes", system="Be brief.")
