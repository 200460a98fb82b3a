"""Steering at attention heads: Inference-Time Intervention, and its use on one person's answers (PAS)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.fit_directions import logistic
from steering.reading import At, read_pairs, sites_at
from steering.vector import AFTER_PROMPT, SteeringVector

if TYPE_CHECKING:
    import pandas as pd


def iti(
    m: Any,
    pairs: Iterable[Any],
    *,
    heads: int = 48,
    alpha: float = 15.0,
    direction: Literal["mass_mean", "probe"] = "mass_mean",
    validation: float = 0.2,
    c: float = 1.0,
    layer: Any = "*",
    at: At = "last",
    scope: Any = AFTER_PROMPT,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    batch_tokens: int = 4096,
) -> SteeringVector:
    """Inference-Time Intervention: at the heads that tell true from false best, ``z + alpha sigma theta``.

    A probe is fitted on every head's output z at the last token of question and answer, on one part of the pairs, and
    scored on the rest; the top `heads` are kept. theta (unit length) is the difference of class means, or the probe's
    normal; sigma is the standard deviation of all activations along it. Source: Li et al. 2023 (arXiv:2306.03341),
    sec. 3-4: K = 48, alpha = 15 on LLaMA-7B; their grid there is K in 8..96, alpha in 5..20.

    Args:
        m: the model.
        pairs: (question, true_answer, false_answer) triples.
        heads: how many to steer, K.
        alpha: how many standard deviations; it is in the vector, so multiplier 1 is alpha.
        direction: "mass_mean" (best in the paper) or "probe".
        validation: share of the pairs on which heads are ranked.
        c: inverse penalty of the probes.
        layer: from which layers heads are taken.
        at: which token is read.
        scope: to which tokens it is added.
        seed: of the split.
        chat: put the prompts into the model's chat template.
        system: the template's system turn.
        batch_tokens: tokens run at once.

    Returns a vector at ``z[l]`` [head, d_head] for each layer with a chosen head, nought at the others;
    ``record["heads"]`` lists (layer, head, accuracy).
    """
    if direction not in ("mass_mean", "probe"):
        raise SteeringError(f"direction={direction!r}: expected 'mass_mean' or 'probe'")
    triples = _pairs.check(pairs)
    sites = sites_at(m, layer, "z")
    both = read_pairs(m, triples, sites, at, chat=chat, system=system, batch_tokens=batch_tokens)
    fit, held = split(len(triples), validation, seed)
    ranked = []
    for s in sites:
        positive, negative = both[s]
        for head in range(positive.shape[1]):
            accuracy, normal = _probe(positive[:, head], negative[:, head], fit, held, c)
            ranked.append((accuracy, s, head, normal))
    if not 1 <= heads <= len(ranked):
        raise SteeringError(f"heads={heads}: {m.name} has {len(ranked)} heads in these layers")
    ranked.sort(key=lambda row: -row[0])
    vectors: dict[str, Tensor] = {}
    for _, s, head, normal in ranked[:heads]:
        positive, negative = (side[:, head] for side in both[s])
        theta = positive.mean(0) - negative.mean(0) if direction == "mass_mean" else normal
        theta = torch.nn.functional.normalize(theta, dim=0)
        sigma = (torch.cat([positive, negative]) @ theta).std(correction=0)
        vectors.setdefault(s, torch.zeros_like(both[s][0][0]))[head] = alpha * sigma * theta
    chosen = [[s, head, accuracy] for accuracy, s, head, _ in ranked[:heads]]
    record = {"heads": chosen, "alpha": alpha, "direction": direction, "at": at, "seed": seed, "pairs": len(triples)}
    ordered = {s: vectors[s] for s in sites if s in vectors}
    return SteeringVector.of(m, ordered, method="iti", scope=scope, record=record)


def split(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(rows to fit on, rows held out), both sorted; whole pairs, so that no pair is on both sides."""
    held = round(n * share)
    if not 0 < held < n:
        raise SteeringError(f"validation={share}: of {n} pairs that leaves {n - held} to fit on and {held} to score on")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


def _probe(positive: Tensor, negative: Tensor, fit: Tensor, held: Tensor, c: float) -> tuple[float, Tensor]:
    """(accuracy on held-out pairs, normal) of a probe on one head."""
    x = torch.cat([positive[fit], negative[fit]])
    y = torch.cat([torch.ones(len(fit)), torch.zeros(len(fit))]).long()
    weight, bias = logistic(x, y, c)
    normal, offset = weight[1] - weight[0], bias[1] - bias[0]
    right = ((positive[held] @ normal + offset) > 0).float().mean() + (
        (negative[held] @ normal + offset) <= 0
    ).float().mean()
    return float(right) / 2, normal


def pas(
    m: Any,
    answers: Sequence[Any],
    score: Callable[[SteeringVector], float],
    *,
    alphas: Sequence[float] = (1.0, 2.0, 4.0, 8.0, 16.0),
    **settings: Any,
) -> tuple[SteeringVector, pd.DataFrame]:
    """Personality Activation Search: iti on one person's answers to an inventory, its strength searched.

    The pairs are (item, what the person answers, the opposite answer); no weight of the model is trained.
    Source: Zhu et al. 2024 (arXiv:2408.11779).

    Args:
        m: the model.
        answers: (item, answer, opposite) triples of one person.
        score: how well a vector makes the model answer as the person does, larger is better. Use items that `answers`
            does not hold, and report on items that neither holds.
        alphas: strengths to try.
        **settings: of `iti`.

    Returns (the best vector, a table with columns alpha, value).
    """
    import pandas as pd

    if not alphas:
        raise SteeringError("alphas: the list is empty; give at least one strength")
    base = iti(m, answers, alpha=1.0, **settings)
    table = pd.DataFrame([{"alpha": a, "value": float(score(base * a))} for a in alphas])
    table.attrs = {"model": m.name, "method": "pas"}
    best = float(table.sort_values("value", ascending=False, kind="stable").alpha.iloc[0])
    found = base * best
    return SteeringVector(
        found.parts, found.fingerprint, found.model, "pas", {**found.record, "alpha": best, "searched": list(alphas)}
    ), table
