"""Directions from single examples rather than from means: principal components, and a linear probe's normal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.nonlinear import Control
from steering.reading import At, read_pairs, sites_at
from steering.vector import AFTER_PROMPT, SteeringMap, SteeringVector


def pca(
    m: Any,
    pairs: Iterable[Any],
    layer: Any = "*",
    *,
    how: Literal["pairs", "centred"] = "pairs",
    site: str = "resid_post",
    at: At = "last",
    scope: Any = "all",
    chat: bool = False,
    system: str | None = None,
    batch_tokens: int = 4096,
) -> SteeringVector:
    """Control vectors: the first principal component of the pairs' differences, of unit length, in each layer.

    The sign is the one in which the positive side of most pairs lies further along. RepE adds it in many layers, at
    all tokens, by a coefficient of its own. Source: Zou et al. 2023 (arXiv:2310.01405), sec. 3; repeng.

    Args:
        m: the model.
        pairs: (prompt, positive_text, negative_text) triples.
        layer: a layer, several, or "*" (all).
        how: "pairs": of both sides centred on their pair's mean, hence of the differences about nought, as RepE has
            it with its sides shuffled, and repeng's "pca_center". "centred": of the differences less their mean, as
            repeng's "pca_diff": what varies between pairs, not what they share.
        site: where, with `layer` put in.
        at: which token is read.
        scope: to which tokens it is added.
        chat: put the prompts into the model's chat template.
        system: the template's system turn.
        batch_tokens: tokens run at once.
    """
    if how not in ("pairs", "centred"):
        raise SteeringError(f"how={how!r}: expected 'pairs' or 'centred'")
    triples = _pairs.check(pairs)
    sites = sites_at(m, layer, site)
    both = read_pairs(m, triples, sites, at, chat=chat, system=system, batch_tokens=batch_tokens)
    vectors = {s: component(positive, negative, how) for s, (positive, negative) in both.items()}
    record = {"how": how, "at": at, "chat": chat, "system": system, "pairs": len(triples)}
    return SteeringVector.of(m, vectors, method="pca", scope=scope, record=record)


def component(positive: Tensor, negative: Tensor, how: str = "pairs") -> Tensor:
    """The first principal component [d] of paired rows [pair, d], signed by the majority of pairs."""
    difference = (positive - negative).double()
    if how == "centred":
        if len(difference) < 2:
            raise SteeringError("pairs: 'centred' components need at least two pairs")
        difference = difference - difference.mean(0)
    if float(difference.norm()) == 0:
        raise SteeringError("pairs: the two sides have the same activations, so there is no direction between them")
    first = torch.linalg.svd(difference, full_matrices=False).Vh[0]
    ahead = ((positive - negative).double() @ first).sign().sum()
    return (first if ahead >= 0 else -first).float()


def operator(v: SteeringVector, *, signed: bool = False, keep_norm: bool = False) -> SteeringMap:
    """The same vector under RepE's other operators: `signed` ("piecewise"), and with each token's norm kept."""
    record = {**v.record, "signed": signed, "keep_norm": keep_norm}
    parts = tuple(replace(p, map=Control(v.vectors[p.site], signed, keep_norm)) for p in v.parts)
    return SteeringMap(parts, v.fingerprint, v.model, v.method, record)


def probe(
    m: Any,
    pairs: Iterable[Any],
    layer: Any,
    *,
    c: float = 1.0,
    unit: bool = False,
    site: str = "resid_post",
    at: At = "answer",
    scope: Any = AFTER_PROMPT,
    chat: bool = False,
    system: str | None = None,
    batch_tokens: int = 4096,
) -> SteeringVector:
    """A linear probe's direction: the normal of the plane that tells positive from negative sides.

    The probe is a logistic regression. Its length is the distance of the two class means along it, so that multiplier
    1 carries one mean to the other's side of the plane as caa does; with `unit`, 1. What tells classes apart best
    need not be what moves a model (Belrose 2023; Wu et al. 2025, arXiv:2501.17148: probes detect well and steer
    little).

    Args:
        m: the model.
        pairs: (prompt, positive_text, negative_text) triples.
        layer: a layer, several, or "*".
        c: inverse strength of the l2 penalty, as in scikit-learn; the data is not standardised.
        unit: give a vector of norm 1.
        site: where, with `layer` put in.
        at: which token is read.
        scope: to which tokens it is added.
        chat: put the prompts into the model's chat template.
        system: the template's system turn.
        batch_tokens: tokens run at once.
    """
    triples = _pairs.check(pairs)
    sites = sites_at(m, layer, site)
    both = read_pairs(m, triples, sites, at, chat=chat, system=system, batch_tokens=batch_tokens)
    vectors, accuracy = {}, {}
    for s, (positive, negative) in both.items():
        x = torch.cat([positive, negative])
        y = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).long()
        weight, bias = logistic(x, y, c)
        normal = torch.nn.functional.normalize(weight[1] - weight[0], dim=0)
        gap = (positive.mean(0) - negative.mean(0)) @ normal
        vectors[s] = normal if unit else gap * normal
        accuracy[s] = float(((x @ weight.T + bias).argmax(1) == y).float().mean())
    record = {"at": at, "c": c, "unit": unit, "chat": chat, "pairs": len(triples), "accuracy on its own data": accuracy}
    return SteeringVector.of(m, vectors, method="probe", scope=scope, record=record)


def logistic(x: Tensor, y: Tensor, c: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logistic regression with an l2 penalty: x [row, d], y [row] in 0..n-1 -> weight [class, d], bias [class].

    Of two classes the second has all of the weight and the first none, so that softmax and sigmoid agree.
    """
    from sklearn.linear_model import LogisticRegression

    classes = int(y.max()) + 1
    counts = torch.bincount(y, minlength=2)
    if int(counts.min()) == 0:
        raise SteeringError(f"labels: class {int(counts.argmin())} is empty; a probe needs examples of each class")
    if not bool(torch.isfinite(x).all()):
        raise SteeringError("activations: not finite; a probe cannot be fitted")
    fitted = LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(x.double().numpy(), y.numpy())
    weight, bias = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    if classes == 2:
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    return weight.float(), bias.float()
