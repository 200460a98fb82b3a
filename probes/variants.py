"""The same question put in several ways: what a probe finds must not hang on one wording.

    table = by_variant(m, {"story": texts, "misleading": others}, {"self": mine, "other": theirs}, groups=story)

Bortoletto et al. 2024, "Benchmarking Mental State Representations in Language Models" (arXiv:2406.17513), probe every
layer for what the reader of a story holds true (self) and for what somebody in it does (other), over variations of the
prompt. The control is the selectivity of Hewitt & Liang (2019): the score less that of the same probe on shuffled
labels. A representation of the belief should carry over: `transfer` fits on one wording and scores on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.calls import recorded
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd


@recorded
def by_variant(
    m: Any, variants: Mapping[str, Any], labels: Mapping[str, Sequence[object]], site: str = "resid_post", *,
    groups: Sequence[object] | None = None, seed: int = 0, **how: Any,
) -> pd.DataFrame:  # fmt: skip
    """`probes.by_layer` for every wording and every label, on one split.

    Args:
        m: the model.
        variants: wording -> its texts (or Tokens); text i of every wording tells the same story.
        labels: what is asked -> its label per story, e.g. "self" and "other".
        site: probed in every layer.
        groups: template or entity of each story.
        seed: of split, shuffle and bootstrap.
        how: other arguments of `probes.by_site`: at, controls, metric, ...

    Returns:
        Table: as `probes.by_site`, with the columns `variant` and `label`. `.attrs["best"]` maps (variant, label) to
        the node that is best on validation.

    Raises ProbeError where wordings differ in their number of texts.
    """
    import pandas as pd

    from probes.splitting import split
    from probes.sweep import by_layer

    _aligned(variants, labels)
    parts, best = [], {}
    for label, y in labels.items():
        chosen = split(np.asarray(y), groups, seed=seed)
        for variant, texts in variants.items():
            one = by_layer(m, texts, y, site, groups=groups, parts=chosen, seed=seed, **how)
            best[variant, label] = one.attrs["best"]
            parts.append(one.assign(variant=variant, label=label))
    attrs = {**parts[0].attrs, "best": best, "variants": list(variants), "labels": list(labels)}
    for part in parts:
        part.attrs = {}
    table = pd.concat(parts, ignore_index=True)
    table.attrs = attrs
    return table


@recorded
def transfer(
    m: Any, variants: Mapping[str, Any], labels: Sequence[object], site: str, *, probe: Any = None,
    groups: Sequence[object] | None = None, at: str = "last", seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Fitted on one wording, scored on held-out stories of each.

    Args:
        m: the model.
        variants: wording -> its texts.
        labels: one per story.
        site: one site, e.g. "resid_post[8]".
        probe: any classifier; default LinearProbe(C=0.1).
        groups: template or entity of each story.
        at: which tokens.
        seed: of split and bootstrap.

    Returns:
        Table: node, fitted, scored (wordings), metric, value, low, high.
    """
    import pandas as pd
    from sklearn.base import clone

    from probes.linear import LinearProbe
    from probes.reading import features
    from probes.scores import interval
    from probes.splitting import split

    _aligned(variants, {"labels": labels})
    y = np.asarray(labels)
    parts = split(y, groups, seed=seed)
    drawn = None if groups is None else np.asarray(groups)[parts.test]
    where = str(m.resolve(site)[0])
    X = {name: features(m, texts, where, at=at)[where] for name, texts in variants.items()}
    rows = []
    for one in variants:
        fitted = clone(probe if probe is not None else LinearProbe(C=0.1)).fit(X[one][parts.train], y[parts.train])
        for other in variants:
            got = interval(y[parts.test], fitted.predict(X[other][parts.test]), groups=drawn, seed=seed)
            rows.append({"node": where, "fitted": one, "scored": other, "metric": "accuracy", "value": got.value,
                         "low": got.low, "high": got.high})  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "at": at, "seed": seed, "test": len(parts.test)}
    return table


def _aligned(variants: Mapping[str, Any], labels: Mapping[str, Sequence[object]]) -> None:
    if not variants or not labels:
        raise ProbeError("variants and labels: give at least one wording and one label")
    sizes = {f"variant {k!r}": len(v) for k, v in variants.items()} | {
        f"label {k!r}": len(v) for k, v in labels.items()
    }
    first, n = next(iter(sizes.items()))
    for name, size in sizes.items():
        if size != n:
            raise ProbeError(f"{name} has {size} entries and {first} {n}; entry i of each must tell of the same story")
