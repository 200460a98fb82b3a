"""Where is it known? One pass over the data, a probe per layer, head, neuron layer or router, beside its controls.

    table = by_layer(m, texts, labels)                          every resid_post, last token
    table = by_site(m, texts, labels, ["z[*, head=*]", "routing[*]"], at="mean", groups=template)

The penalty is chosen on validation, the score taken on test, with an interval over groups. Accuracy alone proves
little: a probe with many weights fits anything. So each table also holds, marked in the column `baseline`:

    shuffled       the same probe on permuted labels (Hewitt & Liang 2019, arXiv:1909.03368: a control task; what it
    learns
                   by heart, the real one may have learned by heart too)
    random model   the same sites of the same architecture with random weights: what the words alone give
    bag of tokens  counts of token ids, no model at all

`selectivity` is the score minus that of the shuffled labels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.calls import recorded
from interp.interrupted import salvaged
from interp.progress import bar
from probes.errors import ProbeError
from probes.reading import Features, features
from probes.scores import Interval, accuracy, balanced_accuracy, description_length, interval
from probes.splitting import Split, split

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = ("shuffled", "random model", "bag of tokens")
PENALTIES = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Survey:
    """What a sweep leaves.

    Attributes:
        table: see `by_site`.
        probes: node -> the probe fitted there on the training part, with the penalty chosen on validation.
        read: the features they were fitted on.
        parts: the split.
    """

    table: pd.DataFrame
    probes: dict[str, Any]
    read: Features
    parts: Split


@recorded
def by_layer(
    m: Any, texts: Sequence[str] | Any, labels: Sequence[object], site: str = "resid_post", **how: Any
) -> pd.DataFrame:
    """A probe at `site` of every layer; see `by_site` for the rest."""
    return by_site(m, texts, labels, f"{site}[*]", **how)


@recorded
def by_site(m: Any, texts: Sequence[str] | Any, labels: Sequence[object], sites: Any, **how: Any) -> pd.DataFrame:
    """Fits a probe at every site and scores it on held-out examples: the table of `survey`, which says the arguments.

    Returns:
        Table: node, site, layer, head, baseline ("none" or a control), metric, value, low, high, selectivity,
        validation, C. Settings in `.attrs`, with the best node by *validation* and its test score. Interrupted, it
        leaves the rows of the probes that were fitted (`interp.unfinished`).
    """
    return survey(m, texts, labels, sites, **how).table


@recorded
def survey(
    m: Any, texts: Sequence[str] | Any, labels: Sequence[object] | np.ndarray, sites: Any, *, at: str = "last",
    probe: Any = None, groups: Sequence[object] | None = None, parts: Split | None = None,
    controls: Iterable[str] = ("shuffled", "bag of tokens"), mdl: bool = False, metric: str = "accuracy", seed: int = 0,
    batch_size: int = 16, max_length: int | None = None,
) -> Survey:  # fmt: skip
    """A probe at every site, beside its controls, and the fitted probes themselves.

    Args:
        m: the model.
        texts: the examples, or Tokens.
        labels: one per text.
        sites: patterns, ``routing[*]`` and SAEs, see `probes.reading.features`. ``z[*, head=*]`` probes every head by
            itself, ``expert_out[3, expert=*]`` every expert.
        at: which tokens: "last", "mean", "max".
        probe: any classifier of scikit-learn's interface; default LinearProbe, whose penalty C is chosen on validation.
        groups: template or document of each example, so that none stands on both sides.
        parts: the split, instead of a drawn one; it is checked against `groups`.
        controls: some of "shuffled", "random model", "bag of tokens".
        mdl: also the online description length on the training part (bits per label), in column `bits`.
        metric: "accuracy" or "balanced" (mean over classes).
        seed: of split, shuffle and bootstrap.
        batch_size: texts per forward pass.
        max_length: longer texts are cut.

    Raises ProbeError for labels of the wrong length, one class, an unknown control, groups on both sides of `parts`.
    """
    if at == "all":
        raise ProbeError(
            "at='all' gives many rows a text; probe tokens with probes.features(...) and a probe's own fit"
        )
    asked = list(controls)
    if unknown := [c for c in asked if c not in CONTROLS]:
        raise ProbeError(f"controls: unknown {unknown[0]!r}; expected some of {', '.join(CONTROLS)}")
    y = np.asarray(labels)
    if len(y) != len(texts):
        raise ProbeError(f"labels: {len(y)} for {len(texts)} texts; give one per text")
    chosen = split(y, groups, seed=seed) if parts is None else parts.check(groups, len(y))
    study = _Study(y, chosen, None if groups is None else np.asarray(groups), probe, metric, mdl, seed)
    reading: dict[str, Any] = {"at": at, "batch_size": batch_size, "max_length": max_length}
    read = features(m, texts, sites, **reading)
    about = {"model": m.name, "fingerprint": m.fingerprint, "at": at, "metric": metric, "seed": seed,
             "examples": len(y), "classes": [str(c) for c in np.unique(y)], "train": len(chosen.train),
             "validation": len(chosen.validation), "test": len(chosen.test), "grouped": groups is not None}  # fmt: skip
    rows: list[dict[str, Any]] = []
    with salvaged("probes.survey", lambda: _table(rows, about) if rows else None):
        probes = study.rows(read, "none", rows)
        if "shuffled" in asked:
            permuted = np.random.default_rng(seed).permutation(y)
            study.with_labels(permuted).rows(read, "shuffled", rows)
        if "random model" in asked:
            study.rows(features(_randomised(m, seed), texts, sites, **reading), "random model", rows)
        if "bag of tokens" in asked:
            rows.append(study.row("bag of tokens", bag_of_tokens(m, texts, max_length), "bag of tokens")[0])
    return Survey(_table(rows, about), probes, read, chosen)


class _Study:
    """Labels, split, probe and metric: everything but the features."""

    def __init__(
        self, labels: np.ndarray, parts: Split, groups: np.ndarray | None, probe: Any, metric: str, mdl: bool, seed: int
    ) -> None:
        if metric not in ("accuracy", "balanced"):
            raise ProbeError(f"metric={metric!r}: expected accuracy or balanced")
        self.labels, self.parts, self.groups, self.probe = labels, parts, groups, probe
        self.metric, self.mdl, self.seed = metric, mdl, seed
        self.score = accuracy if metric == "accuracy" else balanced_accuracy

    def with_labels(self, labels: np.ndarray) -> _Study:
        other = copy.copy(self)
        other.labels = labels
        return other

    def rows(self, read: Features, baseline: str, into: list[dict[str, Any]]) -> dict[str, Any]:
        """A row per node goes `into` the list as it is found; gives node -> the probe fitted there."""
        probes = {}
        with bar(
            "fitting probes" if baseline == "none" else f"fitting probes, {baseline}", len(read.values)
        ) as advance:
            for node, value in read.values.items():
                row, probes[node] = self.row(node, value, baseline)
                into.append(row)
                advance(1)
        return probes

    def row(self, node: str, X: np.ndarray, baseline: str) -> tuple[dict[str, Any], Any]:
        fitted, C, validation = self.fit(X)
        test = self.parts.test
        groups = None if self.groups is None else self.groups[test]
        got: Interval = interval(self.labels[test], fitted.predict(X[test]), self.score, groups, seed=self.seed)
        bits = {}
        if self.mdl:
            train = self.parts.train
            bits = {"bits": description_length(fitted, X[train], self.labels[train], seed=self.seed)["bits_per_label"]}
        return {"node": node, "baseline": baseline, "metric": self.metric, "value": got.value, "low": got.low,
                "high": got.high, "validation": validation, "C": C, **bits}, fitted  # fmt: skip

    def fit(self, X: np.ndarray) -> tuple[Any, float, float]:
        """The probe fitted on train, its penalty (the one that does best on validation), and how well it does there."""
        import warnings

        from sklearn.base import clone

        from probes.errors import ProbeWarning
        from probes.linear import LinearProbe

        train, held = self.parts.train, self.parts.validation
        x, y = X[train], self.labels[train]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProbeWarning)  # the controls say what a warning would
            tried = LinearProbe.path(x, y, PENALTIES) if self.probe is None else [clone(self.probe).fit(x, y)]
        scores = [self.score(self.labels[held], one.predict(X[held])) for one in tried]
        best = int(np.argmax(scores))  # the strongest penalty of the best
        return tried[best], float(getattr(tried[best], "C", np.nan)), scores[best]


def bag_of_tokens(m: Any, texts: Sequence[str] | Any, max_length: int | None = None) -> np.ndarray:
    """How often each token id that occurs stands in each text [text, distinct token]: what needs no model."""
    from sklearn.feature_extraction import DictVectorizer

    tokens = m.tokens(
        texts if hasattr(texts, "mask") else list(texts), max_length=max_length, truncate=max_length is not None
    )
    counts = []
    for i in range(len(tokens)):
        ids, number = tokens.row(i).unique(return_counts=True)
        counts.append({str(t): int(n) for t, n in zip(ids.tolist(), number.tolist(), strict=True)})
    return DictVectorizer(dtype=np.float32, sparse=False).fit_transform(counts)


def _randomised(m: Any, seed: int) -> Any:
    """The same architecture with freshly drawn weights."""
    import torch

    import interp

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(m.hf)(copy.deepcopy(m.hf.config))
    made = interp.load(fresh.to(device=m.device, dtype=m.dtype).eval(), tokenizer=m.tokenizer)
    made.name = f"{m.name}, random weights"
    return made


def _table(rows: list[dict[str, Any]], attrs: dict[str, Any]) -> pd.DataFrame:
    import pandas as pd

    by_chance = {row["node"]: row["value"] for row in rows if row["baseline"] == "shuffled"}
    for row in rows:
        row |= _place(row["node"])
        real = row["baseline"] == "none"
        row["selectivity"] = row["value"] - by_chance.get(row["node"], np.nan) if real else np.nan
    first = ["node", "site", "layer", "head", "expert", "baseline", "metric", "value", "low", "high", "selectivity",
             "validation", "C"]  # fmt: skip
    table = pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64", "expert": "Int64"})
    table = table[first + [c for c in table if c not in first]]
    best = max((row for row in rows if row["baseline"] == "none"), key=lambda row: row["validation"])
    table.attrs.update(attrs, best=best["node"])
    table.attrs.update({f"best_{name}": best[name] for name in ("value", "low", "high", "validation")})
    return table


def _place(node: str) -> dict[str, Any]:
    """site, layer, head and expert of a node; NA where it has none."""
    import pandas as pd

    from interp.sites import Site

    name, _, rest = node.partition("[")
    found = {"site": name, "layer": pd.NA, "head": pd.NA, "expert": pd.NA}
    if name == "routing":
        found["layer"] = int(rest[:-1])
    elif rest:
        site = Site.parse(rest[: rest.index("]") + 1] if name == "sae" else node)  # a latent lives where its SAE reads
        index = dict(site.index)
        found |= {"layer": pd.NA if site.layer is None else site.layer}
        found |= {key: index[key] for key in ("head", "expert") if key in index}
    return found
