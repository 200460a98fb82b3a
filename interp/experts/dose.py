"""Dose and response: what happens as more and more of the experts that carry a label are switched off.

    table = experts.dose(m, stats, "law", held_out, sizes=(1, 2, 4, 8, 16), neutral=plain_texts)

One set says whether something can be removed; the curve says how many experts it is spread over, and when the others
begin to suffer. Each size stands beside random sets of that size (of the same layers and frequency), beside the effect
on every other label, the divergence on neutral text, and, if a dense model is given, as many of its neurons chosen by
the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp.calls import recorded
from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.controls import has_controls
from interp.experts.divergence import divergence
from interp.experts.evaluate import evaluate
from interp.experts.losses import Losses, losses
from interp.experts.select import select
from interp.experts.sets import ExpertSet
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError
from interp.interrupted import salvaged
from interp.progress import bar

if TYPE_CHECKING:
    import pandas as pd


@recorded
def dose(
    model: Any,
    stats: RoutingStats,
    label: str,
    texts: Labelled | Corpus,
    *,
    sizes: Sequence[int] = (1, 2, 4, 8, 16),
    rule: str = "ftri",
    settings: Mapping[str, Any] | None = None,
    ranking: RoutingStats | pd.DataFrame | None = None,
    controls: int = 5,
    neutral: Labelled | Corpus | None = None,
    neurons: tuple[Any, RoutingStats] | None = None,
    per_expert: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> pd.DataFrame:
    """Effects of switching off the `size` units that carry `label` most, for each size.

    Args:
        model: the model.
        stats: its routing statistics on the selection split; controls are matched on their frequencies.
        label: what is removed.
        texts: label -> held-out documents.
        sizes: units in the whole model.
        rule: a rule that takes `total` units (rate, ftri, reap, top, most, precision, attribution).
        settings: further settings of the rule.
        ranking: what the rule reads if not `stats`: a Table of `attribute` or `sweep` for rule "attribution".
        controls: random sets per size.
        neutral: label -> documents on which predictions should stay; adds rows of metric "kl".
        neurons: a dense model and its statistics (kind "neurons"): adds rows with baseline "neurons", as many of its
            neurons as the switched-off experts have, chosen by the same rule.
        per_expert: neurons in one expert, default what the model says.
        max_tokens: per label.
        batch_tokens: tokens run at once.
        seed: of controls and bootstrap.

    Returns the Tables of `evaluate` one below the other, with a column `size` in front. A size that takes more than
    half of a layer, which leaves too few units to draw controls from, has no lines of baseline "random".
    """
    import pandas as pd

    data = corpus(model, texts, max_tokens)
    if label not in data.labels:
        raise ExpertError(f"texts: no text for {label!r}; it has {', '.join(data.labels)}")
    how: dict[str, Any] = {"batch_tokens": batch_tokens, "seed": seed}
    parts: list[pd.DataFrame] = []

    def response() -> pd.DataFrame | None:
        if not parts:
            return None
        frame = pd.concat(parts, ignore_index=True)
        frame.attrs.update({
            "model": model.name, "fingerprint": stats.fingerprint, "label": label, "rule": rule, "controls": controls,
            "settings": dict(settings or {}), "tokens": data.n_tokens, "seed": seed, "chosen_on": stats.data,
        })  # fmt: skip
        return frame

    with salvaged("dose", response), bar("removing more and more", len(sizes)) as advance:
        before = losses(model, data, batch_tokens=batch_tokens)
        dense = _Dense(neurons, texts, max_tokens, batch_tokens) if neurons is not None else None
        for size in sizes:
            chosen = select(ranking if ranking is not None else stats, label, rule, **(settings or {}), total=size)
            drawn = controls if has_controls(stats, chosen) else 0
            table = evaluate(model, chosen, data, controls=drawn, stats=stats, before=before, **how)
            rows = [table]
            if neutral is not None:
                rows.append(_neutral(model, chosen, neutral, max_tokens, seed))
            if dense is not None:
                width = per_expert or _width(model)
                rows.append(dense.table(label, rule, settings, width * len(chosen), how))
            part = pd.concat(rows, ignore_index=True)
            part.insert(0, "size", size)
            parts.append(part)
            advance()
    found = response()
    assert found is not None
    return found


def _neutral(
    model: Any, chosen: ExpertSet, texts: Labelled | Corpus, max_tokens: int | None, seed: int
) -> pd.DataFrame:
    import pandas as pd

    found = divergence(model, chosen, texts, max_tokens=max_tokens, seed=seed)
    about = {"metric": "kl", "baseline": "none", "before": 0.0, "units": len(chosen)}
    return pd.DataFrame([{"label": name, **about, "after": e["value"], **e} for name, e in found.items()])


def _width(model: Any) -> int:
    """Neurons of one expert."""
    sizes = {s["neuron"] for (name, _), s in model.anatomy.sizes.items() if name == "expert_hidden" and "neuron" in s}
    if len(sizes) != 1:
        raise ExpertError(f"per_expert: {model.name} has experts of no one width; say how many neurons one stands for")
    return int(sizes.pop())


class _Dense:
    """The dense model beside: the same number of neurons, chosen by the same rule on its own statistics."""

    def __init__(
        self, neurons: tuple[Any, RoutingStats], texts: Labelled | Corpus, max_tokens: int | None, batch_tokens: int
    ) -> None:  # fmt: skip
        self.model, self.stats = neurons
        if self.stats.kind != "neurons":
            raise ExpertError(f"neurons: the statistics are of kind {self.stats.kind!r}; pass routing(kind='neurons')")
        self.data = corpus(self.model, texts, max_tokens)
        self.before: Losses = losses(self.model, self.data, batch_tokens=batch_tokens)

    def table(
        self, label: str, rule: str, settings: Mapping[str, Any] | None, total: int, how: Mapping[str, Any]
    ) -> pd.DataFrame:  # fmt: skip
        rule = "top" if rule == "attribution" else rule
        total = min(total, self.stats.size * len(self.stats.layers) - 1)
        chosen = select(self.stats, label, rule, **(settings or {}), total=total)
        table = evaluate(self.model, chosen, self.data, controls=0, before=self.before, **how)
        return table.assign(baseline="neurons")
