"""The report card's measures by hand, and the card on models of several shapes."""

from __future__ import annotations

import math

import pytest
import torch

import interp
from interp.patching.report_card import compared, rank_correlation, recall, relative_cost, report_card
from interp.patching.task import PatchError

from .conftest import differing, logit_gap


def test_recall() -> None:
    truth, scores = torch.tensor([5.0, 4.0, 3.0, 0.0]), torch.tensor([1.0, 0.0, 3.0, 2.0])
    assert recall(truth, scores, 1) == 0
    assert recall(truth, scores, 2) == 0
    assert recall(truth, scores, 3).item() == pytest.approx(2 / 3)
    assert recall(truth, truth, 3) == recall(truth, scores, 9) == 1


def test_relative_cost() -> None:
    truth = torch.tensor([4.0, 3.0, 2.0])
    assert relative_cost(truth, truth) == 1
    # the estimator's order is node 2, 0, 1: the true best comes second, the second best third, then all are verified
    by_hand = math.exp((math.log(2 / 1) / 1 + math.log(3 / 2) / 2 + math.log(3 / 3) / 3) / (1 + 1 / 2 + 1 / 3))
    assert relative_cost(truth, torch.tensor([2.0, 1.0, 9.0])).item() == pytest.approx(by_hand)


def test_rank_correlation_is_spearmans() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randint(0, 6, (40,)).float(), torch.randint(0, 6, (40,)).float()
    assert rank_correlation(a, b).item() == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(rank_correlation(a, torch.ones(40)))


def test_measures_of_many_draws_are_those_of_each() -> None:
    truth, scores = torch.rand(6, 30), torch.randint(0, 9, (6, 30)).float()
    for of in (lambda t, s: recall(t, s, 5), relative_cost, rank_correlation):
        assert of(truth, scores).tolist() == pytest.approx(
            [of(t, s).item() for t, s in zip(truth, scores, strict=True)]
        )


def test_intervals_come_from_pairs() -> None:
    """Pairs that agree give no width; pairs that differ give one that holds the value."""
    truth = torch.rand(30, 1).expand(30, 4)
    same = compared(truth, {"a": truth}, ["z"] * 30, 5)
    assert same.value.tolist() == pytest.approx(same.high.tolist())
    assert same.low.tolist() == pytest.approx(same.high.tolist())
    assert set(same.measure) == {"recall@5", "relative cost", "rank correlation"}
    noisy = compared(torch.rand(30, 6), {"a": torch.rand(30, 6)}, ["z"] * 15 + ["q"] * 15, 5)
    assert set(noisy.site) == {"all", "z", "q"}
    assert (noisy.low < noisy.high).any()
    assert (noisy.low <= noisy.high).all()


def test_differences_are_taken_within_draws() -> None:
    """An estimator that is always a little better differs by less than pairs do, and shows it."""
    truth = torch.rand(40, 8)
    good, better = truth + 0.2 * torch.rand(40, 8), truth + 0.02 * torch.rand(40, 8)
    made = compared(truth, {"a": good, "b": better, "c": good}, ["z"] * 40, 5).set_index(["method", "measure"])
    row = made.loc["b", "relative cost"]
    assert row.difference == pytest.approx(row.value - made.value["a", "relative cost"])
    assert row.difference_low <= row.difference <= row.difference_high < 0
    assert (made.loc[["a", "c"], ["difference", "difference_low", "difference_high"]] == 0).all(axis=None)


def test_a_card_of_a_model() -> None:
    m, (clean, corrupt) = interp.load("tiny:qwen3_moe"), differing(3)
    card = report_card(m, clean, corrupt, logit_gap, ["q[*]", "z[*]", "expert_out[1]"], sample=60)
    whole = card[card.site == "all"].set_index(["measure", "method"]).value
    assert card.attrs["sample"] == 60
    assert set(card.site) == {"all", "q", "z", "expert_out"}
    assert (card[card.site != "all"].nodes == 20).all()
    for method in ("atp", "atp+qk", "atp+graddrop", "atp*", "ig"):
        assert whole["rank correlation", method] > 0.5
        assert whole["relative cost", method] < whole["relative cost", "random"]
    assert abs(whole["rank correlation", "random"]) < 0.4
    assert card.attrs["cost"]["atp"]["backward"] < card.attrs["cost"]["atp*"]["backward"]
    assert card.attrs["cost"]["exact"]["forward"] > 10


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"methods": ["atp", "guess"]}, "'guess' is none of atp"),
        ({"k": 0}, "expected k of at least 1"),
        ({"positions": [0]}, "the two runs differ at 0 of these"),
    ],
)
def test_bad_questions_are_refused(how: dict, message: str) -> None:
    clean, corrupt = differing()
    with pytest.raises(PatchError, match=message):
        report_card(interp.load("tiny:llama"), clean, corrupt, logit_gap, "z[*]", **how)
