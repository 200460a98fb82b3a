"""Function vectors on tasks that a model does in context: accuracy without any example, beside their rivals.

    function vector      what the heads of largest indirect effect write on the task's prompts, summed
    shuffled             the same heads on prompts whose outputs are shuffled
    random heads         as many other heads, drawn at random (mean over draws)
    layer mean           the residual stream itself, averaged over the task's prompts

Those that end in "centred" have the mean over ordinary text taken off (mean-centring). Of the examples some are for the
prompts that vectors are made of, some choose layer and number of heads for each row of the table (every rival gets its
own best), and the rest are scored.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _steer_data as data
import numpy as np

from steering import SteeringVector
from steering import pairs as _pairs
from steering.fit_functions import effects, written
from steering.intervals import bootstrap
from steering.reading import read, sites_at, token_mean
from steering.tasks import hits, prompts, right, zero_shot

TASKS = ["capitalize_first_letter", "capitalize", "lowercase_first_letter", "word_length", "country-capital",
         "product-company"]  # fmt: skip
SHOTS, PROMPTS, TRIALS, CHOOSING = 10, 24, 10, 20
LAYERS, HEADS, DRAWS = (8, 10, 12, 15), (10, 20, 40), 5


def function_vectors(
    m: Any, directory: Path, out: Path, *, items: int, controls: int, only: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """One row per task: 10-shot accuracy, zero-shot accuracy, and that with each vector, [mean, low, high].

    Args:
        m: the model.
        directory: see `_steer_data`.
        out: where each task's row is kept.
        items: how many held-out examples are scored.
        controls: not used; the random heads are drawn `DRAWS` times.
        only: names that a task begins with; default `TASKS`.
    """
    for name, examples in data.tasks(directory, only or TASKS).items():
        file = out / f"function-vector-{name}.json"
        if not file.exists():
            file.write_text(json.dumps({"task": name} | _task(m, examples, items)))
        yield json.loads(file.read_text())


def _task(m: Any, examples: list[tuple[str, str]], items: int) -> dict[str, Any]:
    choosing, test = examples[:CHOOSING], examples[CHOOSING : CHOOSING + items]
    train = examples[CHOOSING + items :][:400]
    asked = prompts(train, PROMPTS, SHOTS)
    good = right(m, asked, batch_tokens=512)
    kept = [item for item, ok in zip(asked, good, strict=True) if ok]
    if not kept:
        return {"10-shot": 0.0, "note": "the model has no such task to read"}
    tables, heads = _vectors(m, train, kept)
    runs: dict[Any, list[Any]] = {None: []}
    for key, vector in tables.items():
        runs[key] = SteeringVector.of(m, {f"resid_post[{key[1]}]": vector}).as_edits(m)
    chosen = _best(hits(m, zero_shot(choosing), runs), list(tables))
    scored = hits(m, zero_shot(test), {None: []} | {k: runs[k] for k in tables if k[:3] in chosen.values()})
    row: dict[str, Any] = {
        "10-shot": round(sum(good) / len(good), 3), "scored": len(test), "heads": heads,
        "zero-shot": _interval(np.array(scored[None], dtype=float)),
    }  # fmt: skip
    each = {}
    for name, key in chosen.items():
        draws = [np.array(hit, dtype=float) for k, hit in scored.items() if k is not None and k[:3] == key]
        each[name] = np.mean(draws, axis=0)
        row[name] = {"layer": key[1], "heads": key[2], "accuracy": _interval(each[name])}
    for own in ("function vector", "function vector, centred"):
        row[f"{own} less"] = {
            name: _interval(each[own] - other)
            for name, other in each.items()
            if name.split(",")[0] != "function vector"
        }
    row["centred less plain"] = {
        name: _interval(each[f"{name}, centred"] - each[name]) for name in ("function vector", "layer mean")
    }
    return row


def _vectors(
    m: Any, train: list[tuple[str, str]], kept: list[tuple[str, str]]
) -> tuple[dict[tuple[str, int, int, int], Any], list[Any]]:
    """((name, layer, heads, draw) -> vector, the ten heads of largest effect)."""
    streams = sites_at(m, list(LAYERS))
    heads = sites_at(m, "*", "z")
    task = {s: x.mean(0) for s, x in _last(m, kept, [*heads, *streams]).items()}
    mixed = prompts(train, PROMPTS, SHOTS, shuffled=True, seed=2)
    shuffled = {s: x.mean(0) for s, x in _last(m, mixed, heads).items()}
    usual = token_mean(m, _pairs.texts(m, data.NEUTRAL), [*heads, *streams])
    means = {s: task[s] for s in heads}
    broken = prompts(train, TRIALS, SHOTS, shuffled=True, seed=1)
    table = sorted(effects(m, broken, means).items(), key=lambda x: -x[1])
    rng, found = random.Random(3), {}
    for n in HEADS:
        top = [head for head, _ in table[:n]]
        made = {
            "function vector": [written(m, means, top)],
            "function vector, centred": [written(m, {s: means[s] - usual[s] for s in heads}, top)],
            "shuffled": [written(m, shuffled, top)],
            "random heads": [written(m, means, rng.sample([h for h, _ in table[n:]], n)) for _ in range(DRAWS)],
        }
        for name, vectors in made.items():
            found |= {(name, layer, n, i): v for layer in LAYERS for i, v in enumerate(vectors)}
    for layer, stream in zip(LAYERS, streams, strict=True):
        found["layer mean", layer, 0, 0] = task[stream]
        found["layer mean, centred", layer, 0, 0] = task[stream] - usual[stream]
    return found, [[*head, round(effect, 4)] for head, effect in table[:10]]


def _last(m: Any, items: list[tuple[str, str]], sites: list[str]) -> Any:
    return read(m, [_pairs.passage(m, prompt) for prompt, _ in items], sites, "last", 2048)


def _best(found: dict[Any, list[bool]], keys: list[Any]) -> dict[str, tuple[str, int, int]]:
    """For each row of the table its best (name, layer, heads), random heads by their mean over draws."""
    best: dict[str, tuple[float, tuple[str, int, int]]] = {}
    for name, layer, n in dict.fromkeys(key[:3] for key in keys):
        value = float(np.mean([found[k] for k in keys if k[:3] == (name, layer, n)]))
        if value > best.get(name, (-1.0, None))[0]:
            best[name] = value, (name, layer, n)
    return {name: key for name, (_, key) in best.items()}


def _interval(each: Any) -> list[float]:
    return [round(float(x), 3) for x in (each.mean(), *bootstrap(each))]
