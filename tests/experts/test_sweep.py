"""Sweeps equal the loop over experts; attribution equals the slope of the exact local change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import interp
from interp import edits, experts
from interp.experts import ExpertError
from tests.experts.conftest import build, letters

TEXTS = {"law": ["the court shall", "a party may"], "bio": ["a gene of the cell", "the cell"]}

#: Routers and layers of several kinds: softmax then top-k, normalised, top-k then softmax, shared expert, a multiplier
#: on what is added to the stream, sigmoid with bias, a norm behind the experts, dense layers first.
FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "granitemoe", "glm4_moe", "flex_olmo", "gpt_oss")


def family(name: str) -> interp.Model:
    tokenizer = letters()
    return interp.load(f"tiny:{name}", tokenizer, vocab_size=max(101, len(tokenizer)), max_position_embeddings=128)


@pytest.fixture(scope="module")
def moe() -> interp.Model:
    return build("routed")


def off(m: interp.Model, layer: int, expert: int, mode: str, data: Any) -> Any:
    """A context in which one expert is off, written with plain edits."""
    if mode == "zero":
        return m.intervene(edits.zero(f"expert_weight[{layer}, expert={expert}]"))
    if mode == "reroute":
        return m.intervene(edits.replace(f"router_logits[{layer}, expert={expert}]", float("-inf")))
    acts = m.capture(data, f"expert_weight[{layer}]").experts(layer)
    kept = acts.weights * (acts.ids != expert)
    total, left = acts.weights.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
    return m.intervene(edits.replace(f"expert_weight[{layer}]", torch.where(left > 0, kept * total / left, kept)))


def loop(m: interp.Model, mode: str, metric: Callable[[Tensor], Tensor] | None = None) -> pd.DataFrame:
    """One full forward pass per expert and document."""
    rows = []
    for label, documents in TEXTS.items():
        for layer in m.anatomy.having("expert_weight"):
            for expert in range(m.n_experts):
                total, count = 0.0, 0
                for text in documents:
                    tokens = m.tokens(text, special=False)
                    plain = m(tokens)
                    with off(m, layer, expert, mode, tokens):
                        logits = m(tokens)
                    if metric is None:
                        target = tokens.ids[0, 1:]
                        pair = [torch.nn.functional.cross_entropy(x[0, :-1], target) for x in (logits, plain)]
                        total += float(pair[0] - pair[1]) * len(target)
                        count += len(target)
                    else:
                        total += float((metric(logits) - metric(plain)).sum())
                        count += 1
                rows.append({"layer": layer, "expert": expert, "label": label, "literal": total / count})
    return pd.DataFrame(rows)


def same(table: pd.DataFrame, literal: pd.DataFrame, tolerance: float = 2e-5) -> None:
    both = table.merge(literal, on=["layer", "expert", "label"])
    assert len(both) == len(table) == len(literal)
    largest = both["literal"].abs().max()
    assert largest > 1e-4  # else nothing was switched off
    assert (both["value"] - both["literal"]).abs().max() < tolerance * max(1.0, largest)


@pytest.mark.parametrize("mode", ["zero", "renormalise", "reroute"])
def test_sweep_is_the_loop(moe: interp.Model, mode: str) -> None:
    same(experts.sweep(moe, TEXTS, mode=mode, batch_tokens=100), loop(moe, mode))


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_sweep_is_the_loop_in_other_families(name: str) -> None:
    m = family(name)
    same(experts.sweep(m, TEXTS), loop(m, "zero"))


def test_a_metric_of_the_last_token_is_seen_to_be_one(moe: interp.Model) -> None:
    def last(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 5]

    def mean(logits: Tensor) -> Tensor:
        return logits.mean((1, 2))

    alone = {"law": TEXTS["law"][:1], "bio": TEXTS["bio"][:1]}  # rows of one length each: no padding
    for metric in (last, mean):
        table = experts.sweep(moe, alone, metric=metric, batch_tokens=1)
        for row in table.sample(12, random_state=0).itertuples():
            tokens = moe.tokens(alone[row.label][0])
            with off(moe, row.layer, row.expert, "zero", tokens):
                change = metric(moe(tokens))
            assert row.value == pytest.approx(float(change - metric(moe(tokens))), abs=1e-5)


def test_some_layers_only(moe: interp.Model) -> None:
    whole, part = experts.sweep(moe, TEXTS), experts.sweep(moe, TEXTS, layers=[1])
    assert set(part["layer"]) == {1}
    torch.testing.assert_close(
        torch.tensor(part["value"].to_numpy()), torch.tensor(whole[whole["layer"] == 1]["value"].to_numpy()),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    with pytest.raises(ExpertError, match=r"layers: 7 has no experts; \[0, 1, 2\]"):
        experts.sweep(moe, TEXTS, layers=[7])


def slope_of_change(m: interp.Model, mode: str) -> pd.DataFrame:
    """g . (y' - y) with y' what the model's own block puts out without the expert, and g the gradient there."""
    rows = []
    for label, documents in TEXTS.items():
        for layer in m.anatomy.having("expert_weight"):
            site = f"mlp_out[{layer}]"
            values, count = torch.zeros(m.n_experts), 0
            for text in documents:
                tokens = m.tokens(text, special=False)
                acts = m.capture(tokens, site, logits=True, grad=True)
                with torch.enable_grad():
                    nats = torch.nn.functional.cross_entropy(acts.logits[0, :-1], tokens.ids[0, 1:], reduction="sum")
                    (g,) = torch.autograd.grad(nats, [acts[site]])
                for expert in range(m.n_experts):
                    with off(m, layer, expert, mode, tokens):
                        new = m.capture(tokens, site)[site]
                    values[expert] += (g * (new - acts[site].detach())).sum()
                count += len(tokens.ids[0]) - 1
            rows += [
                {"layer": layer, "expert": e, "label": label, "literal": float(v) / count} for e, v in enumerate(values)
            ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("mode", ["zero", "renormalise", "reroute"])
def test_attribution_is_the_slope_along_the_exact_change(moe: interp.Model, mode: str) -> None:
    same(experts.attribute(moe, TEXTS, mode=mode, batch_tokens=60), slope_of_change(moe, mode))


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "gpt_oss", "glm4_moe"])
def test_the_formula_of_other_routers_is_found(name: str) -> None:
    m = family(name)
    same(experts.attribute(m, TEXTS, mode="reroute"), slope_of_change(m, "reroute"), 1e-4)


