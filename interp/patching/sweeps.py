"""One call over corruptions and metrics, one tidy frame: does the finding depend on how it was measured?

Zhang & Nanda 2023 (arXiv 2309.16042) show that it does: Gaussian noise and replaced tokens localise differently, and a
probability hides heads that work against the answer, since it cannot fall much below where the corrupt run has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from interp.calls import recorded
from interp.patching.guardrails import cautions
from interp.patching.nodes import Nodes
from interp.patching.pairs import MetricName, Pairs
from interp.patching.patch import patch
from interp.patching.task import Direction

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

CORRUPTIONS = ("token replacement", "gaussian noise")
METRICS: tuple[MetricName, ...] = ("logit_diff", "probability", "kl")


@recorded
def sweep(
    m: Model,
    pairs: Pairs,
    nodes: Nodes,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    metrics: Sequence[MetricName] = METRICS,
    direction: Direction = "denoise",
    positions: str | int | Sequence[int] = "each",
    factor: float = 3.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Patches the same nodes under every corruption and metric.

    Args:
        m: the model.
        pairs: with answers; corrupted by token replacement.
        nodes: as for `patch`.
        corruptions: of "token replacement" and "gaussian noise".
        metrics: of "logit_diff", "probability", "log_prob" and "kl" (against the clean run).
        direction: "denoise" or "noise".
        positions: as for `patch`.
        factor: standard deviations of the noise; see `Pairs.noised`.
        seed: of the noise.

    Returns:
        Tables of `patch` one below the other, with columns `corruption` and `share`: the effect as part of the whole
        difference between the source and the base run, so that metrics compare. ``.attrs["cautions"]`` has what
        `guardrails.cautions` says of each combination, ``.attrs["baselines"]`` the metric of both runs.
    """
    import pandas as pd

    for corruption in corruptions:
        if corruption not in CORRUPTIONS:
            raise ValueError(f"corruption {corruption!r}: expected one of {', '.join(CORRUPTIONS)}")
    frames, warned, baselines = [], {}, {}
    reference = m(pairs.clean)
    for corruption in corruptions:
        given = pairs if corruption == CORRUPTIONS[0] else pairs.noised(m, factor, seed)
        for name in metrics:
            metric = given.metric(name, reference=reference if name == "kl" else None)
            frame = patch(m, given, None, metric, nodes, direction, positions=positions)
            clean, corrupt = frame.attrs["baseline"]["clean"], frame.attrs["baseline"]["corrupt"]
            gap = clean - corrupt if direction == "denoise" else corrupt - clean
            frame.insert(len(frame.columns), "share", frame["value"] / gap)
            frame.insert(0, "corruption", corruption)
            warned[f"{corruption}, {name}"] = cautions(m, given, metric, warn=False)
            baselines[f"{corruption}, {name}"] = frame.attrs["baseline"]
            frames.append(frame)
    out = pd.concat(frames, ignore_index=True)
    out.attrs = dict(frames[0].attrs) | {
        "metric": list(metrics), "corruption": list(corruptions), "cautions": warned, "baselines": baselines,
    }  # fmt: skip
    return out


@recorded
def disagreement(frame: pd.DataFrame, matters: float = 0.1) -> pd.DataFrame:
    """The nodes on which a sweep's metrics disagree, a column of shares per corruption and metric.

    A node stands here if some combination gives it at least `matters` (as a share, by size) and another less than half
    of that, or the opposite sign.
    """
    wide = frame.pivot_table(index=["node", "position"], columns=["corruption", "metric"], values="share", dropna=False)
    largest = wide.abs().max(axis=1)
    least = wide.abs().min(axis=1)
    signs = (wide.max(axis=1) > 0) & (wide.min(axis=1) < 0)
    return wide[(largest >= matters) & ((least < largest / 2) | signs)]
