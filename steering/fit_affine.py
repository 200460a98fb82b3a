"""Affine steering: bring the distribution of source states onto that of target states.

Among all affine maps that give source states the target's mean, the one that moves them least on average (least
squares) only shifts. If the covariance is to agree too, it is the optimal transport between Gaussians:

    W = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2,   h -> W (h - mu_s) + mu_t

Source: Singh et al. 2024 (arXiv:2402.09631), theorems 1 and 2 (MiMiC: mean and covariance matching).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from interp.edits import Where
from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.maps import Affine, Map, Shift, savable
from steering.reading import At, read, sites_at
from steering.vector import AFTER_PROMPT, SteeringMap, SteeringVector


@savable("nearer")
@dataclass(frozen=True, eq=False)
class Nearer:
    """A gate: 1 where h is nearer to `this` than to `other` (both [d]), else 0."""

    this: Tensor
    other: Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        this, other = (x.to(h) for x in (self.this, self.other))
        return ((h - this).square().sum(-1) < (h - other).square().sum(-1)).to(h.dtype)


def affine(
    m: Any,
    source_texts: Any,
    target_texts: Any,
    layer: Any,
    *,
    how: Literal["mean", "gaussian"] = "gaussian",
    ridge: float = 1e-5,
    only_source: bool = False,
    site: str = "resid_post",
    at: At = "last",
    scope: Any = AFTER_PROMPT,
    chat: bool = False,
    batch_tokens: int = 4096,
) -> SteeringMap:
    """Maps states of source texts onto those of target texts: mean matching, or mean and covariance (MiMiC).

    Args:
        m: the model.
        source_texts: texts whose states are to be changed.
        target_texts: texts whose states they should be like.
        layer: a layer, several, or "*".
        how: "mean" (a SteeringVector: mu_t - mu_s) or "gaussian".
        ridge: added to both covariances' diagonals, as in the original.
        only_source: change a token only where it is nearer to the source's mean than to the target's.
        site: where, with `layer` put in.
        at: which token is read.
        scope: to which tokens it is applied.
        chat: put the texts into the model's chat template.
        batch_tokens: tokens run at once.
    """
    sites = sites_at(m, layer, site)
    rows = [
        read(m, _pairs.texts(m, given, chat=chat, name=name), sites, at, batch_tokens)
        for given, name in ((source_texts, "source_texts"), (target_texts, "target_texts"))
    ]
    n = [len(next(iter(side.values()))) for side in rows]
    record = {"how": how, "ridge": ridge, "only_source": only_source, "at": at, "source": n[0], "target": n[1]}
    maps = {s: affine_map(rows[0][s], rows[1][s], how, ridge) for s in sites}
    made: SteeringMap
    if how == "mean":
        shifts = {s: x.tensors()["b"] for s, x in maps.items()}
        made = SteeringVector.of(m, shifts, method="affine", scope=scope, record=record)
    else:
        made = SteeringMap.of(m, maps, method="affine", scope=scope, record=record)
    if not only_source:
        return made
    gates = {s: Nearer(rows[0][s].mean(0), rows[1][s].mean(0)) for s in sites}
    return made.changed(lambda part: {"gate": gates[part.site]})


def affine_map(source: Tensor, target: Tensor, how: str = "gaussian", ridge: float = 1e-5) -> Map:
    """The map from source rows [row, d] onto target rows [row, d]; see `affine`."""
    if how not in ("mean", "gaussian"):
        raise SteeringError(f"how={how!r}: expected 'mean' or 'gaussian'")
    if source.shape[1:] != target.shape[1:]:
        raise SteeringError(f"source and target differ in width: {list(source.shape[1:])}, {list(target.shape[1:])}")
    if how == "mean":
        return Shift(target.mean(0) - source.mean(0))
    if source.dim() != 2:
        raise SteeringError(f"how='gaussian' needs vectors, and this site holds {list(source.shape[1:])} per token")
    if min(len(source), len(target)) < 2:
        raise SteeringError("how='gaussian': a covariance needs at least two texts on each side")
    s, t = (_covariance(x.double(), ridge) for x in (source, target))
    root = matrix_power(s, 0.5)
    inverse = matrix_power(s, -0.5)
    w = inverse @ matrix_power(root @ t @ root, 0.5) @ inverse
    return Affine(w.float(), (target.double().mean(0) - w @ source.double().mean(0)).float())


def _covariance(x: Tensor, ridge: float) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1) + ridge * torch.eye(x.shape[1], dtype=x.dtype)


def matrix_power(a: Tensor, power: float, floor: float = 0.0) -> Tensor:
    """A symmetric positive semidefinite matrix to a real power; eigenvalues <= floor x the largest become 0."""
    value, vector = torch.linalg.eigh((a + a.T) / 2)
    kept = value > max(floor * float(value[-1]), 0.0)
    raised = torch.where(kept, value.clamp_min(1e-300), torch.ones_like(value)) ** power
    return vector @ torch.diag(torch.where(kept, raised, torch.zeros_like(value))) @ vector.T
