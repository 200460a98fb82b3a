"""The nnsight bridge: the same weights, the same values, and both at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interp
from interp import edits
from interp.bridges.nnsight import location, proxy
from interp.sites import KINDS, Site, SiteError
from interp.zoo.tiny import tiny

pytest.importorskip("nnsight")

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
BOUNDARY = [
    "embed",
    "resid_pre",
    "attn_out",
    "resid_mid",
    "mlp_hidden",
    "router_logits",
    "expert_ids",
    "expert_weight",
    "shared_out",
    "mlp_out",
    "resid_post",
    "logits",
]


@pytest.fixture(scope="module")
def opened(tokenizer: Any) -> dict[str, tuple[interp.Model, Any]]:
    """Small models with their nnsight counterparts, by family."""
    families = ["llama", "olmoe", "gpt2", "qwen2_moe", "olmo2"]
    models = {family: interp.Model(tiny(family), tokenizer, name=family) for family in families}
    return {family: (m, m.nnsight()) for family, m in models.items()}


def reachable(m: interp.Model) -> list[Site]:
    present = {name for name, _ in m.anatomy.places}
    return sorted(m.resolve([f"{n}[*]" if KINDS[n].layered else n for n in BOUNDARY if n in present]))


@pytest.mark.parametrize("family", ["llama", "olmoe", "gpt2", "qwen2_moe", "olmo2"])
def test_proxies_hold_what_capture_holds(family: str, opened: dict[str, Any]) -> None:
    m, lm = opened[family]
    sites = reachable(m)
    assert {s.name for s in sites} >= {"embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "logits"}
    if m.n_experts:
        assert {s.name for s in sites} >= {"router_logits", "expert_ids", "expert_weight"}
    shared = [
        site for site in sites if site.name == "shared_out"
    ]  # runs before the router in Qwen 2, after it elsewhere
    wanted = m.capture(IDS, sites)
    got = {}
    for group in ([site for site in sites if site not in shared], shared):
        with lm.trace(IDS):
            for site in group:
                got[site] = proxy(lm, m, site).save()
    assert len(got) == len(sites)
    for site in sites:
        ours, theirs = wanted[site], got[site]
        ours = ours.flatten(0, 1) if theirs.dim() < ours.dim() else ours  # routers and experts see tokens in one row
        assert ours.shape == theirs.shape, site
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-5), site


def test_same_weights_and_the_tokenizer_is_left_alone(tokenizer: Any) -> None:
    m = interp.Model(tiny("llama"), tokenizer)
    tokenizer.padding_side, before = "right", tokenizer.pad_token
    lm = m.nnsight()
    assert type(lm).__name__ == "LanguageModel"
    assert lm._module is m.hf
    assert lm.tokenizer is not tokenizer
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", before)


def test_without_tokenizer() -> None:
    m = interp.Model(tiny("llama"))
    lm = m.nnsight()
    assert type(lm).__name__ == "NNsight"
    with lm.trace(input_ids=IDS):
        h = proxy(lm, m, "resid_post[1]").save()
        logits = proxy(lm, m, "logits").save()
    acts = m.capture(IDS, "resid_post[1]", logits=True)
    assert torch.allclose(h, acts["resid_post[1]"], atol=1e-5)
    assert torch.allclose(logits, acts.logits, atol=1e-5)


def test_texts(opened: dict[str, Any]) -> None:
    """nnsight pads on the left, we on the right; the tokens are the same ones."""
    m, lm = opened["llama"]
    texts = ["w5 w6 w7 w8", "w9 w10"]
    acts = m.capture(texts, "resid_post[2]")
    with lm.trace(texts):
        h = proxy(lm, m, "resid_post[2]").save()
    assert torch.allclose(h[0], acts["resid_post[2]"][0], atol=1e-5)
    assert torch.allclose(h[1, 2:], acts["resid_post[2]"][1, :2], atol=1e-5)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "resid_post[1]"),
        ("llama", "resid_mid[1]"),
        ("gpt2", "mlp_out[0]"),
        ("llama", "mlp_hidden[1]"),
        ("olmoe", "attn_out[2]"),
        ("olmoe", "expert_weight[1]"),
    ],
)
def test_writing_in_place_is_our_edit(family: str, name: str, opened: dict[str, Any]) -> None:
    m, lm = opened[family]
    with lm.trace(IDS), torch.no_grad():
        value = proxy(lm, m, name)
        value[:] = value * 0.5
        theirs = proxy(lm, m, "logits").save()
    with m.intervene(edits.scale(name, 0.5)):
        ours = m(IDS)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(m(IDS), theirs, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "name", "inside"),
    [
        ("llama", "q[1]", "LlamaAttention"),
        ("llama", "pattern[0]", "LlamaAttention"),
        ("gpt2", "z[2]", "GPT2Attention"),
        ("olmoe", "expert_hidden[1]", "OlmoeExperts"),
        ("olmoe", "expert_out[1]", "OlmoeExperts"),
        ("llama", "ln1_scale[1]", "LlamaRMSNorm"),
    ],
)
def test_inside_of_functions_is_refused_with_the_way_out(
    family: str, name: str, inside: str, opened: dict[str, Any]
) -> None:
    m, lm = opened[family]
    with pytest.raises(SiteError, match=rf"{inside}.*m\.capture or m\.recording.*m\.intervene"):
        proxy(lm, m, name)


@pytest.mark.parametrize("name", ["resid_post[*]", "resid_post[1, dim=3]", "resid_post[9]"])
def test_one_whole_site(name: str, opened: dict[str, Any]) -> None:
    m, _ = opened["llama"]
    with pytest.raises(SiteError, match=r"resid_post"):
        location(m, name)


@pytest.mark.parametrize(
    ("family", "name", "where"),
    [
        ("llama", "attn_out[1]", "model.layers.1.self_attn.output"),
        ("llama", "resid_pre[2]", "model.layers.2.input"),
        ("llama", "mlp_hidden[0]", "model.layers.0.mlp.down_proj.input"),
        ("olmo2", "attn_out[1]", "model.layers.1.post_attention_layernorm.output"),
        ("gpt2", "resid_post[0]", "transformer.h.0.output"),
        ("olmoe", "router_logits[1]", "model.layers.1.mlp.gate.output"),
        ("olmoe", "expert_ids[1]", "model.layers.1.mlp.experts.inputs"),
        ("llama", "logits", "output"),
    ],
)
def test_locations(family: str, name: str, where: str, opened: dict[str, Any]) -> None:
    assert location(opened[family][0], name) == where


def test_a_router_that_keeps_its_logits_is_refused(opened: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    m, _ = opened["olmoe"]
    monkeypatch.setitem(
        m.anatomy.sizes["router_logits", 1], "expert", 9
    )  # as in a family whose first output is something else
    place = m.anatomy.places["router_logits", 1]
    assert place.how == "router"

    class Stub:
        def get(self, path: str) -> Any:
            return torch.zeros(12, 8), torch.zeros(12, 2)

    with pytest.raises(SiteError, match=r"OlmoeTopKRouter does not return its logits"):
        proxy(Stub(), m, "router_logits[1]")


def test_our_contexts_work_around_a_trace(opened: dict[str, Any]) -> None:
    """Recording what a trace runs, editing below it, and both ways of writing together."""
    m, lm = opened["olmoe"]
    plain = m.capture(IDS, ["q[1]", "expert_hidden[2]", "resid_post[*]"])
    with m.recording(["q[1]", "expert_hidden[2]"]) as rec, lm.trace(IDS):
        h = lm.model.layers[1].output.save()
    acts = rec.activations()
    assert torch.allclose(acts["q[1]"], plain["q[1]"], atol=1e-5)
    assert torch.allclose(acts["expert_hidden[2]"], plain["expert_hidden[2]"], atol=1e-5)
    assert torch.allclose(h, plain["resid_post[1]"], atol=1e-5)
    with m.intervene(edits.zero("z[1, head=2]")), lm.trace(IDS):
        theirs = proxy(lm, m, "resid_post[2]").save()
    with m.intervene(edits.zero("z[1, head=2]")):
        ours = m.capture(IDS, "resid_post[2]")
    assert torch.allclose(theirs, ours["resid_post[2]"], atol=1e-5)
    assert not torch.allclose(theirs, plain["resid_post[2]"], atol=1e-3)


def test_at_one_module_nnsight_acts_first(opened: dict[str, Any]) -> None:
    m, lm = opened["llama"]
    before = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
    edit = edits.add("resid_post[1]", 1.0)
    with m.intervene(edit), m.recording("resid_post[1]") as rec, lm.trace(IDS), torch.no_grad():
        seen = lm.model.layers[1].output.clone().save()
        lm.model.layers[1].output[:] *= 2
    recorded = rec.activations()["resid_post[1]"]
    assert torch.allclose(seen, before, atol=1e-5)
    assert torch.allclose(recorded, 2 * before + 1, atol=1e-5)


def test_nothing_of_ours_changes_when_nnsight_has_been_there(tokenizer: Any) -> None:
    m, other = interp.Model(tiny("olmoe"), tokenizer), interp.Model(tiny("olmoe"), tokenizer)
    sites = ["q[*]", "pattern[1]", "router_logits[*]", "expert_out[1]", "resid_post[*]"]
    lm = m.nnsight()
    with lm.trace(IDS):
        lm.model.layers[0].output[:] = 0
    reopened = interp.Model(m.hf)  # its map is made with nnsight's forwards in place
    wanted = other.capture(IDS, sites, logits=True)
    for model in (m, reopened):
        got = model.capture(IDS, sites, logits=True)
        assert got.sites == wanted.sites
        assert all(torch.equal(got.tensors[s], wanted.tensors[s]) for s in got.sites)
        assert torch.equal(got.logits, wanted.logits)
    assert m.fingerprint == other.fingerprint
