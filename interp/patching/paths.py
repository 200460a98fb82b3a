"""Path patching: the effect of one component on another, the rest of the model held still.

Four runs, as in Wang et al. 2022 (arXiv 2211.00593, appendix B) and Goldowsky-Dill et al. 2023 (arXiv 2304.05969):

1., 2. the base and the source run, as they are;
3.     the base run with the sender as in the source run, all other heads and MLPs frozen: what do the receivers read?
4.     the base run with the receivers as they were in step 3: what becomes of the metric?

With MLPs frozen too, the only way from sender to receiver is the direct edge of the residual graph, and the result is
that of `attribute_edges(method="exact")`. With ``through="mlp"`` MLPs of step 3 answer, so paths by them count too.
Only sites are used, so it works on families whose stream is not a plain sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from interp import edits
from interp.activations import Activations
from interp.calls import recorded
from interp.edits import Edit, Where
from interp.patching.edges import logits_of
from interp.patching.task import Direction, PatchError, Task, evaluate, telling, without_flash
from interp.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

SENDERS = ("embed", "resid_pre", "z", "attn_out", "mlp_out")
RECEIVERS = ("q", "k", "v", "z", "mlp_out", "resid_post")


@recorded
def path_patch(
    m: Model,
    clean: Any,
    corrupt: Any,
    metric: Any,
    senders: str | Site | Sequence[str | Site],
    receivers: str | Site | Sequence[str | Site],
    *,
    direction: Direction = "noise",
    through: Literal["nothing", "mlp"] = "nothing",
) -> pd.DataFrame:
    """The effect of each sender by way of the receivers, all receivers together.

    Args:
        m: the model.
        clean: prompts, or `Pairs`.
        corrupt: their corrupt twins.
        metric: logits [pair, pos, vocab] -> [pair], or a Metric.
        senders: site patterns among embed, resid_pre[0], z, attn_out, mlp_out; a head is ``z[3, head=5]``.
        receivers: among q, k, v (what a head reads for them), z (a head, by all three), mlp_out (the MLP that makes
            it), and resid_post of the last layer for the logits.
        direction: "noise": the clean run gets the corrupt sender; "denoise" the other way round.
        through: what answers between sender and receivers: "nothing", or "mlp".

    Returns:
        A line per sender: sender, receivers (text), value, score, metric, method, direction.
    """
    import pandas as pd

    if through not in ("nothing", "mlp"):
        raise PatchError(f"through={through!r}: expected 'nothing' or 'mlp'")
    sent, received = _resolve(m, senders, SENDERS, "senders"), _resolve(m, receivers, RECEIVERS, "receivers")
    if any(s.name == "resid_pre" and s.layer for s in sent):
        raise PatchError(
            "senders: resid_pre is a sender at layer 0 only, as the embedding; later it is everything before"
        )
    if any(r.name == "resid_post" and r.layer != m.n_layers - 1 for r in received):
        raise PatchError(f"receivers: resid_post is one at the last layer only, resid_post[{m.n_layers - 1}]")
    task = Task.of(m, clean, corrupt, metric, direction)
    frozen = [s for n in ("z", "mlp_out") if m.anatomy.having(n) for s in m.resolve(f"{n}[*]")]
    with without_flash(m), torch.no_grad():
        base, source = _ends(m, task, frozen, sent, received)
        values = torch.stack([_effect(m, task, base, source, s, received, frozen, through) for s in sent])
        baseline = evaluate(task, logits_of(m, task.base), task.base.tokens, "the base run")
        target = evaluate(task, logits_of(m, task.source), task.source.tokens, "the source run")
        telling(task, baseline, target)
    values = values - baseline
    frame = pd.DataFrame({
        "sender": [str(s) for s in sent], "receivers": ", ".join(map(str, received)),
        "layer": pd.array([s.layer for s in sent], dtype="Int64"),
        "head": pd.array([dict(s.index).get("head") for s in sent], dtype="Int64"),
        "value": values.double().mean(1).numpy(), "score": values.double().abs().mean(1).numpy(),
        "metric": task.metric.name, "method": "path", "direction": direction,
    })  # fmt: skip
    clean_value, corrupt_value = (baseline, target) if direction == "noise" else (target, baseline)
    frame.attrs |= {
        "model": m.name, "metric": task.metric.name, "method": "path", "direction": direction, "through": through,
        "pairs": task.pairs, "receivers": [str(r) for r in received],
        "baseline": {"clean": float(clean_value.mean()), "corrupt": float(corrupt_value.mean())},
        "sign": "metric of the patched run - metric of the unpatched run",
    }  # fmt: skip
    return frame


def _resolve(m: Model, given: Any, allowed: Iterable[str], what: str) -> list[Site]:
    sites = m.resolve(given)
    for site in sites:
        if site.name not in allowed:
            raise PatchError(f"{what}: {site} cannot be one; take {', '.join(allowed)}")
    return sites


def _ends(m: Model, task: Task, frozen: list[Site], sent: list[Site], received: list[Site]) -> tuple[Activations, ...]:
    """What both runs left where something is frozen, sent or received."""
    sites = list(dict.fromkeys(s.base for s in [*frozen, *sent, *received]))
    runs = []
    for run in (task.base, task.source):
        change = [] if run.embeds is None else [edits.replace("embed", run.embeds)]
        with m.intervene(*change):
            runs.append(m.capture(run.tokens, sites))
    return tuple(runs)


def _effect(
    m: Model, task: Task, base: Activations, source: Activations, sender: Site, receivers: list[Site],
    frozen: list[Site], through: str,
) -> Tensor:  # fmt: skip
    """Steps 3 and 4 for one sender: the metric [pair]."""
    run = task.base
    given = [] if run.embeds is None else [edits.replace("embed", run.embeds)]
    holds = [
        _hold(site, base[site], [dict(r.index).get("head") for r in receivers if r.base == site])
        for site in frozen
        if not (through == "mlp" and site.name == "mlp_out")
    ]
    send = edits.replace(sender, source[sender])
    with m.intervene(*given, *holds, send):
        read = m.capture(run.tokens, list(dict.fromkeys(r.base for r in receivers)))
    receive = [edits.replace(r, read[r]) for r in receivers]
    with m.intervene(*given, *receive):
        logits = m(run.tokens)
    return evaluate(task, logits, run.tokens, f"the run with the path from {sender} patched")


def _hold(site: Site, value: Tensor, free: list[int | None]) -> Edit:
    """Keeps a site as it was, but for the receivers in it, which answer: some of its heads, or (None) all of it."""
    if not free:
        return edits.replace(site, value)

    def keep(h: Tensor, where: Where) -> Tensor:
        if None in free:
            return h
        out = value.clone()
        out[:, :, free] = h[:, :, free]
        return out

    return Edit(str(site), keep, name="hold")
