"""Switching off is exact, losses are the model's, controls are matched, reports are honest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp import experts
from interp.experts import ExpertError, ExpertSet
from interp.experts.losses import METRICS


def by_hand(model: Any, chosen: ExpertSet, ids: torch.Tensor) -> torch.Tensor:
    """Logits with the set's units off, by changing the weights that put out what they compute."""
    if chosen.kind == "monet":  # from the definition: sum over kept pairs of weight * expert
        handles = []
        for layer, moe in enumerate(model.hf.experts()):
            off = chosen.mask(layer).view(8, 8)

            def forward(module: Any, args: Any, y: Any, off: torch.Tensor = off) -> torch.Tensor:
                x, g1, g2 = args
                total = torch.zeros_like(y)
                for i in range(8):
                    for j in range(8):
                        if not off[i, j]:
                            weight = (g1[..., i] * g2[..., j]).sum(-1, keepdim=True)
                            total += weight * module.expert(x, torch.tensor([i]), torch.tensor([j]))[..., 0, :]
                return total

            handles.append(moe.register_forward_hook(forward))
        try:
            return model.hf(input_ids=ids).logits
        finally:
            for handle in handles:
                handle.remove()
    kept = {k: v.clone() for k, v in model.hf.state_dict().items()}
    for layer, units in chosen.ids.items():
        mlp = model.hf.model.layers[layer].mlp
        if chosen.kind == "routed":
            mlp.experts.down_proj.data[units] = 0
        else:
            mlp.down_proj.weight.data[:, units] = 0
    try:
        return model.hf(input_ids=ids).logits
    finally:
        model.hf.load_state_dict(kept)


def some(model: Any, kind: str, texts: dict[str, list[str]]) -> ExpertSet:
    return experts.select(experts.routing(model, texts, kind=kind), "law", "top", count=3)