def test_a_saturated_router_hides_no_expert(moe: interp.Model) -> None:
    """The gradient through the router says that removing an expert changes no weight; it changes all of them."""
    m = build("routed")
    with torch.no_grad():
        m.hf.model.layers[1].mlp.gate.weight.mul_(400.0)
    acts = m.capture(TEXTS["law"][0], ["router_logits[1]", "expert_weight[1]"], logits=True, grad=True)
    weights = acts["expert_weight[1]"]
    sure = weights[0, :, 0].detach() > 0.9999  # the first slot has it all
    assert sure.float().mean() > 0.7
    with torch.enable_grad():
        loss = torch.nn.functional.cross_entropy(acts.logits[0, :-1], m.tokens(TEXTS["law"][0]).ids[0, 1:])
        (naive,) = torch.autograd.grad(loss, [acts["router_logits[1]"]])
    assert float(naive[0, sure].abs().max()) < 1e-4
    table = experts.attribute(m, TEXTS, mode="reroute")
    same(table, slope_of_change(m, "reroute"), 5e-3)  # layer 1 turns rounding into large changes now
    busy = table[table["layer"] == 1]["routing"].abs().max()
    assert busy > 1e-3


def test_parts_add_up_and_content_is_the_same_in_all_modes(moe: interp.Model) -> None:
    tables = {mode: experts.attribute(moe, TEXTS, mode=mode) for mode in ("zero", "renormalise", "reroute")}
    for table in tables.values():
        assert (table["value"] - table["content"] - table["routing"]).abs().max() < 1e-12
        assert (table["content"] - tables["zero"]["content"]).abs().max() < 1e-6
    assert tables["zero"]["routing"].abs().max() < 1e-12


