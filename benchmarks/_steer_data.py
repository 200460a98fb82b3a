"""Public steering data as (prompt, positive, negative) triples and as in-context tasks, read from a folder.

    DIR/caa/generate/<behaviour>/generate_dataset.json      lettered questions to fit on (github.com/nrimsky/CAA)
    DIR/caa/test/<behaviour>/test_dataset_ab.json           ... and others to score
    DIR/repe_emotions/<emotion>.json                        situations (github.com/andyzoujm/representation-engineering)
    DIR/function_vectors/abstractive/<task>.json            {"input", "output"} (github.com/ericwtodd/function_vectors)
    DIR/function_vectors/extractive/<task>.json             ... whose output is one of the input's words

The letters are taken off: a small model does not bind them, so whole answers are scored.
"""

from __future__ import annotations

import json
import random
import re
from itertools import combinations
from pathlib import Path
from typing import Any

Triples = list[tuple[str, str, str]]
SITUATION = "Describe a situation in one sentence."

#: Plain statements on which damage is measured and means are centred; none of them is about a behaviour.
NEUTRAL = [
    "The committee meets on the first Monday of each month to review the budget for the coming year.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
    "The train to the city leaves every half hour from platform two and takes about forty minutes.",
    "A triangle has three sides, and the sum of its angles in the plane is always one hundred and eighty degrees.",
    "The museum opens at nine in the morning and closes at five, except on public holidays.",
    "To make the dough, mix flour, butter and sugar, then add two eggs and leave it to rest for an hour.",
    "The river rises in the mountains and reaches the sea after two hundred miles of fields and towns.",
    "Copper conducts electricity better than iron does, which is why most wires are made of it.",
    "The library has moved to a building near the station, with more shelves and a room for children.",
    "In spring the farmers plough their fields and sow wheat, barley and oats.",
    "The printer is on the second floor, next to the meeting room with the round table.",
    "Glass is made of sand that is melted at a high temperature and cooled before it can form crystals.",
]


def behaviours(directory: Path) -> dict[str, tuple[Triples, Triples]]:
    """name -> (triples to fit on, triples to score): every lettered behaviour, and every pair of emotions."""
    found: dict[str, tuple[Triples, Triples]] = {}
    for folder in sorted((directory / "caa" / "generate").glob("*/")):
        test = directory / "caa" / "test" / folder.name / "test_dataset_ab.json"
        if test.exists():
            found[folder.name] = _lettered(folder / "generate_dataset.json"), _lettered(test)
    emotions = {f.stem: _read(f) for f in sorted((directory / "repe_emotions").glob("*.json"))}
    for a, b in combinations(sorted(emotions, reverse=True), 2):
        rows = [(SITUATION, x, y) for x, y in zip(emotions[a], emotions[b], strict=False) if x != y]
        found[f"{a} against {b}"] = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if not found:
        raise SystemExit(
            f"{directory}: holds neither caa/generate/* nor repe_emotions/*.json; see --help for the layout"
        )
    return found


def tasks(directory: Path, names: list[str], seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """name -> (input, output) examples of one-to-one tasks, shuffled."""
    found = {}
    for name in names:
        files = sorted((directory / "function_vectors").glob(f"*/{name}.json"))
        if not files:
            raise SystemExit(f"{directory}: there is no function_vectors/*/{name}.json")
        rows = _read(files[0])
        random.Random(seed).shuffle(rows)
        found[name] = [(row["input"], row["output"]) for row in rows]
    return found


def _lettered(path: Path) -> Triples:
    """``question (A) ... (B) ...`` without the letters. Options may be in either order."""
    triples = []
    for row in _read(path):
        text = row["question"]
        cut = re.search(r"\n\nChoices:|\n \(A\)", text)
        if cut is None:
            continue
        options = dict(re.findall(r"\(([AB])\) (.*?)(?=\n \([AB]\)|\Z)", text[cut.start() :], re.DOTALL))
        sides = [
            options.get(row[f"answer_{which}_behavior"].strip(" ()"), "") for which in ("matching", "not_matching")
        ]
        if all(side.strip() for side in sides) and sides[0].strip() != sides[1].strip():
            triples.append((text[: cut.start()].strip(), sides[0].strip(), sides[1].strip()))
    return triples


def _read(path: Path) -> list[Any]:
    rows: list[Any] = json.loads(path.read_text(encoding="utf-8"))
    return rows
