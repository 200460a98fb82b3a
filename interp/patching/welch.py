"""How large an effect can be that was never measured alone: bounds from random subsets (AtP*, Algorithm 1).

Many nodes are patched jointly, each in or out by a fair coin. A node's effect is then estimated by the mean of the runs
in which it was in, minus the mean of those in which it was out; a t test gives an upper bound on its size. Two designs:

``independent``  every subset is drawn anew; in- and out-runs are independent samples, as Welch's test supposes.
``complements``  each subset is run together with its complement, so every node is in exactly one of the two. The
                 estimate is the mean of ±(f(S) - f(S^c)), a paired sample, and the test is the paired one.

Complements let interactions of even order and whatever else both halves share fall out. But where effects simply add
up, f(S^c) is a constant minus f(S) and tells nothing new: then they cost √2 in the error. For the same reason Welch's
formula is wrong for them: the two samples are anticorrelated, and its error is too small by √2
(`tests/patching/test_certify.py` shows the coverage that this costs). The default is ``independent``.

"Some node reaches θ" is a union of nulls, so its p-value is the largest of the nodes' (intersection-union test) and
needs no correction for their number. Estimates are of the mean effect over random backgrounds, not of the effect alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Design = Literal["complements", "independent"]


@dataclass(frozen=True)
class Estimate:
    """Estimated effects of many nodes.

    Attributes:
        mean: estimated effect [node], in units of the metric.
        error: its standard error [node].
        freedom: degrees of freedom of the t distribution [node].
        draws: subsets (or pairs of complementary subsets) that it rests on.
    """

    mean: Tensor
    error: Tensor
    freedom: Tensor
    draws: int

    def bound(self, confidence: float) -> Tensor:
        """Upper bound on |effect| [node]: the far end of the two-sided interval, ``|mean| + t error``.

        An effect may have either sign. The one-sided quantile would do where its sign is clear, but has no room there
        for the t distribution being an approximation.
        """
        from scipy import stats

        quantile = torch.from_numpy(stats.t.ppf((1 + confidence) / 2, self.freedom.double().numpy()))
        return self.mean.abs() + quantile * self.error

    def p_value(self, threshold: float) -> Tensor:
        """p of the null hypothesis |effect| >= threshold [node], matching `bound`."""
        from scipy import stats

        t = (threshold - self.mean.abs()) / self.error.clamp(min=torch.finfo(torch.float64).tiny)
        return torch.from_numpy(2 * stats.t.sf(t.double().numpy(), self.freedom.double().numpy())).clamp(max=1)


def from_complements(inside: Tensor, difference: Tensor) -> Estimate:
    """The paired estimate.

    Args:
        inside: True where a node was in the subset [draw, node].
        difference: f(subset) - f(complement) [draw].
    """
    draws = len(difference)
    if draws < 2:
        raise ValueError(f"from_complements: {draws} draws; a variance needs at least two")
    sign = inside.double() * 2 - 1
    difference = difference.double()
    mean = sign.T @ difference / draws
    variance = ((difference.square().mean() - mean.square()).clamp(min=0)) * draws / (draws - 1)  # (±d)² = d²
    return Estimate(mean, (variance / draws).sqrt(), torch.full_like(mean, draws - 1), draws)


def from_subsets(inside: Tensor, value: Tensor) -> Estimate:
    """Welch's estimate: runs with a node in, against runs with it out, as independent samples.

    A node that was not in and out at least twice has an infinite error.

    Args:
        inside: True where a node was in the subset [draw, node].
        value: f(subset) [draw].
    """
    value, here = value.double(), inside.double()
    means, errors, counts = [], [], []
    for weight in (here, 1 - here):
        n = weight.sum(0)
        mean = weight.T @ value / n.clamp(min=1)
        spread = (weight * (value[:, None] - mean).square()).sum(0)
        means.append(mean)
        errors.append(torch.where(n >= 2, spread / (n - 1).clamp(min=1) / n.clamp(min=1), torch.inf))
        counts.append(n)
    total = errors[0] + errors[1]
    # Welch-Satterthwaite; without any spread at all the estimate is exact and the degrees do not matter
    parts = sum(e.square() / (n - 1).clamp(min=1) for e, n in zip(errors, counts, strict=True))
    freedom = torch.where(total.isfinite() & (total > 0), total.square() / parts, 1.0).clamp(min=1)
    return Estimate(means[0] - means[1], total.sqrt(), freedom.nan_to_num(1.0), len(value))


def draw_subsets(draws: int, nodes: int, generator: torch.Generator) -> Tensor:
    """Fair coins [draw, node]."""
    return torch.rand(draws, nodes, generator=generator) < 0.5
