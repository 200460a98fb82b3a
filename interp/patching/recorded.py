"""What the base and the source run of a task left: logits, activations at the patched sites, residual streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.activations import Activations, ExpertActivations, Tokens, narrow
from interp.hooks import resume
from interp.model import Use
from interp.patching.memory import MARGIN, BudgetError, Meter, human, nbytes
from interp.patching.nodes import Node
from interp.patching.task import Run, Task, evaluate, telling
from interp.patching.writes import Given
from interp.sites import Site

if TYPE_CHECKING:
    from interp.model import Model

#: Tokens per stacked batch beyond which a larger batch is no quicker.
AT_ONCE = {"cpu": 512, "cuda": 16384}


class Recorded:
    """The two runs of a task, each made once; more sites are captured when they are asked for.

    Attributes:
        narrow: True where the metric reads each row's last token only; then logits are made for that token only.
        logits: the base run's, float32 [pair, 1 or pos, vocab].
        tokens: the tokens that these logits belong to, as the metric is told.
        baseline: the metric of the base run [pair].
        target: the metric of the source run [pair].
        here, there: whole site -> activations of the base and of the source run [pair, pos, ...].
        experts: layer -> the routed experts in the base and in the source run.
        streams: layer -> the base run's residual stream before it [pair, pos, d_model].
        forms: how many values each layer returns.
        row_bytes: what a forward pass of one row takes at its peak, as measured.
    """

    def __init__(self, m: Model, task: Task, budget: int) -> None:
        self.m, self.task, self.budget = m, task, budget
        self.here: dict[Site, Tensor] = {}
        self.there: dict[Site, Tensor] = {}
        self.experts: dict[int, tuple[ExpertActivations, ExpertActivations]] = {}
        self.streams: dict[int, Tensor] = {}
        self._moved: dict[Site, Tensor] = {}
        self.narrow = True
        first = torch.tensor([0], device=m.device)
        with resume.forms(m.anatomy.layers) as self.forms, Meter() as meter:
            self.part(task.base, first, [])
        self.row_bytes = int(MARGIN * meter.peak)
        self.require(0)
        self.logits = self.capture(task.base, [])[0]
        self.narrow = reads_last_only(task, self.logits)
        if not self.narrow:
            with Meter() as meter:
                self.part(task.base, first, [])
            self.row_bytes = int(MARGIN * meter.peak)
            self.require(3 * task.pairs * task.width * self.logits[0].nbytes)
            self.logits = self.capture(task.base, [])[0]
        self.tokens = _last(task.base.tokens) if self.narrow else task.base.tokens
        self.baseline = evaluate(task, self.logits, self.tokens, "the base run").float()
        self.target = evaluate(task, self.capture(task.source, [])[0], self.tokens, "the source run").float()
        telling(task, self.baseline, self.target)

    def capture(self, run: Run, sites: Sequence[Site]) -> tuple[Tensor, Activations | None]:
        """Logits (of the last token, if `narrow`) and activations of one run, a few pairs at a time."""
        n = self.task.pairs
        step = max(1, min(n, AT_ONCE[kind(self.m)] // self.task.width, self.budget // (2 * self.row_bytes)))
        parts: list[tuple[Tensor, Activations | None]] = []
        for pairs in torch.arange(n, device=self.m.device).split(step):
            parts.append(self.part(run, pairs, sites))
            if len(parts) == 1 and (acts := parts[0][1]) is not None:
                self.require(self.nbytes + nbytes(acts.tensors) * n // len(pairs))
        kept = [part for _, part in parts if part is not None]
        return torch.cat([logits for logits, _ in parts]), _stacked(kept) if kept else None

    def part(self, run: Run, pairs: Tensor, sites: Sequence[Site]) -> tuple[Tensor, Activations | None]:
        """The same of some pairs [pair], at once."""
        tokens = Tokens(run.tokens.ids[pairs], run.tokens.mask[pairs])
        with ExitStack() as stack:
            stack.enter_context(self.m.using(Use(edits=given(run, pairs))))
            if self.narrow:
                stack.enter_context(resume.narrowed(self.m.hf, tokens.last))
            if not sites:
                return self.m(tokens).float(), None
            acts = self.m.capture(tokens, sites, logits=True)
        assert acts.logits is not None
        logits, acts.logits = acts.logits.float(), None
        return logits, acts

    def require(self, kept: int) -> None:
        """Raises BudgetError where the budget does not hold `kept` bytes and one patched run."""
        least = kept + 2 * self.row_bytes
        if self.budget < least:
            raise BudgetError(
                f"budget={self.budget:,} bytes is too small for one patch: the two runs' activations at these nodes "
                f"take {human(kept)} and one patched run {human(self.row_bytes)}, its prefix as much again; give at "
                f"least {least:,}, or fewer nodes or pairs at a time"
            )

    def prepare(self, nodes: Sequence[Node]) -> None:
        """Captures what both runs have at the nodes' sites, and the base's residual stream before their layers."""
        anatomy, wanted = self.m.anatomy, {site.base for n in nodes for site in n.sites}
        plain = [s for s in wanted if not s.kind.routed and s not in self.there]
        routed = {s.layer for s in wanted if s.kind.routed and s.layer is not None} - self.experts.keys()
        routed_sites = [Site(n, layer) for layer in routed for n in ("expert_ids", "expert_weight", "expert_out")]
        starts = {n.layer for n in nodes} - {0} - self.streams.keys()
        streams = [Site("resid_pre", i) for i in starts if ("resid_pre", i) in anatomy.places]
        if not plain and not routed_sites and not streams:
            return
        _, here = self.capture(self.task.base, [*plain, *routed_sites, *streams])
        assert here is not None
        self.streams |= {s.layer: here[s] for s in streams if s.layer is not None}
        if plain or routed_sites:
            _, there = self.capture(self.task.source, [*plain, *routed_sites])
            assert there is not None
            self.here |= {s: here[s] for s in plain}
            self.there |= {s: there[s] for s in plain}
            self.experts |= {layer: (here.experts(layer), there.experts(layer)) for layer in routed}

    def differs(self, node: Node) -> Tensor:
        """True where the two runs have different activations at a node [pair]."""
        found = torch.zeros(self.task.pairs, dtype=torch.bool, device=self.m.device)
        for site in node.sites:
            mask = self._differing(site)
            at = mask if node.position is None else mask[:, node.position : node.position + 1]
            found |= at.any(1)
        return found

    def _differing(self, site: Site) -> Tensor:
        """Tokens at which the runs differ at a site [pair, pos]; kept, since every position asks for it."""
        if site in self._moved:
            return self._moved[site]
        if site.kind.routed:
            assert site.layer is not None
            a, b = (contribution(e, dict(site.index)["expert"], site.name) for e in self.experts[site.layer])
            self._moved[site] = (a != b).flatten(2).any(2)
        else:
            differs = narrow(self.here[site.base], site) != narrow(self.there[site.base], site)
            gone = {site.kind.index[key] for key, _ in site.index}
            axis = [a for a in site.kind.axes if a not in gone].index(site.kind.axes[site.kind.pos_axis])
            self._moved[site] = differs.movedim(axis, 1).flatten(2).any(2) if differs.dim() > 2 else differs
        return self._moved[site]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        experts = [[e.ids, e.weights, e.out] for both in self.experts.values() for e in both]
        return nbytes(self.here, self.there, self.streams, experts, self._moved, self.logits)


def kind(m: Model) -> str:
    return "cpu" if m.device.type == "cpu" else "cuda"


def given(run: Run, pairs: Tensor) -> list[Any]:
    """The write that stands in for the embeddings where a run has its own."""
    return [] if run.embeds is None else [Given(Site("embed"), run.embeds, pairs)]


def _last(tokens: Tokens) -> Tokens:
    """Each row's last token alone."""
    ids = tokens.ids.gather(1, tokens.last[:, None])
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def contribution(e: ExpertActivations, expert: int, name: str) -> Tensor:
    """An expert's weight [pair, pos, 1], or (expert_out) weight x output [pair, pos, d_model]; 0 where not chosen."""
    hit = ((e.ids == expert) * e.weights)[..., None]
    if name == "expert_weight":
        return hit.sum(2)
    assert e.out is not None
    return (hit * e.out).sum(2)


