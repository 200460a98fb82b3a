"""How strongly each unit belongs to a label: one function per published score, all of them [router, unit].

All read `RoutingStats` only. Write p_l for the mean weight per token on label l, r_l for the share of its tokens that
use the unit, and m_d, u_d for the two on document d alone.

    skew          p_l / max over others p              Monet, section 5.1
    lift          p_l / mean over others p             ours: the largest damage for a given mean spill
    contribution  the same as skew, of weight x norm of output in place of weight
    correlation   Pearson r over documents of m_d with being l                           Monet, section 5.3
    auroc         chance that a document of l has larger m_d than one of the others      (Mann-Whitney)
    precision     average precision of m_d as a detector of l                            relation-specific neurons
    rate          r_l - r_others                                                         SteerMoE, "risk difference"
    ftri          tokens per document that use the unit, on l minus on the others        MoTE
    esft_gate     mean over documents of m_d                                             ESFT-Gate
    esft_token    mean over documents of u_d / top-k                                     ESFT-Token
    reap          mean over the tokens that use it of weight x norm of output            REAP
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from interp.experts.kept import Documents
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError


def skew(stats: RoutingStats, label: str) -> Tensor:
    """Mass per token on `label` over the largest on any other label [router, unit]; 0 / 0 counts as 0.

    Units used on this label alone have infinite skew.
    """
    return _over_largest(stats.probability, *_others(stats, label))


def lift(stats: RoutingStats, label: str) -> Tensor:
    """Mass per token on `label` over the mean of all other labels [router, unit]; 0 / 0 counts as 0.

    Skew protects the second-highest label, lift the average one. If what a unit does for a label is in proportion to
    its mass there, then among all sets of a given damage the one of largest lift has the smallest mean spill (the
    lemma of Neyman and Pearson).
    """
    at, others = _others(stats, label)
    p = stats.probability
    return torch.where(p[at] > 0, p[at] / p[others].mean(0), torch.zeros_like(p[at]))


def contribution(stats: RoutingStats, label: str) -> Tensor:
    """Skew of the norm of weight x output per token: a unit that puts out much counts for more. Needs norms."""
    per_token = stats.measured("contribution") / stats.tokens[:, None, None]
    return _over_largest(per_token, *_others(stats, label))


def correlation(stats: RoutingStats, label: str, against: str | None = None) -> Tensor:
    """Pearson r over documents between mean routing weight and being `label` (1) or not (0) [router, unit].

    Args:
        stats: what was measured.
        label: the ones.
        against: the label of the zeros; default all other labels pooled.

    Units whose weight never varies get r = 0.
    """
    at, zeros = stats.contrast(label, against)
    n1, n0 = float(stats.documents[at]), float(stats.documents[zeros].sum())
    _enough_documents(label, n1, n0)
    sum1, sum0 = stats.doc_sum[at], stats.doc_sum[zeros].sum(0)
    n, total = n1 + n0, sum1 + sum0
    square = stats.doc_square[at] + stats.doc_square[zeros].sum(0)
    # r = cov(m, y) / sd(m) sd(y) with y in {0, 1}
    covariance = sum1 / n - total / n * (n1 / n)
    variance = (square / n - (total / n).square()).clamp_min(0)
    spread = (variance * (n1 / n) * (n0 / n)).sqrt()
    varies = variance > 1e-12 * (total / n).square()
    return torch.where(varies, covariance / spread.clamp_min(1e-300), torch.zeros_like(spread))


def correlation_p(stats: RoutingStats, label: str, against: str | None = None) -> Tensor:
    """One-sided p of `correlation` being that large by chance, from Student's t with n - 2 degrees of freedom."""
    from scipy.stats import t as student

    at, zeros = stats.contrast(label, against)
    r = correlation(stats, label, against).clamp(-1 + 1e-15, 1 - 1e-15)
    freedom = float(stats.documents[at] + stats.documents[zeros].sum()) - 2
    return torch.from_numpy(student.sf((r * (freedom / (1 - r.square())).sqrt()).numpy(), freedom))


def auroc(stats: RoutingStats, label: str, against: str | None = None) -> tuple[Tensor, Tensor]:
    """Area under the ROC curve of a document's mean weight, and its one-sided p (Mann-Whitney) [router, unit] each.

    Over the documents that were kept whole; ties count half.
    """
    from scipy.stats import mannwhitneyu

    ones, zeros = _documents(stats, label, against)
    with np.errstate(all="ignore"):  # units that are never used have no variance
        found = mannwhitneyu(ones.flatten(1).numpy(), zeros.flatten(1).numpy(), alternative="greater", axis=0,
                             method="asymptotic")  # fmt: skip
    area = torch.from_numpy(np.asarray(found.statistic)) / (len(ones) * len(zeros))
    p = torch.from_numpy(np.asarray(found.pvalue)).nan_to_num(1.0)
    return area.view(ones.shape[1:]), p.view(ones.shape[1:])


