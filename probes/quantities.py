"""Do numbers lie as quantities do? Distance, size and ratio effects in what a model makes of number words and digits.

    table = magnitude(m, {"digits": {1: "1", 2: "2", ...}, "words": {1: "one", 2: "two", ...}})

Who compares quantities confuses near ones more than far ones (distance), large neighbours more than small ones (size),
and both follow from the ratio. If a model's numbers lie so, the similarity of two of them is predicted by

    distance    |a - b|, falling in a straight line
    size        min(a, b) among neighbours, |a - b| = 1, rising in a straight line
    ratio       max(a, b) / min(a, b), falling as  s = c + k exp(-r (ratio - 1))
    joint       all three at once, by least squares: |a - b|, min(a, b) and log(max / min)

Similarity is the cosine of activations; how well each fits is R^2. The control permutes which activation is whose.
Source: Shah et al. 2023, "Numeric Magnitude Comparison Effects in Large Language Models" (arXiv:2305.10782). They plot
similarity rescaled to 0..1 after averaging; R^2 does not change with a scale, and all pairs are kept here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.calls import recorded
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd

EFFECTS = ("distance", "size", "ratio", "joint")
_RATES = np.geomspace(0.01, 30, 120)  # of the exponential: from nearly straight to a step at the first ratio


@recorded
def magnitude(
    m: Any, notations: Mapping[str, Mapping[int, str]], sites: str | Sequence[str] = "resid_post[*]", *,
    at: str = "last", template: str = "{}", shuffles: int = 50, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """The effects at each site, for each way of writing numbers.

    Args:
        m: the model.
        notations: e.g. "digits" and "words": number -> how it is written. Numbers are positive.
        sites: where, e.g. all layers.
        at: which token stands for a number; "last" sees all of it.
        template: a frame with one {}, e.g. "I counted {}".
        shuffles: permutations for the control.
        seed: of them.

    Returns:
        Table: node, label (the notation), effect, metric ("r2"), baseline ("none" | "shuffled"), value, low, high (of
        the control: 95 % of permutations), slope (its sign tells the direction: distance and ratio fall, size rises).
    """
    import pandas as pd

    from probes.reading import features

    if template.count("{}") != 1:
        raise ProbeError(f"template={template!r}: expected {{}} once, in the number's place")
    rows = []
    for label, written in notations.items():
        texts = list(written.values())
        if all(isinstance(t, str) for t in texts):
            texts = [template.format(t) for t in texts]
        read = features(m, texts, sites, at=at)
        for node in read:
            for row in effects(read[node], list(written), shuffles=shuffles, seed=seed):
                rows.append({"node": node, "label": label, **row})
    table = pd.DataFrame(rows)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "at": at, "template": template, "seed": seed,
                   "shuffles": shuffles}  # fmt: skip
    return table


def effects(X: np.ndarray, numbers: Sequence[int], *, shuffles: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the table from activations [number, feature] of these numbers.

    Raises ProbeError for fewer than five numbers, one that is not positive, or one given twice.
    """
    n = np.asarray(numbers, np.float64)
    if len(n) != len(X) or len(n) < 5 or (n <= 0).any() or len(np.unique(n)) != len(n):
        raise ProbeError(f"numbers: {list(numbers)[:8]} ...; give five or more, positive, each once, one per row of X")
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    similarity = (unit @ unit.T).astype(np.float64)
    rng = np.random.default_rng(seed)
    found = _all(similarity, n)
    orders = [rng.permutation(len(n)) for _ in range(shuffles)]
    null = [_all(similarity[np.ix_(order, order)], n) for order in orders]
    rows = []
    for effect in EFFECTS:
        if effect not in found:
            continue
        r2, slope = found[effect]
        rows.append({"effect": effect, "metric": "r2", "baseline": "none", "value": r2, "low": np.nan, "high": np.nan,
                     "slope": slope})  # fmt: skip
        draws = np.array([one[effect][0] for one in null])
        low, high = np.quantile(draws, [0.025, 0.975])
        rows.append({"effect": effect, "metric": "r2", "baseline": "shuffled", "value": float(draws.mean()),
                     "low": float(low), "high": float(high), "slope": np.nan})  # fmt: skip
    return rows


def _all(similarity: np.ndarray, n: np.ndarray) -> dict[str, tuple[float, float]]:
    """effect -> (R^2, slope); no "size" where fewer than three pairs are neighbours."""
    i, j = np.triu_indices(len(n), 1)
    s, gap, small = similarity[i, j], np.abs(n[i] - n[j]), np.minimum(n[i], n[j])
    ratio = np.maximum(n[i], n[j]) / small
    found = {"distance": _linear(s, gap), "ratio": _exponential(s, ratio - 1),
             "joint": _linear(s, gap, small, np.log(ratio))}  # fmt: skip
    if (near := gap == 1).sum() >= 3:
        found["size"] = _linear(s[near], small[near])
    return found


def _linear(y: np.ndarray, *columns: np.ndarray) -> tuple[float, float]:
    """R^2 of least squares on the columns and a constant, and the last column's coefficient."""
    design = np.stack([*columns, np.ones_like(y)], 1)
    weight = np.linalg.lstsq(design, y, rcond=None)[0]
    around = y - y.mean()
    total = float(around @ around)
    left = y - design @ weight
    return (1 - float(left @ left) / total if total > 0 else 0.0), float(weight[len(columns) - 1])


def _exponential(y: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """R^2 and slope at x = 0 of the best ``c + k exp(-r x)``: for each rate r the rest is linear."""
    shape = np.exp(-np.outer(_RATES, x))  # [rate, pair]
    a = shape - shape.mean(1, keepdims=True)
    b = y - y.mean()
    size, total = (a**2).sum(1), float(b @ b)
    if total == 0:
        return 0.0, 0.0
    k = np.divide(a @ b, size, out=np.zeros_like(size), where=size > 1e-12)
    best = int((k**2 * size).argmax())
    return float(k[best] ** 2 * size[best] / total), float(-k[best] * _RATES[best])
