"""Steering on a condition, decided for each sequence of a batch by its own prompt (CAST).

    condition = steering.find_condition(m, matching_prompts, other_prompts)
    with m.intervene(steering.conditional(m, v, condition)): ...

At the condition's layer the prompt's mean activation h is compared with its projection on the condition's direction c,

    sim(h) = cos(h, tanh(c (c·h) / c·c))

and the map acts on the sequence only if sim passes the threshold. (Up to the tanh, sim is |cos(h, c)|: blind to
sign.) It is decided once, in the pass that sees the prompt, and kept while the sequence is generated. Source: Lee et
al. 2024 (arXiv:2409.05907); their implementation decides for the first sequence of a batch and applies that to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from interp.edits import Gate, Where
from interp.scope import Scope
from interp.sites import Site
from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.maps import Map
from steering.reading import read, sites_at
from steering.vector import Part, SteeringMap


@dataclass(frozen=True, eq=False)
class Condition:
    """What a prompt must be like.

    Attributes:
        site: where the prompt is read, e.g. "resid_post[7]".
        direction: c [d_model].
        threshold: of sim, in [-1, 1].
        above: True if prompts with sim > threshold meet it, False if those below do.
        f1: on the prompts that it was found on.
    """

    site: str
    direction: Tensor
    threshold: float
    above: bool = True
    f1: float = float("nan")

    def similarity(self, h: Tensor) -> Tensor:
        """sim of mean activations h [..., d_model] -> [...]."""
        c = self.direction.to(h)
        projected = torch.tanh((h @ c)[..., None] * c / (c @ c))
        return torch.nn.functional.cosine_similarity(h, projected, dim=-1)

    def met(self, h: Tensor) -> Tensor:
        sim = self.similarity(h)
        return sim > self.threshold if self.above else sim < self.threshold


@dataclass(frozen=True, eq=False)
class Watch(Map):
    """Changes nothing; decides for each row, in the pass that holds its prompt, whether the condition is met."""

    m: Any
    condition: Condition
    decided: list[Tensor] = field(default_factory=list)
    kind = "watch"
    reads_only = True

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        now = self.m.clock.now
        if now.start == 0:
            real = (now.mask & now.in_prompt)[..., None].to(h.device)
            mean = h.masked_fill(~real, 0).sum(1) / real.sum(1)
            self.decided[:] = [self.condition.met(mean)]
        return h

    def scaled(self, k: float) -> Watch:
        return self

    def ready(self, device: torch.device, dtype: torch.dtype) -> Map:
        return self


@dataclass(frozen=True, eq=False)
class Met:
    """The gate: 1 for the rows whose prompt met the condition, else 0."""

    watch: Watch
    inner: Gate | None = None

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        if not self.watch.decided:
            raise SteeringError(
                "condition: the prompt was not read before the map was to act; the condition's layer must come first"
            )
        on = self.watch.decided[0].to(h)
        if len(on) != len(h):
            raise SteeringError(
                f"condition: decided for {len(on)} sequences, and {len(h)} run; call generate as a whole"
            )
        if self.inner is None:
            return on
        given = self.inner(h, where)
        return on[:, None] * given if given.dim() == 2 else on * given


def conditional(m: Any, v: SteeringMap, condition: Condition) -> SteeringMap:
    """`v`, acting only on sequences whose prompt meets the condition.

    Raises SteeringError where the map acts before the condition can be read. (A map that acts on the prompt itself must
    stand in a later layer; one on generated tokens too, as the prompt's last token is steered in the same pass.)
    """
    place = m.resolve(condition.site)[0]
    for part in v.parts:
        if Site.parse(part.site) < place:
            raise SteeringError(
                f"condition at {condition.site}: it is read after {part.site}, where the map acts already"
            )
    watch = Watch(m, condition)
    parts = [Part(str(place), watch, Scope.prompt())]
    parts += [replace(part, gate=Met(watch, part.gate)) for part in v.parts]
    record = {
        **v.record,
        "condition": {"site": condition.site, "threshold": condition.threshold, "above": condition.above},
    }
    return SteeringMap(tuple(parts), v.fingerprint, v.model, f"{v.method}, conditional", record)


def find_condition(
    m: Any, matching: Any, others: Any, *, layers: Any = "*", chat: bool = False, batch_tokens: int = 4096
) -> Condition:
    """The layer and threshold that tell two sets of prompts apart best by F1, searched over a grid.

    Args:
        m: the model.
        matching: prompts that must meet the condition.
        others: prompts that must not.
        layers: where to look.
        chat: put the prompts into the model's chat template.
        batch_tokens: tokens run at once.

    The direction is the difference of the sets' mean activations (the paper takes the first principal component of
    their pairwise differences). Thresholds are the midpoints between neighbouring similarities. Score it on other
    prompts.
    """
    groups = [
        _pairs.texts(m, given, chat=chat, name=name) for given, name in ((matching, "matching"), (others, "others"))
    ]
    sites = sites_at(m, layers)
    acts = read(m, [*groups[0], *groups[1]], sites, "all", batch_tokens)
    truth = torch.tensor([True] * len(groups[0]) + [False] * len(groups[1]))
    best: Condition | None = None
    for site in sites:
        h = acts[site]
        direction = h[truth].mean(0) - h[~truth].mean(0)
        if float(direction.norm()) == 0:
            continue
        sim = Condition(site, direction, 0.0).similarity(h)
        for above in (True, False):
            threshold, f1 = _best_threshold(sim if above else -sim, truth)
            if best is None or f1 > best.f1:
                best = Condition(site, direction, threshold if above else -threshold, above, f1)
    if best is None:
        raise SteeringError("find_condition: both sets have the same mean activation everywhere")
    return best


def _best_threshold(score: Tensor, truth: Tensor) -> tuple[float, float]:
    """(threshold, F1) of calling score > threshold true, over all midpoints of neighbouring scores."""
    order = score.sort().values
    best = (float(order[0]) - 1e-6, 0.0)
    candidates: Sequence[float] = [best[0], *((order[1:] + order[:-1]) / 2).tolist()]
    for threshold in candidates:
        called = score > threshold
        hit = int((called & truth).sum())
        f1 = 2 * hit / max(1, int(called.sum()) + int(truth.sum()))
        if f1 > best[1]:
            best = (threshold, f1)
    return best
