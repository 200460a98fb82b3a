"""Exact effects of joint patches, many in one batch, each computing only what it can change.

`Patcher` knows one task (two runs, a metric, a direction) and gives the effect of any set of nodes, patched together.
Four things make a sweep quick, and each is exact:

* a set whose activations are the same in both runs (all tokens before the first differing one) has effect 0;
* a patch in layer l is run from layer l on, from the residual stream that the base run left there;
* a patch at position p is run from position p on, over the keys and values (or states) that the base run left before;
* where the metric reads one token per row, only its logits are made.

None of them is taken on trust. Before its first use, each shortcut must give back the logits of the unpatched base run;
a family where it does not (late layers that look past the residual stream, a cache that cannot be copied) is run whole,
and the result says so (`Patcher.shortcuts`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.hooks import resume
from interp.interrupted import carried
from interp.model import Use
from interp.patching.memory import MARGIN, Meter, default_budget, nbytes
from interp.patching.nodes import Node
from interp.patching.recorded import AT_ONCE, Recorded, given, kind
from interp.patching.task import Direction, PatchError, Task, evaluate, without_flash
from interp.patching.writes import Entry, Given, writes
from interp.progress import bar
from interp.sites import Site

if TYPE_CHECKING:
    from interp.model import Model


def effects(
    m: Model,
    clean: Any,
    corrupt: Any,
    metric: Any,
    sets: Sequence[Sequence[Node]],
    direction: Direction = "denoise",
    budget: int | None = None,
) -> Tensor:
    """Effect of jointly patching each set of nodes: metric of the patched base run - metric of the base run.

    Args:
        m: the model.
        clean: prompts as text, ids or Tokens [pair, pos]; or Pairs, with `corrupt` None.
        corrupt: their corrupt twins, token by token.
        metric: a function of logits [pair, pos, vocab] giving [pair], or a Metric.
        sets: sets of nodes, each patched together (see `nodes.expand`).
        direction: "denoise" patches the corrupt run with clean activations, "noise" the other way round.
        budget: bytes that may be used at the peak; by default 1 GiB, on a GPU half of what is free.

    Returns:
        float32 [set, pair], NaN where a pair has no such position.

    Raises PatchError (runs that do not pair, a metric that is NaN or tells nothing) and BudgetError (a budget that does
    not hold one patch).
    """
    return Patcher(m, clean, corrupt, metric, direction, budget).effects(sets)


@dataclass(frozen=True)
class Row:
    """One patch of one pair: the n-th set, what is patched, and from where on something changes."""

    set: int
    pair: int
    nodes: tuple[Node, ...]
    layer: int
    position: int


class Patcher:
    """Effects of patches on one task. Keeps what the base and source runs left, so further sets cost only themselves.

    Attributes:
        recorded: what the two runs left.
        shortcuts: what was skipped, or why it was not.
        rows: patched rows run so far (one set on one pair each); sets without a difference cost none.
        passes: what they cost in forward passes of one pair (the share of layers times the share of positions).
    """

    def __init__(
        self,
        m: Model,
        clean: Any,
        corrupt: Any,
        metric: Any,
        direction: Direction = "denoise",
        budget: int | None = None,
    ) -> None:
        self.m, self.task = m, Task.of(m, clean, corrupt, metric, direction)
        self.budget = default_budget(m.device) if budget is None else int(budget)
        self.rows, self.passes = 0, 0.0
        self.shortcuts: dict[str, str] = {}
        self._trusted: dict[tuple[int, bool], tuple[bool, bool]] = {}
        self._prefix: tuple[int, Any] = (0, None)
        self._bytes: tuple[int, int] | None = None
        with without_flash(m) as switched, torch.no_grad():
            self.recorded = Recorded(m, self.task, self.budget)
        if switched:
            self.shortcuts["attention"] = f"switched for the time of patching: {switched}"

    @property
    def baseline(self) -> Tensor:
        """The metric of the base run [pair]."""
        return self.recorded.baseline

    @property
    def target(self) -> Tensor:
        """The metric of the source run [pair]."""
        return self.recorded.target

    # -- effects -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def effects(self, sets: Sequence[Sequence[Node]]) -> Tensor:
        """Effect of jointly patching each set of nodes: float32 [set, pair]. See `effects`.

        Interrupted, it puts by the sets it had finished; the rows of the others are NaN.
        """
        for i, nodes in enumerate(sets):
            if isinstance(nodes, Node):
                raise PatchError(f"sets[{i}]: expected a set of nodes, got the node {nodes}; write [[node], ...]")
        with without_flash(self.m):
            self.recorded.prepare([n for nodes in sets for n in nodes])
            rows = [row for i, nodes in enumerate(sets) for row in self._moving(i, nodes)]
            logits: dict[int, dict[int, Tensor]] = {}
            left = [0] * len(sets)
            for row in rows:
                left[row.set] += 1
            out = torch.zeros(len(sets), self.task.pairs, device=self.m.device)

            def so_far() -> Tensor:
                return self._known(out, sets).masked_fill(torch.tensor(left)[:, None] > 0, torch.nan)

            with carried(so_far), bar("patching", len(rows)) as advance:
                for chunk in self._chunks(rows):
                    for row, made in zip(chunk, self._run(chunk), strict=True):
                        logits.setdefault(row.set, {})[row.pair] = made
                        if len(logits[row.set]) == left[row.set]:
                            out[row.set] = self._effect(logits.pop(row.set), sets[row.set])
                            left[row.set] = 0
                    advance(len(chunk))
        self._prefix = (0, None)
        return self._known(out, sets)

    def _known(self, out: Tensor, sets: Sequence[Sequence[Node]]) -> Tensor:
        """Effects [set, pair], NaN where a pair has no such position."""
        lengths = self.task.lengths()
        for i, nodes in enumerate(sets):
            reach = max((n.position for n in nodes if n.position is not None), default=-1)
            out[i, lengths <= reach] = torch.nan
        return out.cpu()

    def _effect(self, made: dict[int, Tensor], nodes: Sequence[Node]) -> Tensor:
        """Metric with the pairs' new logits, minus baseline [pair]."""
        logits = self.recorded.logits.clone()
        for pair, new in made.items():
            logits[pair, logits.shape[1] - new.shape[0] :] = new
        what = f"the run patched at {', '.join(f'{n}@{n.position}' for n in nodes[:3])}"
        return evaluate(self.task, logits, self.recorded.tokens, what).float() - self.baseline

    def _moving(self, index: int, nodes: Sequence[Node]) -> Iterator[Row]:
        """The pairs for which a set's activations differ between the runs."""
        if not nodes:
            return
        layer = min(n.layer for n in nodes)
        everywhere = any(n.position is None or s.name == "pattern" for n in nodes for s in n.sites)
        position = 0 if everywhere else min(n.position for n in nodes if n.position is not None)
        moves = torch.stack([self.recorded.differs(n) for n in nodes]).any(0)
        for pair in moves.nonzero().flatten().tolist():
            yield Row(index, pair, tuple(nodes), layer, position)

    # -- batches -----------------------------------------------------------------------------------------------
    def _chunks(self, rows: list[Row]) -> list[list[Row]]:
        """Rows that run together: one first layer, like first positions, within the budget."""
        if not rows:
            return []
        self.recorded.require(self._kept())
        self._measure()
        chunks: list[list[Row]] = []
        for row in sorted(rows, key=lambda r: (r.layer, r.position)):
            last = chunks[-1] if chunks else None
            if last is None or last[0].layer != row.layer or len(last) >= self._most(last[0]):
                chunks.append([row])
            else:
                last.append(row)
        return sorted(chunks, key=lambda c: c[0].position)  # so that each prefix is computed once

    def _kept(self) -> int:
        """Bytes that stay while batches run: what was recorded, and the logits of sets that are under way."""
        return self.recorded.nbytes + (1 if self.recorded.narrow else 3) * nbytes(self.recorded.logits)

    def _measure(self) -> None:
        """Bytes of one row run whole, and of one run at the last position only; between them they grow evenly."""
        if self._bytes:
            return
        one, last = torch.tensor([0], device=self.m.device), self.task.width - 1
        found = [self.recorded.row_bytes]
        try:
            self._prefix_for(one, last)
            with Meter() as meter:
                self._forward(one, [], 0, last)
            found.append(int(MARGIN * meter.peak))
        except Exception:  # no prefixes in this family: `_gives_back` will find out, and say why
            self._prefix = (0, None)
        self._bytes = (found[0], found[-1])

    def _most(self, row: Row) -> int:
        """How many rows like this one fit into one batch."""
        share = 1 - row.position / self.task.width
        written = 3 * max((nbytes(t) // self.task.pairs for t in self.recorded.there.values()), default=0)
        assert self._bytes is not None
        each = written + self._bytes[1] + share * (self._bytes[0] - self._bytes[1])
        room = (self.budget - self._kept() - self.recorded.row_bytes) / max(each, 1)
        return max(1, min(int(room), int(AT_ONCE[kind(self.m)] / (self.task.width * share))))

    def _run(self, chunk: list[Row]) -> Tensor:
        """Logits of the patched rows: [row, 1, vocab] where the metric reads the last token, else [row, pos, vocab]."""
        pairs = torch.tensor([row.pair for row in chunk], device=self.m.device)
        entries = [
            Entry(i, site, node.position, node.part)
            for i, row in enumerate(chunk)
            for node in row.nodes
            for site in node.sites
        ]
        there = {site: self.recorded.there[site] for site in {e.site.base for e in entries if not e.site.kind.routed}}
        experts = {layer: both[1] for layer, both in self.recorded.experts.items()}
        start, first = self._shortcut(chunk[0])
        made = self._forward(pairs, writes(entries, pairs, there, experts), start, first)
        self.rows += len(chunk)
        depth = (self.m.n_layers - start) / self.m.n_layers
        self.passes += len(chunk) * depth * (self.task.width - first) / self.task.width
        return made

    def _forward(self, pairs: Tensor, edits: list[Any], start: int, first: int) -> Tensor:
        """The base run of the given pairs under `edits`, from layer `start` and position `first` on."""
        m, base = self.m, self.task.base
        ids, mask = base.tokens.ids[pairs], base.tokens.mask[pairs]
        inputs: dict[str, Any] = {"input_ids": ids[:, first:], "attention_mask": mask.long(), "use_cache": first > 0}
        if first:
            inputs["past_key_values"] = self._prefix_for(pairs, first)
        with ExitStack() as stack:
            stack.enter_context(m.using(Use(edits=[*given(base, pairs), *edits])))
            if start:
                stream = self.recorded.streams[start][pairs, first:]
                stack.enter_context(resume.resumed(m.anatomy.layers, start, stream, self.recorded.forms))
            if self.recorded.narrow:
                stack.enter_context(resume.narrowed(m.hf, base.tokens.last[pairs] - first))
            return m.hf(**inputs).logits.float()

    def _prefix_for(self, pairs: Tensor, first: int) -> Any:
        """The base run's cache of the first positions, a row for each of `pairs`; the call may write into it."""
        if self._prefix[0] != first:
            base, every = self.task.base, torch.arange(self.task.pairs, device=self.m.device)
            cuts: list[Any] = [Cut(g) for g in given(base, every)]
            with self.m.using(Use(edits=cuts)):
                mask = base.tokens.mask[:, :first].long()
                out = self.m.hf(input_ids=base.tokens.ids[:, :first], attention_mask=mask, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            if cache is None:
                raise NotImplementedError("this family keeps no cache")
            self._prefix = (first, cache)
        cache = copy.deepcopy(self._prefix[1])
        cache.batch_select_indices(pairs)
        return cache

    # -- shortcuts ---------------------------------------------------------------------------------------------
    def _shortcut(self, row: Row) -> tuple[int, int]:
        """(first layer, first position) from which this row is run: what proved exact."""
        key = (row.layer, row.position > 0)
        if key not in self._trusted:
            start = row.layer if row.layer in self.recorded.streams else 0
            reasons: dict[str, str] = {}
            tries = dict.fromkeys([(start, row.position), (start, 0), (0, row.position)])
            self._trusted[key] = next(
                ((s > 0, p > 0) for s, p in tries if (s or p) and self._gives_back(s, p, reasons)), (False, False)
            )
            resumes, prefixed = self._trusted[key]
            if row.layer and not resumes:
                self.shortcuts["layers"] = (
                    f"run from the first layer: {reasons.get('layers', 'no single residual stream')}"
                )
            elif row.layer:
                self.shortcuts.setdefault("layers", "run from the first patched layer on")
            if row.position and not prefixed:
                self.shortcuts["positions"] = f"run from the first position: {reasons.get('positions', '')}"
            elif row.position:
                self.shortcuts.setdefault("positions", "run from the first patched position on, over a cached prefix")
        resumes, prefixed = self._trusted[key]
        return (row.layer if resumes else 0), (row.position if prefixed else 0)

    def _gives_back(self, start: int, first: int, reasons: dict[str, str]) -> bool:
        """Does an unpatched run by this shortcut give the base run's logits? The first pairs speak for all."""
        what = "positions" if first else "layers"
        try:
            pairs = torch.arange(min(2, self.task.pairs), device=self.m.device)
            new = self._forward(pairs, [], start, first)
        except Exception as error:  # any family may refuse any part of this, in its own words
            self._prefix = (0, None)
            reasons[what] = f"{type(error).__name__}: {error}"[:200]
            return False
        old = self.recorded.logits[pairs][:, -new.shape[1] :]
        mask = torch.ones_like(old[..., 0], dtype=torch.bool)
        if not self.recorded.narrow:
            mask = self.task.base.tokens.mask[pairs][:, -new.shape[1] :]
        gap = float((new - old).abs()[mask].max())
        close = 1e-4 if self.m.dtype in (torch.float32, torch.float64) else 3e-2
        if not gap <= close * max(1.0, float(old.abs().max())):
            reasons[what] = f"the shortcut moves this family's logits by {gap:.2g}"
            return False
        return True


@dataclass(eq=False)
class Cut:
    """The same embeddings for a run of the first positions only."""

    given: Given

    @property
    def site(self) -> Site:
        return self.given.site

    def __call__(self, h: Tensor, clock: Any, ids: Tensor | None = None, inputs: Any = ()) -> Tensor:
        return self.given.value[self.given.pairs, : h.shape[1]].to(h.dtype)
