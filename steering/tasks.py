"""In-context tasks: prompts made of examples, and how often a model's first token is right.

Q: without          an example is (input, output); the answer to the last question is what is asked for
A: Without

Q: emu
A:
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from interp.edits import Edit
from interp.progress import bar
from steering.continuation import continued
from steering.errors import SteeringError
from steering.pairs import Passage, passage

Example = tuple[str, str]


def examples(given: Sequence[Any]) -> list[Example]:
    """(input, output) pairs, from such or from ``{"input": ..., "output": ...}``. SteeringError for anything else."""
    out = []
    for i, row in enumerate(given):
        pair = (row.get("input"), row.get("output")) if isinstance(row, dict) else tuple(row)
        if len(pair) != 2 or not all(isinstance(x, str) and x.strip() for x in pair):
            raise SteeringError(f"examples[{i}]: expected (input, output) texts, got {row!r:.80}")
        out.append(pair)
    return out


#: How one input is asked for, what stands before its output, and what behind it.
TEMPLATE = ("Q: {}\nA:", " ", "\n\n")
Template = tuple[str, str, str]


def question(query: str, shots: Sequence[Example] = (), template: Template = TEMPLATE) -> str:
    """The prompt that asks for `query`'s output behind worked examples; in the usual template it ends with "A:"."""
    ask, before, behind = template
    return "".join(ask.format(x) + before + y + behind for x, y in shots) + ask.format(query)


def prompts(
    given: Sequence[Any], n: int, shots: int = 10, *, shuffled: bool = False, seed: int = 0,
    queries: Sequence[Any] | None = None, template: Template = TEMPLATE,
) -> list[tuple[str, str]]:  # fmt: skip
    """`n` prompts with the right answer to each, of `shots` examples drawn anew for each prompt.

    Args:
        given: (input, output) examples, from which shots (and, by default, queries) are drawn.
        n: how many prompts.
        shots: worked examples in each.
        shuffled: give the shots each other's outputs, so that they show the form but not the task.
        seed: of the draws.
        queries: ask for these instead, in turn; no query is among its own shots.
        template: see `TEMPLATE`.
    """
    pool, rng, mixer = examples(given), random.Random(seed), random.Random(seed + 1)  # same draws, shuffled or not
    if len(pool) < shots + 1:
        raise SteeringError(f"examples: there are {len(pool)}; {shots} shots and a query need {shots + 1}")
    asked = examples(queries) if queries is not None else None
    made = []
    for i in range(n):
        drawn = rng.sample(pool, shots + 1)
        query = asked[i % len(asked)] if asked else drawn[-1]
        drawn = [x for x in drawn if x[0] != query[0]][:shots]
        outputs = [y for _, y in drawn]
        if shuffled:
            mixer.shuffle(outputs)
        worked = [(x, y) for (x, _), y in zip(drawn, outputs, strict=True)]
        made.append((question(query[0], worked, template), template[1] + query[1]))
    return made


def zero_shot(given: Sequence[Any], template: Template = TEMPLATE) -> list[tuple[str, str]]:
    """Each example's question without any shot, and its answer."""
    return [(question(x, (), template), template[1] + y) for x, y in examples(given)]


def first_token(m: Any, items: Sequence[tuple[str, str]]) -> list[Passage]:
    """Passages whose answer is cut to its first token."""
    whole = [passage(m, prompt, answer) for prompt, answer in items]
    return [Passage(p.ids[: p.answer + 1], p.answer) for p in whole]


def right(m: Any, items: Sequence[tuple[str, str]], *edits: Edit, batch_tokens: int = 64) -> list[bool]:
    """For each (prompt, answer): is the answer's first token the likeliest next one, under `edits`?"""
    return hits(m, items, {None: list(edits)}, batch_tokens=batch_tokens)[None]


def hits(
    m: Any, items: Sequence[tuple[str, str]], runs: Mapping[Any, Sequence[Edit]], *, batch_tokens: int = 64
) -> dict[Any, list[bool]]:
    """`right` under many sets of edits at once, by their keys; what precedes the edits is run but once."""
    found = {key: [False] * len(items) for key in runs}
    with bar("asking", len(items) * len(runs)) as advance:
        for part in continued(m, first_token(m, items), runs, batch_tokens=batch_tokens):
            each = (part.logits[:, 0].argmax(-1) == part.targets[:, 0]).tolist()
            for row, hit in zip(part.rows, each, strict=True):
                found[part.run][row] = hit
            advance(len(part.rows))
    return found
