"""Prompt pairs: alignment, answers, builders, noise."""

from __future__ import annotations

import pytest
import torch

import interp
from interp.metrics import last_logits
from interp.patching import builders, pairs
from interp.patching.pairs import PairError
from tests.patching.wordy import wordy


@pytest.fixture(scope="module")
def m() -> interp.Model:
    return wordy()


@pytest.mark.parametrize("task", builders.BUILDERS)
def test_every_builder_gives_aligned_natural_pairs(m: interp.Model, task: str) -> None:
    made = builders.BUILDERS[task](m, 9)
    assert len(made) == 9
    assert made.name == task
    assert made.corruption == "token replacement"
    assert torch.equal(made.clean.mask, made.corrupt.mask)
    differs = made.differing
    assert bool(differs.any(1).all())  # each pair has a difference
    assert not bool(differs[~made.clean.mask].any())
    frame = made.frame()
    assert len(frame) == int(made.clean.mask.sum())
    assert ((frame["clean"] != frame["corrupt"]) == frame["differs"]).all()
    for right, wrong in zip(made.answers, made.wrong, strict=True):
        assert right
        assert wrong
        assert not set(right) & set(wrong)
    assert "?" not in set(frame["clean"])  # no word of ours is unknown to the tokenizer made of our words


@pytest.mark.parametrize("task", ["ioi", "capital_swap", "greater_than", "a_an", "pronoun"])
def test_one_token_is_replaced(m: interp.Model, task: str) -> None:
    assert builders.BUILDERS[task](m, 6).differing.sum(1).tolist() == [1] * 6


def test_the_same_seed_gives_the_same_pairs_and_another_gives_others(m: interp.Model) -> None:
    first, again, other = builders.ioi(m, 8), builders.ioi(m, 8), builders.ioi(m, 8, seed=1)
    assert torch.equal(first.clean.ids, again.clean.ids)
    assert not torch.equal(first.clean.ids, other.clean.ids)


def test_ioi_answers_are_in_the_prompt_and_corrupting_swaps_them(m: interp.Model) -> None:
    made = builders.ioi(m, 8)
    for i in range(8):
        clean, corrupt = made.clean.row(i).tolist(), made.corrupt.row(i).tolist()
        (right,), (wrong,) = made.answers[i], made.wrong[i]
        assert (clean.count(right), clean.count(wrong)) == (1, 2)
        assert (corrupt.count(right), corrupt.count(wrong)) == (2, 1)


def test_greater_than_splits_the_digits_at_the_start_year(m: interp.Model) -> None:
    made = builders.greater_than(m, 8)
    for i in range(8):
        digits = [int(m.tokenizer.decode([t])) for t in made.answers[i]]
        before = [int(m.tokenizer.decode([t])) for t in made.wrong[i]]
        tens = int(made.pieces[0][i][made.differing[i].nonzero()[0, 0]])
        assert (digits, before) == (list(range(tens + 1, 10)), list(range(tens + 1)))


def test_words_of_several_tokens_are_left_out_and_named(smollm2: interp.Model) -> None:
    made = builders.a_an(smollm2, 4)
    assert any("left out" in note and "melon" in note for note in made.notes)
    used = " ".join(" ".join(row) for row in made.pieces[0] + made.pieces[1])
    assert "melon" not in used


def test_smollm2_solves_the_tasks_that_the_notebooks_use(smollm2: interp.Model) -> None:
    """Clean prompts prefer the clean answer, corrupt ones the other: else there would be nothing to explain."""
    for task in ("ioi", "capital_swap", "greater_than", "pronoun", "factual", "successor"):
        made = builders.BUILDERS[task](smollm2, 12)
        metric = made.metric()
        with torch.no_grad():
            clean, corrupt = metric(smollm2(made.clean), made.clean), metric(smollm2(made.corrupt), made.corrupt)
        assert float((clean > corrupt).float().mean()) >= 0.9, task
        if task in ("ioi", "capital_swap", "pronoun", "factual"):
            assert float((clean > 0).float().mean()) >= 0.9, task


