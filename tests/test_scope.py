"""A scope picks the same tokens with and without cache, alone or in a batch, whatever the padding.

The oracle decides it for one row as plain lists: which token positions does this expression mean? Every way of running
the same texts must then have edited exactly these tokens, as the trace of the run tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp import edits
from interp.activations import Tokens
from interp.model import Model
from interp.scope import Scope
from interp.zoo.tiny import tiny

Row = list[int]
NEW = 3  # tokens to generate


@dataclass(frozen=True)
class Expression:
    """A scope in three forms: as an object for a given layout of the prompts, as a text, and as the oracle."""

    scope: Callable[[Tensor], Scope]  # from the mask of the tokens as they are given [batch, pos]
    text: str | None
    oracle: Callable[[int, Row, int], set[int]]  # (row, its tokens, how many are prompt) -> positions


def word(text: str, scope: Scope, oracle: Callable[[int, Row, int], set[int]]) -> Expression:
    return Expression(lambda given: scope, text, oracle)


def window(a: int, b: int | None) -> Expression:
    def oracle(row: int, tokens: Row, prompt: int) -> set[int]:
        low = a if a >= 0 else prompt + a
        high = len(tokens) if b is None else b if b >= 0 else prompt + b
        return {p for p in range(len(tokens)) if low <= p < high}

    return word(f"window({a}, {b})", Scope.window(a, b), oracle)


def after(wanted: list[int]) -> Expression:
    def oracle(row: int, tokens: Row, prompt: int) -> set[int]:
        for p in range(len(tokens) - len(wanted) + 1):
            if tokens[p : p + len(wanted)] == wanted:
                return set(range(p + len(wanted), len(tokens)))
        return set()

    what = wanted[0] if len(wanted) == 1 else wanted
    return word(f"after({what})", Scope.after(what), oracle)


def mask(chosen: list[list[bool]]) -> Expression:
    """`chosen[row][position]` of the prompt, spread over whatever layout the prompts are given in."""

    def scope(given: Tensor) -> Scope:
        spread = torch.zeros_like(given)
        for row in range(len(given)):
            for position, column in enumerate(given[row].nonzero()[:, 0].tolist()):
                spread[row, column] = chosen[row][position]
        return Scope.mask(spread)

    return Expression(scope, None, lambda row, tokens, prompt: {p for p in range(prompt) if chosen[row][p]})


WORDS = [
    word("all", Scope.all(), lambda row, tokens, prompt: set(range(len(tokens)))),
    word("prompt", Scope.prompt(), lambda row, tokens, prompt: set(range(prompt))),
    word("generated", Scope.generated(), lambda row, tokens, prompt: set(range(prompt, len(tokens)))),
    word("last", Scope.last(), lambda row, tokens, prompt: {prompt - 1}),
]
SMALL = st.integers(5, 7)  # few different tokens, so that what is looked for is often there
ROWS = st.lists(st.lists(SMALL, min_size=1, max_size=6), min_size=2, max_size=3)
WORD = st.one_of(
    st.sampled_from(WORDS),
    st.builds(window, st.integers(-7, 7), st.none() | st.integers(-7, 9)),
    st.builds(after, st.lists(SMALL, min_size=1, max_size=3)),
    st.builds(mask, st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=3, max_size=3)),
)


def both(a: Expression, b: Expression) -> Expression:
    text = f"({a.text} & {b.text})" if a.text and b.text else None
    return Expression(lambda g: a.scope(g) & b.scope(g), text, lambda *row: a.oracle(*row) & b.oracle(*row))


def either(a: Expression, b: Expression) -> Expression:
    text = f"({a.text} | {b.text})" if a.text and b.text else None
    return Expression(lambda g: a.scope(g) | b.scope(g), text, lambda *row: a.oracle(*row) | b.oracle(*row))


def neither(a: Expression) -> Expression:
    def oracle(row: int, tokens: Row, prompt: int) -> set[int]:
        return set(range(len(tokens))) - a.oracle(row, tokens, prompt)

    return Expression(lambda g: ~a.scope(g), f"~{a.text}" if a.text else None, oracle)


EXPRESSION = st.recursive(
    WORD, lambda e: st.builds(both, e, e) | st.builds(either, e, e) | st.builds(neither, e), max_leaves=4
)


@pytest.fixture(scope="module")
def m() -> Model:
    return Model(tiny("llama"), name="llama")


def batch(rows: list[Row], side: str) -> Tokens:
    width = max(map(len, rows))
    ids, kept = torch.full((len(rows), width), 99), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], kept[i, place] = torch.tensor(row), True
    return Tokens(ids, kept)


def edited(m: Model, scope: Any, run: Callable[[], Any]) -> set[tuple[int, int, int]]:
    """(row, position, token) of every edited token, as the trace tells."""
    with m.intervene(edits.add("resid_post[1]", 0.0, scope=scope)) as handle:
        run()
    return set(handle.trace()[["batch", "position", "token"]].itertuples(index=False, name=None))


def expected(e: Expression, rows: list[Row], prompts: list[int]) -> set[tuple[int, int, int]]:
    return {(r, p, row[p]) for r, row in enumerate(rows) for p in e.oracle(r, row, prompts[r])}


@settings(max_examples=40, deadline=None)
@given(EXPRESSION, ROWS)
def test_the_same_tokens_alone_or_in_a_batch_padded_left_or_right(m: Model, e: Expression, rows: list[Row]) -> None:
    for side in ("right", "left"):
        tokens = batch(rows, side)
        assert edited(m, e.scope(tokens.mask), lambda t=tokens: m(t)) == expected(e, rows, [len(r) for r in rows])
    if e.text is not None:  # a mask belongs to its batch
        for row in rows:
            alone = torch.tensor([row])
            assert edited(m, e.text, lambda t=alone: m(t)) == expected(e, [row], [len(row)])


@settings(max_examples=15, deadline=None)
@given(EXPRESSION, ROWS)
def test_the_same_tokens_with_and_without_a_cache(m: Model, e: Expression, rows: list[Row]) -> None:
    for side in ("right", "left"):
        tokens, full = batch(rows, side), None
        for use_cache in (True, False):
            made: list[Any] = []

            def run(t: Tokens = tokens, cache: bool = use_cache, made: list[Any] = made) -> None:
                made.append(m.generate(t, max_new_tokens=NEW, eos_token_id=None, use_cache=cache))

            got = edited(m, e.scope(tokens.mask), run)
            new = made[0].new_ids[:, :-1].tolist()  # the last new token is never fed back
            full = [row + more for row, more in zip(rows, new, strict=True)]
            assert got == expected(e, full, [len(r) for r in rows])


@settings(max_examples=40, deadline=None)
@given(EXPRESSION)
def test_a_printed_scope_reads_back_as_the_same_rule(e: Expression) -> None:
    given_mask = torch.ones(3, 6, dtype=torch.bool)
    if e.text is None:
        return
    assert str(Scope.parse(e.text)) == e.text == str(e.scope(given_mask))


def test_padding_is_never_picked_and_never_changed(m: Model) -> None:
    rows = [[5, 6, 7, 8, 9], [5, 6]]
    for side in ("right", "left"):
        tokens = batch(rows, side)
        plain = m.capture(tokens, "resid_post[1]")["resid_post[1]"]
        for scope in ("all", "~last", "window(0, None)", "~window(0, 99)", "~generated"):
            with m.intervene(edits.zero("resid_post[1]", scope=scope)):
                changed = m.capture(tokens, "resid_post[1]")["resid_post[1]"]
            assert torch.equal(changed[~tokens.mask], plain[~tokens.mask])


def test_a_mask_follows_its_tokens_when_the_batch_is_padded_anew(m: Model) -> None:
    rows = [[5, 6, 7, 8, 9], [5, 6]]
    right = batch(rows, "right")
    chosen = torch.zeros_like(right.mask)
    chosen[0, 3] = chosen[1, 0] = True
    chosen[1, 4] = True  # at padding: means nothing
    run = lambda: m.generate(right, max_new_tokens=2, eos_token_id=None)  # noqa: E731 -- generate pads on the left
    assert edited(m, chosen, run) == {(0, 3, 8), (1, 0, 5)}


def test_the_trace_can_tell_each_call(m: Model) -> None:
    with m.intervene(edits.add("resid_post[1]", 0.0, scope="all", name="nothing")) as run:
        m.generate([[5, 6]], max_new_tokens=3, eos_token_id=None, use_cache=False)
    calls = run.trace(calls=True)
    assert list(calls.groupby("call").size()) == [2, 3, 4]
    assert set(calls.edit) == {"nothing"}
    assert set(calls.node) == {"resid_post[1]"}
    assert len(run.trace()) == 4
    assert len(calls[["batch", "position"]].drop_duplicates()) == 4


def test_the_trace_of_one_expert_holds_the_tokens_routed_to_it() -> None:
    m = Model(tiny("olmoe"), name="olmoe")
    ids = torch.randint(3, 90, (2, 7))
    chosen = m.capture(ids, "expert_ids[1]").experts(1)
    expert = int(chosen.ids[0, 0, 0])
    with m.intervene(edits.zero(f"expert_out[1, expert={expert}]")) as run:
        m(ids)
    row, position, _ = chosen.rows(expert)
    trace = run.trace()
    assert set(zip(trace.batch, trace.position, strict=True)) == set(zip(row.tolist(), position.tolist(), strict=True))


# -- texts, with a real tokenizer ------------------------------------------------------------------------------
def pieces(m: Model, scope: Any, run: Callable[[], Any]) -> list[str]:
    """For each row the edited text."""
    rows: dict[int, list[int]] = {}
    for row, _, token in sorted(edited(m, scope, run)):
        rows.setdefault(row, []).append(token)
    return [m.tokenizer.decode(rows[r]) for r in sorted(rows)]


@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("text", "behind"),
    [
        ("cat", " sat on the mat, he said"),  # a word inside the text: its token is " cat"
        (" cat", " sat on the mat, he said"),
        ("The quick brown", " cat sat on the mat, he said"),  # several tokens
        ("own cat s", " on the mat, he said"),  # neither begins nor ends where tokens do
        ("mat,", " he said"),
        ("dog", None),
    ],
)
def test_after_a_text_is_behind_the_token_that_completes_it(smollm2: Model, text: str, behind: str | None) -> None:
    prompt = "The quick brown cat sat on the mat, he said"
    found = pieces(smollm2, Scope.after(text), lambda: smollm2(prompt))
    assert found == ([] if behind is None else [behind])


@pytest.mark.smollm2
def test_after_a_text_is_the_same_in_a_batch_and_under_every_cache(smollm2: Model) -> None:
    prompts = ["One, two, three, four", "Here it is: one, two, three, and on we go, four"]
    whole = []
    for use_cache in (True, False):
        with smollm2.intervene(edits.add("resid_post[3]", 0.0, scope="after('two, three') & ~last")) as run:
            made = smollm2.generate(prompts, max_new_tokens=4, use_cache=use_cache, eos_token_id=None)
        whole.append(run.trace())
        fed = smollm2.tokenizer.batch_decode(made.new_ids[:, :-1])
        for row, (begun, new) in enumerate(zip([", four", ", and on we go, four"], fed, strict=True)):
            trace = run.trace()
            kept = smollm2.tokenizer.decode(trace[trace.batch == row].token.tolist())
            assert kept == begun.removesuffix(" four") + new
    assert whole[0].equals(whole[1])


@pytest.mark.smollm2
def test_after_a_text_can_begin_in_what_is_generated(smollm2: Model) -> None:
    made = smollm2.generate("The capital of France is", max_new_tokens=6)
    first = smollm2.tokenizer.decode(made.new_ids[0, :2])  # will be there, but only once it is generated
    with smollm2.intervene(edits.add("resid_post[3]", 0.0, scope=Scope.after(first))) as run:
        again = smollm2.generate("The capital of France is", max_new_tokens=6)
    assert torch.equal(again.new_ids, made.new_ids)
    assert run.trace().token.tolist() == made.new_ids[0, 2:-1].tolist()


@pytest.mark.smollm2
def test_after_a_special_token_is_found_by_its_text(smollm2: Model) -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert pieces(smollm2, "after('<|im_end|>')", lambda: smollm2(prompt)) == ["\n<|im_start|>assistant\n"]


# -- bad input -------------------------------------------------------------------------------------------------
NO_SCOPES = [
    *("", "first", "window", "window(", "window(0, 55", "window(0.5, 2)", "window(start=0)", "all(3)", "after()"),
    *("after(1.5)", "last + all", "all and last", "__import__('os')"),
]


@pytest.mark.parametrize("text", NO_SCOPES)
def test_a_text_that_is_no_scope_is_refused_with_the_words_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"scope .*: expected one of 'all', 'prompt', 'generated', 'last'"):
        Scope.parse(text)


def test_what_is_no_scope_at_all_is_refused() -> None:
    with pytest.raises(TypeError, match="scope 3: expected a text such as 'last', a bool mask or a Scope, not int"):
        Scope.parse(3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"Scope.mask: expected a bool tensor \[batch, pos\], got torch.int64 \[2, 3\]"
    ):
        Scope.mask(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="the sequence of token ids is empty"):
        Scope.after([])
    with pytest.raises(ValueError, match="the text is empty"):
        Scope.after("")


def test_a_mask_of_another_batch_is_refused(m: Model) -> None:
    with pytest.raises(ValueError, match=r"Scope.mask: the mask is \[2, 3\], the tokens are \[1, 4\]"):
        edited(m, torch.ones(2, 3, dtype=torch.bool), lambda: m([[5, 6, 7, 8]]))


def test_a_text_needs_a_tokenizer(m: Model) -> None:
    with pytest.raises(ValueError, match=r"scope after\('cat'\): this model has no tokenizer; give token ids"):
        edited(m, "after('cat') | last", lambda: None)


def test_a_token_cannot_be_looked_for_where_embeddings_are_fed(m: Model) -> None:
    embeds = torch.randn(1, 4, m.d_model)
    with pytest.raises(ValueError, match="the model was fed embeddings, not ids"):
        edited(m, "after(5)", lambda: m.hf(inputs_embeds=embeds))
    assert edited(m, "last", lambda: m.hf(inputs_embeds=embeds)) == {(0, 3, -1)}
