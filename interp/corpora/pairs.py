"""Rude and friendly conversations in matched pairs: the same sentences, only the register differs.

Since both versions of a pair are filled from one template with the same names, things and order, what tells
them apart is the register alone, and the label is exact: no classifier had a part in it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from interp.corpora.documents import Document
from interp.corpora.words import (
    ACTS,
    FILLERS,
    NAMES,
    NEUTRAL,
    PLACES,
    TEMPLATES,
    THINGS,
    TIMES,
    TOXIC,
    Register,
)

#: How many pairs each split has; a conversation is about 500 bytes.
PAIRS = {"train": 2400, "validation": 160, "test": 160}

SOURCE = "generated"


def pairs(
    split: str, count: int | None = None, seed: int = 0, part: int | None = None
) -> Iterator[tuple[Document, Document]]:
    """(toxic, neutral) conversations of one split; the same arguments give the same texts.

    With `part` 0 or 1 the register's places are filled from one half of its words, the other half being held out.

    Raises KeyError for an unknown split.
    """
    rude, friendly = TOXIC[split], NEUTRAL[split]
    if part is not None:
        rude, friendly = rude.part(part), friendly.part(part)
    for number in range(PAIRS[split] if count is None else count):
        key = f"{split}/{seed}/{number}"
        versions = [_conversation(random.Random(key), register) for register in (rude, friendly)]
        identity = f"{SOURCE}:pair-{split}-{number}"
        toxic, neutral = (Document(identity, text, identity, SOURCE) for text in versions)
        yield toxic, neutral


def _conversation(draw: random.Random, register: Register) -> str:
    """Six to twelve posts by three people about two things.

    Fillers are drawn by position (a number in [0, 1)), never by length of a list, so both registers consume the
    same random numbers and the shared words agree.
    """
    people, things = draw.sample(NAMES, 3), draw.sample(THINGS, 2)
    posts: list[str] = []
    for turn in range(draw.randint(6, 12)):
        speaker, addressee = draw.sample(people, 2)
        template = draw.choice(TEMPLATES if turn % 3 else FILLERS)
        shared = {
            "name": addressee,
            "thing": draw.choice(things),
            "act": draw.choice(ACTS),
            "when": draw.choice(TIMES),
            "where": draw.choice(PLACES),
        }
        own = {
            slot: options[int(draw.random() * len(options))]
            for slot, options in (
                ("noun", register.nouns),
                ("adjective", register.adjectives),
                ("order", register.orders),
                ("verdict", register.verdicts),
            )
        }
        capital = {slot.capitalize(): own[slot][0].upper() + own[slot][1:] for slot in ("order", "verdict")}
        posts.append(f"{speaker}: " + template.format(**shared, **own, **capital))
    return _articles("\n".join(posts))


def _articles(text: str) -> str:
    """The word "an" where the next word needs it.

    >>> _articles("such a idiotic, a useless, a honest thing")
    'such an idiotic, a useless, an honest thing'
    """
    return re.sub(r"\b([Aa]) (?=[aeio]|honest)", r"\1n ", text)
