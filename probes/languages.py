"""The same axis in several languages: do the directions agree, and do the ratings?

    found = across(m, {"en": phrases, "de": translations}, positive=[0, 1, 2], negative=[3, 4, 5], site="resid_post[8]")
    found.matrix("cosine"), found.matrix("spearman")

Phrase i of every language says the same. Each language's axis is found from its own anchors and rates its own other
phrases, so the rank correlation compares judgements and not words; the cosine compares directions. Pairing phrases at
random is the control. Nothing in it is about morals or languages: any axis, any groups that share phrases.

Source: Haemmerl et al. 2023, "Speaking Multiple Languages Affects the Moral Bias of Language Models"
(arXiv:2211.07733).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.calls import recorded
from probes.axes import Axis, Method, fit_axis, phrase_features
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Across:
    """What `across` found.

    Attributes:
        axes: language -> its Axis.
        ratings: of the phrases that no axis was found from: a row per phrase (its number), a column per language.
        table: one, other (languages), metric ("cosine" | "spearman"), baseline ("none" | "shuffled"), value, low, high.
    """

    axes: dict[str, Axis]
    ratings: pd.DataFrame
    table: pd.DataFrame

    def matrix(self, metric: str, baseline: str = "none") -> pd.DataFrame:
        """The square of values, language by language, 1 on its diagonal."""
        import pandas as pd

        names = list(self.axes)
        square = pd.DataFrame(np.eye(len(names)), names, names)
        part = self.table[(self.table.metric == metric) & (self.table.baseline == baseline)]
        for row in part.to_dict("records"):
            square.loc[row["one"], row["other"]] = square.loc[row["other"], row["one"]] = row["value"]
        return square


@recorded
def across(
    m: Any, phrases: Mapping[str, Sequence[Any]], *, positive: Sequence[int], negative: Sequence[int], site: str,
    at: str = "mean", templates: Mapping[str, Sequence[str]] | None = None, method: Method = "pca", draws: int = 1000,
    seed: int = 0,
) -> Across:  # fmt: skip
    """An axis per language, and how they compare.

    Args:
        m: a model that knows the languages.
        phrases: language -> phrases; number i means the same in each.
        positive: numbers of the positive anchors.
        negative: numbers of the negative anchors. All other phrases are rated.
        site: where.
        at: how a phrase's tokens become one vector.
        templates: language -> templates with one {}.
        method: how an axis is found, see `probes.fit_axis`.
        draws: of bootstrap (over phrases) and shuffles.
        seed: of both.

    Raises ProbeError where languages differ in their number of phrases, or fewer than four are left to be rated.
    """
    import pandas as pd

    sizes = {name: len(texts) for name, texts in phrases.items()}
    if len(sizes) < 2 or len(set(sizes.values())) != 1:
        raise ProbeError(f"phrases: {sizes}; give two languages or more, with the same phrases in the same order")
    n = next(iter(sizes.values()))
    anchors = [*positive, *negative]
    if len(set(anchors)) != len(anchors) or not all(0 <= i < n for i in anchors):
        raise ProbeError(f"positive, negative: expected different numbers in 0..{n - 1}")
    rest = [i for i in range(n) if i not in set(anchors)]
    if len(rest) < 4:
        raise ProbeError(f"phrases: {len(rest)} are no anchors; at least four are needed to compare ratings")
    where = str(m.resolve(site)[0])
    y = np.r_[np.ones(len(positive), bool), np.zeros(len(negative), bool)]
    axes, ratings = {}, {}
    for name, texts in phrases.items():
        used = tuple((templates or {}).get(name, ("{}",)))
        X = phrase_features(m, texts, where, at, used)
        axes[name] = fit_axis(X[anchors], y, method, site=where, at=at, templates=used)
        ratings[name] = axes[name].rate(X[rest])
    rated = pd.DataFrame(ratings, index=pd.Index(rest, name="phrase"))
    table = pd.DataFrame([row for pair in combinations(axes, 2) for row in _compare(*pair, axes, rated, draws, seed)])
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "site": where, "method": method, "rated": len(rest),
                   "seed": seed}  # fmt: skip
    return Across(axes, rated, table)


def _compare(
    one: str, other: str, axes: Mapping[str, Axis], ratings: pd.DataFrame, draws: int, seed: int
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    a, b = ratings[one].to_numpy(), ratings[other].to_numpy()
    picks = rng.integers(len(a), size=(draws, len(a)))
    resampled = [_spearman(a[i], b[i]) for i in picks]
    shuffled = [_spearman(a, rng.permutation(b)) for _ in range(draws)]
    cosine = float(axes[one].direction @ axes[other].direction)
    pair = {"one": one, "other": other}
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    null = np.quantile(shuffled, [0.025, 0.975])
    return [
        {**pair, "metric": "cosine", "baseline": "none", "value": cosine, "low": np.nan, "high": np.nan},
        {**pair, "metric": "spearman", "baseline": "none", "value": _spearman(a, b), "low": low, "high": high},
        {**pair, "metric": "spearman", "baseline": "shuffled", "value": float(np.mean(shuffled)), "low": null[0],
         "high": null[1]},
    ]  # fmt: skip


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, ties shared; NaN where one side does not vary."""
    from scipy.stats import rankdata

    x, y = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")