def test_neurons_have_slopes_too() -> None:
    m = build("neurons")
    table = experts.attribute(m, TEXTS, kind="neurons")
    text = {"law": TEXTS["law"][:1]}
    one = experts.attribute(m, text, kind="neurons")
    row = one.iloc[one["value"].abs().argmax()]
    before = experts.losses(m, text).of("law").sum(0)
    with m.intervene(edits.scale(f"mlp_hidden[{row['layer']}, neuron={row['expert']}]", 1 - 1e-2)):
        after = experts.losses(m, text).of("law").sum(0)
    slope = float((after - before)[0] / before[2]) / 1e-2
    assert row["value"] == pytest.approx(slope, rel=0.05)
    assert len(table) == len(m.anatomy.having("mlp_hidden")) * 40 * 2


def test_agreement_of_an_estimate_with_the_truth(moe: interp.Model) -> None:
    exact, guess = experts.sweep(moe, TEXTS), experts.attribute(moe, TEXTS)
    perfect = experts.agreement(exact, exact)
    assert (perfect["spearman"].dropna() > 0.999).all()
    assert (perfect[["recall", "sign", "ratio"]] == 1).all().all()
    wrong = exact.assign(value=-exact["value"])
    wrong.attrs = exact.attrs
    assert (experts.agreement(wrong, exact)["spearman"].dropna() < -0.999).all()
    table = experts.agreement(guess, exact, top=0.2)
    whole = table[table["layer"] == "all"]
    assert len(whole) == 2
    assert (whole["spearman"] > 0.3).all()  # random weights, large effects: a linear estimate is a rough one
    with pytest.raises(ExpertError, match="mode: the estimate has 'reroute'"):
        experts.agreement(experts.attribute(moe, TEXTS, mode="reroute"), exact)


def test_sets_are_cut_from_attributions(moe: interp.Model) -> None:
    table = experts.sweep(moe, TEXTS)
    wide = table.pivot(index=["layer", "expert"], columns="label", values="value")
    best = (wide["law"] - wide["bio"]).nlargest(3)
    chosen = experts.select(table, "law", "attribution", total=3)
    assert {(la, e) for la, ids in chosen.ids.items() for e in ids.tolist()} == {k for k, v in best.items() if v > 0}
    alone = experts.select(table, "law", "attribution", total=1, beyond=False)
    assert (int(wide["law"].idxmax()[0]), int(wide["law"].idxmax()[1])) in alone
    assert chosen.record["method"] == "exact"
    assert chosen.record["data"] == table.attrs["data"]
    chosen.check(moe)
    with pytest.raises(ExpertError, match="is cut by rule='attribution'"):
        experts.select(table, "law", "skew")
    with pytest.raises(ExpertError, match="label 'x': the table has law, bio"):
        experts.select(table, "x", "attribution", total=1)


def test_what_cannot_be_attributed_is_told(moe: interp.Model, monet: interp.Model) -> None:
    with pytest.raises(ExpertError, match="too many to remove one by one"):
        experts.attribute(monet, TEXTS)
    with pytest.raises(ExpertError, match=r"mode='mean': expected one of zero, renormalise, reroute"):
        experts.sweep(moe, TEXTS, mode="mean")
    with pytest.raises(ExpertError, match="metric='accuracy': expected loss"):
        experts.attribute(moe, TEXTS, metric="accuracy")
    with pytest.raises(ExpertError, match="neurons have no router"):
        experts.attribute(build("neurons"), TEXTS, kind="neurons", mode="reroute")
    with pytest.raises(ExpertError, match="one number per row"):
        experts.attribute(moe, TEXTS, metric=lambda logits: logits.sum())
    grouped = family("deepseek_v3")
    with pytest.raises(ExpertError, match="follow none of the formulas"):
        experts.attribute(grouped, TEXTS, mode="reroute")
    assert len(experts.attribute(grouped, TEXTS)) > 0
    same(experts.sweep(grouped, TEXTS, mode="reroute"), loop(grouped, "reroute"))
