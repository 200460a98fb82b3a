"""Propensity: how much more likely a model finds the answers with a behaviour than those without.

    p(item) = log P(positive | prompt) / tokens - log P(negative | prompt) / tokens        nats per token

It reads likelihoods of whole answers, so it needs no model that binds lettered options, no sampling and no judge,
and each item gives a curve over multipliers: its slope says how steerable that item is, its sign whether it was
steered the wrong way (Tan et al. 2024, arXiv:2407.12404). Everything else in the evaluation stands on the table made
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp.calls import recorded
from interp.edits import Edit
from interp.interrupted import handed_on, salvaged
from steering import pairs as _pairs
from steering.baselines import as_list, instructed, random_like
from steering.continuation import Scores, log_likelihoods
from steering.errors import SteeringError
from steering.vector import SteeringMap, SteeringVector

if TYPE_CHECKING:
    import pandas as pd

MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@recorded
def propensities(
    m: Any,
    v: SteeringMap,
    pairs: Any,
    multipliers: Sequence[float] = MULTIPLIERS,
    *,
    controls: int = 20,
    baselines: Mapping[str, SteeringMap | Sequence[SteeringMap]] | None = None,
    prompt: tuple[str, str] | None = None,
    chat: bool = False,
    system: str | None = None,
    seed: int = 0,
    batch_tokens: int = 1024,
    share: bool = True,
) -> pd.DataFrame:
    """One row per item, multiplier, baseline and draw.

    Args:
        m: the model.
        v: the vector or map.
        pairs: held-out (prompt, positive_text, negative_text) triples; nothing here knows what `v` was fitted on.
        multipliers: strengths; 0 is the unsteered model.
        controls: random controls of the same norm (`random_like`). A random direction's sign means nothing, so for
            vectors k and -k share their draws.
        baselines: further maps to set beside it, by name, e.g. ``{"shuffled": steering.shuffled(...)}``.
        prompt: two texts that ask for the behaviour and for its opposite, put before the prompts (baseline "prompt").
        chat: put the prompts into the model's chat template.
        system: the template's system turn.
        seed: of the controls.
        batch_tokens: answer tokens run at once.
        share: False runs every prompt through the whole model each time; same numbers, more time.

    Returns columns item, multiplier, baseline ("none" is `v` itself), draw, positive, negative (mean log-probability
    of an answer's tokens, nats), value (their difference). Raises SteeringError for malformed pairs or multipliers.
    Interrupted, it leaves the lines of the items that were done (`interp.unfinished`).
    """
    import pandas as pd

    ks = check_multipliers(multipliers)
    if controls < 0:
        raise SteeringError(f"controls={controls}: expected 0 or more")
    triples = _pairs.check(pairs)
    maps = {"none": [v]}
    if controls:
        maps["random"] = random_like(v, controls, seed)
    for name, given in (baselines or {}).items():
        if name in ("none", "random", "prompt"):
            raise SteeringError(f"baselines: {name!r} is a name of our own; call yours otherwise")
        maps[name] = as_list(given, name)
    runs: dict[Any, list[Edit]] = {0.0: []}
    for name, found in maps.items():
        for draw, one in enumerate(found):
            for k in ks:
                if k and (name, draw, -k) not in (runs if _mirrored(name, one) else ()):
                    runs[name, draw, k] = (one * k).as_edits(m)
    how: dict[str, Any] = {"batch_tokens": batch_tokens, "share": share}
    sides = _pairs.sides(m, triples, chat=chat, system=system)
    rows: list[pd.DataFrame] = []

    def put(name: str, draw: int, k: float, scores: Scores, run: Any) -> None:
        items, per_token = scores.items(), scores.per_token(run)
        a, b = per_token[0::2][items].numpy(), per_token[1::2][items].numpy()
        rows.append(pd.DataFrame({
            "item": items, "multiplier": k, "baseline": name, "draw": draw,
            "positive": a, "negative": b, "value": a - b,
        }))  # fmt: skip

    def put_all(scores: Scores) -> None:
        for name, found in maps.items():
            for draw in range(len(found)):
                for k in ks:
                    key: Any = (name, draw, k) if k else 0.0
                    put(name, draw, k, scores, key if key in runs else (name, draw, -k))

    def made(scores: Scores) -> pd.DataFrame | None:
        if not rows:  # interrupted before they could be written down
            put_all(scores)
        table = pd.concat(rows, ignore_index=True)
        table.attrs.update({
            "metric": "propensity", "unit": "nats per token", "model": m.name, "fingerprint": m.fingerprint,
            "method": v.method, "record": v.record, "sites": v.sites, "scope": v.scope.text, "controls": controls,
            "seed": seed, "items": table["item"].nunique(), "chat": chat, "literal": scores.literal,
        })  # fmt: skip
        return table if len(table) else None

    with handed_on("steering.propensities", made):
        scores = log_likelihoods(m, [p for both in zip(*sides, strict=True) for p in both], runs, **how)
    put_all(scores)
    with salvaged("steering.propensities", lambda: made(scores)):
        signs = sorted({(k > 0) - (k < 0) for k in ks})  # the sign is all that an instruction follows
        for asked, k in [(prompt, k) for k in signs] if prompt is not None else ():
            sides = _pairs.sides(m, instructed(triples, *asked, multiplier=k), chat=chat, system=system)
            told = log_likelihoods(m, [p for both in zip(*sides, strict=True) for p in both], {0.0: []}, **how)
            for each in (x for x in ks if (x > 0) - (x < 0) == k):
                put("prompt", 0, each, told, 0.0)
    table = made(scores)
    assert table is not None
    return table


@recorded
def slopes(table: pd.DataFrame, baseline: str = "none") -> pd.DataFrame:
    """Each item's least-squares slope of value over multiplier: columns item, slope (nats per token and unit),
    residual.

    `residual` is the root mean square of what a straight line leaves. `.attrs` has the mean slope, and `flipped`,
    the share of items with a negative slope: those steered the wrong way.
    """
    import numpy as np
    import pandas as pd

    own = table[(table["baseline"] == baseline) & (table["draw"] == 0)]
    grid = own.pivot(index="item", columns="multiplier", values="value")
    if grid.shape[1] < 2:
        raise SteeringError(f"slopes: {grid.shape[1]} multiplier of baseline {baseline!r}; a slope needs two")
    k = grid.columns.to_numpy(dtype=float)
    y = grid.to_numpy()
    slope = ((y - y.mean(1, keepdims=True)) * (k - k.mean())).sum(1) / ((k - k.mean()) ** 2).sum()
    rest = y - y.mean(1, keepdims=True) - slope[:, None] * (k - k.mean())
    out = pd.DataFrame({"item": grid.index, "slope": slope, "residual": np.sqrt((rest**2).mean(1))})
    out.attrs.update(table.attrs | {"slope": float(slope.mean()), "flipped": float((slope < 0).mean())})
    return out


def check_multipliers(given: Sequence[float]) -> list[float]:
    """As a list of floats. SteeringError for none, one that is not finite, or one given twice."""
    import math

    ks = [float(k) for k in ([given] if isinstance(given, int | float) else given)]
    if not ks or not all(math.isfinite(k) for k in ks) or len(set(ks)) < len(ks):
        raise SteeringError(f"multipliers={list(ks)}: expected finite numbers, each once, such as [-2, -1, 0, 1, 2]")
    return [k + 0.0 for k in ks]  # no negative zero


def _mirrored(name: str, one: SteeringMap) -> bool:
    return name == "random" and isinstance(one, SteeringVector)
