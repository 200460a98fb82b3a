"""What switching a set off does, to what it was chosen for and to everything else, beside random controls.

    table = experts.evaluate(m, law, {"law": held_out, "code": ...}, controls=20)

A line per label, metric and baseline: "none" is the set itself, "random" the controls (see `interp.experts.controls`).
Score on text that the set was not chosen on: nothing here can know whether you did.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from interp.calls import recorded
from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.collect import routing
from interp.experts.controls import frequency, matched
from interp.experts.losses import METRICS, Losses, change, losses, metric
from interp.experts.sets import ExpertSet
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError
from interp.progress import Advance, bar

if TYPE_CHECKING:
    import pandas as pd


def switched_off(model: Any, chosen: ExpertSet) -> AbstractContextManager[Any]:
    """A context in which the set's units contribute nothing; the other units' weights stay as they are.

        with experts.switched_off(m, law):
            m.generate("The court")

    Exact for every kind: Monet's W_ij is 0 in the layer's sum, so is a routed expert's weight or a neuron's activation.
    """
    return chosen.check(model).off(model, chosen.ids)


@recorded
def evaluate(
    model: Any,
    chosen: ExpertSet,
    texts: Labelled | Corpus,
    *,
    controls: int = 20,
    stats: RoutingStats | None = None,
    before: Losses | None = None,
    scored: str | Sequence[str] = "all",
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> pd.DataFrame:
    """Loss, perplexity and next-token accuracy per label with the set on and off, and with random sets off.

    Args:
        model: the model the set belongs to.
        chosen: what to switch off.
        texts: label -> held-out documents.
        controls: number of random sets, matched on layer and frequency.
        stats: routing statistics to match frequency on; made from `texts` where missing.
        before: the model's own losses on these texts, if you have them.
        scored: labels on which the controls are scored: "all", one, or several (fewer is quicker).
        max_tokens: per label.
        batch_tokens: tokens run at once.
        seed: of controls and bootstrap.

    Returns a Table with columns label, metric, baseline, before, after, value (after - before), low, high, units. With
    baseline "none" the interval is a bootstrap over documents; with "random" the value is the mean over control sets
    and the interval holds the middle 95 % of them. `.attrs` has the set's record and frequencies.
    """
    import pandas as pd

    if controls < 0:
        raise ExpertError(f"controls={controls}: expected 0 or more")
    data = corpus(model, texts, max_tokens)
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {
        "model": model.name,
        "fingerprint": chosen.fingerprint,
        "chosen": chosen.record,
        "seed": seed,
    }
    drawn: list[ExpertSet] = []
    if controls and len(chosen):  # drawn first: where too few units are left to draw from, nothing has been run in vain
        stats = stats or routing(model, data, kind=chosen.kind)
        generator = torch.Generator().manual_seed(seed)
        drawn = [matched(stats, chosen, generator) for _ in range(controls)]
        about["frequency"] = frequency(stats, chosen)
        about["control_frequency"] = sum(frequency(stats, control) for control in drawn) / controls
    with bar("evaluating", 2 + controls) as advance:
        before = before or losses(model, data, batch_tokens=batch_tokens)
        advance()
        with switched_off(model, chosen):
            after = losses(model, data, batch_tokens=batch_tokens)
        advance()
        for label in data.labels:
            for name, numbers in change(before, after, label, seed=seed).items():
                rows.append({"label": label, "metric": name, "baseline": "none", **numbers, "units": len(chosen)})
        if drawn:
            labels = data.labels if scored == "all" else [scored] if isinstance(scored, str) else list(scored)
            part = data.only(labels)
            rows += _controls(model, drawn, part, labels, before, batch_tokens, advance)
    table = pd.DataFrame(rows)
    table.attrs.update(about)
    return table


def _controls(
    model: Any, drawn: list[ExpertSet], data: Corpus, labels: list[str], before: Losses, batch_tokens: int,
    advance: Advance,
) -> list[dict[str, Any]]:  # fmt: skip
    """One line per label and metric, over all control sets."""
    sums: dict[str, list[Any]] = {label: [] for label in labels}
    for control in drawn:
        with switched_off(model, control):
            after = losses(model, data, batch_tokens=batch_tokens)
        for label in labels:
            sums[label].append(after.of(label).sum(0))
        advance()
    rows = []
    for label in labels:
        was, now = before.of(label).sum(0), torch.stack(sums[label])  # [3], [control, 3]
        for name in METRICS:
            start, end = float(metric(was, name)), metric(now, name)
            low, high = (end - start).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            mean = float(end.mean())
            numbers = {"before": start, "after": mean, "value": mean - start, "low": low, "high": high}
            rows.append({"label": label, "metric": name, "baseline": "random", **numbers, "units": len(drawn[0])})
    return rows
