from __future__ import annotations

import itertools
import re

import pytest

from interp.corpora.pairs import pairs
from interp.corpora.split import SPLITS
from interp.corpora.words import NEUTRAL, TOXIC, Register

SLOTS = ("nouns", "adjectives", "orders", "verdicts")


def fillers(register: Register) -> set[str]:
    return {filler for slot in SLOTS for filler in getattr(register, slot)}


def test_no_word_is_in_two_splits():
    for registers in (TOXIC, NEUTRAL):
        for one, other in itertools.combinations(SPLITS, 2):
            assert not fillers(registers[one]) & fillers(registers[other])


def test_the_registers_have_the_same_shape():
    for split in SPLITS:
        for slot in SLOTS:
            assert len(getattr(TOXIC[split], slot)) == len(getattr(NEUTRAL[split], slot))
        assert not fillers(TOXIC[split]) & fillers(NEUTRAL[split])


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_differ_in_the_register_only(split):
    """With every filler and article taken out, the two versions are the same text."""

    def bare(text: str, register: Register) -> str:
        for filler in sorted(fillers(register), key=len, reverse=True):
            text = re.sub(re.escape(filler), "_", text, flags=re.IGNORECASE)
        return re.sub(r"\b([Aa])n? ", r"\1 ", text)

    for toxic, neutral in pairs(split, 30):
        assert toxic.id == neutral.id
        assert toxic.text != neutral.text
        assert bare(toxic.text, TOXIC[split]) == bare(neutral.text, NEUTRAL[split])
        assert any(filler in toxic.text for filler in fillers(TOXIC[split]))
        assert "{" not in toxic.text + neutral.text


def test_pairs_are_the_same_every_time_and_differ_from_each_other():
    first = list(pairs("train", 200))
    assert first == list(pairs("train", 200))
    assert first[:50] == list(pairs("train", 50))
    assert len({toxic.text for toxic, _ in first}) == 200
    assert first[0] != next(pairs("train", 1, seed=1))


def test_a_half_of_the_words_is_held_out():
    halves = [TOXIC["train"].part(number) for number in (0, 1)]
    assert fillers(halves[0]) | fillers(halves[1]) == fillers(TOXIC["train"])
    assert not fillers(halves[0]) & fillers(halves[1])
    for part in (0, 1):
        text = "\n".join(toxic.text for toxic, _ in pairs("train", 40, seed=5, part=part)).lower()
        words = [*halves[1 - part].nouns, *halves[1 - part].adjectives]
        assert not [word for word in words if re.search(rf"\b{word}\b", text)]


def test_unknown_split():
    with pytest.raises(KeyError):
        next(pairs("dev"))
