"""Each selection rule against its published definition, written out over documents and tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, mannwhitneyu, pearsonr
from sklearn.metrics import average_precision_score, roc_auc_score

import interp
from interp import experts
from interp.experts import ExpertError, scores
from tests.experts.conftest import build

LABELS = ("law", "code", "bio")


@pytest.fixture(scope="module")
def moe() -> interp.Model:
    return build("routed")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Twelve short documents of each label, of different lengths."""
    from tests.experts.conftest import TEXTS

    generator = torch.Generator().manual_seed(5)
    out = {}
    for label, (a, b, c) in TEXTS.items():
        source = a + b + c
        starts = torch.randint(0, len(source) - 50, (12,), generator=generator).tolist()
        out[label] = [source[s : s + 20 + 2 * i] for i, s in enumerate(starts)]
    return out


@pytest.fixture(scope="module")
def stats(moe: interp.Model, texts: dict[str, list[str]]) -> experts.RoutingStats:
    return experts.routing(moe, texts, norms=True)


@pytest.fixture(scope="module")
def runs(moe: interp.Model, texts: dict[str, list[str]]) -> dict[str, list[Any]]:
    """The routed experts of layer 2 for every document on its own."""
    return {label: [moe.capture(t, "expert_out[2]").experts(2) for t in texts[label]] for label in LABELS}


def gates(run: Any, expert: int) -> np.ndarray:
    """Weight of an expert at every token [token]."""
    return ((run.ids[0] == expert) * run.weights[0]).sum(-1).detach().numpy().astype(float)


def uses(run: Any, expert: int) -> np.ndarray:
    return (run.ids[0] == expert).any(-1).numpy().astype(float)


def test_rate_is_steermoes_risk_difference(stats: experts.RoutingStats, runs: dict[str, list[Any]]) -> None:
    for e in range(stats.size):
        law = np.concatenate([uses(r, e) for r in runs["law"]])
        code = np.concatenate([uses(r, e) for r in runs["code"]])
        assert float(scores.rate(stats, "law", "code")[2, e]) == pytest.approx(law.mean() - code.mean())
        rest = np.concatenate([uses(r, e) for label in ("code", "bio") for r in runs[label]])
        assert float(scores.rate(stats, "law")[2, e]) == pytest.approx(law.mean() - rest.mean())


def test_ftri_sums_over_tokens_and_averages_over_prompts(
    stats: experts.RoutingStats, runs: dict[str, list[Any]]
) -> None:
    for e in range(stats.size):
        inside = np.mean([uses(r, e).sum() for r in runs["bio"]])
        rest = np.mean([uses(r, e).sum() for label in ("law", "code") for r in runs[label]])
        assert float(scores.ftri(stats, "bio")[2, e]) == pytest.approx(inside - rest)
    chosen = experts.select(stats, "bio", "ftri")
    best = scores.ftri(stats, "bio").flatten()
    assert len(chosen) == min(10, int((best > 0).sum()))
    flat = [layer * stats.size + e for layer, ids in chosen.ids.items() for e in ids.tolist()]
    assert sorted(flat) == sorted(best.topk(len(chosen)).indices.tolist())


def test_esft_scores_average_documents_and_take_the_fewest(
    stats: experts.RoutingStats, runs: dict[str, list[Any]]
) -> None:
    gate = [np.mean([gates(r, e).mean() for r in runs["law"]]) for e in range(stats.size)]
    token = [np.mean([uses(r, e).mean() / r.ids.shape[-1] for r in runs["law"]]) for e in range(stats.size)]
    np.testing.assert_allclose(scores.esft_gate(stats, "law")[2].numpy(), gate, rtol=1e-5)
    np.testing.assert_allclose(scores.esft_token(stats, "law")[2].numpy(), token, rtol=1e-5)
    for rule, score in (("esft_gate", gate), ("esft_token", token)):
        chosen = experts.select(stats, "law", rule, p=0.6).ids[2].tolist()
        order = np.argsort(score)[::-1]
        cut = next(n for n in range(1, 9) if sum(score[i] for i in order[:n]) >= 0.6 * sum(score))
        assert sorted(order[:cut].tolist()) == chosen


def test_reap_averages_over_the_tokens_that_use_the_expert(
    stats: experts.RoutingStats, runs: dict[str, list[Any]]
) -> None:
    for e in range(stats.size):
        products = [
            float(r.weights[0, t, s] * r.out[0, t, s].norm())
            for r in runs["code"] for t, s in np.ndindex(*r.ids.shape[1:]) if r.ids[0, t, s] == e
        ]  # fmt: skip
        assert float(scores.reap(stats, "code")[2, e]) == pytest.approx(np.mean(products), rel=1e-4)


def test_contribution_is_skew_of_weight_times_output(stats: experts.RoutingStats, runs: dict[str, list[Any]]) -> None:
    def per_token(label: str, e: int) -> float:
        total = sum(float((gates(r, e) * _norm(r, e)).sum()) for r in runs[label])
        return total / sum(r.ids.shape[1] for r in runs[label])

    chosen = experts.select(stats, "law", "contribution", ratio=1.2)
    for e in range(stats.size):
        ratio = per_token("law", e) / max(per_token("code", e), per_token("bio", e))
        assert float(scores.contribution(stats, "law")[2, e]) == pytest.approx(ratio, rel=1e-4)
        assert ((2, e) in chosen) == (ratio >= 1.2)


