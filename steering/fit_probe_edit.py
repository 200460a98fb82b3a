"""Probing, then editing: move a state just across a probe's boundary, in every layer where the probe can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steering import pairs as _pairs
from steering.crossing import reachable
from steering.errors import SteeringError
from steering.fit_directions import logistic
from steering.fit_heads import split
from steering.nonlinear import Cross
from steering.reading import At, read, sites_at
from steering.vector import AFTER_PROMPT, SteeringMap


def probe_edit(
    m: Any,
    texts: Sequence[Any],
    labels: Sequence[Any],
    target: Any,
    *,
    goal: float = 0.99,
    min_accuracy: float = 0.9,
    validation: float = 0.2,
    c: float = 1.0,
    layer: Any = "*",
    site: str = "resid_post",
    at: At = "last",
    scope: Any = AFTER_PROMPT,
    seed: int = 0,
    chat: bool = False,
    batch_tokens: int = 4096,
) -> SteeringMap:
    """The smallest change of h that makes a probe say `target` with probability `goal`, layer by layer.

    A probe per layer (multinomial logistic regression) is fitted on one part of the texts and scored on the rest;
    layers whose accuracy exceeds `min_accuracy` are edited, each token only if p(target) < goal. For two classes

        h + e w / |w|,   e = (logit goal - b - w . h) / |w|

    For more classes the published code uses this form too, and so misses its goal; here the smallest step is solved
    for (`steering.crossing`). Source: Ju et al. 2025 (arXiv:2504.10227), sec. 4 (there for personality
    traits).

    Args:
        m: the model.
        texts: texts that show one class each.
        labels: their classes.
        target: the class wanted.
        goal: its probability, in (0, 1).
        min_accuracy: on held-out texts.
        validation: share of the texts held out.
        c: inverse penalty of the probes.
        layer: layers to try.
        site: where, with `layer` put in.
        at: which token is read.
        scope: to which tokens it is applied.
        seed: of the split.
        chat: put the texts into the model's chat template.
        batch_tokens: tokens run at once.

    Raises SteeringError where no layer's probe is good enough; ``record["accuracy"]`` has each layer's.
    """
    if not 0 < goal < 1:
        raise SteeringError(f"goal={goal}: expected a probability between 0 and 1")
    kinds = sorted({str(x) for x in labels})
    if str(target) not in kinds:
        raise SteeringError(f"target={target!r}: the labels are {', '.join(kinds)}")
    if len(kinds) < 2:
        raise SteeringError("labels: all are of one kind; a probe needs at least two")
    passages = _pairs.texts(m, texts, chat=chat)
    if len(labels) != len(passages):
        raise SteeringError(f"labels: there are {len(labels)} for {len(passages)} texts")
    y = torch.tensor([kinds.index(str(x)) for x in labels])
    fit, held = split(len(passages), validation, seed)
    sites = sites_at(m, layer, site)
    maps, accuracy = {}, {}
    for s, x in read(m, passages, sites, at, batch_tokens).items():
        weight, bias = logistic(x[fit], y[fit], c)
        accuracy[s] = float(((x[held] @ weight.T + bias).argmax(1) == y[held]).float().mean())
        if accuracy[s] > min_accuracy and not reachable(weight, kinds.index(str(target))):
            raise SteeringError(
                f"target={target!r} at {s}: the probe has this class between the others, so that no state makes it "
                "certain; steer away from one of them instead, or merge classes"
            )
        if accuracy[s] > min_accuracy:
            maps[s] = Cross(weight, bias, kinds.index(str(target)), goal)
    if not maps:
        raise SteeringError(
            f"probe_edit: no probe exceeds min_accuracy={min_accuracy} on held-out texts (the best has "
            f"{max(accuracy.values()):.2f}); give more texts, or a lower min_accuracy"
        )
    record = {"target": str(target), "classes": kinds, "goal": goal, "accuracy": accuracy, "at": at, "seed": seed}
    return SteeringMap.of(m, maps, method="probe_edit", scope=scope, record=record)