def reads_last_only(task: Task, last: Tensor) -> bool:
    """Does the metric read each row's last token only, and take logits [pair, 1, vocab] of just these?

    It is tried out: NaN in the other columns must not reach the value.
    """
    ids = torch.zeros(task.pairs, 2, dtype=torch.long, device=last.device)
    real = torch.ones_like(ids, dtype=torch.bool)
    behind = torch.tensor([True, False], device=last.device).expand_as(real)
    nothing = torch.full_like(last, torch.nan)
    try:
        value = task.metric(last, Tokens(ids[:, :1], real[:, :1]))
        tests = [task.metric(torch.cat([nothing, last], 1), Tokens(ids, real))]
        if task.padded:  # it must find the last real token, and not read the last column
            tests.append(task.metric(torch.cat([last, nothing], 1), Tokens(ids, behind)))
    except Exception:  # a metric that needs the whole sequence says so in its own way
        return False
    return bool(torch.isfinite(value).all()) and all(torch.equal(value, test) for test in tests)


def _stacked(parts: list[Activations]) -> Activations:
    """Activations of several groups of pairs as one."""
    if len(parts) == 1:
        return parts[0]
    tokens = Tokens(torch.cat([p.tokens.ids for p in parts]), torch.cat([p.tokens.mask for p in parts]))
    tensors = {site: torch.cat([p.tensors[site] for p in parts]) for site in parts[0].tensors}
    first = parts[0]
    return Activations(tokens, tensors, None, first.model, first.n_experts, first.rotary, first.keep)