def _norm(run: Any, expert: int) -> np.ndarray:
    return ((run.ids[0] == expert) * run.out[0].norm(dim=-1)).sum(-1).detach().numpy().astype(float)


def test_documents_are_ranked_as_scipy_and_sklearn_rank_them(
    stats: experts.RoutingStats, runs: dict[str, list[Any]]
) -> None:
    y = [1] * 12 + [0] * 24
    area, p = scores.auroc(stats, "law")
    for e in range(stats.size):
        assert stats.sample is not None
        mean = stats.sample.mean[stats.sample.label.argsort(stable=True), 2, e].double().numpy()
        for at, label in enumerate(LABELS):  # documents that tie do so up to rounding: rank the kept means themselves
            literal = sorted(gates(r, e).mean() for r in runs[label])
            np.testing.assert_allclose(sorted(mean[12 * at : 12 * at + 12]), literal, rtol=1e-4, atol=1e-6)
        assert float(area[2, e]) == pytest.approx(roc_auc_score(y, mean), abs=1e-6)
        assert float(p[2, e]) == pytest.approx(
            mannwhitneyu(mean[:12], mean[12:], alternative="greater", method="asymptotic").pvalue, abs=1e-6
        )
        assert float(scores.precision(stats, "law")[2, e]) == pytest.approx(average_precision_score(y, mean), abs=1e-6)
        r = pearsonr(mean, y, alternative="greater")
        assert float(scores.correlation_p(stats, "law")[2, e]) == pytest.approx(r.pvalue, abs=1e-4)


def test_ties_share_a_threshold() -> None:
    from types import SimpleNamespace

    from interp.experts.kept import Documents

    mean = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.5])[:, None, None]
    label = torch.tensor([0, 0, 0, 1, 1, 1])
    kept = Documents(torch.tensor(9), label, label, label, mean)
    fake: Any = SimpleNamespace(sample=kept, contrast=lambda a, b: (0, [1]))
    expected = average_precision_score([1, 1, 1, 0, 0, 0], mean[:, 0, 0])
    assert float(scores.precision(fake, "a")[0, 0]) == pytest.approx(expected)


def test_false_discoveries_are_controlled(stats: experts.RoutingStats) -> None:
    area, p = scores.auroc(stats, "law")
    keep = torch.from_numpy(false_discovery_control(p.flatten().numpy())).view_as(p) <= 0.2
    chosen = experts.select(stats, "law", "auroc", fdr=0.2)
    assert {(la, e) for la, ids in chosen.ids.items() for e in ids.tolist()} == {
        (int(a), int(b)) for a, b in (keep & (area > 0.5)).nonzero()
    }
    q = torch.from_numpy(false_discovery_control(scores.correlation_p(stats, "law").flatten().numpy()))
    both = experts.select(stats, "law", "correlation", threshold=0.0, fdr=0.3)
    assert len(both) == int(((q <= 0.3) & (experts.correlation(stats, "law").flatten() > 0)).sum())


def test_largest_takes_what_was_asked_for(stats: experts.RoutingStats) -> None:
    assert [len(ids) for ids in experts.select(stats, "law", "reap", count=2).ids.values()] == [2, 2, 2]
    assert [len(ids) for ids in experts.select(stats, "law", "precision", share=0.25).ids.values()] == [2, 2, 2]
    assert len(experts.select(stats, "law", "rate", total=3, against="code")) == 3
    for wrong in ({}, {"count": 1, "total": 2}):
        with pytest.raises(ExpertError, match="exactly one of count"):
            experts.select(stats, "law", "rate", **wrong)
    with pytest.raises(ExpertError, match=r"total=99: expected 1\.\.24"):
        experts.select(stats, "law", "ftri", total=99)
    with pytest.raises(ExpertError, match=r"p=1\.5: expected a share"):
        experts.select(stats, "law", "esft_gate", p=1.5)
    with pytest.raises(ExpertError, match=r"fdr=2: expected a rate"):
        experts.select(stats, "law", "auroc", fdr=2)
    with pytest.raises(ExpertError, match="needs at least one other label"):
        experts.select(stats, "law", "rate", against="law", count=1)


def test_a_set_knows_what_it_was_chosen_on(moe: interp.Model, stats: experts.RoutingStats) -> None:
    record = experts.select(stats, "law", "rate", count=1, against="bio").record
    assert record["rule"] == "rate"
    assert record["settings"] == {"count": 1, "against": "bio"}
    assert record["documents"] == 12
    assert record["data"] == stats.data
    again = experts.routing(moe, {"law": ["the court shall decide"], "bio": ["a gene of the cell"]})
    assert again.data != stats.data


def test_a_label_of_a_few_tokens_is_too_small(moe: interp.Model) -> None:
    small = experts.routing(moe, {"law": ["the court"], "bio": ["a gene of the cell "]})
    with pytest.raises(ExpertError, match=r"label 'law': 9 tokens are too few"):
        experts.select(small, "law", "most", count=1)
    assert len(experts.select(small, "law", "most", count=1, force=True)) == 3
