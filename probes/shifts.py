"""Does a probe still tell when the data change? One score on the source, one on the shift, never the first alone.

    table = shift(m, (easy_texts, labels), (hard_texts, labels), "resid_post[*]")
    table.attrs["text"]              "resid_post[7], LinearProbe: 96% [..] on unseen source, 61% [..] on the shift"

On the source, features that merely go along with the label are as good as those that make it; a shift that breaks the
habit tells them apart. The pairs of distributions of GENIES are such shifts: Clymer et al. 2023, "Generalization
Analogies" (arXiv:2311.07723). `ceiling` is a probe fitted on the shift itself; what share of the way from chance to
that ceiling the source's probe goes is what they call elasticity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.calls import recorded
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd

Labelled = tuple[Any, Sequence[object]]


@recorded
def shift(
    m: Any, source: Labelled, target: Labelled, sites: str | Sequence[str] = "resid_post[*]", *,
    probes: Mapping[str, Any] | None = None, groups: tuple[Sequence[object], Sequence[object]] | None = None,
    at: str = "last", seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Fits each probe on the source and scores it on held-out examples of source and target.

    Args:
        m: the model.
        source: (texts, labels) that probes are fitted on.
        target: (texts, labels) of the shifted distribution, with the same classes.
        sites: where.
        probes: name -> estimator with scikit-learn's interface; default LinearProbe(C=0.1) and MeanDifference.
        groups: templates of the source's and of the target's examples.
        at: which tokens.
        seed: of splits, shuffle and bootstrap.

    Returns:
        Table: node, method (the probe), baseline ("none"; "shuffled" labels; "ceiling": fitted on the target), scored
        ("source" | "shift"), metric (balanced accuracy), value, low, high. `.attrs`: `text`, a line for each node and
        probe with both numbers; `elasticity`, (node, method) -> (shift - chance) / (ceiling - chance).

    Raises ProbeError where the target has a class that the source lacks.
    """
    import pandas as pd
    from sklearn.base import clone

    from probes.linear import LinearProbe, MeanDifference
    from probes.reading import features
    from probes.scores import balanced_accuracy, interval
    from probes.splitting import split

    labels = {"source": np.asarray(source[1]), "shift": np.asarray(target[1])}
    texts = {"source": source[0], "shift": target[0]}
    for name, y in labels.items():
        if len(y) != len(texts[name]):
            raise ProbeError(f"{name}: {len(y)} labels for {len(texts[name])} texts; give one per text")
    classes = np.unique(labels["source"])
    if not np.array_equal(classes, np.unique(labels["shift"])):
        raise ProbeError(f"target: its classes are {np.unique(labels['shift'])}, the source's {classes}; give the same")
    asked = dict(probes or {"LinearProbe": LinearProbe(C=0.1), "MeanDifference": MeanDifference()})
    by = dict(zip(labels, groups or (None, None), strict=True))
    read = {name: features(m, texts[name], sites, at=at) for name in labels}
    parts = {name: split(labels[name], by[name], seed=seed) for name in labels}
    rng = np.random.default_rng(seed)
    permuted = rng.permutation(labels["source"])
    rows = []
    for node in read["source"]:
        for method, probe in asked.items():
            for baseline, name, y in (
                ("none", "source", labels["source"]), ("shuffled", "source", permuted),
                ("ceiling", "shift", labels["shift"]),
            ):  # fmt: skip
                fitted = clone(probe).fit(read[name][node][parts[name].train], y[parts[name].train])
                for scored in ("source", "shift") if name == "source" else ("shift",):
                    test = parts[scored].test
                    held = None if by[scored] is None else np.asarray(by[scored])[test]
                    said = fitted.predict(read[scored][node][test])
                    got = interval(labels[scored][test], said, balanced_accuracy, held, seed=seed)
                    rows.append({"node": node, "method": method, "baseline": baseline, "scored": scored,
                                 "metric": "balanced accuracy", "value": got.value, "low": got.low,
                                 "high": got.high})  # fmt: skip
    table = pd.DataFrame(rows)
    lines, elastic = _report(table, 1 / len(classes))
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "at": at, "seed": seed, "text": "\n".join(lines),
                   "elasticity": elastic, "classes": [str(c) for c in classes]}  # fmt: skip
    return table


def _report(table: pd.DataFrame, chance: float) -> tuple[list[str], dict[tuple[str, str], float]]:
    lines, elastic = [], {}
    for (node, method), part in table.groupby(["node", "method"], sort=False):
        row: Any = part.set_index(["baseline", "scored"])
        here, there, top = (row.loc[key] for key in (("none", "source"), ("none", "shift"), ("ceiling", "shift")))
        room = top.value - chance
        elastic[str(node), str(method)] = float((there.value - chance) / room) if room > 0 else float("nan")
        lines.append(
            f"{node}, {method}: {here.value:.0%} [{here.low:.0%}, {here.high:.0%}] on unseen source, "
            f"{there.value:.0%} [{there.low:.0%}, {there.high:.0%}] on the shift "
            f"(fitted on the shift itself: {top.value:.0%})"
        )
    return lines, elastic
