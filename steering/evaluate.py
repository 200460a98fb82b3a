"""Evaluating a vector: a dose-response curve beside its controls.

    steering.evaluate(m, v, held_out_pairs, multipliers=[-2, -1, 0, 1, 2])

gives one row per multiplier and baseline. A vector steers if the line of baseline "none" rises with the multiplier and
leaves the interval of "random"; how far it does so at equal damage is what `steering.compare` ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from interp.calls import recorded
from interp.interrupted import handed_on
from steering.intervals import bootstrap, spread
from steering.propensity import MULTIPLIERS, propensities, slopes
from steering.vector import SteeringMap

if TYPE_CHECKING:
    import pandas as pd


@recorded
def evaluate(
    m: Any, v: SteeringMap, pairs: Any, multipliers: Sequence[float] = MULTIPLIERS, *, seed: int = 0, **how: Any
) -> pd.DataFrame:
    """The likelihood propensity of a behaviour at each multiplier, of the vector and of its baselines.

    Args:
        m: the model.
        v: the vector or map.
        pairs: held-out (prompt, positive_text, negative_text) triples.
        multipliers: strengths; 0 is the unsteered model.
        seed: of the controls and the bootstrap.
        **how: further settings of `steering.propensities`: controls, baselines, prompt, chat, system, ...

    Returns a Table with columns multiplier, baseline, metric, value, low, high, n. `value` is the mean over items of
    the per-token log-likelihood of the positive answer less that of the negative one, in nats. For "none" (the
    vector) and "prompt" the interval is a bootstrap over items (n of them); for controls the value is the mean over
    draws (n), and the interval holds the middle 95 % of them. `.attrs` has the settings, the mean slope over items
    and `flipped`, the share of items that are steered the wrong way.

    Interrupted, it leaves the same of the items that were done (`interp.unfinished`).
    """
    with handed_on("steering.evaluate", lambda table: summarise(table, seed=seed)):
        table = propensities(m, v, pairs, multipliers, seed=seed, **how)
    return summarise(table, seed=seed)


@recorded
def summarise(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """The table of `evaluate` from that of `propensities`."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for (k, name), part in table.groupby(["multiplier", "baseline"], sort=False):
        draws = part.groupby("draw", sort=True)["value"].mean()
        controls = name not in ("none", "prompt") and len(draws) > 1
        low, high = spread(draws) if controls else bootstrap(part["value"], seed=seed)
        rows.append({
            "multiplier": k, "baseline": name, "metric": table.attrs.get("metric", "propensity"),
            "value": float(draws.mean()), "low": low, "high": high, "n": len(draws) if controls else len(part),
        })  # fmt: skip
    out = pd.DataFrame(rows)
    order = {name: i for i, name in enumerate(dict.fromkeys(table["baseline"]))}
    out = out.sort_values(["baseline", "multiplier"], key=lambda c: c.map(order) if c.name == "baseline" else c)
    out = out.reset_index(drop=True)
    out.attrs.update(table.attrs)
    if table["multiplier"].nunique() > 1:
        found = slopes(table).attrs
        out.attrs.update({"slope": found["slope"], "flipped": found["flipped"]})
    return out


def finding(table: pd.DataFrame) -> str:
    """One sentence of what a table of `evaluate` found: how far the vector steers, and whether random ones do too."""
    own = table[table["baseline"] == "none"].set_index("multiplier")["value"].sort_index()
    control = next((str(b) for b in table["baseline"].unique() if str(b).startswith("random")), "random")
    about, said = table.attrs, verdict(table.replace({"baseline": {control: "random"}}))
    others = "random vectors" if control == "random" else control
    sites = about.get("sites") or []
    place = sites[0] if len(sites) == 1 else f"{len(sites)} sites"
    who = f"{about['method']} at {place} of {about['model']}" if sites else "the vector"
    low, high = own.index[0], own.index[-1]
    moved = f"{own.iloc[-1] - own.iloc[0]:+.2f} nats per token from multiplier {low:g} to {high:g}"
    strong = [k for k in own.index if k]
    if said["leaves"] is None:
        beside = f"not set beside {others}"
    elif not said["leaves"] and not said["wrong"]:
        beside = f"within the middle 95 % of {others}"
    else:
        at = "at every strength" if said["leaves"] == strong else f"at {_listed(said['leaves'])}"
        parts = [f"as meant {at}"] if said["leaves"] else []
        parts += [f"the wrong way at {_listed(said['wrong'])}"] if said["wrong"] else []
        beside = f"outside the middle 95 % of {others}, {', '.join(parts)}"
    return f"{who}: {moved}; {beside}"


def _listed(multipliers: Sequence[float]) -> str:
    return ", ".join(f"{k:+g}" for k in multipliers)


def verdict(table: pd.DataFrame) -> dict[str, Any]:
    """What a table of `evaluate` says, in the words of the reports.

    Keys: rises (the value goes up with every step of the multiplier), leaves (multipliers other than 0 where the
    value lies outside the random controls' interval, on the side that the multiplier asks for), wrong (those where
    it lies outside on the other side), spearman (of value with multiplier). Without random controls `leaves` and
    `wrong` are None.
    """
    own = table[table["baseline"] == "none"].set_index("multiplier")["value"].sort_index()
    random = table[table["baseline"] == "random"].set_index("multiplier")
    steps = own.to_numpy()
    ranks = own.rank()
    leaves: list[float] | None = None
    wrong: list[float] | None = None
    if len(random):
        above = {k: own[k] > random.loc[k, "high"] for k in own.index if k}
        below = {k: own[k] < random.loc[k, "low"] for k in own.index if k}
        leaves = [k for k in above if (above[k] if k > 0 else below[k])]
        wrong = [k for k in above if (below[k] if k > 0 else above[k])]
    spearman = float(ranks.corr(own.index.to_series().rank())) if len(own) > 2 else float("nan")
    rises = bool(len(steps) > 1 and all(b > a for a, b in pairwise(steps)))
    return {"rises": rises, "leaves": leaves, "wrong": wrong, "spearman": spearman}
