"""LEACE on a model's states: erases a concept so that no linear probe finds it. The arithmetic is `probes.leace`'s.

Source: Belrose et al. 2023 (arXiv:2306.03819), theorem 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probes.leace import leace as fit
from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.maps import LowRank
from steering.reading import At, read, sites_at
from steering.vector import SteeringMap


def leace(
    m: Any,
    texts: Any,
    labels: Any,
    layer: Any,
    *,
    site: str = "resid_post",
    at: At = "last",
    scope: Any = "all",
    shrink: bool = False,
    tolerance: float = 0.01,
    trace_guard: bool = True,
    chat: bool = False,
    batch_tokens: int = 4096,
) -> SteeringMap:
    """Erases a concept, given by one label per text, from the states at a layer.

    Args:
        m: the model.
        texts: texts.
        labels: one per text, of at least two kinds.
        layer: a layer, several, or "*"; several are fitted apart, each on the unedited model.
        site: where, with `layer` put in.
        at: which token is read.
        scope: to which tokens it is applied.
        shrink: shrink the covariance towards a multiple of the identity (Ledoit-Wolf), for few texts.
        tolerance: singular values of the whitened cross-covariance up to this are taken for noise.
        trace_guard: mix in the orthogonal projection where the oblique one would make the states' total variance
        larger.
        chat: put the texts into the model's chat template.
        batch_tokens: tokens run at once.
    """
    passages = _pairs.texts(m, texts, chat=chat)
    kinds = sorted({str(x) for x in labels})
    if len(labels) != len(passages):
        raise SteeringError(f"labels: there are {len(labels)} for {len(passages)} texts")
    y = torch.tensor([kinds.index(str(x)) for x in labels])
    sites = sites_at(m, layer, site)
    rows = read(m, passages, sites, at, batch_tokens)
    maps = {s: leace_map(x, y, shrink=shrink, tolerance=tolerance, trace_guard=trace_guard) for s, x in rows.items()}
    record = {"labels": kinds, "texts": len(passages), "at": at, "shrink": shrink, "tolerance": tolerance}
    return SteeringMap.of(m, maps, method="leace", scope=scope, record=record)


def leace_map(
    x: Tensor, labels: Tensor, *, shrink: bool = False, tolerance: float = 0.01, trace_guard: bool = True
) -> LowRank:
    """LEACE from states x [row, d] and labels [row] in 0..n-1 (or a concept matrix [row, k])."""
    if x.dim() != 2:
        raise SteeringError(f"leace: states must be [row, d], got {list(x.shape)}")
    z = torch.nn.functional.one_hot(labels).double() if labels.dim() == 1 else labels.double()
    if labels.dim() == 1 and (z.shape[1] < 2 or int((z.sum(0) > 0).sum()) < 2):
        raise SteeringError("labels: all are of one kind; there is nothing to erase")
    if not bool((x != x[:1]).any()):
        raise SteeringError("leace: the states do not vary")
    found = fit(x, z, tolerance=tolerance, shrink=shrink, trace_guard=trace_guard)
    if found.rank == 0:
        raise SteeringError(f"leace: the labels have no linear trace above tolerance={tolerance}; nothing to erase")
    left, right = found.left, found.right  # r(h) = h - left right (h - mean)
    return LowRank(-left.float(), right.float().contiguous(), (left @ (right @ found.mean)).float())
