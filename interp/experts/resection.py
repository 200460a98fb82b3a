"""Resection experiments: remove each label in turn and see what every label loses (Monet, section 5).

    table = remove_each(m, stats, held_out)                 Table 1 of the paper, on your model: a matrix with intervals
    summary(table)                                          damage, selectivity, and how far beyond random
    frontier(m, stats, held_out, "skew", ratio=[1.5, 2, 4]) the whole trade-off, not one point of it

`stats` come from one split, `held_out` is another.

**Damage** is the mean rise of the removed label's loss (nats per token), **spill** the mean absolute change on all
other labels, and **selectivity** their ratio. A method is not better because it removes more: compare at equal damage
(`at_damage`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from interp.calls import recorded
from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.controls import has_controls
from interp.experts.evaluate import evaluate
from interp.experts.losses import Losses, losses
from interp.experts.select import select_or_none
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError
from interp.interrupted import salvaged
from interp.progress import bar

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]


@recorded
def remove_each(
    model: Any,
    stats: RoutingStats,
    held_out: Labelled | Corpus,
    *,
    rule: str = "skew",
    labels: Sequence[str] | None = None,
    controls: int = 20,
    scored: str = "target",
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    before: Losses | None = None,
    say: Say = lambda message: None,
    **settings: Any,
) -> pd.DataFrame:
    """Switches off each label's units in turn and measures every label.

    Args:
        model: the model.
        stats: routing statistics of the selection split.
        held_out: label -> documents of the scoring split; at least the labels that are removed.
        rule: as for `select`.
        **settings: of the rule.
        max_tokens: per label.
        batch_tokens: tokens run at once.
        seed: of controls and bootstrap.
        before: the model's own losses on `held_out`, if you have them.
        say: is told what happens next.
        labels: which to remove, default all of `stats`.
        controls: random matched sets per removed label.
        scored: "target" scores controls on the removed label only (quick), "all" on every label.

    Returns the Tables of `evaluate` one below the other, with a column `removed` in front. A label for which no unit
    meets the rule keeps its lines, with 0 units and no change; one that takes more than half of a layer, which leaves
    too few units to draw controls from, has no lines of baseline "random".
    """
    import pandas as pd

    data = corpus(model, held_out, max_tokens)
    labels = list(labels or stats.labels)
    if absent := [label for label in labels if label not in data.labels]:
        raise ExpertError(f"held_out: no text for {absent[0]!r}; it has {', '.join(data.labels)}")
    if scored not in ("target", "all"):
        raise ExpertError(f"scored={scored!r}: expected target or all")
    parts: list[pd.DataFrame] = []

    def table() -> pd.DataFrame | None:
        if not parts:
            return None
        found = pd.concat(parts, ignore_index=True)
        found.attrs = {
            "model": model.name, "fingerprint": stats.fingerprint, "kind": stats.kind, "rule": rule,
            "settings": settings, "controls": controls, "tokens": data.n_tokens, "seed": seed,
        }  # fmt: skip
        return found

    with salvaged("remove_each", table), bar("removing labels", len(labels)) as advance:
        before = before or losses(model, data, batch_tokens=batch_tokens)
        for number, label in enumerate(labels):
            chosen = select_or_none(stats, label, rule, settings)
            drawn = controls if has_controls(stats, chosen) else 0
            beside = f"{drawn} controls" if drawn or not controls else "no controls (more than half of a layer)"
            say(f"removing {label} ({number + 1} of {len(labels)}): {len(chosen):,} units, {beside}")
            part = evaluate(
                model, chosen, data, controls=drawn, stats=stats, before=before, batch_tokens=batch_tokens,
                seed=seed, scored=label if scored == "target" else "all",
            )  # fmt: skip
            part.insert(0, "removed", label)
            parts.append(part)
            advance()
    found = table()
    assert found is not None
    return found


@recorded
def matrix(table: pd.DataFrame, metric: str = "loss") -> pd.DataFrame:
    """The change of `metric` as removed x label."""
    own = table[(table["metric"] == metric) & (table["baseline"] == "none")]
    order = list(dict.fromkeys(own["removed"]))
    columns = [*order, *(label for label in dict.fromkeys(own["label"]) if label not in order)]
    return own.pivot(index="removed", columns="label", values="value").loc[order, columns]


@recorded
def summary(table: pd.DataFrame, metric: str = "loss") -> pd.DataFrame:
    """One line per removed label, and one for the mean over them ("mean"): columns

    removed, units, damage, damage_low, damage_high, spill (mean absolute change on the other labels), selectivity
    (damage / spill), random (mean damage by the controls), random_high (97.5 % of them), beyond_random (damage over
    that by the controls).
    """
    import pandas as pd

    here = table[table["metric"] == metric]
    rows = []
    for removed, part in here.groupby("removed", sort=False):
        own, others = part[part["label"] == removed], part[(part["label"] != removed) & (part["baseline"] == "none")]
        target, random = own[own["baseline"] == "none"].iloc[0], own[own["baseline"] == "random"]
        row = {"removed": removed, "units": int(target["units"]), "damage": target["value"]}
        row |= {"damage_low": target["low"], "damage_high": target["high"], "spill": others["value"].abs().mean()}
        row["random"] = random["value"].iloc[0] if len(random) else float("nan")
        row["random_high"] = random["high"].iloc[0] if len(random) else float("nan")
        rows.append(row)
    frame = pd.DataFrame(rows)
    mean = frame.drop(columns=["removed", "damage_low", "damage_high", "random_high"]).mean()  # no interval of a mean
    frame = pd.concat([frame, pd.DataFrame([{"removed": "mean", **mean}])], ignore_index=True)
    frame.insert(6, "selectivity", frame["damage"] / frame["spill"])
    frame["beyond_random"] = frame["damage"] / frame["random"]
    frame.attrs = dict(table.attrs)
    return frame


@recorded
def frontier(
    model: Any,
    stats: RoutingStats,
    held_out: Labelled | Corpus,
    rule: str = "skew",
    *,
    max_tokens: int | None = None,
    say: Say = lambda message: None,
    **grid: Sequence[Any],
) -> pd.DataFrame:
    """Damage and spill for every setting of a rule: one line per combination of `grid`.

    Columns: method (kind of units and rule), the grid's names, share_of_all (part of all units, mean over labels),
    damage, spill, selectivity.
    """
    import pandas as pd

    data = corpus(model, held_out, max_tokens)
    rows = []
    tries = list(itertools.product(*grid.values()))
    with bar(f"trying settings of {rule}", len(tries)) as advance:
        before = losses(model, data)
        for values in tries:
            settings = dict(zip(grid, values, strict=True))
            say(f"{stats.kind}, {rule} {settings}")
            table = remove_each(model, stats, data, rule=rule, controls=0, before=before, **settings)
            mean = summary(table).iloc[-1]
            total = stats.size * len(stats.layers)
            row = {"method": f"{stats.kind}, {rule}", **settings, "share_of_all": mean["units"] / total}
            rows.append(row | {"damage": mean["damage"], "spill": mean["spill"], "selectivity": mean["selectivity"]})
            advance()
    frame = pd.DataFrame(rows)
    frame.attrs = {"model": model.name, "fingerprint": stats.fingerprint, "rule": rule, "tokens": data.n_tokens}
    return frame


@recorded
def at_damage(frontiers: pd.DataFrame, damage: float) -> pd.DataFrame:
    """Spill and selectivity of each method at one common damage, by linear interpolation along its frontier.

    NaN for a method that never reaches it: nothing is extrapolated.
    """
    import numpy as np
    import pandas as pd

    rows = []
    for method, part in frontiers.groupby("method", sort=False):
        curve = part.sort_values("damage")
        reached = bool(curve["damage"].min() <= damage <= curve["damage"].max())
        spill = float(np.interp(damage, curve["damage"], curve["spill"])) if reached else float("nan")
        share = float(np.interp(damage, curve["damage"], curve["share_of_all"])) if reached else float("nan")
        rows.append(
            {"method": method, "damage": damage, "spill": spill, "selectivity": damage / spill, "share_of_all": share}
        )
    return pd.DataFrame(rows)
