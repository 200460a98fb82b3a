"""GradDrop of AtP*: gradients with one layer's contribution taken away at a time.

A node's direct effect and its effect through later layers may cancel in the gradient, and plain AtP then misses a node
whose true effect is large. GradDrop (Kramár et al., arXiv 2403.00745, eq. 11) stops the gradient through what layer l
writes into the residual stream, for each l in turn, and averages the absolute estimates::

    write_l = resid_post[l] - resid_pre[l]          x' = resid_pre[l] + stop_gradient(write_l)
    score = E over pairs of 1 / (L - 1) sum_l |I_l(node)|

A node of layer l itself only acts through the write, so its own term is 0; and 1 / (L - 1) gives a node that acts
directly the score that AtP gives it.

One forward pass serves all L gradients. Above layer l nothing changes. At its input the gradient is by definition the
one at its output, so the pass is taken up there, with ``dL/d resid_post[l]`` as the cotangent of ``resid_pre[l]``:
about (L + 1) / 2 backward passes in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from interp.sites import Site

Gradient = dict[Site, Tensor]


def gradients(output: Tensor, cotangent: Tensor | None, at: dict[Site, Tensor]) -> Gradient:
    """d output / d activation at each site, for activations in the graph; 0 where the output does not depend on it."""
    sites = [site for site in at if at[site].requires_grad]
    cotangents = None if cotangent is None else [cotangent]
    found = torch.autograd.grad([output], [at[s] for s in sites], cotangents, retain_graph=True, allow_unused=True)
    given = {site: g for site, g in zip(sites, found, strict=True) if g is not None}
    return {site: given[site] if site in given else torch.zeros_like(t) for site, t in at.items()}


def dropped(
    full: Gradient, streams: dict[Site, Tensor], at: dict[Site, Tensor], n_layers: int
) -> Iterator[tuple[int, Gradient]]:
    """For each layer l: the gradients with l's write taken out, at the sites that this changes (those up to l).

    Args:
        full: the gradient at every site of `at`, and at every resid_post.
        streams: resid_pre of every layer, in the graph.
        at: the activations of interest, in the graph.
        n_layers: layers of the model.
    """
    for layer in range(n_layers):
        cotangent = full[Site("resid_post", layer)]
        below = {s: t for s, t in at.items() if s.layer is None or s.layer < layer}
        found = gradients(streams[Site("resid_pre", layer)], cotangent, below) if below else {}
        for site in at:
            if site.layer == layer:
                own = {"resid_pre": cotangent, "resid_post": full.get(site)}.get(site.name)
                found[site] = torch.zeros_like(at[site]) if own is None else own
        yield layer, found


def score(full: Tensor, without: Sequence[tuple[int, Tensor]], layers: Tensor, n_layers: int) -> Tensor:
    """1 / (L - 1) sum over l of |I_l| [node, pair].

    Args:
        full: the estimate by the whole gradient [node, pair], which is also I_l for every l below the node.
        without: (l, I_l), for the nodes that are not above l; their other rows do not count.
        layers: the layer of each node [node].
        n_layers: L; a model of one layer has no other to drop, and keeps |I|.
    """
    if n_layers < 2:
        return full.abs()
    total = torch.zeros_like(full)
    for layer, estimate in without:
        total += torch.where((layers > layer)[:, None], full, estimate).abs()
    return total / (n_layers - 1)
