"""Exact activation patching as a Table: one line per node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.interrupted import handed_on
from interp.patching.nodes import Node, Nodes, expand, frame
from interp.patching.runs import Patcher
from interp.patching.task import Direction, Task

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

#: Draws of the bootstrap over pairs, and what its intervals hold.
DRAWS, CONFIDENCE = 2000, 0.95


@recorded
def patch(
    m: Model,
    clean: Any,
    corrupt: Any,
    metric: Any,
    nodes: Nodes,
    direction: Direction = "denoise",
    *,
    positions: str | int | Sequence[int] = "each",
    budget: int | None = None,
) -> pd.DataFrame:
    """Patches every node, each on its own, and gives the exact effect on the metric.

    Args:
        m: the model.
        clean: prompts as text, list of texts, ids [pair, pos] or Tokens; or Pairs, with `corrupt` None.
        corrupt: their corrupt twins, as many tokens each.
        metric: logits [pair, pos, vocab] -> [pair], or a Metric. Prefer one that is linear in the logits, such as
            `interp.metrics.logit_diff` (Zhang & Nanda, arXiv 2309.16042).
        nodes: site patterns or nodes (see `interp.patching.nodes`): ``"z[*]"`` is every head at every position.
        direction: "denoise": the corrupt run is patched with clean activations (what suffices); "noise": the clean run
            with corrupt ones (what is needed).
        positions: "each", "all" (all positions as one node), or a list of positions.
        budget: bytes to stay within; by default 1 GiB, on a GPU half of what is free.

    Returns:
        A line per node: node, site, layer, head, neuron, expert, position, joint, value (mean over pairs of metric of
        the patched run - metric of the unpatched run), score (mean of its absolute value), low, high (95% bootstrap
        over pairs; missing with one pair), metric, method ("exact") and direction. Its
        ``.attrs`` hold the baseline values of both runs, shortcuts taken and refused, and the cost. Interrupted, it
        leaves the lines of the nodes that were done (`interp.unfinished`).

    Raises PatchError, SiteError and BudgetError; see `interp.patching.runs.effects`.

    Example:
        >>> import interp
        >>> from interp.patching import patch
        >>> m = interp.load("tiny:llama")
        >>> table = patch(m, [[5, 6, 7, 8]], [[5, 9, 7, 8]], lambda x: x[:, -1, 3] - x[:, -1, 4], "resid_post[*]")
        >>> len(table)  # 3 layers x 4 positions
        12
    """
    patcher = Patcher(m, clean, corrupt, metric, direction, budget)
    wanted = expand(m, nodes, patcher.task.base.tokens, positions)

    def made(values: Tensor) -> pd.DataFrame:
        rows = table(m, patcher.task, patcher.baseline, patcher.target, wanted, values, "exact")
        rows.attrs |= {"rows": patcher.rows, "forward_passes": patcher.passes, "shortcuts": dict(patcher.shortcuts)}
        return rows

    def finished(values: Tensor) -> pd.DataFrame:
        known = values.isfinite().any(1)
        return made(values)[known.numpy()].reset_index(drop=True)

    with handed_on("patching.patch", finished):
        values = patcher.effects([[node] for node in wanted])
    return made(values)


def table(
    m: Model, task: Task, baseline: Tensor, target: Tensor, nodes: Sequence[Node], values: Tensor, method: str
) -> pd.DataFrame:
    """The Table of effects [node, pair], which every method of this package gives; `baseline`, `target` [pair]."""
    rows = frame(nodes)
    low, high = interval(values)
    rows["value"] = values.nanmean(1).double().numpy()
    rows["score"] = values.abs().nanmean(1).double().numpy()
    rows["low"], rows["high"] = low.numpy(), high.numpy()
    rows["metric"], rows["method"], rows["direction"] = task.metric.name, method, task.direction
    base, source = baseline.mean().item(), target.mean().item()
    clean, corrupt = (source, base) if task.direction == "denoise" else (base, source)
    rows.attrs |= {
        "model": m.name,
        "fingerprint": m.fingerprint,
        "metric": task.metric.name,
        "method": method,
        "direction": task.direction,
        "baseline": {"clean": clean, "corrupt": corrupt},
        "pairs": values.shape[1],
        "sign": "metric of the patched run - metric of the unpatched run",
        "interval": f"{CONFIDENCE:.0%} bootstrap over pairs, {DRAWS} draws"
        if values.shape[1] > 1
        else "none: one pair",
        "dtype": str(m.dtype).removeprefix("torch."),
    }
    return rows


def interval(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap over pairs of the mean of each row of `values` [row, pair]: low and high [row], float64."""
    n = values.shape[1]
    if n < 2:
        nothing = torch.full((len(values),), torch.nan, dtype=torch.float64)
        return nothing, nothing.clone()
    drawn = torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(DRAWS, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(DRAWS, n, dtype=torch.float64)
    )
    known = values.isfinite().double()
    low, high, edge = [], [], (1 - CONFIDENCE) / 2
    for some, real in zip(values.nan_to_num().double().split(1024), known.split(1024), strict=True):  # few MB at a time
        means = (some @ counts.T) / (real @ counts.T)
        bounds = torch.nanquantile(means, torch.tensor([edge, 1 - edge], dtype=torch.float64), dim=1)
        low.append(bounds[0])
        high.append(bounds[1])
    return torch.cat(low), torch.cat(high)
