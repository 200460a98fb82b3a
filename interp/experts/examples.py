"""The strongest tokens of every expert, with their context, as the pass left them.

    stats = experts.routing(m, texts, examples=5)
    experts.examples(stats, m)                         layer, expert, rank, weight, before, token, after, label

`experts.describe.top_examples` finds more of them for a set of units, Monet's pairs included, in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp.calls import recorded
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError

if TYPE_CHECKING:
    import pandas as pd


@recorded
def examples(stats: RoutingStats, model: Any, units: Sequence[tuple[int, int]] | None = None) -> pd.DataFrame:
    """The tokens at which units weigh most.

    Args:
        stats: from ``experts.routing(..., examples=k)``.
        model: whose tokenizer turns ids into text; token numbers without one.
        units: (layer, expert) to show, default all.

    Returns columns layer, expert, rank, weight, before, token, after (text), label, position (in its window). A unit
    that was never used has no lines. Raises ExpertError where none were kept.
    """
    import pandas as pd

    kept = stats.examples
    if kept is None:
        raise ExpertError("no examples were kept; pass examples=5 to experts.routing")
    around = kept.around

    def text(ids: list[int]) -> str:
        real = [i for i in ids if i >= 0]
        return str(model.tokenizer.decode(real)) if model.tokenizer is not None else " ".join(map(str, real))

    wanted = units if units is not None else [(layer, e) for layer in stats.layers for e in range(stats.size)]
    rows = []
    for layer, unit in wanted:
        if layer not in stats.layers or not 0 <= unit < stats.size:
            raise ExpertError(f"units: ({layer}, {unit}) is none; layers {sorted(stats.layers)}, 0..{stats.size - 1}")
        router = stats.layers[layer]
        for rank, weight in enumerate(kept.weight[router, unit].tolist()):
            if weight <= 0:
                break  # falling
            ids = kept.ids[router, unit, rank].tolist()
            about = {"layer": layer, "expert": unit, "rank": rank, "weight": weight}
            about |= {"before": text(ids[:around]), "token": text(ids[around : around + 1])}
            about |= {"after": text(ids[around + 1 :]), "label": stats.labels[int(kept.label[router, unit, rank])]}
            rows.append({**about, "position": int(kept.position[router, unit, rank])})
    columns = ["layer", "expert", "rank", "weight", "before", "token", "after", "label", "position"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.attrs.update(stats.about())
    return frame
