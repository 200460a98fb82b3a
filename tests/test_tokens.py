"""Whatever a user calls text becomes a padded batch of ids, or is refused with the mend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from interp.activations import Tokens
from interp.model import Model
from interp.zoo.tiny import tiny

WORDS = ["<unk>", "<eos>", "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; no pad token, no beginning."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def m(tokenizer: PreTrainedTokenizerFast) -> Model:
    return Model(tiny("llama"), tokenizer, name="llama")


@pytest.fixture(scope="module")
def bare() -> Model:
    return Model(tiny("llama"), name="bare")


def ids_of(text: str) -> list[int]:
    return [WORDS.index(w) for w in text.split()]


def test_texts_become_one_batch_padded_on_the_right(m: Model) -> None:
    texts = ["the cat sat", "it slept"]
    tokens = m.tokens(texts)
    assert tokens.ids.dtype == torch.long
    assert tokens.mask.tolist() == [[True, True, True], [True, True, False]]
    assert [tokens.row(i).tolist() for i in range(2)] == [ids_of(t) for t in texts]
    assert tokens.texts == texts
    assert tokens.offsets == [[(0, 3), (4, 7), (8, 11)], [(0, 2), (3, 8)]]
    assert len(tokens) == 2
    assert repr(tokens) == "Tokens(2 rows x 3 columns, 5 tokens)"


def test_a_tokenizer_without_a_pad_token_works_and_padding_changes_nothing(m: Model) -> None:
    assert m.tokenizer.pad_token is None
    texts = ["the cat sat on a mat", "it slept"]
    logits = m(texts)
    torch.testing.assert_close(logits[1, :2], m("it slept")[0], rtol=0, atol=1e-5)
    made = m.generate(texts, max_new_tokens=3)
    assert len(made.texts) == 2
    assert m.tokenizer.pad_token is None


def test_every_way_to_say_the_same_gives_the_same(m: Model, bare: Model) -> None:
    row = ids_of("the cat sat")
    ways: list[Any] = [
        *(torch.tensor(row), torch.tensor([row]), torch.tensor([row], dtype=torch.int32)),
        *(row, [row], (tuple(row),), [torch.tensor(row)]),
        *(Tokens(torch.tensor([row]), torch.ones(1, 3, dtype=torch.bool)),),
        *({"input_ids": [row]}, {"input_ids": row}, {"input_ids": torch.tensor([row])}),
    ]
    for x in ways:
        assert bare.tokens(x).ids.tolist() == [row], x
        assert bool(bare.tokens(x).mask.all())
    assert m.tokens("the cat sat").ids.tolist() == [row]
    assert m.tokens(m.tokenizer("the cat sat")).ids.tolist() == [row]


def test_ragged_rows_of_ids_are_padded(bare: Model) -> None:
    assert bare.tokens([[5, 6, 7], [8]]).mask.tolist() == [[True, True, True], [True, False, False]]


def test_what_a_tokenizer_returns_keeps_its_attention_mask(m: Model, bare: Model) -> None:
    encoded = {"input_ids": [[0, 0, 5, 6], [5, 6, 7, 8]], "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}
    as_lists = bare.tokens(encoded)
    assert [as_lists.row(i).tolist() for i in range(2)] == [[5, 6], [5, 6, 7, 8]]
    as_tensors = bare.tokens({k: torch.tensor(v) for k, v in encoded.items()})
    assert as_tensors.mask.tolist() == [[False, False, True, True], [True] * 4]
    torch.testing.assert_close(bare(as_tensors)[0, 2:], bare([[5, 6]])[0], rtol=0, atol=1e-5)


def test_padding_moves_to_the_other_side_and_back(bare: Model) -> None:
    right = bare.tokens([[5, 6, 7], [8]])
    left = right.padded("left")
    assert left.mask.tolist() == [[True, True, True], [False, False, True]]
    assert [left.row(i).tolist() for i in range(2)] == [[5, 6, 7], [8]]
    assert left.padded("right").ids.tolist() == right.ids.tolist()
    assert left.position.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert (right.last.tolist(), left.last.tolist()) == ([2, 0], [2, 2])


def test_a_text_longer_than_the_context_is_refused_or_cut(m: Model) -> None:
    assert m.n_ctx == 128
    long = "the cat " * 70
    with pytest.raises(
        ValueError, match="text 1 has 140 tokens, the context holds 128; shorten it, or pass truncate=True"
    ):
        m.tokens(["the cat", long])
    cut = m.tokens(["the cat", long], truncate=True)
    assert cut.ids.shape == (2, 128)
    assert cut.offsets is not None
    assert [len(o) for o in cut.offsets] == [2, 128]
    assert m.tokens(long, truncate=True, max_length=5).ids.tolist() == [ids_of("the cat the cat the")]
    with pytest.raises(ValueError, match="has 3 tokens, the context holds 2"):
        m.tokens("the cat sat", max_length=2)


def test_cutting_a_batch_padded_on_the_left_keeps_its_first_tokens(bare: Model) -> None:
    left = bare.tokens([[5, 6, 7, 8], [9, 10]]).padded("left")
    cut = bare.tokens(left, truncate=True, max_length=3)
    assert [cut.row(i).tolist() for i in range(2)] == [[5, 6, 7], [9, 10]]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], "the list of texts is empty; give at least one text"),
        ("", r"text 0 is empty \(''\); leave it out"),
        (["the cat", "  \n"], r"text 1 is empty \('  \\n'\); leave it out"),
        ([[5, 6], []], "row 1 holds no token"),
        ([[]], "a row of ids is empty"),
        (torch.zeros(2, 0, dtype=torch.long), "row 0 holds no token"),
        (torch.tensor([[5, 101]]), r"id 101 is outside the vocabulary 0\.\.100; is this the model's own tokenizer\?"),
        (torch.tensor([[5, -1]]), r"id -1 is outside the vocabulary 0\.\.100"),
        (torch.randn(2, 3), r"expected integer ids \[batch, pos\], got torch.float32 \[2, 3\]"),
        (torch.ones(2, 3, 4, dtype=torch.long), r"expected integer ids \[batch, pos\], got torch.int64 \[2, 3, 4\]"),
        (["the cat", 5], r"expected texts or lists of ids, got a list that holds int \(5\)"),
        (
            Tokens(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool)),
            r"the mask is \[2, 2\], the ids are",
        ),
        (Tokens(torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool)), "row 0 holds no token"),
    ],
)
def test_what_is_no_text_is_refused(m: Model, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"tokens: .*{message}"):
        m.tokens(x)


def test_ids_at_padding_may_be_anything(bare: Model) -> None:
    tokens = Tokens(torch.tensor([[5, 6, -100]]), torch.tensor([[True, True, False]]))
    assert bare.tokens(tokens).row(0).tolist() == [5, 6]
    torch.testing.assert_close(bare(tokens)[0, :2], bare([[5, 6]])[0], rtol=0, atol=1e-5)


def test_a_text_needs_a_tokenizer(bare: Model) -> None:
    with pytest.raises(ValueError, match=r"this model has no tokenizer; give token ids, or load it with interp.load"):
        bare.tokens("the cat")


@pytest.mark.smollm2
def test_a_real_tokenizer_gives_offsets_into_the_text(smollm2: Model) -> None:
    texts = ["Grüße aus Köln!", "The quick brown fox jumps."]
    tokens = smollm2.tokens(texts)
    assert tokens.offsets is not None
    for i, text in enumerate(texts):
        spans = tokens.offsets[i]
        assert len(spans) == len(tokens.row(i))
        assert spans[0][0] == 0
        assert spans[-1][1] == len(text)
    word = [texts[1][a:b] for a, b in tokens.offsets[1]]
    assert "".join(word) == texts[1]
