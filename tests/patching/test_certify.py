"""The certificate: its bound covers the truth, its costs add up, its words say what was done."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import Tensor

import interp
from interp.patching import builders
from interp.patching.certify import Effects, certify, certify_effects, nodes_of
from interp.patching.welch import draw_subsets, from_complements, from_subsets
from tests.patching.wordy import wordy


class World:
    """Nodes with known effects on two pairs: additive, and one interaction for each neighbouring couple."""

    def __init__(self, n: int, generator: torch.Generator, top: float = 0.0, interaction: float = 0.3) -> None:
        self.own = torch.randn(2, n, generator=generator).double() * 0.1
        self.own[:, n // 2] += top  # one node that may matter
        self.joint = torch.randn(2, n - 1, generator=generator).double() * 0.1 * interaction
        self.calls = 0

    def __call__(self, sets: list[list[int]]) -> Tensor:
        self.calls += 2 * len(sets)
        x = torch.zeros(len(sets), self.own.shape[1], dtype=torch.float64)
        x[[i for i, s in enumerate(sets) for _ in s], [node for s in sets for node in s]] = 1
        return x @ self.own.T + (x[:, 1:] * x[:, :-1]) @ self.joint.T

    @property
    def truth(self) -> Tensor:
        """Mean effect of each node over random backgrounds [node]: its own, and half of its interactions."""
        own, joint = self.own.mean(0), self.joint.mean(0)
        return own + (torch.cat([joint, joint.new_zeros(1)]) + torch.cat([joint.new_zeros(1), joint])) / 2


@pytest.mark.parametrize("design", ["complements", "independent"])
def test_the_bound_covers_the_truth_in_a_thousand_simulated_runs(design: str) -> None:
    """At 99 % the largest unverified effect lies below the bound in at least 990 of 1,000."""
    covered = false = 0
    for seed in range(1000):
        world = World(12, torch.Generator().manual_seed(seed), top=0.5)
        threshold = float(world.truth.abs().max())  # the node that matters sits exactly at the threshold
        done = certify_effects(
            world, torch.zeros(12), threshold=threshold, budget=2 + 2 * 64, confidence=0.99, design=design, seed=seed,
        )  # fmt: skip
        unverified = torch.tensor((done.frame["status"] == "bounded").tolist())
        largest = float(world.truth.abs()[unverified].max())
        covered += done.bound >= largest
        false += done.holds and largest >= threshold
    assert covered >= 990
    assert false <= 10


def test_each_nodes_own_bound_has_its_nominal_coverage() -> None:
    """Not only the maximum over many: single bounds at 99 % cover 99 %, Welch's formula on complements does not."""
    hits = {"paired": 0, "independent": 0, "welch on complements": 0}
    total = 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        world = World(12, generator, interaction=0.0)
        truth = world.truth

        def value(inside: Tensor, world: World = world) -> Tensor:
            return world([row.nonzero().flatten().tolist() for row in inside]).mean(1)

        half = draw_subsets(32, 12, generator)
        both = torch.cat([half, ~half])
        signed = {
            "paired": from_complements(half, value(half) - value(~half)),
            "welch on complements": from_subsets(both, value(both)),
            "independent": from_subsets(*(lambda s: (s, value(s)))(draw_subsets(64, 12, generator))),
        }
        for name, estimate in signed.items():
            # in the direction of the true effect (one-sided, at 99 %): what the bound on |effect| rests on
            upper = estimate.mean * truth.sign() + (estimate.bound(0.98) - estimate.mean.abs())
            hits[name] += int((upper >= truth.abs()).sum())
        total += 12
    share = {name: n / total for name, n in hits.items()}
    assert share["paired"] >= 0.985
    assert share["independent"] >= 0.985
    assert share["welch on complements"] < 0.97  # the error that pairing avoids


def test_estimates_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    inside, value = draw_subsets(40, 5, generator), torch.randn(40, generator=generator).double()
    from scipy import stats

    welch = from_subsets(inside, value)
    for node in range(5):
        a, b = value[inside[:, node]].numpy(), value[~inside[:, node]].numpy()
        test = stats.ttest_ind(a, b, equal_var=False)
        assert float(welch.mean[node]) == pytest.approx(a.mean() - b.mean())
        assert float(welch.freedom[node]) == pytest.approx(test.df)
        assert float(welch.mean[node] / welch.error[node]) == pytest.approx(test.statistic)
    paired = from_complements(inside, value)
    for node in range(5):
        signed = torch.where(inside[:, node], value, -value).numpy()
        test = stats.ttest_1samp(signed, 0.0)
        assert float(paired.mean[node]) == pytest.approx(signed.mean())
        assert float(paired.mean[node] / paired.error[node]) == pytest.approx(test.statistic)
    # the p-value of a threshold equals one minus the confidence at which the bound is that threshold
    for estimate in (welch, paired):
        at = estimate.bound(0.97)
        assert [float(estimate.p_value(float(b))[i]) for i, b in enumerate(at)] == pytest.approx([0.03] * 5)


