"""Contrast pairs, and how a prompt and an answer become tokens.

    pairs = [(prompt, positive_text, negative_text), ...]

The same triples are what vectors are fitted on and what `steering.evaluate` scores. Texts may be lists of token ids,
for models without a tokenizer. Prompt and answer are cut into tokens together, so that a token boundary is where the
model would see it; where they merge into one token across the border, they are cut apart. White space that ends a
prompt is counted to the answer, where tokenizers put it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from steering.errors import SteeringError

Text = str | Sequence[int]
Pair = tuple[Text, Text, Text]


@dataclass(frozen=True)
class Passage:
    """One row of tokens: ids, and where the answer starts in it (len(ids) where there is none)."""

    ids: tuple[int, ...]
    answer: int

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.answer]


def check(pairs: Iterable[Any]) -> list[Pair]:
    """The pairs as a list. SteeringError for none, for a malformed one, and for equal sides."""
    out: list[Pair] = []
    for i, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 3:
            raise SteeringError(f"pairs[{i}]: expected (prompt, positive_text, negative_text), got {pair!r:.80}")
        prompt, positive, negative = pair
        for name, side in (("prompt", prompt), ("positive", positive), ("negative", negative)):
            if not len(side) or (isinstance(side, str) and not side.strip()):
                raise SteeringError(f"pairs[{i}]: the {name} text is empty ({side!r})")
        if (
            (positive.strip() == negative.strip())
            if isinstance(positive, str) and isinstance(negative, str)
            else (list(positive) == list(negative))
        ):
            raise SteeringError(f"pairs[{i}]: both sides are equal ({positive!r:.60}); a pair must contrast")
        out.append((prompt, positive, negative))
    if not out:
        raise SteeringError("pairs: there is none; give (prompt, positive_text, negative_text) triples")
    return out


def chat_text(m: Any, prompt: str, system: str | None = None) -> str:
    """`prompt` as a user's turn in the model's chat template, up to where the assistant begins to answer.

    Raises SteeringError where the model has no tokenizer, or its tokenizer no chat template.
    """
    if m.tokenizer is None or not getattr(m.tokenizer, "chat_template", None):
        what = "no tokenizer" if m.tokenizer is None else "a tokenizer without a chat template"
        raise SteeringError(f"chat=True: {m.name} has {what}; pass chat=False, or set tokenizer.chat_template")
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": prompt})
    return str(m.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def passage(
    m: Any, prompt: Text | None, answer: Text = "", *, chat: bool = False, system: str | None = None
) -> Passage:
    """Tokens of a prompt and an answer.

    Args:
        m: the model.
        prompt: text or ids; None or empty for an answer alone.
        answer: text or ids; empty for a prompt alone.
        chat: put the prompt into the model's chat template (whose text brings its special tokens with it).
        system: the template's system turn.
    """
    if system is not None and not chat:
        raise SteeringError("system: only a chat template has a system turn; pass chat=True")
    if not isinstance(prompt, str | None) or not isinstance(answer, str):
        if chat:
            raise SteeringError("chat=True needs texts; the prompt or the answer was given as token ids")
        head, tail = _ids(m, prompt), _ids(m, answer, first=not prompt)
        return Passage((*head, *tail), len(head))
    text = chat_text(m, prompt or "", system) if chat else prompt or ""
    if not answer:
        ids = _encode(m, text, special=not chat)
        return Passage(ids, len(ids))
    if not text:
        return Passage(_encode(m, answer, special=True), 0)
    bare = text if chat else text.rstrip()
    border = text[len(bare) :]
    head, whole = _encode(m, bare, special=not chat), _encode(m, text + answer, special=not chat)
    if whole[: len(head)] == head and len(whole) > len(head):
        return Passage(whole, len(head))
    return Passage((*head, *_encode(m, border + answer, special=False)), len(head))


def texts(m: Any, given: Any, *, chat: bool = False, system: str | None = None, name: str = "texts") -> list[Passage]:
    """Passages of texts (or rows of ids) without answers. SteeringError if there is none."""
    rows = [given] if isinstance(given, str) else list(given)
    if not rows:
        raise SteeringError(f"{name}: the list is empty; give at least one text")
    return [row if isinstance(row, Passage) else passage(m, row, chat=chat, system=system) for row in rows]


def sides(
    m: Any, pairs: Iterable[Any], *, chat: bool = False, system: str | None = None
) -> tuple[list[Passage], list[Passage]]:
    """The positive and the negative passages of pairs."""
    checked = check(pairs)
    made = [[passage(m, p, side, chat=chat, system=system) for side in both] for p, *both in checked]
    return [row[0] for row in made], [row[1] for row in made]


def _ids(m: Any, text: Text | None, first: bool = True) -> tuple[int, ...]:
    if text is None or not len(text):
        return ()
    return _encode(m, text, special=first) if isinstance(text, str) else tuple(int(i) for i in text)


def _encode(m: Any, text: str, special: bool) -> tuple[int, ...]:
    return tuple(m.tokens(text, special=special).row(0).tolist())
