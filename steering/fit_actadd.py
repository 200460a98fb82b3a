"""Activation Addition: one pair of prompts, their difference added token by token at the front."""

from __future__ import annotations

from typing import Any

from interp.scope import Scope
from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.maps import PerToken
from steering.pairs import Passage, Text
from steering.reading import one_site, read
from steering.vector import SteeringMap


def actadd(
    m: Any, positive: Text, negative: Text, layer: int, *, site: str = "resid_pre", pad: int | None = None
) -> SteeringMap:
    """ActAdd: ``h_p + c (a_p(positive) - a_p(negative))`` for the first T token positions of the prompt.

    Both prompts are padded on the right to one length T with the token of a single space, as in the original, and
    read before block `layer`. c is the strength: ``m.intervene(5 * actadd(m, " Love", " Hate", layer=6))``.
    Source: Turner et al. 2023 (arXiv:2308.10248), algorithm 1.

    Args:
        m: the model.
        positive: text or token ids. Where the tokenizer puts a token before every text, both have it and its
            difference is nought.
        negative: what is taken off.
        layer: the block before which is read and added.
        site: where, with `layer` put in.
        pad: token id for padding; needed where the tokenizer has no token for one space.

    Raises SteeringError for equal prompts, and where padding is needed and there is no token for it.
    """
    place = one_site(m, layer, site)
    if list(positive) == list(negative):
        raise SteeringError(f"positive, negative: both sides are equal ({positive!r:.60}); a pair must contrast")
    a, b = (_row(m, side) for side in (positive, negative))
    length = max(len(a), len(b))
    if len(a) != len(b):
        token = _space(m) if pad is None else pad
        a, b = (row + [token] * (length - len(row)) for row in (a, b))
    if a == b:
        raise SteeringError("positive, negative: both have the same tokens once padded; a pair must contrast")
    rows = read(m, [Passage(tuple(a), length), Passage(tuple(b), length)], [place], list(range(length)))[place]
    # on generated tokens nothing is added, even where the prompt is shorter than the pair
    scope = Scope.window(0, length) & Scope.prompt()
    record = {"positive": positive, "negative": negative, "tokens": length}
    return SteeringMap.of(m, {place: PerToken(rows[0] - rows[1])}, method="actadd", scope=scope, record=record)


def _row(m: Any, text: Text) -> list[int]:
    """Token ids of one side, which may be blank: the paper's own pair is " weddings" against " "."""
    if not isinstance(text, str) or text.strip():
        return list(_pairs.passage(m, None, text).ids)
    ids = m.tokenizer(text)["input_ids"] if m.tokenizer is not None else []
    if not ids:
        raise SteeringError(f"{text!r} makes no token here; give a text that does, or token ids")
    return [int(i) for i in ids]


def _space(m: Any) -> int:
    ids = m.tokenizer.encode(" ", add_special_tokens=False) if m.tokenizer is not None else []
    if len(ids) != 1:
        raise SteeringError(
            "pad: the prompts differ in length and this tokenizer has no token for one space; pass pad=<token id>, or "
            "prompts of equal length"
        )
    return int(ids[0])
