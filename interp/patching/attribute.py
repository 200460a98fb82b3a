r"""Attribution: every node's effect estimated from gradients, as a Table like that of exact patching.

================  =====================================================================  ===================
method            estimate of a node's effect                                            passes of one pair
================  =====================================================================  ===================
``atp``           (source - base) . gradient at the base run                             4 forward, 1 back
``atp+qk``        queries, keys and router scores exactly through their softmax          1 forward more
``atp+graddrop``  \|.\| averaged over gradients with one layer's write taken out         4, (L + 1) / 2 back
``atp*``          both: AtP* of Kramár et al., arXiv 2403.00745                          5, (L + 1) / 2 back
``ig``            gradients averaged over the middles of `steps` steps from the base     4 + steps, steps back
                  run's embeddings to the source's (EAP-IG: Hanna et al., 2403.17806)
``secant``        slopes between the two runs in the place of gradients: what is         5 forward, 2 back
                  upstream of saturated attention or a shut gate is seen (`secant`)
``secant+qk``     the same, with queries, keys, router scores as in ``atp+qk`` and       6 forward, 2 back
                  values as they act alone
================  =====================================================================  ===================

Two of the forward passes find out what the metric reads and what it is in both runs, and one row more plans the memory.
GradDrop checks its shortcut on the first pair, which takes this pair one backward pass more. Gradients stop at the
activations, no weight's is ever made, so a backward pass does about the arithmetic of a forward
one. `.attrs["cost"]` is what was counted, layer by layer.

Which one: ``atp*`` where attention is as trained models have it; ``secant+qk`` beside it where heads look at one token
only, or units are off, as in compiled or very sharp models, where whole paths have no gradient. On SmolLM2 secants rank
worse than gradients (benchmarks/README.md): they answer for the way between the runs, and a node alone goes less far.

The absolute value is taken per pair, inside the mean over pairs (eq. 5 of AtP*): a node that helps in half of the pairs
and harms in the others is not one without effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from interp.activations import Activations
from interp.calls import recorded
from interp.hooks import resume
from interp.interrupted import carried, handed_on
from interp.patching import graddrop
from interp.patching.gather import grouped
from interp.patching.linear import Levels, Linear
from interp.patching.memory import Meter, default_budget
from interp.patching.nodes import Node, Nodes, expand
from interp.patching.patch import table
from interp.patching.recorded import AT_ONCE, Recorded, kind
from interp.patching.task import Direction, PatchError, Task, without_flash
from interp.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

Method = Literal["atp", "atp+qk", "atp+graddrop", "atp*", "ig", "secant", "secant+qk"]
METHODS: tuple[str, ...] = get_args(Method)


@recorded
def attribute(
    m: Model,
    clean: Any,
    corrupt: Any,
    metric: Any,
    nodes: Nodes,
    method: Method = "atp*",
    direction: Direction = "denoise",
    *,
    positions: str | int | Sequence[int] = "each",
    steps: int = 5,
    budget: int | None = None,
) -> pd.DataFrame:
    """Estimates the effect of patching every node, all of them from a few passes.

    Args:
        m: the model.
        clean: prompts, as for `patch`.
        corrupt: their corrupt twins.
        metric: a differentiable function of logits [pair, pos, vocab] -> [pair], or a Metric.
        nodes: site patterns or nodes, as for `patch`.
        method: see the table above.
        direction: "denoise" or "noise", as for `patch`: gradients are taken at the run that is patched.
        positions: as for `patch`.
        steps: of "ig".
        budget: bytes to stay within; decides how many pairs run at once.

    Returns:
        The columns of `patch`. ``value`` is the signed estimate (mean over pairs, by the whole gradient) and ``score``
        what nodes are ranked by: the mean over pairs of the absolute estimate, for GradDrop of the average over its
        gradients. ``.attrs["cost"]`` is what was run, in forward and backward passes of one pair, as counted;
        ``.attrs["plain"]`` names the layers that a fix did not apply to, with the reason. For secants
        ``.attrs["unexplained"]`` is the share of the runs' difference (in the metric's tangent) that the estimates of
        the embeddings do not add up to: 0 where every step is a secant, more where steps go by their tangents.

    Raises PatchError where the metric has no gradient; otherwise as `patch`. Interrupted, it leaves the estimates from
    the pairs that were done; ``.attrs["pairs"]`` counts them.
    """
    if method not in METHODS:
        raise PatchError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if steps < 1:
        raise PatchError(f"steps={steps}: integrated gradients take at least one step")
    task = Task.of(m, clean, corrupt, metric, direction)
    wanted = expand(m, nodes, task.base.tokens, positions)
    with without_flash(m) as switched, resume.counted(m.anatomy.layers) as passes:
        with torch.no_grad():
            recorded = Recorded(m, task, default_budget(m.device) if budget is None else budget)
        work = Attribution(recorded, wanted, method, steps, passes)

        def made(done: tuple[Tensor, Tensor]) -> pd.DataFrame:
            """The Table of the first pairs, as many as estimates [node, pair] and scores hold: in the end all."""
            value, score = done
            pairs = value.shape[1]
            _missing(value, wanted, task)
            rows = table(m, task, recorded.baseline[:pairs], recorded.target[:pairs], wanted, value, method)
            rows["score"] = score.where(value.isfinite(), torch.nan).nanmean(1).double().numpy()
            rows.attrs |= {
                "cost": {"forward": passes.forward / pairs, "backward": passes.backward / pairs},
                "plain": work.notes,
                **({"steps": steps} if method == "ig" else {}),
                **({"unexplained": work.left / max(work.gap, 1e-30)} if work.secant else {}),
                **({"attention": f"switched meanwhile: {switched}"} if switched else {}),
            }
            return rows

        with handed_on("patching.attribute", made):
            done = work.run()
    return made(done)


class Attribution:
    """One method over all pairs, as many at a time as the budget holds."""

    def __init__(
        self, recorded: Recorded, nodes: Sequence[Node], method: str, steps: int, passes: resume.Passes | None = None
    ) -> None:
        self.passes = resume.Passes() if passes is None else passes  # what has been counted
        self.recorded, self.nodes, self.method, self.steps = recorded, nodes, method, steps
        self.m, self.task = recorded.m, recorded.task
        self.groups = grouped(nodes, self.task.width, self.m.device)
        self.notes: dict[int, str] = {}
        self.secant, self.left, self.gap = method.startswith("secant"), 0.0, 0.0
        self.drops, self.checked, self.apart = method in ("atp+graddrop", "atp*"), False, False
        if self.drops:
            self.m.resolve([f"{name}[{i}]" for name in ("resid_pre", "resid_post") for i in range(self.m.n_layers)])
            if any(n.others and len({s.layer for s in n.sites}) > 1 for n in nodes):
                raise PatchError(
                    f"method={method!r}: a window of layers has no layer of its own to leave out; use 'atp' or 'atp+qk'"
                )
            self.levels = self._levels()

    def _levels(self) -> Levels:
        """The nodes by layer, as the walk down the layers meets them."""
        numbers: dict[int | None, list[int]] = {}
        for i, node in enumerate(self.nodes):
            numbers.setdefault(node.site.layer, []).append(i)
        width, device = self.task.width, self.m.device
        return {
            layer: (torch.tensor(own, device=device), grouped([self.nodes[i] for i in own], width, device))
            for layer, own in numbers.items()
        }

    def run(self) -> tuple[Tensor, Tensor]:
        """Signed estimates and scores [node, pair]."""
        parts: list[tuple[Tensor, Tensor]] = []
        pairs = torch.arange(self.task.pairs, device=self.m.device)
        with Meter() as meter:
            parts.append(self._some(pairs[:1]))
        room = max(1, (self.recorded.budget - self.recorded.nbytes) // max(1, meter.peak))
        step = max(1, min(room, AT_ONCE[kind(self.m)] // self.task.width))
        with carried(lambda: _joined(parts)):
            for some in pairs[1:].split(step) if len(pairs) > 1 else ():
                parts.append(self._some(some))
        return _joined(parts)

    def _some(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        if self.method == "ig":
            return self._integrated(pairs, self._source(pairs))
        line = self._line(pairs)
        if self.drops:
            return self._dropped(line)
        gradient = line.gradient()
        if self.secant:
            made, gap = line.explained(gradient)
            self.left, self.gap = self.left + float((made - gap).abs().sum()), self.gap + float(gap.abs().sum())
        value = line.estimate(gradient, len(self.nodes))
        return value, value.abs()

    def _line(self, pairs: Tensor) -> Linear:
        """The base run of some pairs, ready for estimates."""
        fixes, source = self.method in ("atp+qk", "atp*", "secant+qk"), self._source(pairs)
        line = Linear(self.recorded, pairs, self.groups, source, fixes=fixes, streams=self.drops, secant=self.secant)
        self.notes |= line.notes
        return line

    def _dropped(self, line: Linear) -> tuple[Tensor, Tensor]:
        """By GradDrop. The first pair tells whether one layer's residual stream is all that the next one gets."""
        before = self.passes.backward
        value, score = line.dropped(self.levels, len(self.nodes), self.apart)
        if not self.apart:  # hooks see a batched step once, whatever its rows
            self.passes.backward = before + graddrop.passes(self.m.n_layers) * value.shape[1]
        if self.checked:
            return value, score
        self.checked, whole = True, line.estimate(line.gradient(), len(self.nodes))
        close = 1e-3 if self.m.dtype in (torch.float32, torch.float64) else 3e-2
        if float((value - whole).abs().max()) <= close * float(whole.abs().max()):
            return value, score
        self.apart = True
        return line.dropped(self.levels, len(self.nodes), apart=True)

    def _integrated(self, pairs: Tensor, there: Activations) -> tuple[Tensor, Tensor]:
        """Gradients at the middles of equal steps, averaged; the difference of activations is that of the two ends."""
        here = self._capture(self.task.base, pairs)
        a, b = here[Site("embed")], there[Site("embed")]
        value = torch.zeros(len(self.nodes), len(pairs), device=self.m.device)
        for step in range(self.steps):
            middle = a + (step + 0.5) / self.steps * (b - a)
            line = Linear(self.recorded, pairs, self.groups, there, embeds=middle, here=here)
            value += line.estimate(line.gradient(), len(self.nodes)) / self.steps
        return value, value.abs()

    def _source(self, pairs: Tensor) -> Activations:
        return self._capture(self.task.source, pairs)

    def _capture(self, run: Any, pairs: Tensor) -> Activations:
        """A run's activations at the nodes' sites (and embeddings) of some pairs."""
        sites: set[Site] = {Site("embed")} if self.method == "ig" else set()
        for g in self.groups:
            if g.base.kind.routed:
                sites |= {Site(n, g.base.layer) for n in ("expert_ids", "expert_weight", "expert_out")}
            else:
                sites.add(g.base)
        with torch.no_grad():
            acts = self.recorded.part(run, pairs, sorted(sites))[1]
        assert acts is not None
        return acts


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Estimates and scores of groups of pairs, side by side [node, pair]."""
    return torch.cat([value for value, _ in parts], 1).cpu(), torch.cat([score for _, score in parts], 1).cpu()


def _missing(value: Tensor, nodes: Sequence[Node], task: Task) -> None:
    """A pair too short for a node's position has no effect there, not an effect of 0."""
    lengths = task.lengths().cpu()[: value.shape[1]]
    reach = torch.tensor([-1 if n.position is None else n.position for n in nodes])
    value[reach[:, None] >= lengths[None]] = torch.nan