def precision(stats: RoutingStats, label: str, against: str | None = None) -> Tensor:
    """Average precision of a document's mean weight as a detector of `label` [router, unit].

    AP = sum_n (R_n - R_n-1) P_n over falling thresholds; documents of equal weight share one threshold.
    """
    ones, zeros = _documents(stats, label, against)
    values, order = torch.cat([ones, zeros]).sort(0, descending=True)
    hit = (order < len(ones)).double()
    found = hit.cumsum(0) / torch.arange(1, len(hit) + 1)[:, None, None]  # precision at each cut
    last = len(hit) - 1
    for i in range(last - 1, -1, -1):  # within ties the cut is behind the last of them
        found[i] = torch.where(values[i] == values[i + 1], found[i + 1], found[i])
    return (hit * found).sum(0) / len(ones)


def rate(stats: RoutingStats, label: str, against: str | None = None) -> Tensor:
    """Share of tokens that use the unit, on `label` minus on the others pooled [router, unit]: -1..1.

    SteerMoE (arXiv 2509.09660) compares paired prompts: give the two sides as two labels.
    """
    at, others = stats.contrast(label, against)
    return stats.rate[at] - stats.used[others].sum(0) / stats.tokens[others].sum()


def ftri(stats: RoutingStats, label: str, against: str | None = None) -> Tensor:
    """Functional token resonance: tokens of a document that use the unit, on average over `label` minus over the rest.

    MoTE (arXiv 2502.11096) sums over the tokens of each prompt and averages by class of response. [router, unit].
    """
    at, others = stats.contrast(label, against)
    return stats.used[at] / stats.documents[at] - stats.used[others].sum(0) / stats.documents[others].sum()


def esft_gate(stats: RoutingStats, label: str) -> Tensor:
    """ESFT's average gate score g = 1/N sum_d 1/L_d sum_t g_t (arXiv 2407.01906, eq. 6) [router, unit]."""
    at = stats.index(label)
    return stats.doc_sum[at] / stats.documents[at]


def esft_token(stats: RoutingStats, label: str) -> Tensor:
    """ESFT's token selection ratio r = 1/N sum_d 1/L_d sum_t 1(g_t > 0) / K (eq. 7) [router, unit].

    K, the experts per token, is what the uses add up to; so r adds up to 1 over the units of a router.
    """
    at = stats.index(label)
    share = stats.doc_used[at] / stats.documents[at]
    return share / share.sum(-1, keepdim=True).clamp_min(1e-300)


def reap(stats: RoutingStats, label: str) -> Tensor:
    """REAP's saliency: mean over the tokens of `label` that use the unit of weight x norm of its output.

    Arxiv 2510.13999 prunes what has the least of it. Needs norms. [router, unit], 0 for a unit never used.
    """
    at = stats.index(label)
    return stats.measured("contribution")[at] / stats.used[at].clamp_min(1)


def _others(stats: RoutingStats, label: str) -> tuple[int, list[int]]:
    at = stats.index(label)
    if len(stats.labels) < 2:
        raise ExpertError(f"labels: only {label!r} is there; a contrast needs at least one other label")
    return at, [i for i in range(len(stats.labels)) if i != at]


def _over_largest(values: Tensor, at: int, others: list[int]) -> Tensor:
    return torch.where(values[at] > 0, values[at] / values[others].amax(0), torch.zeros_like(values[at]))


def _enough_documents(label: str, n1: float, n0: float) -> None:
    if min(n1, n0) < 2:
        raise ExpertError(f"label {label!r}: {int(n1)} documents against {int(n0)}; a correlation needs two of each")


def _documents(stats: RoutingStats, label: str, against: str | None) -> tuple[Tensor, Tensor]:
    """Mean weights of the kept documents of the label, and of the others [document, router, unit]."""
    at, zeros = stats.contrast(label, against)
    kept: Documents | None = stats.sample
    if kept is None:
        raise ExpertError("no documents were kept; pass documents=200 to experts.routing")
    ones, rest = kept.mean[kept.label == at], kept.mean[torch.isin(kept.label, torch.tensor(zeros))]
    _enough_documents(label, len(ones), len(rest))
    return ones, rest
