"""GradDrop of AtP*: gradients with one layer's contribution taken away at a time.

A node's direct effect and its effect through later layers may cancel in the gradient, and plain AtP then misses a node
whose true effect is large. GradDrop (Kramár et al., arXiv 2403.00745, eq. 11) stops the gradient through what layer l
writes into the residual stream, for each l in turn, and averages the absolute estimates::

    write_l = resid_post[l] - resid_pre[l]          x' = resid_pre[l] + stop_gradient(write_l)
    score = E over pairs of 1 / (L - 1) sum_l |I_l(node)|

A node of layer l itself only acts through the write, so its own term is 0; and 1 / (L - 1) gives a node that acts
directly the score that AtP gives it.

One forward pass serves all L gradients, and one walk down the layers makes them. Above layer l nothing changes; at its
input the gradient is by definition the one at its output. So the walk carries a stack of gradients of the residual
stream, the whole one first, takes the stack through a layer in one batched backward step (its weights are read once for
all of them), and leaves each layer with one row more::

    at resid_post[l]: rows  whole, L-1 dropped, ..., l+1 dropped        at resid_pre[l]: the same and  l dropped

That is the work of (L + 1) / 2 backward passes, in L steps (`walk`). It rests on the residual stream being all that one
layer tells the next. Where layers share keys or a router it is not, and cutting the stream cuts too much; `apart` works
on the whole graph instead, by linearity and with two passes per layer. G_l being the gradient at resid_post[l]::

    dropping l = whole gradient - what G_l at resid_post[l] sends down + what G_l at resid_pre[l] sends down
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from interp.sites import Site

Gradient = dict[Site, Tensor]


def gradients(output: Tensor, cotangent: Tensor | None, at: dict[Site, Tensor]) -> Gradient:
    """d output / d activation at each site, for activations in the graph; 0 where the output does not depend on it."""
    found = _grad(output, cotangent, [t for t in at.values() if t.requires_grad])
    given = iter(found)
    made = {site: next(given) if t.requires_grad else None for site, t in at.items()}
    return {site: torch.zeros_like(at[site]) if g is None else g for site, g in made.items()}


def stacked(output: Tensor, cotangents: Tensor, at: dict[Site, Tensor]) -> Gradient:
    """`gradients` for each row of `cotangents` [row, ...], as [row, ...]; at once, where torch can batch the graph."""
    asked = [t for t in at.values() if t.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*")  # a kernel that runs row by row inside
        try:
            found = _grad(output, cotangents, asked, batched=True)
        except RuntimeError:  # some backward step cannot be batched at all
            rows = [_grad(output, row, asked) for row in cotangents]
            found = [None if each[0] is None else torch.stack(each) for each in zip(*rows, strict=True)]
    given = iter(found)
    made = {site: next(given) if t.requires_grad else None for site, t in at.items()}
    n = len(cotangents)
    return {site: at[site].new_zeros(n, *at[site].shape) if g is None else g for site, g in made.items()}


def _grad(output: Tensor, cotangent: Tensor | None, at: list[Tensor], batched: bool = False) -> list[Tensor | None]:
    cotangents = None if cotangent is None else [cotangent]
    return list(
        torch.autograd.grad(
            [output], at, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
    )  # fmt: skip


def walk(
    value: Tensor, streams: dict[Site, Tensor], at: dict[Site, Tensor], n_layers: int
) -> Iterator[tuple[int | None, Gradient]]:
    """Down the layers: the gradients at each layer's sites, whole and with each layer's write from there up taken out.

    Args:
        value: the metric, summed over pairs.
        streams: resid_pre and resid_post of every layer, in the graph.
        at: the activations of interest, in the graph.
        n_layers: L.

    Yields:
        (layer, gradients), from layer L - 1 down to 0, and then None for what comes before the layers. Each gradient is
        [row, pair, pos, ...]: row 0 the whole one, row r with layer L - r taken out; the last row is the layer's own.
    """
    top = Site("resid_post", n_layers - 1)
    stack = gradients(value, None, {top: streams[top]})[top][None]
    for layer in reversed(range(n_layers)):
        entry, exit_ = Site("resid_pre", layer), Site("resid_post", layer)
        inside = {s: t for s, t in at.items() if s.layer == layer and s not in (entry, exit_)}
        found = stacked(streams[exit_], stack, {entry: streams[entry], **inside})
        grown = torch.cat([found.pop(entry), stack[:1]])
        made = {site: torch.cat([g, torch.zeros_like(g[:1])]) for site, g in found.items()}
        made |= {s: g for s, g in ((entry, grown), (exit_, torch.cat([stack, stack[:1]]))) if s in at}
        yield layer, made
        stack = grown
    before = {s: t for s, t in at.items() if s.layer is None}
    if before:
        first = Site("resid_pre", 0)
        yield None, stacked(streams[first], stack, before)


def apart(
    value: Tensor, streams: dict[Site, Tensor], at: dict[Site, Tensor], n_layers: int
) -> Iterator[tuple[int | None, Gradient]]:
    """What `walk` gives, of any graph: each layer's write taken out of the gradient of the whole."""
    whole = gradients(value, None, at | {s: t for s, t in streams.items() if s.name == "resid_post"})
    rows = {site: [whole[site]] for site in at}
    for layer in reversed(range(n_layers)):
        entry, exit_ = Site("resid_pre", layer), Site("resid_post", layer)
        into, past = (gradients(streams[s], whole[exit_], at) for s in (exit_, entry))
        for site in at:
            if site.layer is None or site.layer <= layer:
                left = whole[site] - into[site] + past[site]
                rows[site].append(whole[site] if site == exit_ else left)  # what is read behind the write has it whole
    for level in [*reversed(range(n_layers)), None]:
        made = {site: torch.stack(rows[site]) for site in at if site.layer == level}
        if made:
            yield level, made


def passes(n_layers: int) -> float:
    """What `walk` takes in backward passes of one pair: each row's share of the layers."""
    return (n_layers + 1) / 2


def score(rows: Tensor, layer: int | None, n_layers: int) -> Tensor:
    """1 / (L - 1) sum over l of |I_l| [node, pair], for the nodes of one layer.

    Args:
        rows: estimates [row, node, pair] by the rows of `walk` at this layer.
        layer: the layer, or None before the layers; its nodes do not see layers below it dropped.
        n_layers: L; a model of one layer has no other to drop, and keeps |I|.
    """
    if n_layers < 2:
        return rows[0].abs()
    return (rows[1:].abs().sum(0) + (layer or 0) * rows[0].abs()) / (n_layers - 1)
