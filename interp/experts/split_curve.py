"""What it costs to leave experts of a split model off: loss against the share that is on.

    table = experts.split_curve(m, held_out, n=16, fit_on=other_texts)

A partition is good if few of its experts carry each token, so it is held against random groups of neurons of the same
size, under the same gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from interp.calls import recorded
from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.losses import change, losses
from interp.experts.partition import HOWS, partition
from interp.experts.split import split

if TYPE_CHECKING:
    import pandas as pd


@recorded
def split_curve(
    model: Any,
    texts: Labelled | Corpus,
    n: int = 16,
    *,
    hows: Sequence[str] = HOWS,
    gates: Sequence[str] = ("oracle", "fitted", "average", "similarity", "random"),
    shares: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0),
    fit_on: Labelled | Corpus | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> pd.DataFrame:
    """Loss of a dense model as experts, for each partition, gate and share of experts on.

    Args:
        model: a dense model.
        texts: label -> held-out documents; the loss is over all of them.
        n: experts per layer.
        hows: partitions.
        gates: how active experts are chosen.
        shares: parts of the experts that are on, 0..1.
        fit_on: label -> documents for co-activation and fitted gates, others than `texts`.
        max_tokens: per label of `texts`.
        seed: of partitions, random gates and bootstrap.
        say: is told what happens next.

    Returns columns how, gate, active, share, loss (nats per token, mean over labels), value (above the dense model's),
    low, high (95 % over documents, mean over labels).
    """
    import pandas as pd

    data = corpus(model, texts, max_tokens)
    before = losses(model, data)
    rows: list[dict[str, Any]] = []
    for how in hows:
        groups = partition(model, n, how, texts=fit_on, seed=seed)
        for gate in gates:
            for active in sorted({max(1, round(share * n)) for share in shares}):
                say(f"{how}, {gate}: {active} of {n} on")
                moe = split(model, groups=groups, active=active, gate=gate, texts=fit_on, seed=seed)
                after = losses(moe, data)
                each = [change(before, after, label, seed=seed)["loss"] for label in data.labels]
                mean = {k: sum(e[k] for e in each) / len(each) for k in ("after", "value", "low", "high")}
                loss = {"loss": mean.pop("after")}
                rows.append({"how": how, "gate": gate, "active": active, "share": active / n, **loss, **mean})
    frame = pd.DataFrame(rows)
    frame.attrs.update({"model": model.name, "n": n, "tokens": data.n_tokens, "seed": seed, "labels": data.labels})
    return frame
