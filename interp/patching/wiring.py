"""Running a model with some edges of its residual graph patched, all others as they are.

Along a patched edge writer -> reader, the reader gets what the writer wrote in the source run instead of what it writes
now::

    what a reader reads  =  stream  +  sum over its patched edges of (source write - present write)

where "present" is this very run, so that a circuit is run as one forward pass, upstream changes included (Conmy et al.
2023, arXiv 2304.14997). Heads of one layer read different sums, but a model projects them all from one tensor. So every
reading head gets a row of the batch of its own: row c reads the sum of head c, and behind the projection each row's own
head is taken out and given to all rows. One forward pass, the family's own code, no weights touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.activations import Tokens
from interp.model import Use
from interp.patching.graph import ATTENTION_READERS, Graph, Reader, Write
from interp.sites import Site

#: Rows of a stacked batch times tokens, beyond which a larger batch is no quicker on a CPU.
AT_ONCE = 4096


def run(graph: Graph, base: Tokens, source: Tensor, masks: Tensor, embeds: Tensor | None = None) -> Tensor:
    """Logits of the base run with edges patched.

    Args:
        graph: the residual graph.
        base: tokens of the base run [pair, pos].
        source: what every writer wrote in the source run [writer, pair, pos, d_model] (`Graph.written`).
        masks: True at the edges to patch [run, writer, reader].
        embeds: embeddings of the base run [pair, pos, d_model], where they are not its tokens' (noise).

    Returns:
        logits [run, pair, pos, vocab].
    """
    if masks.shape[1:] != (len(graph.writers), len(graph.readers)):
        raise ValueError(
            f"masks: expected [run, {len(graph.writers)} writers, {len(graph.readers)} readers], got {[*masks.shape]}"
        )
    step = max(1, AT_ONCE // (base.ids.numel() * _copies(graph)))
    with torch.no_grad():
        parts = [_Pass(graph, base, source, part, embeds)() for part in masks.split(step)]
    return torch.cat(parts)


def _copies(graph: Graph) -> int:
    """Rows per run and pair: one for each reading head of a layer."""
    per_layer = [sum(r.layer == i and r.head is not None for r in graph.readers) for i in range(graph.m.n_layers)]
    return max(1, *per_layer)


class _Pass:
    """One stacked forward pass: rows [run, pair, copy]."""

    def __init__(self, graph: Graph, base: Tokens, source: Tensor, masks: Tensor, embeds: Tensor | None) -> None:
        self.graph, self.base, self.source, self.embeds = graph, base, source, embeds
        self.masks = masks.to(source)
        self.runs, self.pairs, self.copies = len(masks), len(base), _copies(graph)
        self.now: dict[int, Tensor] = {}  # writer -> what it wrote in this pass [run, pair, pos, d_model]
        self.at = {w.name: i for i, w in enumerate(graph.writers)}

    def __call__(self) -> Tensor:
        ids, mask = (
            t[None, :, None].expand(self.runs, -1, self.copies, -1).flatten(0, 2)
            for t in (self.base.ids, self.base.mask)
        )
        use = Use(edits=self._writes())
        with self.graph.reading(self._read), self.graph.m.using(use):
            logits = self.graph.m(Tokens(ids, mask))
        return self._split(logits)[:, :, 0]

    def _split(self, h: Tensor) -> Tensor:
        return h.unflatten(0, (self.runs, self.pairs, self.copies))

    def _writes(self) -> list[Any]:
        graph = self.graph
        made = [Write(Site("resid_pre", 0), self._note("embed"))]
        if self.embeds is not None:
            made.insert(0, Write(Site("embed"), self._given))
        for layer in range(graph.m.n_layers):
            if graph.level == "head":
                made += [Write(Site(p, layer), self._gather(layer, p)) for p in ATTENTION_READERS]
                made.append(Write(Site("z", layer), self._note_heads(layer)))
            else:
                made.append(Write(Site("attn_out", layer), self._note(f"attn_out[{layer}]")))
            made.append(Write(Site("mlp_out", layer), self._note(f"mlp_out[{layer}]")))
        return made

    def _given(self, h: Tensor) -> Tensor:
        assert self.embeds is not None
        return self.embeds[None, :, None].expand(self.runs, -1, self.copies, -1, -1).flatten(0, 2).to(h)

    def _note(self, name: str) -> Any:
        def fn(h: Tensor) -> Tensor:
            self.now[self.at[name]] = self._split(h)[:, :, 0]
            return h

        return fn

    def _note_heads(self, layer: int) -> Any:
        def fn(z: Tensor) -> Tensor:
            first = self._split(z)[:, :, 0]
            for head, out in enumerate(self.graph.output[layer]):
                self.now[self.at[f"z[{layer}, head={head}]"]] = first[..., head, :] @ out
            return z

        return fn

    def _gather(self, layer: int, part: str) -> Any:
        """Behind the projection: head h of q (k, v) as the row that read for it has it, given to all rows."""
        own = self._layer_readers(layer)
        rows = [i for i, r in enumerate(own) if r.part == part]

        def fn(h: Tensor) -> Tensor:
            split = self._split(h)  # [run, pair, copy, pos, head, d_head]
            heads = torch.stack([split[:, :, c, :, own[c].head] for c in rows], dim=3)
            return heads[:, :, None].expand_as(split).flatten(0, 2)

        return fn

    def _layer_readers(self, layer: int) -> list[Reader]:
        return [r for r in self.graph.readers if r.layer == layer and r.head is not None]

    def _read(self, reader: Reader, x: Tensor) -> Tensor:
        """The stream as the readers behind this norm get it."""
        group = self._layer_readers(reader.layer) if reader.head is not None else [reader]
        columns = [self.graph.readers.index(r) for r in group]
        delta = self._delta(columns)
        if delta is None:
            return x
        split = self._split(x)
        if len(group) == 1:
            return (split + delta).flatten(0, 2)
        padded = torch.zeros_like(split)
        padded[:, :, : len(group)] = delta
        return (split + padded).flatten(0, 2)

    def _delta(self, columns: Sequence[int]) -> Tensor | None:
        """Sum over patched edges of (source - present), for each reader [run, pair, reader, pos, d_model]."""
        mask = self.masks[:, :, list(columns)]
        used = [u for u in mask.any(-1).any(0).nonzero().flatten().tolist() if u in self.now]
        if not used:
            return None
        change = torch.stack([self.source[u][None] - self.now[u] for u in used])  # [writer, run, pair, pos, d_model]
        return torch.einsum("gur,ugptd->gprtd", mask[:, used].to(change), change)
