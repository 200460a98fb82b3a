"""Activations give back what was captured: whole, narrowed, stacked, by expert, averaged, moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.activations import Activations, Tokens
from interp.model import Model
from interp.sites import Site, SiteError
from interp.zoo.tiny import tiny

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS, dtype=torch.bool)
MASK[1, 4:] = False
TOKENS = Tokens(IDS, MASK)


@pytest.fixture(scope="module")
def m() -> Model:
    return Model(tiny("llama"), name="llama")


@pytest.fixture(scope="module")
def moe() -> Model:
    return Model(tiny("olmoe"), name="olmoe")


@pytest.fixture(scope="module")
def acts(m: Model) -> Activations:
    return m.capture(TOKENS, ["resid_post[*]", "z[*]", "pattern[1]", "embed"], logits=True)


@pytest.fixture(scope="module")
def routed(moe: Model) -> Activations:
    return moe.capture(TOKENS, ["expert_out[*]", "expert_hidden[1]", "router_logits[1]"])


AXES = {
    "embed": (2, 7, 32),
    "resid_post[1]": (2, 7, 32),
    "q[1]": (2, 7, 4, 16),
    "k[1]": (2, 7, 2, 16),
    "v[1]": (2, 7, 2, 16),
    "pattern[1]": (2, 4, 7, 7),
    "z[1]": (2, 7, 4, 16),
    "mlp_hidden[1]": (2, 7, 40),
    "ln1_scale[1]": (2, 7, 1),
    "ln_final_scale": (2, 7, 1),
    "logits": (2, 7, 101),
}
ROUTED_AXES = {
    "router_logits[1]": (2, 7, 8),
    "expert_ids[1]": (2, 7, 2),
    "expert_weight[1]": (2, 7, 2),
    "expert_hidden[1]": (2, 7, 2, 24),
    "expert_out[1]": (2, 7, 2, 32),
    "mlp_out[1]": (2, 7, 32),
}


@pytest.mark.parametrize(("site", "shape"), [*AXES.items(), *ROUTED_AXES.items()])
def test_a_tensor_has_the_axes_of_its_site(m: Model, moe: Model, site: str, shape: tuple[int, ...]) -> None:
    got = (m if site in AXES else moe).capture(TOKENS, site)
    assert got[site].shape == shape
    assert len(got.axes(site)) == len(shape)
    assert got.tokens.ids is TOKENS.ids or torch.equal(got.tokens.ids, TOKENS.ids)
    assert torch.equal(got.mask, MASK)


def test_a_key_may_be_written_in_any_way_that_names_the_site(acts: Activations) -> None:
    whole = acts["resid_post[2]"]
    assert acts["blocks.2.hook_resid_post"] is whole
    assert acts[Site("resid_post", 2)] is whole
    assert acts["resid_post[-1]"] is whole
    assert torch.equal(acts["z[1, head=3]"], acts["z[1]"][:, :, 3])
    assert torch.equal(acts["z[1, head=-1]"], acts["z[1]"][:, :, 3])
    assert torch.equal(acts["z[1, dim=5, head=3]"], acts["z[1]"][:, :, 3, 5])
    assert torch.equal(acts["pattern[1, head=2]"], acts["pattern[1]"][:, 2])
    assert torch.equal(acts["resid_post[1, dim=7]"], acts["resid_post[1]"][..., 7])


def test_a_pattern_gives_the_sites_stacked(acts: Activations) -> None:
    stacked = acts["resid_post[*]"]
    assert stacked.shape == (3, 2, 7, 32)
    for layer in range(3):
        assert torch.equal(stacked[layer], acts[f"resid_post[{layer}]"])
    assert torch.equal(acts["resid_post[1:]"], stacked[1:])
    assert torch.equal(acts["z[1, head=*]"], acts["z[1]"].movedim(2, 0))
    assert acts["z[*, head=*]"].shape == (12, 2, 7, 16)


def test_the_very_pattern_that_was_captured_reads_back(m: Model) -> None:
    parts = m.capture(TOKENS, ["z[*, head=*]", "k[1, head=*]", "mlp_hidden[0, neuron=39]"])
    whole = m.capture(TOKENS, ["z[*]", "k[1]", "mlp_hidden[0]"])
    assert len(parts) == 12 + 2 + 1
    assert torch.equal(parts["z[*, head=*]"], whole["z[*, head=*]"])
    assert torch.equal(parts["k[1, head=*]"], whole["k[1, head=*]"])
    assert torch.equal(parts["mlp_hidden[0, neuron=39]"], whole["mlp_hidden[0]"][..., 39])


def test_a_captured_part_holds_nothing_else_in_memory(m: Model) -> None:
    neuron = m.capture(TOKENS, "mlp_hidden[1, neuron=3]")["mlp_hidden[1, neuron=3]"]
    assert neuron.untyped_storage().nbytes() == neuron.numel() * neuron.element_size()


def test_it_is_a_mapping_in_the_order_of_the_forward_pass(acts: Activations) -> None:
    assert list(acts) == [
        "embed",
        "z[0]",
        "resid_post[0]",
        "pattern[1]",
        "z[1]",
        "resid_post[1]",
        "z[2]",
        "resid_post[2]",
    ]
    assert len(acts) == 8
    assert [str(s) for s in acts.sites] == list(acts)
    assert "z[1]" in acts
    assert "z[1, head=2]" in acts
    assert "z[1, head=4]" not in acts
    assert "q[1]" not in acts
    assert dict(acts.items())["embed"] is acts["embed"]


def test_what_was_not_captured_is_missed_with_what_there_is(acts: Activations, moe: Model) -> None:
    with pytest.raises(
        KeyError, match=r"q\[1\] was not captured; there are embed, z\[0\.\.2\], resid_post\[0\.\.2\], pattern"
    ):
        acts["q[1]"]
    with pytest.raises(KeyError, match=r"q\[\*\]: no such site was captured"):
        acts["q[*]"]
    with pytest.raises(KeyError, match=r"z\[1, head=4\]: head=4 is out of range; there are head 0\.\.3"):
        acts["z[1, head=4]"]
    with pytest.raises(SiteError, match="'resid_posst' is not a site name"):
        acts["resid_posst[1]"]
    with pytest.raises(
        KeyError, match=r"no experts of layer 1 were captured; capture 'expert_weight\[1\]' or 'expert_out"
    ):
        acts.experts(1)
    with pytest.raises(KeyError, match=r"expert_hidden\[1\] was not captured; there are expert_ids\[1\]"):
        moe.capture(TOKENS, "expert_weight[1]")["expert_hidden[1]"]


def test_sites_of_different_shapes_do_not_stack() -> None:
    m = Model(tiny("gemma4"), name="gemma4")
    sizes = {m.anatomy.sizes["z", layer]["d_head"] for layer in range(m.n_layers)}
    assert len(sizes) > 1, "this family was chosen because its layers differ"
    with pytest.raises(SiteError, match=r"z\[\*\]: these sites differ in shape .* read them one by one"):
        m.capture(TOKENS, "z[*]")["z[*]"]


# -- experts ---------------------------------------------------------------------------------------------------
def test_routing_comes_with_whatever_is_routed(moe: Model) -> None:
    for site in ("expert_hidden[1]", "expert_out[1]", "expert_weight[1]", "expert_ids[1]"):
        e = moe.capture(TOKENS, site).experts(1)
        assert e.ids.shape == e.weights.shape == (2, 7, 2)
        assert (e.hidden is not None, e.out is not None) == (site == "expert_hidden[1]", site == "expert_out[1]")


def test_rows_of_an_expert_are_the_real_tokens_that_chose_it(routed: Activations) -> None:
    e = routed.experts(1)
    assert e.out is not None
    seen = 0
    for expert in range(8):
        batch, pos, slot = e.rows(expert)
        cells = [
            (b, p, s) for b in range(2) for p in range(7) for s in range(2) if MASK[b, p] and e.ids[b, p, s] == expert
        ]
        assert list(zip(batch.tolist(), pos.tolist(), slot.tolist(), strict=True)) == cells
        assert torch.equal(routed[f"expert_out[1, expert={expert}]"], e.out[batch, pos, slot])
        assert int(e.load()[expert]) == len(cells)
        seen += len(cells)
    assert seen == int(MASK.sum()) * 2
    assert len(e.load()) == 8


def test_rows_of_an_expert_captured_alone_leave_padding_out_too(moe: Model, routed: Activations) -> None:
    expert = int(routed["expert_ids[1]"][1, 6, 0])  # a token of padding has been sent there
    site = f"expert_out[1, expert={expert}]"
    assert torch.equal(moe.capture(TOKENS, site)[site], routed[site])
    assert len(routed[site]) < int((routed["expert_ids[1]"] == expert).sum())


def test_the_table_of_experts_has_a_line_per_real_token_and_slot(routed: Activations) -> None:
    e = routed.experts(-2)  # counted from the end, as everywhere
    assert e.layer == 1
    frame = e.frame()
    assert list(frame) == ["batch", "position", "slot", "layer", "expert", "weight", "hidden_norm", "out_norm"]
    assert len(frame) == int(MASK.sum()) * 2
    assert e.hidden is not None
    assert e.out is not None
    for line in frame.sample(5, random_state=0).itertuples():
        cell = (line.batch, line.position, line.slot)
        assert line.expert == int(e.ids[cell])
        assert line.weight == pytest.approx(float(e.weights[cell]))
        assert line.hidden_norm == pytest.approx(float(e.hidden[cell].norm()), rel=1e-5)
        assert line.out_norm == pytest.approx(float(e.out[cell].norm()), rel=1e-5)
    assert frame.groupby("expert").size().reindex(range(8), fill_value=0).tolist() == e.load().tolist()
    assert list(routed.experts(0).frame())[-1] == "out_norm"
    assert "hidden_norm" not in routed.experts(0).frame()


def test_positions_in_the_table_count_real_tokens_under_left_padding(moe: Model) -> None:
    left = moe.capture(TOKENS.padded("left"), "expert_weight[1]").experts(1).frame()
    right = moe.capture(TOKENS, "expert_weight[1]").experts(1).frame()
    keys = ["batch", "position", "slot"]
    merged = left.merge(right, on=keys, suffixes=("_left", "_right"))
    assert len(merged) == len(right)
    assert (merged.expert_left == merged.expert_right).all()


# -- arithmetic and moves --------------------------------------------------------------------------------------
def test_a_mean_is_over_real_tokens(acts: Activations, routed: Activations) -> None:
    for site in ("resid_post[1]", "z[1]", "z[1, head=2]", "embed"):
        torch.testing.assert_close(acts.mean(site), acts[site][MASK].mean(0))
    rows = f"expert_out[1, expert={int(routed['expert_ids[1]'][0, 0, 0])}]"
    torch.testing.assert_close(routed.mean(rows), routed[rows].mean(0))
    with pytest.raises(SiteError, match=r"pattern\[1\]: its axes are .* so it has no mean over tokens"):
        acts.mean("pattern[1]")


def test_moving_changes_floating_tensors_and_keeps_the_rest(routed: Activations, acts: Activations) -> None:
    half = routed.to(torch.bfloat16)
    assert half["expert_out[1]"].dtype == torch.bfloat16
    assert half["expert_ids[1]"].dtype == torch.long
    assert torch.equal(half["expert_out[1]"], routed["expert_out[1]"].bfloat16())
    assert half.experts(1).load().tolist() == routed.experts(1).load().tolist()
    assert half.mask.device == routed.mask.device
    away = acts.to("meta")
    assert away.logits is not None
    assert {away["embed"].device.type, away.mask.device.type, away.tokens.ids.device.type, away.logits.device.type} == {
        "meta"
    }
    assert acts["embed"].device.type == "cpu"


def test_detached_activations_have_left_the_graph(m: Model) -> None:
    attached = m.capture(TOKENS, "resid_post[1]", logits=True, grad=True)
    free = attached.detach()
    assert attached["resid_post[1]"].requires_grad
    assert attached.logits is not None
    assert attached.logits.requires_grad
    assert free.logits is not None
    assert not free["resid_post[1]"].requires_grad
    assert not free.logits.requires_grad


def test_it_says_what_it_holds(acts: Activations, m: Model) -> None:
    assert repr(acts) == "Activations(llama, 2x7 tokens, 0.0 MiB: embed, z[0..2], resid_post[0..2], pattern[1])"
    some: Any = m.capture(TOKENS, ["q[0]", "q[2]"])
    assert repr(some).endswith("q[0, 2])")
    heads = {Site("pattern", 1, (("head", h),)): torch.zeros(2, 7, 7) for h in (0, 3)}
    assert repr(Activations(TOKENS, heads)).endswith("pattern[1, head=0], pattern[1, head=3])")
    assert repr(Activations(TOKENS)) == "Activations(model, 2x7 tokens, 0.0 MiB: none)"
