"""Builders of prompt pairs for the tasks of the literature, each on any tokenizer.

A builder fills a template with words of our own lists (`interp.patching.words`). Words that are several tokens for the
given tokenizer are left out, and the pairs say which (`Pairs.notes`); so clean and corrupt prompts align token by
token. The two prompts of a pair are symmetric: each is a natural text, and each is the other's corruption.

========================  ====================================================  =====================================
builder                   clean prompt, and what is replaced                    source
========================  ====================================================  =====================================
`ioi`                     ... **John** gave a drink to | Mary                   Wang et al. 2022, arXiv 2211.00593
`capital_swap`            The capital of **France** is | Paris                  Kramár et al. 2024, arXiv 2403.00745
`greater_than`            ... from the year 17**3**2 to the year 17 | 4..9      Hanna et al. 2023, arXiv 2305.00586
`successor`               **May, June, July,** | August                         Gould et al. 2023, arXiv 2312.09230
`a_an`                    I want one **pear**. Can you pick up | a              Kramár et al. 2024
`pronoun`                 **Anna** is a very good doctor, isn't | she           Mathwin et al. 2023
`factual`                 People in **Spain** mostly speak | Spanish            Meng et al. 2022, arXiv 2202.05262
`fully_random`            two unrelated texts of equal length                   Kramár et al. 2024 (RAND-PP)
========================  ====================================================  =====================================
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from interp.metrics import last_logits
from interp.model import Model
from interp.patching import words
from interp.patching.pairs import PairError, Pairs, of


@dataclass(frozen=True)
class Row:
    """One pair as text: the prompts and the texts (or ids) that continue them."""

    clean: str
    corrupt: str
    answer: str | list[int]
    wrong: str | list[int]


def ioi(m: Model, n: int = 16, seed: int = 0) -> Pairs:
    """Indirect object identification: the second mention of the giver is swapped for the other name.

    Half the prompts name the receiver first, half the giver. Answers: the receiver; in the corrupt prompt, the other.
    """
    names, note = _single(m, [*words.FEMALE, *words.MALE], "names")
    draw, rows = random.Random(f"ioi/{seed}"), []
    for i in range(n):
        receiver, giver = draw.sample(names, 2)
        first, second = (receiver, giver) if i % 2 else (giver, receiver)
        place, thing = draw.choice(words.PLACES), draw.choice(words.THINGS)
        text = f"When {first} and {second} went to the {place}, {{}} gave a {thing} to"
        rows.append(Row(text.format(giver), text.format(receiver), f" {receiver}", f" {giver}"))
    return _pairs(m, "ioi", rows, note)


def capital_swap(m: Model, n: int = 16, seed: int = 0) -> Pairs:
    """The capital of one country, and of another whose name has as many tokens."""
    return _facts(m, "capital_swap", n, seed, "The capital of {} is the city of", words.CAPITALS)


def factual(m: Model, n: int = 16, seed: int = 0) -> Pairs:
    """Facts against counterfactual subjects: the same relation asked of a subject with another object."""
    rows: list[Row] = []
    notes: list[str] = []
    for template, facts in words.FACTS.items():
        part, note = _fact_rows(m, -(-n // len(words.FACTS)), f"factual/{template}/{seed}", template, facts)
        rows, notes = rows + part, notes + note
    random.Random(f"factual/{seed}").shuffle(rows)
    return _pairs(m, "factual", rows[:n], notes)


def greater_than(m: Model, n: int = 16, seed: int = 0) -> Pairs:
    """A span of years: what follows must be later than the start.

    Answers are all continuations later than the start, wrong ones all others. Where the tokenizer has a token for two
    digits, the last two digits of the start year are replaced by 01, as in the source; where it writes digits one by
    one, the tens digit by 0, and answers are digits. A tokenizer that does neither is refused.
    """
    draw, rows = random.Random(f"greater_than/{seed}"), []
    style, ends = _year_tokens(m)
    for _ in range(n):
        century, event = draw.choice(("11", "12", "13", "14", "15", "16", "17")), draw.choice(words.EVENTS)
        year, unit = draw.randint(2, 7), draw.randint(2, 8)
        text = f"The {event} lasted from the year {century}{{}} to the year {century}"
        start = 10 * year + unit if style == "pairs" else year
        later, earlier = ends[start + 1 :], ends[: start + 1]
        changed = "01" if style == "pairs" else f"0{unit}"
        rows.append(Row(text.format(f"{year}{unit}"), text.format(changed), later, earlier))
    return _pairs(m, "greater_than", rows, [f"years as tokens: century, then {style} of digits"])


def _year_tokens(m: Model) -> tuple[str, list[int]]:
    """How a tokenizer ends a year that begins as ' 17': ("pairs", 100 tokens) or ("single", 10 tokens)."""

    def ids(year: str) -> list[int]:
        return list(m.tokens(f" {year}", special=False).row(0).tolist())

    century, years = ids("17"), [ids(f"17{y:02d}") for y in range(100)]
    tails = [row[len(century) :] for row in years if row[: len(century)] == century]
    if len(tails) == 100 and all(len(t) == 1 for t in tails):
        return "pairs", [t[0] for t in tails]
    if len(tails) == 100 and all(len(t) == 2 for t in tails) and len({t[0] for t in tails}) == 10:
        return "single", [tails[10 * d][0] for d in range(10)]
    raise PairError(
        f"greater_than: the tokenizer of {m.name} cuts ' 1732' into {len(years[32])} tokens that do not begin with "
        "those of ' 17', so a year has no place where it must continue"
    )


def successor(m: Model, n: int = 16, seed: int = 0) -> Pairs:
    """The next of an ordered list, of which three are said: months, number words."""
    rows: list[Row] = []
    notes: list[str] = []
    draw = random.Random(f"successor/{seed}")
    for kind, items in words.SEQUENCES.items():
        usable, note = _single(m, items, kind)
        runs = [r for r in zip(*(items[i:] for i in range(4)), strict=False) if all(w in usable for w in r)]
        couples = [(a, b) for a in runs for b in runs if a[0] not in b and b[0] not in a]  # else answers are in sight
        notes += note
        for a, b in draw.choices(couples, k=-(-n // len(words.SEQUENCES))) if couples else []:
            rows.append(Row(f" {', '.join(a[:3])},", f" {', '.join(b[:3])},", f" {a[3]}", f" {b[3]}"))
    if not rows:
        raise PairError("successor: none of our lists has four words in a row that are single tokens")
    draw.shuffle(rows)
    return _pairs(m, "successor", rows[:n], notes)


def a_an(m: Model, n: int = 16, seed: int = 0) -> Pairs:
    """The article that a word asks for, some words before the word comes."""
    consonant, note = _single(m, words.CONSONANT, "nouns")
    vowel, more = _single(m, words.VOWEL, "nouns")
    draw, rows = random.Random(f"a_an/{seed}"), []
    for i in range(n):
        x, y = draw.choice(consonant), draw.choice(vowel)
        text = draw.choice(words.WISHES)
        row = Row(text.format(x), text.format(y), " a", " an")
        rows.append(row if i % 2 else Row(row.corrupt, row.clean, row.wrong, row.answer))
    return _pairs(m, "a_an", rows, note + more)


def pronoun(m: Model, n: int = 16, seed: int = 0) -> Pairs:
    """The pronoun that goes with a given name."""
    female, note = _single(m, words.FEMALE, "names")
    male, more = _single(m, words.MALE, "names")
    draw, rows = random.Random(f"pronoun/{seed}"), []
    for i in range(n):
        a, b, job = draw.choice(female), draw.choice(male), draw.choice(words.JOBS)
        text = f"{{}} is a very good {job}, isn't"
        row = Row(f"So {text.format(a)}", f"So {text.format(b)}", " she", " he")
        rows.append(row if i % 2 else Row(row.corrupt, row.clean, row.wrong, row.answer))
    return _pairs(m, "pronoun", rows, note + more)


def fully_random(m: Model, n: int = 16, seed: int = 0, length: int = 12) -> Pairs:
    """Two unrelated texts, cut to `length` tokens; the answers are what the model itself holds most likely after each.

    Raises PairError where fewer than two texts have so many tokens, or the model continues all of them alike.
    """
    rows = [row[:length] for row in (m.tokens(text).row(0).tolist() for text in words.SENTENCES) if len(row) >= length]
    if len(rows) < 2:
        raise PairError(f"fully_random: length={length} tokens, and {len(rows)} of our texts are as long; lower it")
    best = last_logits(m(torch.tensor(rows, device=m.device)), None).argmax(-1).tolist()
    pairs = [(a, b) for a in range(len(rows)) for b in range(len(rows)) if best[a] != best[b] and rows[a] != rows[b]]
    if not pairs:
        raise PairError("fully_random: the model continues all of our texts with the same token")
    chosen = random.Random(f"fully_random/{seed}").sample(pairs, min(n, len(pairs)))
    left, right = zip(*chosen, strict=True)
    return of(
        m, [rows[a] for a in left], [rows[b] for b in right], [[best[a]] for a in left], [[best[b]] for b in right],
        name="fully_random", notes=["answers are the model's own most likely continuations"],
    )  # fmt: skip


#: Every builder by the name of its task.
BUILDERS: dict[str, Callable[..., Pairs]] = {
    f.__name__: f for f in (ioi, capital_swap, greater_than, successor, a_an, pronoun, factual, fully_random)
}


def _single(m: Model, candidates: Sequence[str], what: str, needed: int = 2) -> tuple[list[str], list[str]]:
    """(words that are one token with a leading space, what to say of the others)."""
    kept = [word for word in candidates if len(m.tokens(f" {word}", special=False).row(0)) == 1]
    left = [word for word in candidates if word not in kept]
    if len(kept) < needed:
        raise PairError(
            f"{what}: only {len(kept)} of our {len(candidates)} are a single token for the tokenizer of {m.name}; "
            "build the pairs with your own words (interp.patching.pairs.of)"
        )
    return kept, [f"{what} left out, several tokens each: {', '.join(left)}"] if left else []


def _facts(m: Model, name: str, n: int, seed: int, template: str, facts: dict[str, str]) -> Pairs:
    rows, notes = _fact_rows(m, n, f"{name}/{seed}", template, facts)
    return _pairs(m, name, rows, notes)


def _fact_rows(m: Model, n: int, key: str, template: str, facts: dict[str, str]) -> tuple[list[Row], list[str]]:
    """Pairs of subjects with as many tokens as each other and different one-token objects."""
    objects, notes = _single(m, list(dict.fromkeys(facts.values())), f"objects of '{template}'")
    size = {s: len(m.tokens(f" {s}", special=False).row(0)) for s, o in facts.items() if o in objects}
    couples = [(a, b) for a in size for b in size if size[a] == size[b] and facts[a] != facts[b]]
    if not couples:
        raise PairError(f"{template!r}: no two of our subjects have as many tokens for the tokenizer of {m.name}")
    draw = random.Random(key)
    chosen = draw.sample(couples, n) if n <= len(couples) else draw.choices(couples, k=n)
    return list(_filled(template, facts, chosen)), notes


def _filled(template: str, facts: dict[str, str], chosen: Sequence[tuple[str, str]]) -> Iterator[Row]:
    for a, b in chosen:
        yield Row(template.format(a), template.format(b), f" {facts[a]}", f" {facts[b]}")


def _pairs(m: Model, name: str, rows: list[Row], notes: list[str]) -> Pairs:
    return of(
        m, [r.clean for r in rows], [r.corrupt for r in rows], [r.answer for r in rows], [r.wrong for r in rows],
        name=name, notes=notes,
    )  # fmt: skip
