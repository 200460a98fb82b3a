"""One base run with gradients, and the estimate of every node's effect that follows from it.

The estimate of a node is (activation of the source run - activation of the base run) . dL/d activation, first order in
the node alone (AtP: Nanda 2023; Kramár et al., arXiv 2403.00745, eq. 4). With `fixes`, queries, keys and router scores
go exactly through the softmax or choice that they meet and linearly from there on (`qk_fix`, `router_fix`).

Which gradient it is taken with is the caller's: the run's own, those of GradDrop, a mean along a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interp.activations import Activations, Tokens
from interp.hooks import resume
from interp.model import Use
from interp.patching import graddrop, router_fix, scores
from interp.patching.experts_grad import Widened, per_expert
from interp.patching.gather import Group, gather
from interp.patching.graddrop import Gradient
from interp.patching.qk_fix import KeyMoves, QueryMoves
from interp.patching.recorded import Recorded, given
from interp.patching.secant import secants, wide
from interp.patching.task import PatchError, Run
from interp.sites import Site

#: Nodes by layer (None: before the layers): their numbers, and their groups, in which they are counted from 0.
Levels = dict[int | None, tuple[Tensor, list[Group]]]


class Linear:
    """The base run of some pairs, with its graph.

    Args:
        recorded: the task's two runs.
        pairs: which pairs [pair].
        groups: the nodes.
        there: the source run of these pairs at the nodes' sites.
        fixes: take queries, keys and router scores through their softmax.
        streams: keep the residual streams too, for GradDrop.
        secant: gradients are secants between the two runs and not tangents (`secant`); with `fixes`, of nodes alone.
        embeds: embeddings to run instead of the base's own [pair, pos, d_model].
        here: activations of the base run, where they are not this run's.
    """

    def __init__(
        self,
        recorded: Recorded,
        pairs: Tensor,
        groups: Sequence[Group],
        there: Activations,
        *,
        fixes: bool = False,
        streams: bool = False,
        secant: bool = False,
        embeds: Tensor | None = None,
        here: Activations | None = None,
    ) -> None:
        self.m, self.recorded, self.pairs, self.groups, self.there = recorded.m, recorded, pairs, groups, there
        self.secant, self.alone, self.notes = secant, fixes, dict[int, str]()
        self.queries: dict[int, QueryMoves] = {}
        self.keys: dict[int, KeyMoves] = {}
        self.routers: dict[int, Tensor] = {}
        self.tokens = _rows(recorded.task.base, pairs).tokens
        bases = {g.base for g in groups}
        self.routed = sorted({s.layer for s in bases if s.kind.routed and s.layer is not None})
        more = {i: there.experts(i).ids for i in self.routed}
        if here is not None:
            more = {i: torch.cat([here.experts(i).ids, ids], -1) for i, ids in more.items()}
        if fixes:
            more |= self._routers(sorted({s.layer for s in bases if s.name == "router_logits" and s.layer is not None}))
        attending = sorted({s.layer for s in bases if fixes and s.name in ("q", "k") and s.layer is not None})
        sites = {s for s in bases if not s.kind.routed} | {Site("pattern", i) for i in attending}
        sites |= {Site(n, i) for i in attending for n in ("q", "k")}
        sites |= {Site(n, i) for i in more for n in ("expert_ids", "expert_weight", "expert_out")}
        if streams:
            sites |= {Site(n, i) for i in range(self.m.n_layers) for n in ("resid_pre", "resid_post")}
        sites |= {Site("embed")} if secant else set()
        self.run = self._forward(sorted(sites), more, embeds)
        self.here = here or self.run
        for layer in attending:
            self._attention(layer, bases)

    # -- the run -----------------------------------------------------------------------------------------------
    def _forward(self, sites: list[Site], more: dict[int, Tensor], embeds: Tensor | None) -> Activations:
        base, n = _rows(self.recorded.task.base, self.pairs), len(self.pairs)
        base = base if embeds is None else Run(base.tokens, embeds)
        if self.secant:
            base, more = self._beside(base), {i: torch.cat([ids, ids]) for i, ids in more.items()}
        every = torch.arange(len(base), device=self.m.device)
        edits: list[Any] = [*given(base, every), *(w for i, ids in more.items() for w in Widened(i, ids).writes())]
        with ExitStack() as stack:
            stack.enter_context(self.m.using(Use(edits=edits)))
            if self.recorded.narrow:
                stack.enter_context(resume.narrowed(self.m.hf, base.tokens.last))
            if self.secant:
                stack.enter_context(secants(self.m.hf, len(base), self._apart(), self.alone))
            acts = self.m.capture(base.tokens, sites, logits=True, grad=True)
        assert acts.logits is not None
        self.graph, self.logits = acts.tensors, acts.logits
        # The metric is given every pair, since it may hold an answer for each: the others as they are.
        logits = self.recorded.logits.clone()
        logits[self.pairs] = acts.logits[:n].float()
        with torch.enable_grad():
            value = self.recorded.task.metric(logits, self.recorded.tokens)
            if not value.requires_grad:
                raise PatchError(
                    f"metric {self.recorded.task.metric.name!r} has no gradient (an argmax, .item(), .detach() or "
                    "no_grad inside?), and estimates are made of gradients; use a smooth metric, or the exact `patch`"
                )
            self.value = value[self.pairs].sum()
        return replace(acts, tensors={s: t[:n] for s, t in acts.tensors.items()}) if self.secant else acts

    def _beside(self, base: Run) -> Run:
        """The rows of the base run, and under them those of the source run."""
        task = self.recorded.task
        both = base, _rows(task.source, self.pairs)
        tokens = Tokens(torch.cat([run.tokens.ids for run in both]), torch.cat([run.tokens.mask for run in both]))
        if all(run.embeds is None for run in both):
            return Run(tokens)
        rows = []
        for run, whole in zip(both, (task.base, task.source), strict=True):
            acts = None if run.embeds is not None else self.recorded.part(whole, self.pairs, [Site("embed")])[1]
            rows.append(run.embeds if acts is None else acts[Site("embed")].detach())
        return Run(tokens, torch.cat([row.to(self.m.dtype) for row in rows if row is not None]))

    def _apart(self) -> list[Any]:
        """Modules that sort tokens by expert, in which the two runs' rows do not lie side by side."""
        names = ("router_logits", "expert_ids", "expert_weight", "expert_out")
        found = {}
        for (name, layer), place in self.m.anatomy.places.items():
            if name in names and layer is not None:
                found[id(place.module)] = place.module
                self.notes[layer] = "routed experts and their router by their slope: the runs choose different experts"
        return list(found.values())

    def explained(self, gradient: Gradient) -> tuple[Tensor, Tensor]:
        """Sum of the estimates of all embeddings, and the difference that the runs make to the metric [pair].

        The two are equal where every step between is a secant. The metric itself goes by its slope.
        """
        n, embed = len(self.pairs), self.graph[Site("embed")].detach()
        (slope,) = torch.autograd.grad([self.value], [self.logits], retain_graph=True)
        gap = wide(slope[:n]) * wide(self.logits[n:] - self.logits[:n]).detach()
        made = wide(gradient[Site("embed")]) * wide(embed[n:] - embed[:n])
        return made.flatten(1).sum(1), gap.flatten(1).sum(1)

    def _attention(self, layer: int, bases: set[Site]) -> None:
        """What queries and keys of a layer do to its pattern, where the recipe of its scores is known."""
        q, k, pattern = (self.run[Site(n, layer)].detach() for n in ("q", "k", "pattern"))
        bias, sink = self._added[layer]
        recipe = scores.explain(self.m, layer, bias, sink, q, k, pattern, self.tokens.mask)
        if isinstance(recipe, str):
            self.notes[layer] = f"queries and keys by their slope: {recipe}"
            return
        if (site := Site("q", layer)) in bases:
            self.queries[layer] = QueryMoves.of(recipe, q, k, self.there[site])
        if (site := Site("k", layer)) in bases:
            self.keys[layer] = KeyMoves.of(recipe, q, k, self.there[site])

    @property
    def _added(self) -> dict[int, tuple[Tensor, Tensor]]:
        """What is added to the scores; without padding one row speaks for all, here and in every other batch."""
        if (kept := self.__dict__.get("_bias")) is None:
            layers = sorted(
                {g.base.layer for g in self.groups if g.base.name in ("q", "k") and g.base.layer is not None}
            )
            whole = not self.recorded.task.padded
            store = self.recorded.__dict__.setdefault("_added", {}) if whole else {}
            if not store:
                tokens = self.tokens if not whole else Tokens(self.tokens.ids[:1], self.tokens.mask[:1])
                store |= scores.added(self.m, tokens, layers)
            kept = self.__dict__["_bias"] = store
        return kept

    def _routers(self, layers: list[int]) -> dict[int, Tensor]:
        """Finds the moves of each router's weights; gives, per layer, the experts that some move would bring in."""
        for i in [i for i in layers if not router_fix.reaches(self.m, i)]:
            layers.remove(i)
            self.notes[i] = "router scores by their slope: experts outside transformers' experts interface"
        if not layers:
            return {}
        sites = [Site(n, i) for i in layers for n in ("router_logits", "expert_ids", "expert_weight")]
        with torch.no_grad(), self.m.using(Use(edits=given(self.recorded.task.base, self.pairs))):
            here = self.m.capture(self.tokens, sites)
        more: dict[int, Tensor] = {}
        for i in layers:
            logits, ids, weights = (here[s].flatten(0, 1) for s in sites if s.layer == i)
            rule = router_fix.rule_of(logits, ids, weights) if logits.shape[-1] == self.m.n_experts else None
            if rule is None:
                self.notes[i] = "router scores by their slope: no known rule makes this router's weights"
                continue
            frame = self.tokens.ids.shape
            change = router_fix.moved(rule, logits, self.there[Site("router_logits", i)].flatten(0, 1))
            self.routers[i] = change.unflatten(0, frame)
            more[i] = router_fix.entering(change, ids).unflatten(0, frame)
            if i in self.routed:
                more[i] = torch.cat([more[i], self.there.experts(i).ids], -1)
        return more

    # -- gradients ---------------------------------------------------------------------------------------------
    @property
    def at(self) -> dict[Site, Tensor]:
        """The activations in the graph that estimates are made with."""
        sites = {self._through(g) for g in self.groups} | ({Site("embed")} if self.secant else set())
        return {s: self.graph[s] for s in sorted(sites)}

    def _through(self, g: Group) -> Site:
        """Where the gradient is taken that a group is estimated with: behind the softmax or choice, if it is fixed.

        Fixed are whole queries, keys and scores; a single coordinate or another part of one goes by its slope.
        """
        site, layer = g.base, g.base.layer
        fixes: dict[str, dict[int, Any]] = {"q": self.queries, "k": self.keys, "router_logits": self.routers}
        if layer not in fixes.get(site.name, {}) or g.part is not None or g.keys not in (("head",), ("expert",)):
            return site
        return Site("expert_weight" if site.name == "router_logits" else "pattern", layer)

    def gradient(self) -> Gradient:
        """dL / d activation at every site that estimates are made with."""
        found = graddrop.gradients(self.value, None, self.at)
        return {s: g[: len(self.pairs)] for s, g in found.items()} if self.secant else found

    def dropped(self, levels: Levels, n_nodes: int, apart: bool = False) -> tuple[Tensor, Tensor]:
        """Signed estimates by the whole gradient, and GradDrop's scores [node, pair].

        Args:
            levels: the nodes by layer: their numbers, and their groups, in which they are counted from 0.
            n_nodes: how many there are in all.
            apart: do not rely on the residual stream alone (`graddrop.apart`).
        """
        value, score = torch.zeros(2, n_nodes, len(self.pairs), device=self.m.device)
        streams = {s: t for s, t in self.run.tensors.items() if s.name in ("resid_pre", "resid_post")}
        walk = graddrop.apart if apart else graddrop.walk
        for layer, gradient in walk(self.value, streams, self.at, self.m.n_layers):
            if layer in levels:
                numbers, groups = levels[layer]
                rows = self._rows(gradient, groups, len(numbers))
                value[numbers], score[numbers] = rows[0], graddrop.score(rows, layer, self.m.n_layers)
        return value, score

    # -- estimates ---------------------------------------------------------------------------------------------
    def estimate(self, gradient: Gradient, n_nodes: int) -> Tensor:
        """Estimated effect of each node [node, pair]; nodes at sites that `gradient` lacks get 0."""
        return gather(self.groups, n_nodes, len(self.pairs), partial(self._map, gradient))

    def _rows(self, gradient: Gradient, groups: Sequence[Group], n_nodes: int) -> Tensor:
        """`estimate` [row, node, pair] by gradients [row, pair, pos, ...], for some of the groups."""
        first = next(iter(gradient.values()))
        out = torch.zeros(len(first), n_nodes, len(self.pairs), device=first.device)
        for g in groups:
            out.index_add_(1, g.node, torch.func.vmap(partial(self._looked_up, g=g))(gradient))
        return out

    def _looked_up(self, gradient: Gradient, g: Group) -> Tensor:
        values = self._map(gradient, g)
        assert values is not None  # the gradient has every site of its layer
        return g.look_up(values.float())

    def _map(self, gradient: Gradient, g: Group) -> Tensor | None:
        site, layer, through = g.base, g.base.layer, self._through(g)
        assert layer is not None or site.name == "embed"
        if through not in gradient:
            return None
        if through.name == "pattern" and site.name != "pattern":
            assert layer is not None
            return (self.queries if site.name == "q" else self.keys)[layer].effect(gradient[through])
        if site.name == "router_logits" and through != site:
            assert layer is not None
            slope = self._slopes(gradient, layer)
            return None if slope is None else torch.einsum("btef,btf->bte", self.routers[layer], slope)
        if site.kind.routed:
            assert layer is not None
            return self._experts(gradient, site, layer)
        here, there = self.here[site].detach(), self.there[site]
        moved = (there if g.part is None else g.part(here, there)) - here
        return g.reduce(moved.float() * gradient[site].float())

    def _slopes(self, gradient: Gradient, layer: int) -> Tensor | None:
        """dL/d weight of every expert [pair, pos, expert], 0 for those that neither run needs."""
        slot = gradient.get(Site("expert_weight", layer))
        return None if slot is None else per_expert(self._slots(layer), slot[..., :-1], self.m.n_experts)

    def _slots(self, layer: int) -> Tensor:
        return self.run[Site("expert_ids", layer)][..., :-1]

    def _experts(self, gradient: Gradient, site: Site, layer: int) -> Tensor | None:
        there, n = self.there.experts(layer), self.m.n_experts
        own = there.ids.shape[-1]  # the slots that the router gave
        ids, weights, out = (self.here[Site(name, layer)][..., :own, :] if name == "expert_out" else
                             self.here[Site(name, layer)][..., :own]
                             for name in ("expert_ids", "expert_weight", "expert_out"))  # fmt: skip
        if site.name == "expert_weight":
            moved = router_fix.dense(there.ids, there.weights, n) - router_fix.dense(ids, weights.detach(), n)
            slope = self._slopes(gradient, layer)
            return None if slope is None else moved * slope
        assert there.out is not None
        y = gradient[site][..., -1:, :].float()  # d L / d what the layer's experts add
        added = [
            ((w[..., None].float() * o.float()) * y).sum(-1)
            for w, o in ((there.weights, there.out), (weights.detach(), out.detach()))
        ]
        return router_fix.dense(there.ids, added[0], n) - router_fix.dense(ids, added[1], n)


def _rows(run: Run, pairs: Tensor) -> Run:
    tokens = Tokens(run.tokens.ids[pairs], run.tokens.mask[pairs])
    return Run(tokens, None if run.embeds is None else run.embeds[pairs])
