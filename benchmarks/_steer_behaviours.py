"""Dose and response of contrastive activation addition on every behaviour of a folder, beside random vectors.

Fitted on one set of questions, scored on another. Each behaviour's scores are written as they are done, so a run that
was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _steer_data as data

import steering
from steering.evaluate import summarise, verdict
from steering.intervals import bootstrap

MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def behaviours(
    m: Any, directory: Path, out: Path, *, layer: int, fit: int, items: int, controls: int, chat: bool,
    only: list[str] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per behaviour: `summary` of its scores.

    Args:
        m: the model.
        directory: see `_steer_data`.
        out: where each behaviour's per-item scores are kept as CSV.
        layer: where the vector is read and added, from the prompt's last token on.
        fit: pairs to fit on, spread over the set.
        items: held-out items, spread over theirs.
        controls: random vectors of the same norm.
        chat: put prompts into the chat template.
        only: behaviours whose names begin so.
    """
    import pandas as pd

    for name, (train, test) in data.behaviours(directory).items():
        if only and not any(name.startswith(start) for start in only):
            continue
        file = out / f"{name.replace(' ', '-')}.csv"
        if file.exists():
            table = pd.read_csv(file)
        else:
            v = steering.caa(m, spaced(train, fit), layer=layer, chat=chat)
            table = steering.propensities(m, v, spaced(test, items), MULTIPLIERS, controls=controls, chat=chat)
            table.assign(norm=v.norm).to_csv(file, index=False)
        yield {"behaviour": name} | summary(table)


def summary(table: Any) -> dict[str, Any]:
    """What the scores of one behaviour say; `table` is that of `steering.propensities`.

    value, random: propensity by multiplier (nats per token), [mean, low, high]; over items for the vector, the middle
    95 % of draws for random vectors. beyond: the vector's effect (change from multiplier 0) less that of random
    vectors, bootstrapped over items. rises, leaves, wrong as in `steering.verdict`.
    """
    short = summarise(table)
    told = verdict(short)
    rows = {name: part.set_index("multiplier") for name, part in short.groupby("baseline")}
    by = {
        name: part.groupby(["item", "multiplier"])["value"].mean().unstack() for name, part in table.groupby("baseline")
    }
    beyond = {}
    for k in sorted(set(table["multiplier"]) - {0.0}):
        apart = by["none"][k] - by["random"][k]  # both are the same without steering
        beyond[f"{k:+g}"] = _rounded(float(apart.mean()), *bootstrap(apart))
    return {
        "items": int(table["item"].nunique()), "rises": told["rises"], "leaves": told["leaves"], "wrong": told["wrong"],
        "flipped": round(short.attrs["flipped"], 3),
        "value": {f"{k:+g}": _rounded(r["value"], r["low"], r["high"]) for k, r in rows["none"].iterrows()},
        "random": {f"{k:+g}": _rounded(r["value"], r["low"], r["high"]) for k, r in rows["random"].iterrows()},
        "beyond": beyond,
    }  # fmt: skip


def spaced(rows: list[Any], n: int) -> list[Any]:
    """`n` of the rows, evenly spread."""
    return [rows[i * len(rows) // n] for i in range(n)] if n < len(rows) else rows


def _rounded(*numbers: float) -> list[float]:
    return [round(float(x), 3) for x in numbers]
