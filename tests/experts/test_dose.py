"""Dose and response, and divergence, against the same written out."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import experts
from interp.experts import ExpertError
from tests.experts.conftest import TEXTS, build


@pytest.fixture(scope="module")
def moe() -> interp.Model:
    return build("routed")


@pytest.fixture(scope="module")
def stats(moe: interp.Model) -> experts.RoutingStats:
    return experts.routing(moe, TEXTS, norms=True)


def test_divergence_is_kl_over_tokens(moe: interp.Model) -> None:
    chosen = experts.ExpertSet(moe, {1: [0, 3], 2: [5]})
    found = experts.divergence(moe, chosen, TEXTS, batch_tokens=60)
    for label, documents in TEXTS.items():
        total, count = 0.0, 0
        for text in documents:
            p = moe(text).log_softmax(-1)
            with experts.switched_off(moe, chosen):
                q = moe(text).log_softmax(-1)
            total += float(torch.nn.functional.kl_div(q[0], p[0], log_target=True, reduction="sum"))
            count += len(text)
        assert found[label]["value"] == pytest.approx(total / count, rel=1e-4)
        assert found[label]["low"] <= found[label]["value"] <= found[label]["high"]
    nothing = experts.divergence(moe, experts.ExpertSet(moe, {}), {"law": TEXTS["law"]})
    assert nothing["law"]["value"] == pytest.approx(0, abs=1e-6)


def test_each_size_is_the_evaluation_of_its_set(moe: interp.Model, stats: experts.RoutingStats) -> None:
    neutral = {"plain": ["the cell and the court ", "a print of the gene "]}
    table = experts.dose(moe, stats, "law", TEXTS, sizes=(1, 3), rule="ftri", controls=2, neutral=neutral)
    assert list(table["size"].unique()) == [1, 3]
    for size in (1, 3):
        chosen = experts.select(stats, "law", "ftri", total=size)
        alone = experts.evaluate(moe, chosen, TEXTS, controls=0)
        here = table[(table["size"] == size) & (table["baseline"] == "none") & (table["metric"] == "loss")]
        expected = alone[alone["metric"] == "loss"].set_index("label")["value"]
        for row in here.itertuples():
            assert row.value == pytest.approx(expected[row.label], abs=1e-6)
        kl = table[(table["size"] == size) & (table["metric"] == "kl")].iloc[0]
        assert kl["value"] == pytest.approx(experts.divergence(moe, chosen, neutral)["plain"]["value"], rel=1e-5)
    random = table[table["baseline"] == "random"]
    assert set(random["label"]) == set(TEXTS)
    assert table.attrs["chosen_on"] == stats.data


def test_sizes_that_leave_too_few_units_go_on_without_controls(moe: interp.Model, stats: experts.RoutingStats) -> None:
    half = stats.probability.shape[-1] / 2

    def crowded(size: int) -> bool:
        return any(len(ids) > half for ids in experts.select(stats, "law", "top", total=size).ids.values())

    most = next(size for size in range(1, 20) if crowded(size))
    table = experts.dose(moe, stats, "law", TEXTS, sizes=(1, most), rule="top", controls=1)
    controlled = table.groupby("size")["baseline"].apply(lambda column: "random" in set(column))
    assert controlled.to_dict() == {1: True, most: False}


def test_as_many_dense_neurons_stand_beside(moe: interp.Model, stats: experts.RoutingStats) -> None:
    dense = build("neurons")
    of_neurons = experts.routing(dense, TEXTS, kind="neurons")
    table = experts.dose(moe, stats, "law", TEXTS, sizes=(1,), controls=0, neurons=(dense, of_neurons), rule="top")
    beside = table[table["baseline"] == "neurons"]
    assert (beside["units"] == 24).all()  # one expert of width 24
    chosen = experts.select(of_neurons, "law", "top", total=24)
    expected = experts.evaluate(dense, chosen, TEXTS, controls=0)
    assert beside["value"].tolist() == pytest.approx(expected["value"].tolist(), abs=1e-6)


def test_attributions_can_rank(moe: interp.Model, stats: experts.RoutingStats) -> None:
    ranking = experts.attribute(moe, TEXTS)
    table = experts.dose(
        moe,
        stats,
        "law",
        TEXTS,
        sizes=(2,),
        rule="attribution",
        ranking=ranking,
        settings={"beyond": False},
        controls=0,
    )
    own = table[(table["label"] == "law") & (table["metric"] == "loss")].iloc[0]
    assert own["value"] > 0  # what is estimated to help most does help


def test_bad_input_is_told(moe: interp.Model, stats: experts.RoutingStats) -> None:
    with pytest.raises(ExpertError, match="texts: no text for 'law'"):
        experts.dose(moe, stats, "law", {"bio": TEXTS["bio"]})
    with pytest.raises(ExpertError, match="unexpected keyword argument 'total'"):
        experts.dose(moe, stats, "law", TEXTS, rule="skew", sizes=(1,))
    with pytest.raises(ExpertError, match="statistics are of kind 'routed'"):
        experts.dose(moe, stats, "law", TEXTS, sizes=(1,), neurons=(moe, stats))
