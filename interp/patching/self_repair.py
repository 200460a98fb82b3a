"""Self-repair: a second pass for what acts only when the first is out of the way.

A backup does nothing while its principal works, so patched alone it has no effect, and every ranking of single nodes
misses it. The second pass patches the nodes that the first pass found, keeps them so, and measures the others again:

    conditional(n) = metric(given and n patched) - metric(given patched)

A node whose conditional effect is much larger than its own is a backup of what was given (McGrath et al. 2023, arXiv
2307.15771). Patching anything large moves the run off its usual course, so the same is done given random nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.calls import recorded
from interp.patching.nodes import Nodes, expand
from interp.patching.patch import table
from interp.patching.runs import Patcher
from interp.patching.task import Direction

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model


@recorded
def conditional(
    m: Model,
    clean: Any,
    corrupt: Any,
    metric: Any,
    nodes: Nodes,
    given: Nodes,
    direction: Direction = "noise",
    *,
    positions: str | int | Sequence[int] = "each",
    controls: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Effects of nodes while others are patched already.

    Args:
        m: the model.
        clean: prompts, or `Pairs`.
        corrupt: their corrupt twins.
        metric: logits [pair, pos, vocab] -> [pair], or a Metric.
        nodes: what to measure.
        given: what stays patched, jointly: the nodes that the first pass found.
        direction: "noise" (knock the given out, then see who steps in) or "denoise".
        positions: of both, where patterns name none.
        controls: random sets of as many of `nodes` to give instead.
        seed: of the controls.

    Returns:
        The Table of `patch` with `value` (alone), `conditional`, `repair` = |conditional| - |alone|, and `random`, the
        mean repair under the controls. ``.attrs["given_effect"]`` is the effect of the given alone.
    """
    patcher = Patcher(m, clean, corrupt, metric, direction)
    tokens = patcher.task.base.tokens
    held = expand(m, given, tokens, positions)
    wanted = [n for n in expand(m, nodes, tokens, positions) if n not in held]
    if not wanted:
        raise ValueError("conditional: every one of `nodes` is given; nothing is left to measure")
    alone = patcher.effects([[n] for n in wanted])
    after, base = _after(patcher, wanted, held)
    frame = table(m, patcher.task, patcher.baseline, patcher.target, wanted, alone, "exact")
    frame["conditional"] = after.nanmean(1).double().numpy()
    frame["repair"] = frame["conditional"].abs() - frame["value"].abs()
    generator, repairs = torch.Generator().manual_seed(seed), []
    for _ in range(controls):
        drawn = torch.randperm(len(wanted), generator=generator)[: len(held)].tolist()
        chance, _ = _after(patcher, wanted, [wanted[i] for i in drawn])
        repair = chance.nanmean(1).abs() - alone.nanmean(1).abs()
        repair[drawn] = torch.nan  # a node given twice says nothing
        repairs.append(repair)
    frame["random"] = torch.stack(repairs).nanmean(0).double().numpy() if controls else float("nan")
    frame.attrs |= {
        "given": [f"{n}@{'all' if n.position is None else n.position}" for n in held],
        "given_effect": float(base.nanmean()), "controls": controls, "seed": seed,
    }  # fmt: skip
    return frame


def _after(patcher: Patcher, wanted: list[Any], held: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(conditional effects [node, pair], effect of the held alone [pair])."""
    found = patcher.effects([list(held), *([*held, n] for n in wanted)])
    return found[1:] - found[0], found[0]