def test_costs_are_what_was_run_and_stay_within_the_budget() -> None:
    for budget, share in ((40, 0.5), (300, 0.2), (300, 0.0), (5000, 1.0)):
        world = World(30, torch.Generator().manual_seed(1), top=2.0)
        score = world.own.abs().mean(0)
        done = certify_effects(world, score, threshold=0.2, budget=budget, share=share)
        assert done.cost["verify"] + done.cost["sample"] == world.calls <= budget
        assert done.cost["left"] == budget - world.calls
        assert done.cost["brute_force"] == 60
        verified = done.frame["status"] == "verified"
        assert int(verified.sum()) * 2 == done.cost["verify"]
        exact = world([[i] for i in range(30)]).mean(1).numpy()
        assert done.frame["value"][verified].to_numpy() == pytest.approx(exact[verified])


def test_the_top_is_verified_first_and_a_large_one_is_found() -> None:
    world = World(30, torch.Generator().manual_seed(2), top=2.0)
    done = certify_effects(world, world.own.abs().mean(0), threshold=1.0, budget=600)
    assert done.holds
    assert len(done.found) == 1
    assert abs(float(done.found["value"].iloc[0])) > 1.0
    assert done.frame["status"][15] == "verified"


def test_what_the_ranking_missed_is_not_certified_away() -> None:
    """The one node that matters is last in the ranking: subsets find it, or the certificate does not hold."""
    for seed in range(20):
        world = World(30, torch.Generator().manual_seed(seed), top=2.0, interaction=0.0)
        score = torch.ones(30).double() * 0.01
        score[15] = 0.0
        for budget in (2 + 40, 400):
            done = certify_effects(world, score, threshold=1.0, budget=budget, seed=seed)
            missed = done.frame["status"][15] == "bounded"
            assert not (missed and done.holds)


def test_everything_verified_is_said_so() -> None:
    world = World(6, torch.Generator().manual_seed(0))
    done = certify_effects(world, torch.ones(6), threshold=0.5, budget=1000, share=1.0)
    assert done.holds
    assert done.bound == 0
    assert "Every node was verified" in done.statement


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0: expected a positive"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"budget": 1}, "takes 2 passes"),
        ({"design": "latin"}, "design='latin'"),
        ({"share": 2.0}, "share=2.0"),
    ],
)
def test_bad_settings_are_refused(change: dict, message: str) -> None:
    world: Effects = World(6, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        certify_effects(world, torch.ones(6), **{"threshold": 0.5, "budget": 100, **change})


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        certify_effects(World(3, torch.Generator()), [1.0, float("nan"), 0.0], threshold=0.5)


# -- on a model ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def m() -> interp.Model:
    return wordy()


def test_on_a_model_every_exact_value_is_patchs_and_the_statement_is_true(m: interp.Model) -> None:
    from interp import patching

    pairs = builders.pronoun(m, 3)
    metric = pairs.metric()
    exact = patching.patch(m, pairs, None, metric, "z[*]")
    table = exact.assign(score=exact["value"].abs() + 1e-4)  # a perfect ranking, for the arithmetic
    threshold = float(exact["value"].abs().quantile(0.9))
    done = certify(m, pairs, None, metric, table, threshold=threshold, budget=3 * 60)
    merged = done.frame.merge(exact, on=["node", "position"], suffixes=("", "_exact"))
    verified = merged[merged["status"] == "verified"]
    assert verified["value"].to_numpy() == pytest.approx(verified["value_exact"].to_numpy(), abs=1e-5)
    assert done.cost["verify"] + done.cost["sample"] + done.cost["left"] == 180
    assert "3 pair(s)" in done.statement
    assert done.frame.attrs["direction"] == "denoise"


def test_nodes_are_read_back_from_their_text(m: interp.Model) -> None:
    table = pd.DataFrame({"node": ["z[1, head=2]", "mlp_out[0:2]", "mlp_out[1]"], "position": [3, pd.NA, 0]})
    a, b, c = nodes_of(m, table)
    assert (str(a), a.position) == ("z[1, head=2]", 3)
    assert (str(b), b.position, len(b.sites)) == ("mlp_out[0:2]", None, 2)
    assert (str(c), c.position) == ("mlp_out[1]", 0)


def test_a_table_without_scores_is_refused(m: interp.Model) -> None:
    with pytest.raises(ValueError, match="columns 'node' and 'score'"):
        certify(m, "the store", "the park", lambda x: x[:, -1, 0], pd.DataFrame({"node": []}), threshold=1.0)
