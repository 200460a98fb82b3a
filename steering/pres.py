"""Pres et al.'s evaluation: likelihoods in a deployment-like context, comparable across behaviours, beside a baseline.

Their four properties (arXiv:2410.17245): the context is open-ended as in use, the likelihood of answers is measured
and not a sample, the scale is common to all behaviours, and a baseline stands beside it. The common scale: each mean
log-likelihood l of an answer is divided by

    c = | mean(max over queries of l(negative), min over queries of l(positive)) |

of its own model, the middle of the region where good and bad answers overlap. Queries are sorted by the unsteered
model: the negatives it likes best and the positives it likes least are hardest, and those are what steering is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from interp.calls import recorded
from steering.errors import SteeringError
from steering.intervals import bootstrap, spread

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.25, 0.5, 0.75)


@recorded
def pres(table: pd.DataFrame, multiplier: float = 1.0, *, seed: int = 0) -> pd.DataFrame:
    """Shift of normalised likelihoods at one multiplier, for the hardest queries, positives and negatives apart.

    Args:
        table: from `steering.propensities`, with multipliers 0 and `multiplier`.
        multiplier: the strength to look at.
        seed: of the bootstrap over queries.

    Returns columns multiplier, baseline, metric ("promotes" positives, "demotes" negatives), share (of hardest
    queries), value, low, high, n; larger is better for both, and 0 is no effect. The interval of controls is their
    spread. Raises SteeringError where the table lacks a multiplier, or where likelihoods overlap so little that
    there is no scale.
    """
    import pandas as pd

    have = set(table["multiplier"])
    for k in (0.0, float(multiplier)):
        if k not in have:
            raise SteeringError(f"pres: the table has no multiplier {k:g}; it has {sorted(have)}")
    own = table[(table["baseline"] == "none") & (table["multiplier"] == 0.0)].sort_values("item")
    base = {side: own[side].to_numpy() for side in ("positive", "negative")}
    hardest = {"positive": np.argsort(base["positive"]), "negative": np.argsort(-base["negative"])}
    start = {side: base[side] / scale(base) for side in base}
    rows = []
    for name, part in table[table["multiplier"] == float(multiplier)].groupby("baseline", sort=False):
        shifts: dict[str, list[np.ndarray]] = {"positive": [], "negative": []}
        for _, draw in part.groupby("draw"):
            draw = draw.sort_values("item")
            ends = {side: draw[side].to_numpy() for side in base}
            c = scale(ends)
            shifts["positive"].append(ends["positive"] / c - start["positive"])
            shifts["negative"].append(start["negative"] - ends["negative"] / c)
        for side, metric in (("positive", "promotes"), ("negative", "demotes")):
            for share in SHARES:
                chosen = hardest[side][: max(1, round(share * len(hardest[side])))]
                each = [shift[chosen] for shift in shifts[side]]
                low, high = spread([e.mean() for e in each]) if len(each) > 1 else bootstrap(each[0], seed=seed)
                rows.append({
                    "multiplier": float(multiplier), "baseline": name, "metric": metric, "share": share,
                    "value": float(np.mean([e.mean() for e in each])), "low": low, "high": high,
                    "n": len(each) if len(each) > 1 else len(chosen),
                })  # fmt: skip
    out = pd.DataFrame(rows)
    out.attrs.update(table.attrs | {"metric": "normalised likelihood", "unit": "shares of the overlap's middle"})
    return out


def scale(likelihood: dict[str, np.ndarray]) -> float:
    """|mean(max negative, min positive)| of mean log-likelihoods, the unit of the common scale."""
    c = abs(0.5 * (likelihood["negative"].max() + likelihood["positive"].min()))
    if not np.isfinite(c) or c == 0:
        raise SteeringError("pres: the likelihoods' common scale is 0 or not finite; are the answers scored at all?")
    return float(c)