def test_metrics_are_their_definitions(m: interp.Model) -> None:
    made = builders.greater_than(m, 3)
    logits = m(made.clean)
    final = last_logits(logits, made.clean)
    p = final.softmax(-1)
    for i in range(3):
        right, wrong = made.answers[i], made.wrong[i]
        got = {
            name: float(made.metric(name)(logits, made.clean)[i]) for name in ("logit_diff", "probability", "log_prob")
        }  # type: ignore[arg-type]
        assert got["logit_diff"] == pytest.approx(float(final[i, right].mean() - final[i, wrong].mean()), abs=1e-5)
        assert got["probability"] == pytest.approx(float(p[i, right].sum()), rel=1e-5)
        assert got["log_prob"] == pytest.approx(float(p[i, right].sum().log()), rel=1e-5)
    assert float(made.metric("kl", reference=logits)(logits, made.clean).abs().max()) < 1e-6
    other = made.metric("kl", reference=logits)(m(made.corrupt), made.corrupt)
    assert bool((other > 0).all())


def test_noise_touches_the_differing_tokens_only_and_says_so(m: interp.Model) -> None:
    made = builders.ioi(m, 4)
    noisy = made.noised(m, factor=3.0, seed=1)
    embed = m.capture(made.clean, "embed")["embed"]
    assert noisy.noise is not None
    changed = (noisy.noise != embed).any(-1)
    assert torch.equal(changed, made.differing)
    assert noisy.corruption == "gaussian noise"
    assert any("gaussian noise" in note for note in noisy.notes)
    step = (noisy.noise - embed)[changed]
    expected = 3.0 * float(m.hf.get_input_embeddings().weight.detach().std())
    assert float(step.std()) == pytest.approx(expected, rel=0.2)
    assert torch.equal(noisy.rows([2]).differing, made.differing[2:3])


def test_rows_and_split_keep_everything_together(m: interp.Model) -> None:
    made = builders.ioi(m, 6)
    a, b = made.split(0.5)
    assert (len(a), len(b)) == (3, 3)
    assert torch.equal(torch.cat([a.clean.ids, b.clean.ids]), made.clean.ids)
    assert b.answers == made.answers[3:]
    assert b.pieces[1] == made.pieces[1][3:]


# -- bad input -------------------------------------------------------------------------------------------------
def test_prompts_of_different_length_are_shown_aligned(m: interp.Model) -> None:
    with pytest.raises(PairError) as caught:
        pairs.of(m, "the doctor went to the store", "the very good doctor went to the store")
    said = str(caught.value)
    assert "6 tokens, the corrupt one 8" in said
    rows = [line for line in said.splitlines() if "|" in line]
    assert rows[0].split("|")[2].strip() == "-"  # a gap under the word that only the other has
    assert rows[1].split("|")[2].strip() == "very"
    assert len(rows[0]) == len(rows[1])


@pytest.mark.parametrize(
    ("clean", "corrupt", "answers", "message"),
    [
        ("the store", "the store", None, "same tokens"),
        (["the store", "the park"], ["the park"], None, "2 clean prompts and 1 corrupt"),
        ("the store", "the park", "very good", "is 2 tokens"),
        ("the store", "the park", 10**6, "vocabulary is 0"),
        ("the store", "the park", ["Mary", "John"], "2 given for 1 pairs"),
        ("the store", "the park", " ", "is 0 tokens"),
    ],
)
def test_what_does_not_pair_is_refused(m: interp.Model, clean, corrupt, answers, message: str) -> None:
    with pytest.raises(PairError, match=message):
        pairs.of(m, clean, corrupt, answers)


def test_a_metric_without_answers_is_refused(m: interp.Model) -> None:
    made = pairs.of(m, "the store", "the park")
    with pytest.raises(PairError, match="needs answers="):
        made.metric()
    with pytest.raises(PairError, match="needs reference="):
        made.metric("kl")
    with pytest.raises(PairError, match="expected logit_diff"):
        made.metric("accuracy")  # type: ignore[arg-type]


def test_ids_work_without_a_tokenizer() -> None:
    m = interp.load("tiny:llama")
    made = pairs.of(m, torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]]), answers=3, wrong=4)
    assert made.frame()["differs"].tolist() == [False, True, False]
    with pytest.raises(PairError, match="no tokenizer"):
        pairs.of(m, torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]]), answers="x")
