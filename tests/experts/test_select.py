"""Selection rules against their definitions, and sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr

from interp import experts
from interp.experts import ExpertError, ExpertSet
from tests.experts.test_stats import literal


def test_skew_is_monets_rule(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(model, texts, kind=kind)
    p = stats.probability
    chosen = experts.select(stats, "law", rule="skew", ratio=1.05)
    for layer, router in stats.layers.items():
        for unit in range(stats.size):
            mine, others = float(p[0, router, unit]), max(float(p[1, router, unit]), float(p[2, router, unit]))
            assert ((layer, unit) in chosen) == (mine > 0 and mine >= 1.05 * others)


def test_lift_is_mass_over_the_mean_of_the_others(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(model, texts, kind=kind)
    p = stats.probability
    chosen = experts.select(stats, "code", rule="lift", ratio=1.1)
    for layer, router in stats.layers.items():
        for unit in range(stats.size):
            mine, others = float(p[1, router, unit]), float(p[0, router, unit] + p[2, router, unit]) / 2
            assert ((layer, unit) in chosen) == (mine > 0 and mine >= 1.1 * others)
    assert len(experts.select(stats, "code", rule="skew", ratio=1.1) - chosen) == 0  # the mean is not above the maximum


def test_sets_of_different_labels_are_disjoint(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(model, texts, kind=kind)
    sets = [experts.select(stats, label, ratio=1.05) for label in texts]
    assert all(len(a & b) == 0 for i, a in enumerate(sets) for b in sets[:i])


def test_correlation_is_pearsons(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(model, texts, kind=kind)
    r = experts.correlation(stats, "law", against="code")
    with torch.no_grad():
        means = torch.stack([literal(model, t, 0).double().mean(0) for label in ("law", "code") for t in texts[label]])
    y = [1, 1, 1, 0, 0, 0]
    for unit in range(stats.size):
        if means[:, unit].std() > 1e-9:
            assert float(r[0, unit]) == pytest.approx(pearsonr(means[:, unit], y).statistic, abs=1e-4)
        else:
            assert float(r[0, unit]) == 0
    chosen = experts.select(stats, "law", "correlation", threshold=0.2, against="code")
    assert torch.equal(chosen.ids[0], (r[0] > 0.2).nonzero()[:, 0])


def test_top_and_most_take_a_count_per_router(monet: Any, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(monet, texts)
    top = experts.select(stats, "law", "top", count=5)
    assert [len(ids) for ids in top.ids.values()] == [5, 5, 5, 5]
    assert torch.equal(top.ids[0], top.ids[1])  # one router
    most = experts.select(stats, "law", "most", count=1)
    assert int(most.ids[0][0]) == int(stats.probability[0, 0].argmax())


def test_no_unit_all_units_and_wrong_words_are_told(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(model, texts, kind=kind)
    with pytest.raises(ExpertError, match=r"no unit of .* meets rule 'skew'.*; try a smaller ratio"):
        experts.select(
            stats.only(["law"]) + stats.only(["law", "bio"]), "law", ratio=1e9 if kind == "neurons" else 1e300
        )
    with pytest.raises(ExpertError, match=r"takes every unit of layer 0.*force=True"):
        experts.select(stats, "law", "correlation", threshold=-2.0)
    assert experts.select(stats, "law", "correlation", threshold=-2.0, force=True).share == 1.0
    with pytest.raises(ExpertError, match="label 'physics': the statistics have law, code, bio"):
        experts.select(stats, "physics")
    with pytest.raises(ExpertError, match=r"expected one of skew, lift, correlation"):
        experts.select(stats, "law", "magic")
    with pytest.raises(ExpertError, match=r"ratio=1\.0: expected more than 1"):
        experts.select(stats, "law", ratio=1.0)
    with pytest.raises(ExpertError, match=r"unexpected keyword argument 'treshold'"):
        experts.select(stats, "law", treshold=1.0)
    with pytest.raises(ExpertError, match="only 'law' is there"):
        experts.select(stats.only(["law"]), "law")


def test_algebra_and_files(monet: Any, tmp_path: Path) -> None:
    a, b = ExpertSet(monet, {0: [1, 2, 3], 2: [5]}), ExpertSet(monet, {0: [3, 4], 3: [7]})
    assert len(a | b) == 6
    assert (a & b) == ExpertSet(monet, {0: [3]})
    assert (a - b) == ExpertSet(monet, {0: [1, 2], 2: [5]})
    assert (0, 2) in a
    assert (1, 2) not in a
    assert ExpertSet.load(a.save(tmp_path / "a.json"), monet) == a
    assert not list(tmp_path.glob(".*"))


def test_a_set_of_another_model_is_refused(monet: Any, tmp_path: Path) -> None:
    from tests.experts.conftest import build

    other = build("routed")
    mine = ExpertSet(monet, {0: [1]})
    with (
        pytest.raises(ExpertError, match=r"was made for monet-tiny .* not for tiny:olmoe"),
        experts.switched_off(other, mine),
    ):
        pass
    with pytest.raises(ExpertError, match="mean nothing in another"):
        ExpertSet.load(mine.save(tmp_path / "a.json"), other)
    with pytest.raises(ExpertError, match="different models"):
        mine | ExpertSet(other, {0: [1]})
    with pytest.raises(ExpertError, match=r"layer 0: expert 64; a layer has experts 0\.\.63"):
        ExpertSet(monet, {0: [64]})
    with pytest.raises(ExpertError, match="layer 9: the layers with monet units"):
        ExpertSet(monet, {9: [1]})
    with pytest.raises(ExpertError, match="expected whole numbers"):
        ExpertSet(monet, {0: [0.5]})  # type: ignore[list-item]
