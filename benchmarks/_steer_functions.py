"""Function vectors on tasks that a model does in context: accuracy without any example, beside their rivals.

    function vector      what the heads of largest indirect effect write on the task's prompts, summed
    shuffled             the same heads on prompts whose outputs are shuffled
    random heads         as many other heads, drawn at random (mean over draws)
    layer mean           the residual stream itself, averaged over the task's prompts

Those that end in "centred" have the mean over ordinary text taken off (mean-centring). Of the examples some are for the
prompts that vectors are made of, some choose layer, number of heads and multiplier for each column of the table (every
rival gets its own best), and the rest are scored. The paper adds its vector unscaled; in a model of 135M parameters the
few heads write too little for facts, hence the multiplier.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _steer_data as data
import numpy as np

from steering import SteeringVector
from steering import pairs as _pairs
from steering.continuation import continued
from steering.fit_functions import effects, written
from steering.intervals import bootstrap
from steering.reading import read, sites_at, token_mean
from steering.tasks import TEMPLATE, Template, first_token, prompts, right, zero_shot

TASKS = ["capitalize_first_letter", "capitalize", "lowercase_first_letter", "word_length", "country-capital",
         "product-company"]  # fmt: skip
SHOTS = 10
LAYERS, HEADS, MULTIPLIERS, DRAWS = (8, 12, 15), (10, 20, 40), (1.0, 2.0, 4.0), 5
#: Many tokenizers cut " 5" into a space and a digit; the first token of every answer would then be the space.
TEMPLATES = {"word_length": ("Q: {}\nA:", "", "\n\n")}


class Sizes(NamedTuple):
    """How many prompts heads are read from, shuffled prompts their effects are measured in, and examples choose."""

    prompts: int
    trials: int
    choosing: int


def function_vectors(
    m: Any, directory: Path, out: Path, *, items: int, sizes: Sizes, controls: int, only: list[str] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per task: 10-shot accuracy, zero-shot accuracy, and that with each vector, [mean, low, high].

    Args:
        m: the model.
        directory: see `_steer_data`.
        out: where each task's row is kept.
        items: how many held-out examples are scored.
        sizes: of what vectors are read from and chosen by.
        controls: not used; the random heads are drawn `DRAWS` times.
        only: the tasks' names; default `TASKS`.
    """
    for name, examples in data.tasks(directory, only or TASKS).items():
        file = out / f"function-vector-{name}.json"
        if not file.exists():
            template = TEMPLATES.get(name, TEMPLATE)
            file.write_text(json.dumps({"task": name} | _task(m, examples, items, template, sizes)))
        yield json.loads(file.read_text())


def _task(m: Any, examples: list[tuple[str, str]], items: int, template: Template, sizes: Sizes) -> dict[str, Any]:
    choosing, test = examples[: sizes.choosing], examples[sizes.choosing : sizes.choosing + items]
    train = examples[sizes.choosing + items :][:400]
    asked = prompts(train, sizes.prompts, SHOTS, template=template)
    good = right(m, asked, batch_tokens=512)
    kept = [item for item, ok in zip(asked, good, strict=True) if ok]
    if not kept:
        return {"10-shot": 0.0, "note": "the model has no such task to read"}
    tables, heads = _vectors(m, train, kept, template, sizes.trials)
    runs: dict[Any, list[Any]] = {None: []}
    for (name, layer, n, draw), vector in tables.items():
        v = SteeringVector.of(m, {f"resid_post[{layer}]": vector})
        runs |= {(name, layer, n, k, draw): (v * k).as_edits(m) for k in MULTIPLIERS}
    chosen = _best(_asked(m, zero_shot(choosing, template), runs))
    runs = {key: edits for key, edits in runs.items() if key is None or key[:4] in chosen.values()}
    scored = _asked(m, zero_shot(test, template), runs)
    mixed = right(m, prompts(train, sizes.prompts, SHOTS, shuffled=True, template=template), batch_tokens=512)
    row: dict[str, Any] = {
        "10-shot": round(sum(good) / len(good), 3), "10-shot, shuffled": round(sum(mixed) / len(mixed), 3),
        "kept": len(kept), "scored": len(test), "heads": heads,
        "zero-shot": {"accuracy": _interval(scored[None][:, 0]), "log P": _interval(scored[None][:, 1])},
    }  # fmt: skip
    each = {}
    for name, key in chosen.items():
        each[name] = np.mean([found for k, found in scored.items() if k is not None and k[:4] == key], axis=0)
        row[name] = {
            "layer": key[1], "heads": key[2], "multiplier": key[3],
            "accuracy": _interval(each[name][:, 0]), "log P": _interval(each[name][:, 1]),
        }  # fmt: skip
    for own in ("function vector", "function vector, centred"):
        row[f"{own} less"] = {
            name: _less(each[own], other) for name, other in each.items() if name.split(",")[0] != "function vector"
        }
    row["centred less plain"] = {
        name: _less(each[f"{name}, centred"], each[name]) for name in ("function vector", "layer mean")
    }
    return row


def _vectors(
    m: Any, train: list[tuple[str, str]], kept: list[tuple[str, str]], template: Template, trials: int
) -> tuple[dict[tuple[str, int, int, int], Any], list[Any]]:
    """((name, layer, heads, draw) -> vector, the ten heads of largest effect)."""
    streams = sites_at(m, list(LAYERS))
    heads = sites_at(m, "*", "z")
    task = {s: x.mean(0) for s, x in _last(m, kept, [*heads, *streams]).items()}
    mixed = prompts(train, len(kept), SHOTS, shuffled=True, seed=2, template=template)
    shuffled = {s: x.mean(0) for s, x in _last(m, mixed, heads).items()}
    usual = token_mean(m, _pairs.texts(m, data.NEUTRAL), [*heads, *streams])
    means = {s: task[s] for s in heads}
    broken = prompts(train, trials, SHOTS, shuffled=True, seed=1, template=template)
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


def _asked(m: Any, items: list[tuple[str, str]], runs: dict[Any, list[Any]]) -> dict[Any, Any]:
    """run -> [item, (1.0 where the right first token is the likeliest, its log P)]."""
    found = {key: np.zeros((len(items), 2)) for key in runs}
    for part in continued(m, first_token(m, items), runs):
        logits, right_ones = part.logits[:, 0].float(), part.targets[:, 0]
        found[part.run][part.rows, 0] = (logits.argmax(-1) == right_ones).numpy()
        found[part.run][part.rows, 1] = logits.log_softmax(-1).gather(-1, right_ones[:, None])[:, 0].numpy()
    return found


def _best(found: dict[Any, Any]) -> dict[str, tuple[str, int, int, float]]:
    """For each column of the table its best (name, layer, heads, multiplier): by accuracy, of equals by log P.

    Random heads by their mean over draws.
    """
    best: dict[str, tuple[list[float], tuple[str, int, int, float]]] = {}
    for key in dict.fromkeys(key[:4] for key in found if key is not None):
        draws = [each.mean(0) for k, each in found.items() if k is not None and k[:4] == key]
        value = [round(float(x), 6) for x in np.mean(draws, axis=0)]
        if key[0] not in best or value > best[key[0]][0]:
            best[key[0]] = value, key
    return {name: key for name, (_, key) in best.items()}


def _less(own: Any, other: Any) -> dict[str, list[float]]:
    return {name: _interval((own - other)[:, i]) for i, name in enumerate(("accuracy", "log P"))}


def _interval(each: Any) -> list[float]:
    return [round(float(x), 3) for x in (each.mean(), *bootstrap(each))]
