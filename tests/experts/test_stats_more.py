"""What routing statistics hold besides mass, against sums written out token by token; joined and reopened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import experts
from interp.experts import ExpertError
from tests.experts.conftest import TEXTS, build

ALL: dict[str, Any] = {"norms": True, "positions": True, "together": True, "examples": 3, "documents": 2}


@pytest.fixture(scope="module")
def moe() -> interp.Model:
    return build("routed")


@pytest.fixture(scope="module")
def dense() -> interp.Model:
    return build("neurons")


@pytest.fixture(scope="module")
def stats(moe: interp.Model) -> experts.RoutingStats:
    return experts.routing(moe, TEXTS, batch_tokens=100, **ALL)


def test_norms_positions_and_pairs_are_the_literal_sums(moe: interp.Model, stats: experts.RoutingStats) -> None:
    n, router = moe.n_experts, 1
    for at, documents in enumerate(TEXTS.values()):
        out, contribution, used, rates = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
        places, pairs = np.zeros((n, 12)), np.zeros((n, n))
        for text in documents:
            acts = moe.capture(text, f"expert_out[{router}]").experts(router)
            length = acts.ids.shape[1]
            for t in range(length):
                bin_ = 0 if t == 0 else int(np.log2(t)) + 1
                for s, e in enumerate(acts.ids[0, t].tolist()):
                    norm, weight = float(acts.out[0, t, s].norm()), float(acts.weights[0, t, s])
                    out[e] += norm
                    contribution[e] += weight * norm
                    used[e] += 1
                    rates[e] += 1 / length
                    places[e, bin_] += weight
                    pairs[e, acts.ids[0, t].tolist()] += 1
        for name, mine in (
            ("out_norm", out),
            ("contribution", contribution),
            ("positions", places),
            ("together", pairs),
        ):
            np.testing.assert_allclose(stats.more[name][at, router].numpy(), mine, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.used[at, router].numpy(), used)
        np.testing.assert_allclose(stats.doc_used[at, router].numpy(), rates, rtol=1e-6)
    table = stats.frame()
    row = table[(table["layer"] == 1) & (table["label"] == "bio") & (table["expert"] == 0)].iloc[0]
    assert row["out_norm"] == pytest.approx(out[0] / max(used[0], 1), rel=1e-5)


def test_a_neuron_puts_out_its_activation_times_its_column(dense: interp.Model) -> None:
    stats = experts.routing(dense, {"a": TEXTS["law"][:1]}, kind="neurons", norms=True)
    acts = dense.capture(TEXTS["law"][0], "mlp_hidden[1]")["mlp_hidden[1]"][0]
    column = dense.hf.model.layers[1].mlp.down_proj.weight.norm(dim=0)
    expected = (acts.abs() * column).sum(0).detach()
    torch.testing.assert_close(stats.more["contribution"][0, 1].float(), expected, rtol=1e-5, atol=1e-6)


def test_profile_is_mass_per_token_of_a_place(stats: experts.RoutingStats) -> None:
    table = stats.profile()
    assert sorted(table["position"].unique())[:5] == [0, 1, 2, 4, 8]
    tokens = stats.more["position_tokens"]
    assert torch.equal(tokens.sum(1), stats.tokens)
    assert tokens[0, 0] == len(TEXTS["law"])  # as many first tokens as documents
    first = table[(table["position"] == 0) & (table["layer"] == 0) & (table["label"] == "law")]
    k = stats.used[0, 0].sum() / stats.tokens[0]
    assert first["mass"].sum() <= float(k)  # softmax weights


def test_examples_are_the_strongest_tokens(moe: interp.Model, stats: experts.RoutingStats) -> None:
    table = experts.examples(stats, moe, [(1, e) for e in range(moe.n_experts)])
    every: dict[int, list[tuple[float, str, str]]] = {e: [] for e in range(moe.n_experts)}
    for label, documents in TEXTS.items():
        for text in documents:
            acts = moe.capture(text, "expert_weight[1]").experts(1)
            for t, s in np.ndindex(*acts.ids.shape[1:]):
                every[int(acts.ids[0, t, s])].append((float(acts.weights[0, t, s]), text[t], label))
    for e, part in table.groupby("expert"):
        expected = sorted(every[int(e)], reverse=True)[:3]
        assert part["weight"].tolist() == pytest.approx([w for w, _, _ in expected], rel=1e-5)
        assert part["token"].iloc[0] == expected[0][1]
    row = table.iloc[0]
    shown = (row["before"] + row["token"] + row["after"]).replace(" ", "")  # this tokenizer puts spaces between letters
    texts = [t for t in TEXTS[row["label"]] if shown in t.replace(" ", "")]
    assert row["token"] in [t[row["position"]] for t in texts]


def test_workers_add_up_whatever_the_order(moe: interp.Model, stats: experts.RoutingStats) -> None:
    first = experts.routing(moe, {label: texts[:1] for label, texts in TEXTS.items()}, **ALL)
    rest = experts.routing(moe, {label: TEXTS[label][1:] for label in ("bio", "law", "code")}, **ALL)
    for both in (first + rest, (rest + first).only(stats.labels)):
        for name, value in stats.more.items():
            torch.testing.assert_close(both.more[name], value, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(both.doc_used, stats.doc_used)
        assert both.sample is not None
        assert stats.sample is not None
        assert sorted(both.sample.key.tolist()) == sorted(stats.sample.key.tolist())
        assert both.examples is not None
        assert stats.examples is not None
        torch.testing.assert_close(both.examples.weight, stats.examples.weight, rtol=1e-5, atol=1e-6)
        shown, again = experts.examples(stats, moe), experts.examples(both, moe)
        assert (shown["label"] == again["label"]).mean() > 0.95  # equal weights of equal contexts may change places
    assert len(first.data) == 1
    assert len((first + rest).data) == 2


def test_memory_does_not_grow_with_the_text(moe: interp.Model) -> None:
    small = experts.routing(moe, {"a": ["the court " * 3] * 3, "b": ["a gene "] * 3}, **ALL)
    large = experts.routing(moe, {"a": [f"the court {'x' * i}" for i in range(30)], "b": ["a gene of"] * 30}, **ALL)

    def size(stats: experts.RoutingStats) -> int:
        assert stats.sample is not None
        assert stats.examples is not None
        parts = [*stats.more.values(), stats.mass, *stats.sample.tensors().values(), *stats.examples.tensors().values()]
        return sum(t.numel() for t in parts)

    assert size(large) == size(small)


def test_all_of_it_comes_back_from_disk(moe: interp.Model, stats: experts.RoutingStats, tmp_path: Path) -> None:
    again = experts.RoutingStats.load(stats.save(tmp_path / "stats.safetensors"))
    assert again.about() == stats.about()
    for name, value in stats.more.items():
        torch.testing.assert_close(again.more[name], value, rtol=0, atol=0)
    assert experts.examples(again, moe).equals(experts.examples(stats, moe))
    torch.testing.assert_close(experts.auroc(again, "law")[0], experts.auroc(stats, "law")[0])


def test_load_tells_balance_from_collapse(stats: experts.RoutingStats) -> None:
    table = experts.load(stats)
    assert len(table) == len(stats.layers) * (len(stats.labels) + 1)
    even, one = torch.full_like(stats.used, 5.0), torch.zeros_like(stats.used)
    one[..., 0] = 40.0
    from dataclasses import replace

    flat = experts.load(replace(stats, used=even, mass=even)).iloc[0]
    assert (flat["entropy"], flat["max_over_mean"], flat["dead"]) == (pytest.approx(1), pytest.approx(1), 0)
    assert flat["gini"] == pytest.approx(0, abs=1e-9)
    assert flat["switch"] == pytest.approx(1)
    sunk = experts.load(replace(stats, used=one, mass=one)).iloc[0]
    assert (sunk["entropy"], sunk["max_over_mean"], sunk["dead"]) == (pytest.approx(0), 8, 7)
    assert sunk["gini"] == pytest.approx(7 / 8)


def test_saturation_is_one_with_itself_and_chance_with_a_stranger(moe: interp.Model) -> None:
    other = interp.load("tiny:olmoe", moe.tokenizer, vocab_size=len(moe.tokenizer), max_position_embeddings=256, seed=9)
    table = experts.saturation({"self": moe, "other": other}, moe, TEXTS)
    assert (table[table["checkpoint"] == "self"]["value"] == 1).all()
    strange = table[table["checkpoint"] == "other"]
    assert strange["value"].mean() == pytest.approx(strange["chance"].iloc[0], abs=0.15)
    mine, theirs = (x.capture(TEXTS["law"][0], "expert_ids[0]")["expert_ids[0]"][0].tolist() for x in (moe, other))
    literal = np.mean([len({*a} & {*b}) / len(a) for a, b in zip(mine, theirs, strict=True)])
    alone = experts.saturation({"other": other}, moe, {"law": TEXTS["law"][:1]})
    assert alone["value"].iloc[0] == pytest.approx(literal)


def test_coactivation_is_the_share_of_tokens_that_use_both(stats: experts.RoutingStats) -> None:
    table = experts.coactivation(stats, "law", top=None)
    pairs, used = stats.more["together"][0], stats.used[0]
    for row in table.itertuples():
        assert row.value == pytest.approx(float(pairs[row.layer, row.expert, row.other] / used[row.layer, row.expert]))
    assert (table["expert"] != table["other"]).all()
    by_pair = table.set_index(["layer", "expert", "other"])["lift"]
    assert all(by_pair[la, j, i] == pytest.approx(lift) for (la, i, j), lift in by_pair.items())


def test_specialisation_is_the_divergence_of_the_labels(stats: experts.RoutingStats) -> None:
    from scipy.stats import entropy

    layers = experts.specialisation(stats, shuffles=50)
    each = experts.specialisation(stats, by="expert", shuffles=0)
    for layer, part in each.groupby("layer"):
        p = (stats.mass[:, layer] / stats.mass[:, layer].sum(-1, keepdim=True)).numpy()
        jsd = entropy(p.mean(0), base=2) - np.mean([entropy(row, base=2) for row in p])
        assert layers["value"][layer] == pytest.approx(jsd)
        assert (part["share"] * part["value"]).sum() == pytest.approx(jsd)
    assert (layers["chance"] > 0).all()  # few documents always differ
    assert (layers["low"] <= layers["chance"]).all()


def test_specialisation_of_dealt_labels_is_no_more_than_chance() -> None:
    from dataclasses import replace

    torch.manual_seed(1)
    from interp.experts.kept import Documents

    moe = build("routed")
    stats = experts.routing(moe, TEXTS)
    n = 60
    label, mean = torch.arange(n) % 3, torch.rand(n, *stats.mass.shape[1:])
    plain = Documents(torch.tensor(200), torch.arange(n), label, torch.full((n,), 10.0), mean)
    table = experts.specialisation(replace(stats, sample=plain), shuffles=200)
    assert (table["p"] > 0.01).all()
    mean = mean.clone()
    mean[label == 0, :, 0] += 1.0
    table = experts.specialisation(replace(stats, sample=replace(plain, mean=mean)), shuffles=200)
    assert (table["kept"] > table["high"]).all()
    assert (table["p"] < 0.01).all()


def test_what_cannot_be_measured_is_told(moe: interp.Model, monet: interp.Model, stats: experts.RoutingStats) -> None:
    plain = experts.routing(moe, TEXTS, documents=0)
    with pytest.raises(ExpertError, match="pass norms=True to"):
        experts.select(plain, "law", "reap", count=1)
    with pytest.raises(ExpertError, match="pass together=True"):
        experts.coactivation(plain)
    with pytest.raises(ExpertError, match="pass documents=200"):
        experts.auroc(plain, "law")
    with pytest.raises(ExpertError, match="pass examples=5"):
        experts.examples(plain, moe)
    with pytest.raises(ExpertError, match=r"units: \(9, 0\) is none"):
        experts.examples(stats, moe, [(9, 0)])
    with pytest.raises(ExpertError, match="never written out"):
        experts.routing(monet, TEXTS, norms=True)
    with pytest.raises(ExpertError, match="too many to list"):
        experts.routing(monet, TEXTS, together=True)
    with pytest.raises(ExpertError, match="in one of the two statistics only"):
        plain + experts.routing(moe, TEXTS, norms=True, documents=0)
    with pytest.raises(ExpertError, match="kept documents or examples"):
        plain + experts.routing(moe, TEXTS)
    with pytest.raises(ExpertError, match=r"earlier\['x'\]"):
        experts.saturation({"x": build("neurons")}, moe, TEXTS)