@torch.no_grad()
def test_switched_off_is_exact(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    chosen = some(model, kind, texts)
    ids = model.tokens(texts["law"][1]).ids
    before = model(ids)
    with experts.switched_off(model, chosen):
        masked = model(ids)
    torch.testing.assert_close(masked, by_hand(model, chosen, ids), rtol=1e-4, atol=1e-5)
    assert (masked - before).abs().max() > 1e-4
    assert torch.equal(model(ids), before)


@torch.no_grad()
def test_sets_nest(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(model, texts, kind=kind)
    a, b = (experts.select(stats, label, "top", count=2) for label in ("law", "code"))
    ids = model.tokens(texts["bio"][1]).ids
    with experts.switched_off(model, a), experts.switched_off(model, b):
        nested = model(ids)
    with experts.switched_off(model, a | b):
        torch.testing.assert_close(nested, model(ids), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_losses_are_the_models_own(model: Any, texts: dict[str, list[str]]) -> None:
    measured = experts.losses(model, texts, batch_tokens=100)
    document = 0
    for documents in texts.values():
        for text in documents:
            ids = model.tokens(text).ids
            logits = model(ids)[0, :-1]
            assert float(measured.nats[document]) == pytest.approx(
                float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")), rel=1e-5
            )
            assert int(measured.correct[document]) == int((logits.argmax(-1) == ids[0, 1:]).sum())
            assert int(measured.tokens[document]) == ids.shape[1] - 1
            document += 1


def test_controls_match_layer_and_frequency(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(model, texts, kind=kind)
    chosen = experts.select(stats, "law", "top", count=3)
    generator = torch.Generator().manual_seed(0)
    drawn = [experts.matched(stats, chosen, generator) for _ in range(20)]
    for control in drawn:
        assert {la: len(ids) for la, ids in control.ids.items()} == {la: len(ids) for la, ids in chosen.ids.items()}
        assert len(control & chosen) == 0
    assert len({str(control.ids) for control in drawn}) > 1


def test_a_controls_frequency_is_close_where_there_are_units_to_choose_from(monet: Any) -> None:
    """On made-up frequencies over four decades: a control's is within a few per cent, that of any units is not."""
    from interp.experts.controls import frequency

    size, generator = 64, torch.Generator().manual_seed(1)
    stats = experts.routing(monet, {"a": ["the court"], "b": ["a party"]})
    stats.mass.copy_((10 ** torch.linspace(-4, 0, size).double())[torch.randperm(size, generator=generator)])
    chosen = ExpertSet(
        monet, {0: stats.mass[0, 0].argsort()[[5, 20, 40, 50]], 1: stats.mass[0, 0].argsort()[[5, 20, 40, 50]]}
    )
    drawn = [frequency(stats, experts.matched(stats, chosen, generator, near=2)) for _ in range(20)]
    assert frequency(stats, chosen) / 1.4 < sum(drawn) / 20 < frequency(stats, chosen) * 1.4


def test_the_table(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    chosen = some(model, kind, texts)
    table = experts.evaluate(model, chosen, texts, controls=4)
    assert list(table.columns) == ["label", "metric", "baseline", "before", "after", "value", "low", "high", "units"]
    assert len(table) == len(texts) * len(METRICS) * 2
    own = table[table["baseline"] == "none"]
    assert ((own["low"] <= own["value"] + 1e-9) & (own["value"] <= own["high"] + 1e-9)).all()
    law = own[(own["label"] == "law") & (own["metric"] == "loss")].iloc[0]
    before = experts.losses(model, texts).of("law").sum(0)
    with experts.switched_off(model, chosen):
        after = experts.losses(model, texts).of("law").sum(0)
    assert law["value"] == pytest.approx(float(after[0] / after[2] - before[0] / before[2]), abs=1e-9)
    ppl = own[(own["label"] == "law") & (own["metric"] == "perplexity")].iloc[0]
    assert ppl["after"] == pytest.approx(torch.tensor(law["after"]).exp().item(), rel=1e-6)
    again = experts.evaluate(model, chosen, texts, controls=4)
    assert again.equals(table)


def test_intervals_shrink_with_documents_and_cover(monet: Any) -> None:
    """The bootstrap interval of a mean of known spread has about the width that theory gives."""
    from interp.experts.losses import Losses, change

    generator = torch.Generator().manual_seed(0)

    def made(n: int, shift: float) -> Losses:
        noise = torch.randn(n, generator=generator).double()
        return Losses(
            ["a"],
            torch.zeros(n).long(),
            (2 + shift + 0.5 * noise) * 10,
            torch.zeros(n),
            torch.full((n,), 10.0).double(),
        )

    for n in (50, 800):
        zero = Losses(
            ["a"],
            torch.zeros(n).long(),
            torch.full((n,), 20.0).double(),
            torch.zeros(n),
            torch.full((n,), 10.0).double(),
        )
        interval = change(zero, made(n, 0.3), "a")["loss"]
        assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * 0.5 / n**0.5, rel=0.25)


def test_a_bounded_number_of_tokens_is_spread_over_documents(monet: Any) -> None:
    long = ["the court shall decide " * 20] * 30  # 460 tokens each
    data = experts.corpus(monet, {"a": long, "b": long[:2]}, max_tokens=400)
    lengths = [sum(len(w.ids) for w in data.windows if w.document == d) for d in range(len(data.documents))]
    assert lengths == [20] * 20 + [200] * 2


def test_one_document_has_no_interval(monet: Any) -> None:
    table = experts.evaluate(
        monet, ExpertSet(monet, {0: [1]}), {"a": ["the court shall "], "b": ["a party", "a court"]}, controls=0
    )
    loss = table[table["metric"] == "loss"].set_index("label")
    assert loss.loc["a", ["low", "high"]].isna().all()


def test_resection_tables(monet: Any, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(monet, texts)
    table = experts.remove_each(monet, stats, texts, rule="top", count=3, controls=3)
    grid = experts.matrix(table)
    assert list(grid.index) == list(grid.columns) == list(texts)
    law = experts.select(stats, "law", "top", count=3)
    single = experts.evaluate(monet, law, texts, controls=0)
    for label in texts:
        value = single[(single["label"] == label) & (single["metric"] == "loss")]["value"].iloc[0]
        assert grid.loc["law", label] == pytest.approx(value, abs=1e-12)
    summary = experts.summary(table)
    assert list(summary["removed"]) == [*texts, "mean"]
    row = summary.iloc[0]
    assert row["spill"] == pytest.approx((abs(grid.loc["law", "code"]) + abs(grid.loc["law", "bio"])) / 2)
    assert row["selectivity"] == pytest.approx(row["damage"] / row["spill"])


def test_a_label_without_units_is_a_result_in_a_sweep(monet: Any, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(monet, texts)
    table = experts.remove_each(monet, stats, texts, rule="correlation", threshold=2.0, controls=3)
    assert (table["units"] == 0).all()
    assert (table["value"] == 0).all()


def test_a_sweep_goes_on_where_too_few_units_are_left_as_controls(monet: Any, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(monet, texts)
    said: list[str] = []
    table = experts.remove_each(monet, stats, texts, rule="top", labels=["law"], count=40, controls=2, say=said.append)
    assert set(table["baseline"]) == {"none"}
    assert said == ["removing law (1 of 1): 160 units, no controls (more than half of a layer)"]
    assert experts.summary(table)["random"].isna().all()


def test_frontier_and_equal_damage(monet: Any, texts: dict[str, list[str]]) -> None:
    import pandas as pd

    stats = experts.routing(monet, texts)
    curve = experts.frontier(monet, stats, texts, "top", count=[1, 4, 12])
    assert list(curve["count"]) == [1, 4, 12]
    assert (curve["share_of_all"].diff().dropna() > 0).all()
    made = pd.DataFrame(
        {"method": ["a"] * 3 + ["b"] * 2, "damage": [0.0, 0.4, 0.8, 0.0, 0.3], "spill": [0.0, 0.1, 0.3, 0.0, 0.1],
         "share_of_all": [0.0, 0.1, 0.2, 0.0, 0.1]}
    )  # fmt: skip
    level = experts.at_damage(made, 0.6)
    assert level["spill"].iloc[0] == pytest.approx(0.2)
    assert level["selectivity"].iloc[0] == pytest.approx(3.0)
    assert level["spill"].isna().iloc[1]  # b never gets there


def test_bad_input(monet: Any, texts: dict[str, list[str]]) -> None:
    chosen = some(monet, "auto", texts)
    with pytest.raises(ExpertError, match="controls=-1"):
        experts.evaluate(monet, chosen, texts, controls=-1)
    stats = experts.routing(monet, texts)
    with pytest.raises(ExpertError, match="held_out: no text for 'bio'"):
        experts.remove_each(monet, stats, {"law": texts["law"], "code": texts["code"]})
    nearly_all = ExpertSet(monet, {0: range(60)})
    runs: list[Any] = []
    counter = monet.hf.register_forward_pre_hook(lambda module, args: runs.append(args))
    with pytest.raises(ExpertError, match="too few are left as controls"):
        experts.evaluate(monet, nearly_all, texts, controls=1, stats=stats)
    counter.remove()
    assert not runs, "it is found out before anything is run"
