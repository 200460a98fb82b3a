"""Angular steering: turn the part of the stream in a plane, instead of adding to it; the norm stays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.nonlinear import Rotate
from steering.reading import At, read_pairs, sites_at
from steering.vector import SteeringMap


def angular(
    m: Any,
    pairs: Iterable[Any],
    layer: Any = "*",
    *,
    degrees: float = 0.0,
    adaptive: bool = False,
    site: str = "resid_post",
    at: At = "last",
    scope: Any = "all",
    chat: bool = False,
    system: str | None = None,
    batch_tokens: int = 4096,
) -> SteeringMap:
    """Angular steering in the plane of a feature and of how its direction varies over layers.

    Each layer has a candidate, the unit difference of means. b1 is the candidate that is most like all others
    (largest mean cosine); b2 the first principal component of all candidates, made orthogonal to b1. At every chosen
    layer ``h -> h - P h + |P h| (cos t b1 + sin t b2)``: t = 0 is all of the feature, 180 its opposite, and the norm
    is kept.
    Source: Vu and Nguyen 2025 (arXiv:2510.26243).

    Args:
        m: the model.
        pairs: (prompt, positive_text, negative_text) triples.
        layer: where it is applied, and whose candidates are compared; at least two.
        degrees: the angle to b1.
        adaptive: turn only tokens that have some of the feature, b1 . h > 0.
        site: where, with `layer` put in.
        at: which token is read.
        scope: to which tokens it is applied.
        chat: put the prompts into the model's chat template.
        system: the template's system turn.
        batch_tokens: tokens run at once.
    """
    triples = _pairs.check(pairs)
    sites = sites_at(m, layer, site)
    both = read_pairs(m, triples, sites, at, chat=chat, system=system, batch_tokens=batch_tokens)
    b1, b2, chosen = plane(torch.stack([(a - b).mean(0) for a, b in both.values()]))
    record = {"degrees": degrees, "adaptive": adaptive, "at": at, "pairs": len(triples), "b1 from": sites[chosen]}
    maps = {s: Rotate(b1, b2, degrees, adaptive) for s in sites}
    return SteeringMap.of(m, maps, method="angular", scope=scope, record=record)


def plane(candidates: Tensor) -> tuple[Tensor, Tensor, int]:
    """(b1 [d], b2 [d], which candidate is b1) from the candidates of the layers [layer, d]."""
    if len(candidates) < 2:
        raise SteeringError("layer: a plane needs the directions of at least two layers")
    norms = candidates.double().norm(dim=1, keepdim=True)
    if float(norms.min()) == 0:
        raise SteeringError("pairs: both sides have equal means at some layer, so there is no direction there")
    unit = candidates.double() / norms
    chosen = int((unit @ unit.T).mean(1).argmax())
    b1 = unit[chosen]
    _, size, components = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    for spread, component in zip(size.tolist(), components, strict=True):
        rest = component - (component @ b1) * b1
        if spread > 1e-6 and float(rest.norm()) > 1e-3:
            return b1.float(), (rest / rest.norm()).float(), chosen
    raise SteeringError("the directions of all layers are one line, so they span no plane")
