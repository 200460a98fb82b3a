"""LEACE: the affine map that removes all linear trace of a concept and changes the states least.

    r(h) = h - W+ P (W (h - mu)),   W = (Sigma_xx^1/2)+,   P the projection on the columns of W Sigma_xz

No linear probe can do better on r(h) than a constant. Source: Belrose et al. 2023 (arXiv:2306.03819), theorem 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    h = x.double()
    z = torch.nn.functional.one_hot(labels).double() if labels.dim() == 1 else labels.double()
    if labels.dim() == 1 and (z.shape[1] < 2 or int((z.sum(0) > 0).sum()) < 2):
        raise SteeringError("labels: all are of one kind; there is nothing to erase")
    mean, z = h.mean(0), z - z.mean(0)
    h = h - mean
    xx, xz = h.T @ h / len(h), h.T @ z / len(h)
    if shrink:
        xx = _ledoit_wolf(h, xx)
    value, vector = torch.linalg.eigh(xx)
    kept = value > value[-1].clamp_min(0) * len(xx) * torch.finfo(torch.float64).eps * 1e3
    if not bool(kept.any()):
        raise SteeringError("leace: the states do not vary")
    value, vector = value[kept], vector[:, kept]
    whiten, unwhiten = vector @ (vector / value.sqrt()).T, vector @ (vector * value.sqrt()).T
    u, size, _ = torch.linalg.svd(whiten @ xz, full_matrices=False)
    u = u[:, size > tolerance]
    if u.shape[1] == 0:
        raise SteeringError(f"leace: the labels have no linear trace above tolerance={tolerance}; nothing to erase")
    left, right = unwhiten @ u, u.T @ whiten  # r(h) = h - left right (h - mean)
    if trace_guard:
        left, right = _guarded(left, right, xx)
    return LowRank(-left.float(), right.float().contiguous(), (left @ (right @ mean)).float())


def _guarded(left: Tensor, right: Tensor, xx: Tensor) -> tuple[Tensor, Tensor]:
    """`left right`, or its mixture with the orthogonal projection that just keeps the trace of the covariance.

    Both erase (both annihilate Sigma_xz), so every mixture does; the trace is quadratic in its weight.
    """
    eye = torch.eye(len(xx), dtype=xx.dtype)
    basis = torch.linalg.qr(left).Q
    p, q = eye - left @ right, eye - basis @ basis.T
    w, x = xx.trace(), (p @ xx @ p.T).trace()
    if x <= w:
        return left, right
    y, z = (p @ xx @ q.T).trace(), (q @ xx @ q.T).trace()
    # a^2 x + 2 a (1 - a) y + (1 - a)^2 z = w, for the larger root a in [0, 1)
    a2, a1, a0 = x - 2 * y + z, 2 * (y - z), z - w
    a = float(((-a1 + (a1.square() - 4 * a2 * a0).clamp_min(0).sqrt()) / (2 * a2)).clamp(0, 1))
    return torch.cat([a * left, (1 - a) * basis], 1), torch.cat([right, basis.T])


def _ledoit_wolf(centred: Tensor, covariance: Tensor) -> Tensor:
    """Covariance shrunk towards its mean variance times the identity (Ledoit and Wolf 2004)."""
    n, d = centred.shape
    mu = covariance.trace() / d
    spread = (covariance - mu * torch.eye(d, dtype=covariance.dtype)).square().sum()
    noise = (centred.square().sum(1).square().sum() / n - covariance.square().sum()) / n
    weight = float((noise / spread).clamp(0, 1)) if float(spread) > 0 else 0.0
    return (1 - weight) * covariance + weight * mu * torch.eye(d, dtype=covariance.dtype)
