"""The smallest step over a probe's curved boundary: what `probe_edit` does at each token.

With p = softmax(W h + b) and class c wanted at probability g, the odds of c are those of its logit against the
others'

    minimise |d|^2 / 2   subject to   lse_j (q_j + D_j . d) <= -logit g,     q_j = z_j - z_c,  D_j = w_j - w_c

lse is convex, so there is one answer, d = -D' v with v = lambda softmax(q - D D' v): as many unknowns as other
classes. For each lambda Newton's method minimises |d|^2 / 2 + lambda lse, which is smooth and strictly convex; the
left side falls as lambda grows, so halving finds the lambda at which it is just met. One other class is the closed
form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def smallest_step(weight: Tensor, logits: Tensor, target: int, goal: float) -> Tensor:
    """Steps d [row, d_model] after which each row of `logits` [row, class] gives `target` the probability `goal`.

    Args:
        weight: [class, d_model].
        logits: W h + b of the rows; ones that reach the goal already get no step.
        target: the class wanted.
        goal: its probability, in (0, 1).

    Where the class can reach the goal nowhere (`reachable`), the step is the furthest that was tried.
    """
    weight, logits = weight.double(), logits.double()
    others = torch.tensor([j for j in range(len(weight)) if j != target], device=weight.device)
    away = weight[others] - weight[target]  # D [other, d_model]
    q, bound = logits[:, others] - logits[:, [target]], -math.log(goal / (1 - goal))
    short = q.logsumexp(-1) > bound
    step = torch.zeros(len(q), weight.shape[1], dtype=q.dtype, device=q.device)
    if not bool(short.any()):
        return step
    gram = away @ away.T
    q = q[short]
    if len(others) == 1:
        v = (q - bound) / gram
    else:
        low = torch.zeros(len(q), dtype=q.dtype, device=q.device)
        high = torch.full_like(low, float((q.logsumexp(-1) - bound).max() / gram.diagonal().min().clamp_min(1e-12)))
        v = torch.zeros_like(q)
        for _ in range(40):  # until every row's bound is met
            v = _minimise(gram, q, high, v)
            unmet = (q - v @ gram).logsumexp(-1) > bound
            if not bool(unmet.any()):
                break
            low, high = torch.where(unmet, high, low), torch.where(unmet, 4 * high, high)
        for _ in range(45):
            middle = (low + high) / 2
            v = _minimise(gram, q, middle, v)
            unmet = (q - v @ gram).logsumexp(-1) > bound
            low, high = torch.where(unmet, middle, low), torch.where(unmet, high, middle)
    step[short] = -v @ away
    return step


def _minimise(gram: Tensor, q: Tensor, strength: Tensor, v: Tensor) -> Tensor:
    """argmin over v of v' G v / 2 + strength lse(q - G v), for each row, from a first guess; [row, other]."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lengths = 0.5 ** torch.arange(12, dtype=gram.dtype, device=gram.device)

    def height(v: Tensor) -> Tensor:
        return ((v @ gram) * v).sum(-1) / 2 + strength * (q - v @ gram).logsumexp(-1)

    for _ in range(25):
        s = (q - v @ gram).softmax(-1)
        rest = v - strength[:, None] * s
        if float((rest.abs() / strength[:, None].clamp_min(1e-30)).max()) < 1e-9:
            break
        curve = torch.diag_embed(s) - s[:, :, None] * s[:, None, :]
        newton = torch.linalg.solve(eye + strength[:, None, None] * (curve @ gram), rest[:, :, None])[..., 0]
        heights = torch.stack([height(v - k * newton) for k in lengths])
        v = v - lengths[heights.argmin(0)][:, None] * newton
    return v


def reachable(weight: Tensor, target: int) -> bool:
    """Is there a direction in which `target`'s logit outgrows every other's, by a thousandth of the step at least?

    If not (its row lies between the others'), some goals are reached nowhere, or only absurdly far away.
    """
    from scipy.optimize import linprog

    others = [j for j in range(len(weight)) if j != target]
    away = torch.nn.functional.normalize(weight[others].double() - weight[target].double(), dim=1).numpy()
    d = away.shape[1]
    # the largest margin t with away . u <= -t, for u in the unit box
    rows = [[*row, 1.0] for row in away]
    found = linprog([0.0] * d + [-1.0], A_ub=rows, b_ub=[0.0] * len(others), bounds=[(-1, 1)] * d + [(None, 1)])
    return bool(found.status == 0 and -found.fun > 1e-3)
