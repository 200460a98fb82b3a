"""An ablation as an Edit: on the tokens of its scope alone, while text is generated, refused where it is not exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interp
from interp import experts
from interp.experts import ExpertError, ExpertSet
from tests.experts.conftest import build


def chosen_of(model: Any, kind: str, texts: dict[str, list[str]]) -> ExpertSet:
    return experts.select(experts.routing(model, texts, kind=kind), "law", "top", count=3)


@torch.no_grad()
def test_on_all_tokens_it_is_switching_off(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    chosen = chosen_of(model, kind, texts)
    tokens = model.tokens([texts["law"][1], texts["code"][1]])  # padded
    with experts.switched_off(model, chosen):
        wanted = model(tokens)
    with model.intervene(experts.ablate(chosen)):
        found = model(tokens)
    torch.testing.assert_close(found[tokens.mask], wanted[tokens.mask], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_scope_leaves_earlier_tokens_as_they_were(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    chosen = chosen_of(model, kind, texts)
    ids = model.tokens(texts["law"][1]).ids
    plain = model(ids)
    with model.intervene(experts.ablate(chosen, scope="window(10, 20)")) as run:
        edited = model(ids)
    # equal up to rounding: experts work on tokens in groups, and later tokens may change groups
    torch.testing.assert_close(edited[:, :10], plain[:, :10], rtol=1e-5, atol=1e-5)
    assert (edited[:, 10:] - plain[:, 10:]).abs().max() > 1e-5
    assert set(run.trace()["position"]) <= set(range(10, 20))
    assert torch.equal(model(ids), plain)


@torch.no_grad()
def test_generation_with_and_without_a_cache_agree(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    chosen = chosen_of(model, kind, texts)
    with model.intervene(experts.ablate(chosen, scope="generated")):
        cached = model.generate("the court ", max_new_tokens=8, use_cache=True)
        whole = model.generate("the court ", max_new_tokens=8, use_cache=False)
    assert torch.equal(cached.tokens.ids, whole.tokens.ids)


@torch.no_grad()
def test_it_composes_with_a_mask_and_with_edited_routing(monet: Any) -> None:
    a, b = ExpertSet(monet, {0: [1, 9, 30], 2: [5]}), ExpertSet(monet, {0: [9, 12], 1: [3]})
    ids = monet.tokens("the court shall").ids
    with experts.switched_off(monet, a | b):
        wanted = monet(ids)
    with experts.switched_off(monet, a), monet.intervene(experts.ablate(b)):
        torch.testing.assert_close(monet(ids), wanted, rtol=1e-4, atol=1e-5)
    from interp import edits

    routed = edits.scale("g1[0]", 0.5)
    with monet.intervene(routed), experts.switched_off(monet, a):
        wanted = monet(ids)
    with monet.intervene(routed, experts.ablate(a)):
        torch.testing.assert_close(monet(ids), wanted, rtol=1e-4, atol=1e-5)


def test_half_a_gate_takes_half_out(monet: Any) -> None:
    chosen = ExpertSet(monet, {3: range(20)})
    ids = monet.tokens("the court shall").ids
    outs = []
    for strength in (0.0, 0.5, 1.0):
        gate = lambda h, where, strength=strength: torch.full(h.shape[:2], strength)  # noqa: E731
        with monet.intervene(experts.ablate(chosen, gate=gate)):
            outs.append(monet.capture(ids, "mlp_out[3]")["mlp_out[3]"])
    torch.testing.assert_close(outs[1], (outs[0] + outs[2]) / 2, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_monet_and_neurons_are_scaled(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    """Scaling by a half is half of zeroing, at the one layer that is changed."""
    layer = model.n_layers - 1
    chosen = ExpertSet(model, {layer: [0, 1, 5]}, kind)
    ids = model.tokens(texts["law"][0][:20]).ids
    site = f"mlp_out[{layer}]"

    def out(*edits: Any) -> torch.Tensor:
        with model.intervene(*edits):
            return model.capture(ids, site)[site]

    half = (out() + out(experts.ablate(chosen))) / 2
    torch.testing.assert_close(out(experts.ablate(chosen, "scale", factor=0.5)), half, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out(experts.ablate(chosen, "scale", factor=1.0)), out(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_mean_of_neurons_is_over_all_tokens(texts: dict[str, list[str]]) -> None:
    model = build("neurons")
    chosen = ExpertSet(model, {1: [3, 7]}, "neurons")
    acts = model.capture(texts["bio"], "mlp_hidden[1]")
    mean = acts.mean("mlp_hidden[1]")
    with model.intervene(experts.ablate(chosen, "mean", reference=texts["bio"])):
        found = model.capture(texts["law"][1], "mlp_hidden[1]")["mlp_hidden[1]"]
    plain = model.capture(texts["law"][1], "mlp_hidden[1]")["mlp_hidden[1]"]
    torch.testing.assert_close(found[..., [3, 7]], mean[[3, 7]].expand_as(found[..., [3, 7]]))
    others = [n for n in range(found.shape[-1]) if n not in (3, 7)]
    assert torch.equal(found[..., others], plain[..., others])


def changes(m: Any, chosen: ExpertSet) -> dict[str, dict[str, Any]]:
    """What each mode needs, for a set of two experts a layer."""
    partners = {layer: {e: (e + 3) % m.n_experts for e in ids.tolist()} for layer, ids in chosen.ids.items()}
    text = torch.randint(3, 90, (4, 40), generator=torch.Generator().manual_seed(2))
    recorded = m.capture(text[:1, :12], "expert_weight[*]")
    settings = {"scale": {"factor": 3.0}, "swap": {"partners": partners}, "mean": {"reference": text}}
    return {mode: settings.get(mode, {}) for mode in experts.MODES} | {"freeze": {"recorded": recorded}}


@torch.no_grad()
@pytest.mark.parametrize("family", ["deepseek_v3", "afmoe"])
def test_a_step_a_scope_and_a_cache(family: str) -> None:
    """With and without a cache the same text; tokens before the scope as in the plain run; afterwards nothing stays."""
    m = interp.load(f"tiny:{family}")
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(1))
    used = m.capture(ids, "expert_weight[*]")
    layers = m.anatomy.having("expert_weight")
    busy = {la: used[f"expert_ids[{la}]"].flatten().bincount(minlength=m.n_experts).topk(2).indices for la in layers}
    chosen = ExpertSet(m, busy)
    plain = m(ids)
    for mode, how in changes(m, chosen).items():
        scope = "window(5, 8)" if mode == "freeze" else "generated"
        texts = []
        for cache in (True, False):
            with m.intervene(experts.ablate(chosen, mode, scope=scope, **how)):  # type: ignore[arg-type]
                texts.append(m.generate(ids, max_new_tokens=4, use_cache=cache).tokens.ids)
        assert torch.equal(*texts), mode
        with m.intervene(experts.ablate(chosen, mode, scope="window(5, 8)", **how)) as run:  # type: ignore[arg-type]
            edited = m(ids)
        torch.testing.assert_close(edited[:, :5], plain[:, :5], rtol=1e-5, atol=1e-5)
        assert (edited[:, 5:] - plain[:, 5:]).abs().max() > 1e-5, mode
        assert set(run.trace()["position"]) == {5, 6, 7}
    assert torch.equal(m(ids), plain)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    m = interp.load("tiny:gpt_oss")
    chosen = ExpertSet(m, {layer: [1, 4] for layer in range(3)})
    short, long = torch.arange(3, 10), torch.arange(20, 32)
    ids = torch.stack([torch.cat([short, torch.zeros(5, dtype=torch.long)]), long])
    mask = torch.stack([torch.arange(12) < 7, torch.arange(12) < 12])
    batch = interp.Tokens(ids, mask)
    for mode in ("renormalise", "reroute", "force"):
        with m.intervene(experts.ablate(chosen, mode)):  # type: ignore[arg-type]
            alone, right, left = m(short[None]), m(batch), m(batch.padded("left"))
        torch.testing.assert_close(right[:1, :7], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left[:1, 5:], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_absent_experts_leave_a_slot_empty_where_groups_run_short() -> None:
    """Two groups of four, one kept, two slots: with three of each group gone no group fills both slots."""
    m = interp.load("tiny:deepseek_v3")
    layer = m.anatomy.having("expert_weight")[-1]
    chosen = ExpertSet(m, {layer: [0, 1, 2, 4, 5, 6]})
    with m.intervene(experts.ablate(chosen, "reroute")):
        acts = m.capture(torch.arange(3, 23)[None], f"expert_weight[{layer}]", logits=True)
    ids, weights = acts[f"expert_ids[{layer}]"], acts[f"expert_weight[{layer}]"]
    there = (ids == 3) | (ids == 7)
    assert (there.sum(-1) == 1).all()
    assert (weights[~there] == 0).all()
    assert (weights[there] > 0).all()
    assert acts.logits is not None
    assert acts.logits.isfinite().all()


def test_bad_input(monet: Any) -> None:
    chosen = ExpertSet(monet, {0: [1]})
    routed = build("routed")
    one = ExpertSet(routed, {0: [1]})
    with pytest.raises(ExpertError, match="mode='magic': expected one of zero"):
        experts.ablate(chosen, "magic")  # type: ignore[arg-type]
    with pytest.raises(ExpertError, match="mean nothing in another"), routed.intervene(experts.ablate(chosen)):
        pass
    with pytest.raises(ExpertError, match="mode='reroute': Monet's pairs are chosen in factors; they take zero, scale"):
        experts.ablate(chosen, "reroute")
    with pytest.raises(ExpertError, match="mode='scale' needs factor="):
        experts.ablate(one, "scale")
    with pytest.raises(ExpertError, match="factor= belongs to mode='scale', not 'zero'"):
        experts.ablate(one, factor=0.5)
    with pytest.raises(ExpertError, match="there is no half of a choice"):
        experts.ablate(one, "reroute", gate=lambda h, where: torch.ones(1))
    with pytest.raises(ExpertError, match="partners: layer 0, expert 1: has none"):
        experts.ablate(one, "swap", partners={})
    with pytest.raises(ExpertError, match=r"99 is no expert; a layer has 0\.\.7"):
        experts.ablate(one, "swap", partners={0: {1: 99}})
    with pytest.raises(ExpertError, match="layer 0, expert 2 is not in the set"):
        experts.ablate(one, "swap", partners={0: {1: 3, 2: 1}})
    most = ExpertSet(routed, {0: range(7)})
    with pytest.raises(ExpertError, match="fewer left than the 2"), routed.intervene(experts.ablate(most, "reroute")):
        pass
    with (
        pytest.raises(ExpertError, match="7 experts cannot all be on"),
        routed.intervene(experts.ablate(most, "force")),
    ):
        pass
    unseen = experts.ablate(most, "mean", reference="th")
    with pytest.raises(ExpertError, match="was never chosen in the reference text"), routed.intervene(unseen):
        pass
    recorded = routed.capture("the court", "expert_weight[1]")
    missing = experts.ablate(one, "freeze", recorded=recorded)
    with pytest.raises(ExpertError, match=r"expert_ids\[0\] was not recorded"), routed.intervene(missing):
        pass


def test_models_without_reachable_experts() -> None:
    with pytest.raises(ExpertError, match=r"is dense: it has no experts. experts.split\(m, n=...\) makes experts"):
        ExpertSet(interp.load("tiny:llama"), {0: [1]})
    with pytest.raises(ExpertError, match="cannot be read or changed one by one: Llama 4 multiplies"):
        ExpertSet(interp.load("tiny:llama4"), {1: [1]})
    m = interp.load("tiny:deepseek_v4")  # the first layers of this family have no choice that could be changed
    table = ExpertSet(m, {0: [1]})
    with pytest.raises(ExpertError, match="looked up by token id"), m.intervene(experts.ablate(table, "reroute")):
        pass
