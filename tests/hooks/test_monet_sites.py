"""Monet's factored experts as sites: read where they are, written exactly, refused where there is nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interp import Model, edits, store
from interp.factored import FactoredExperts
from interp.monet import MonetConfig, MonetForCausalLM, MonetMask, masked
from interp.sites import SiteError

N, HEADS, WIDTH, D = 6, 3, 4, 24
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": 61, "hidden_size": D, "num_hidden_layers": 4, "initializer_range": 0.2}
HEADED = {"num_attention_heads": 3, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
EXPERTS = {"moe_experts": N, "moe_dim": WIDTH, "moe_heads": HEADS, "moe_topk": 2, "moe_groups": 2}


def build(decompose: str) -> Model:
    torch.manual_seed(0)
    hf = MonetForCausalLM(MonetConfig(**SIZES, **HEADED, **EXPERTS, moe_decompose=decompose)).eval()
    with torch.no_grad():
        for name, tensor in hf.named_parameters():
            if name.endswith((".b", ".b1", ".b2", ".bias")):
                tensor.normal_(std=0.3)
    return Model(hf, name=decompose)


@pytest.fixture(params=["horizontal", "vertical"])
def m(request: pytest.FixtureRequest) -> Model:
    return build(request.param)


def moe(m: Model, layer: int):
    return m.hf.model.layers[layer].moe


def given(m: Model, layer: int) -> tuple[Tensor, ...]:
    """(x, g1, g2) of a layer's experts in a plain run, by a bare hook."""
    seen: list[tuple[Tensor, ...]] = []
    handle = moe(m, layer).register_forward_pre_hook(lambda _, args: seen.append(args))
    try:
        m(IDS)
    finally:
        handle.remove()
    return seen[0]


def wide(m: Model, layer: int) -> list[torch.nn.Linear]:
    """The linears that make the neurons of axis 1 and, vertical, of axis 2."""
    experts = moe(m, layer)
    return [experts.u] if hasattr(experts, "u") else [experts.u1, experts.u2]


# -- what there is ---------------------------------------------------------------------------------------------
def test_the_model_tells_its_size(m):
    assert (m.n_experts, m.top_k) == (N * N, 0)
    assert "36 experts, float32" in repr(m)


def test_every_layer_has_its_factors_and_groups_their_logits(m):
    assert m.anatomy.having("g1") == m.anatomy.having("g2") == m.anatomy.having("z1") == [0, 1, 2, 3]
    assert m.anatomy.having("key_logits1") == m.anatomy.having("key_logits2") == [0, 2]
    assert m.anatomy.having("z2") == ([] if m.name == "horizontal" else [0, 1, 2, 3])
    assert len(m.resolve("g1[1, head=*, key=*]")) == HEADS * N
    assert len(m.resolve("z1[1, neuron=*]")) == (WIDTH if m.name == "horizontal" else WIDTH // 2)


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("key_logits1[1]", r"layer 1 uses the router of layer 0: read key_logits1\[0\]"),
        ("key_logits2[3]", r"layer 3 uses the router of layer 2: read key_logits2\[2\]"),
        ("mlp_hidden[1]", r"products of two sets of parts; their neurons are z1\[1\]"),
        ("router_logits[0]", r"never one row each; read g1\[0\] and g2\[0\], and acts\.experts\(0\) of both"),
        ("expert_ids[1]", r"read g1\[1\]"),
        ("expert_weight[2]", r"read g1\[2\]"),
        ("expert_hidden[3]", r"read g1\[3\]"),
        ("expert_out[0]", r"read g1\[0\]"),
        ("shared_out[0]", r"layer 0 has no shared expert"),
        ("g1[4]", r"has layers 0\.\.3"),
        ("g1[0, key=6]", r"key=6 is out of range; layer 0 has key 0\.\.5"),
        ("g2[0, head=3]", r"head=3 is out of range; layer 0 has head 0\.\.2"),
        ("z1[0, key=-7]", r"key=-7 is out of range; layer 0 has key 0\.\.5"),
    ],
)
def test_what_is_not_there_says_why(m, site, reason):
    with pytest.raises(SiteError, match=reason):
        m.resolve(site)


def test_horizontal_experts_have_neurons_on_one_axis_only():
    with pytest.raises(SiteError, match=r"decomposed horizontally: part i computes all neurons .* part j only puts"):
        build("horizontal").resolve("z2[0]")


# -- reading ---------------------------------------------------------------------------------------------------
def test_factors_are_what_the_model_itself_reports(m):
    acts = m.capture(IDS, ["g1[*]", "g2[*]"])
    probs = m.hf(IDS, output_router_probs=True).router_probs
    for layer in range(4):
        for name, g in zip(("g1", "g2"), probs[layer // 2 * 2], strict=True):
            assert torch.equal(acts[f"{name}[{layer}]"], g)
    assert acts["g1[*]"].shape == (4, 2, 9, HEADS, N)
    assert torch.equal(acts["g1[1, head=2, key=4]"], acts["g1[1]"][:, :, 2, 4])


def test_logits_and_neurons_are_those_written_out(m):
    names = ["key_logits1[*]", "key_logits2[*]", "z1[*]", *(["z2[*]"] if m.name == "vertical" else [])]
    acts = m.capture(IDS, names)
    for layer in range(4):
        x = given(m, layer)[0]
        for name, u in zip(("z1", "z2"), wide(m, layer), strict=False):
            z = (x @ u.weight.T + u.bias).clamp(min=0).pow(2)
            torch.testing.assert_close(acts[f"{name}[{layer}]"], z.view(2, 9, N, -1))
        if layer in (0, 2):
            router = m.hf.model.layers[layer].router
            for name, w in (("key_logits1", router.w1), ("key_logits2", router.w2)):
                torch.testing.assert_close(acts[f"{name}[{layer}]"], (x @ w.weight.T).view(2, 9, HEADS, N))


def test_padding_on_either_side_gives_the_same(m):
    alone = m.capture(IDS[:1, :5], ["g1[3]", "z1[3]"])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    from interp.activations import Tokens

    for side in ("left", "right"):
        acts = m.capture(Tokens(IDS, mask).padded(side), ["g1[3]", "z1[3]"])
        for site in ("g1[3]", "z1[3]"):
            torch.testing.assert_close(acts[site][0][acts.mask[0]], alone[site][0], atol=1e-5, rtol=1e-4)


def test_a_dataset_keeps_them_as_rows(m, tmp_path):
    sites = ["g1[1]", "g2[1]", "z1[1]", "key_logits1[0]", "g1[2, head=0]"]
    documents = [row.tolist() for row in IDS]
    ds = store.write(m, documents, sites, tmp_path / "ds", dtype="float32", context=16, progress=False)
    frame, acts = ds.frame(), m.capture(IDS, sites)
    for i in range(2):
        rows = torch.tensor(frame[frame.document == i].row.to_numpy())
        for site in sites:
            torch.testing.assert_close(ds[site][rows], acts[site][i])


# -- writing ---------------------------------------------------------------------------------------------------
def by_hook(m: Model, layer: int, change) -> Tensor:
    """Logits when `change(x, g1, g2)` gives what the experts of one layer put out."""
    handle = moe(m, layer).register_forward_hook(lambda module, args, out: change(*args))
    try:
        return m(IDS)
    finally:
        handle.remove()


def test_one_entry_of_a_factor_is_written_in_one_layer(m):
    forward = moe(m, 2).forward

    def change(x: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
        g1 = g1.clone()
        g1[:, :, 1, 4] = 0.7
        return forward(x, g1, g2)

    with m.intervene(edits.replace("g1[2, head=1, key=4]", 0.7)):
        torch.testing.assert_close(m(IDS), by_hook(m, 2, change), atol=1e-5, rtol=1e-5)
        acts = m.capture(IDS, ["g1[2]", "g1[3]", "key_logits1[2]"])
    assert bool((acts["g1[2, head=1, key=4]"] == 0.7).all())
    plain = m.capture(IDS, ["g1[3]", "key_logits1[2]"])
    assert torch.equal(acts["g1[3]"], plain["g1[3]"])  # the same router, and nothing of it has changed
    assert torch.equal(acts["key_logits1[2]"], plain["key_logits1[2]"])


@pytest.mark.parametrize("factor", ["g1", "g2"])
@pytest.mark.parametrize("off", [None, [(0, 0, 1), (0, 4, 2), (2, 2, 2), (2, 5, 0)]])
def test_a_key_without_weight_is_a_row_or_column_switched_off(m, factor, off):
    if off:
        m.hf.set_expert_mask(MonetMask.from_pairs(m.hf, {la: [p[1:] for p in off if p[0] == la] for la in (0, 2)}))
    full = MonetMask.full_rows if factor == "g1" else MonetMask.full_cols
    with masked(m.hf, full(m.hf, {0: [2], 2: [5]})):
        expected = m(IDS)
    with m.intervene(edits.zero(f"{factor}[0, key=2]"), edits.zero(f"{factor}[2, key=5]")):
        torch.testing.assert_close(m(IDS), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(m(IDS), expected, atol=1e-4)


def test_a_neuron_without_activation_is_a_zeroed_row_of_weights(m):
    for axis, u in enumerate(wide(m, 1), 1):
        width = u.out_features // N
        with m.intervene(edits.zero(f"z{axis}[1, key=3, neuron=1]")):
            edited = m(IDS)
        kept = u.weight.detach().clone(), u.bias.detach().clone()
        with torch.no_grad():
            u.weight[3 * width + 1], u.bias[3 * width + 1] = 0, 0
            expected = m(IDS)
            u.weight.copy_(kept[0]), u.bias.copy_(kept[1])
        torch.testing.assert_close(edited, expected)


def test_key_logits_change_the_routing_of_their_whole_group_and_of_no_other(m):
    with m.intervene(edits.add("key_logits2[0, head=1, key=3]", 1e4)):
        acts = m.capture(IDS, "g2[*]")
    for layer in (0, 1):
        assert bool((acts[f"g2[{layer}, head=1, key=3]"] == 1).all())
    plain = m.capture(IDS, "g2[*]")
    assert torch.equal(acts["g2[0, head=0]"], plain["g2[0, head=0]"])
    assert float(acts["g2[2, head=1, key=3]"].mean()) < 1


def test_routing_of_another_text_is_replayed(m):
    other = m.capture(IDS.flip(0), ["g1[*]", "g2[*]"])
    with m.intervene(edits.freeze("g1[*]", other), edits.freeze("g2[*]", other)):
        acts = m.capture(IDS, ["g1[*]", "g2[*]", "mlp_out[0]"])
    for layer in range(4):
        assert torch.equal(acts[f"g1[{layer}]"], other[f"g1[{layer}]"])
    x = given(m, 0)[0]
    torch.testing.assert_close(acts["mlp_out[0]"], moe(m, 0)(x, other["g1[0]"], other["g2[0]"]))


def test_only_the_tokens_of_the_scope_change_and_the_trace_says_which(m):
    before = m.capture(IDS, ["g1[1]", "mlp_out[1]"])
    with m.intervene(edits.scale("g1[1, key=2]", 3.0, scope="last")) as run:
        after = m.capture(IDS, ["g1[1]", "mlp_out[1]"])
    assert torch.equal(after["g1[1]"][:, :-1], before["g1[1]"][:, :-1])
    torch.testing.assert_close(after["g1[1, key=2]"][:, -1], 3 * before["g1[1, key=2]"][:, -1])
    assert torch.equal(after["mlp_out[1]"][:, :-1], before["mlp_out[1]"][:, :-1])
    assert sorted(zip(run.trace().batch, run.trace().position, strict=True)) == [(0, 8), (1, 8)]


@pytest.mark.parametrize("site", ["g1[1, key=2]", "z1[2, key=1]", "key_logits1[0, key=3]"])
def test_generation_with_and_without_cache_is_edited_alike(m, site):
    texts, recorded = [], []
    for use_cache in (True, False):
        with m.intervene(edits.scale(site, 4.0, scope="generated")), m.recording("g1[*]") as rec:
            texts.append(m.generate(IDS[:1, :4], max_new_tokens=5, use_cache=use_cache).new_ids.tolist())
        recorded.append(rec.activations())
    assert texts[0] == texts[1]
    assert recorded[0]["g1[3]"].shape[:2] == (1, 8)
    torch.testing.assert_close(recorded[0]["g1[3]"], recorded[1]["g1[3]"][:, -8:], atol=1e-4, rtol=1e-4)


def test_half_precision_models_route_in_single_precision(m):
    m.hf.bfloat16()
    with m.intervene(edits.add("g1[1, key=0]", 0.5), edits.scale("z1[1]", 2.0), edits.zero("key_logits2[0, key=1]")):
        acts = m.capture(IDS, ["g1[1]", "z1[1]", "key_logits2[0]"])
    assert (acts["g1[1]"].dtype, acts["z1[1]"].dtype) == (torch.float32, torch.bfloat16)
    assert bool((acts["key_logits2[0, key=1]"] == 0).all())


# -- gradients -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["g1", "g2", "z1"])
def test_each_layer_has_its_own_share_of_the_gradient(m, name):
    """Layers 0 and 1 share one tensor g; an edit reaches one of them, and so must the derivative."""
    acts = m.capture(IDS, [f"{name}[0]", f"{name}[1]"], logits=True, grad=True)
    assert acts.logits is not None
    slopes = torch.autograd.grad(acts.logits.logsumexp(-1).sum(), [acts[f"{name}[0]"], acts[f"{name}[1]"]])
    for layer, slope in enumerate(slopes):
        leaf: list[Tensor] = []

        def cut(tensor: Tensor, leaf: list[Tensor] = leaf) -> Tensor:
            leaf.append(tensor.detach().requires_grad_())
            return leaf[0]

        if name == "z1":
            act = next(c for n, c in moe(m, layer).named_children() if n in ("act", "act1"))
            handle = act.register_forward_hook(lambda _, args, out, cut=cut: cut(out))
        elif name == "g1":
            handle = moe(m, layer).register_forward_pre_hook(lambda _, args, cut=cut: (args[0], cut(args[1]), args[2]))
        else:
            handle = moe(m, layer).register_forward_pre_hook(lambda _, args, cut=cut: (*args[:2], cut(args[2])))
        m.hf(IDS).logits.logsumexp(-1).sum().backward()
        handle.remove()
        torch.testing.assert_close(slope, leaf[0].grad.view_as(slope), atol=1e-5, rtol=1e-4)


def test_checkpointed_layers_run_again_under_their_edits(m):
    def slope() -> Tensor:
        m.hf.zero_grad()
        with m.intervene(edits.scale("z1[1, key=2]", 3.0), edits.scale("g1[2]", 0.5)):
            m.hf(IDS, labels=IDS).lm_loss.backward()
        return wide(m, 1)[0].weight.grad.clone()

    plain = slope()
    m.hf.activation_checkpointing_enable({"use_reentrant": False})
    m.hf.train()
    for module in m.hf.modules():  # statistics must stay those of evaluation
        if type(module).__name__ == "HeadNorm":
            module.eval()
    torch.testing.assert_close(slope(), plain)


# -- experts ---------------------------------------------------------------------------------------------------
def literal_output(m: Model, layer: int, expert: int, x: Tensor) -> Tensor:
    """E_ij(x), from its own slices of the weights."""
    experts, (i, j) = moe(m, layer), divmod(expert, N)
    first, second = wide(m, layer)[0], wide(m, layer)[-1]
    w = first.out_features // N
    a, b = slice(i * w, (i + 1) * w), slice(j * w, (j + 1) * w)
    z1 = (x @ first.weight[a].T + first.bias[a]).clamp(min=0) ** 2
    if m.name == "horizontal":
        return z1 @ experts.v.weight[:, b].T + experts.b[j]
    z2 = (x @ second.weight[b].T + second.bias[b]).clamp(min=0) ** 2
    top = z1 @ experts.v11.weight[:, a].T + z2 @ experts.v12.weight[:, a].T + experts.b1[i]
    bottom = z1 @ experts.v21.weight[:, b].T + z2 @ experts.v22.weight[:, b].T + experts.b2[j]
    return torch.cat((top, bottom), -1)


def test_single_experts_put_out_what_their_slices_make(m):
    x = torch.randn(5, D)
    out = m.expert_output(-1, [0, 17, 35], x)
    assert out.shape == (5, 3, D)
    for place, expert in enumerate((0, 17, 35)):
        torch.testing.assert_close(out[:, place], literal_output(m, 3, expert, x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(m.expert_output(3, expert, x), out[:, place])
    for bad in (36, -1, [3, 99]):
        with pytest.raises(SiteError, match=r"the layer has experts 0\.\.35, expert \(i, j\) is 6 i \+ j"):
            m.expert_output(3, bad, x)


def test_weights_times_outputs_are_what_the_layer_puts_out(m):
    m.hf.set_expert_mask(MonetMask.from_ids(m.hf, {1: range(0, 36, 5)}))
    acts = m.capture(IDS, ["g1[1]", "g2[1]", "mlp_out[1]"])
    e = acts.experts(1)
    assert isinstance(e, FactoredExperts)
    assert bool((e.weights(range(0, 36, 5)) == 0).all())
    x = given(m, 1)[0]
    every = torch.stack([literal_output(m, 1, expert, x) for expert in range(36)], 2)
    torch.testing.assert_close(
        (e.weights(range(36))[..., None] * every).sum(2), acts["mlp_out[1]"], atol=1e-5, rtol=1e-4
    )


def test_asking_for_an_expert_amid_a_run_leaves_taps_alone(m):
    """As an edit does that takes single experts out of the sum, while the neurons are read or written elsewhere."""
    x, expert = given(m, 1)[0], 8

    class TakeOut:
        def __call__(self, h: Tensor, where: edits.Where) -> Tensor:
            return h - m.expert_output(1, expert, x)

    plain = m.capture(IDS, ["mlp_out[1]", "z1[1]"])
    with m.intervene(edits.Edit("mlp_out[1]", TakeOut())):
        acts = m.capture(IDS, ["mlp_out[1]", "z1[1]"])
    assert torch.equal(acts["z1[1]"], plain["z1[1]"])
    torch.testing.assert_close(
        acts["mlp_out[1]"], plain["mlp_out[1]"] - literal_output(m, 1, expert, x), atol=1e-5, rtol=1e-4
    )
    with m.intervene(edits.zero("z1[1]")) as run:
        m(IDS)
        touched = len(run.trace())
        torch.testing.assert_close(m.expert_output(1, expert, x), literal_output(m, 1, expert, x), atol=1e-5, rtol=1e-4)
        assert len(run.trace()) == touched


def test_a_view_of_the_experts_keeps_the_mask_of_its_run(m):
    m.hf.set_expert_mask(MonetMask.from_ids(m.hf, {1: [7, 8]}))
    acts = m.capture(IDS, ["g1[*]", "g2[*]"])
    m.hf.clear_expert_mask()
    for kept in (acts, acts.detach(), acts.to(torch.float64), acts.to("cpu")):
        assert bool((kept.experts(1).weights([7, 8]) == 0).all())
        assert kept.experts(-3).keep is not None
        assert kept.experts(2).keep is None
    assert m.capture(IDS, ["g1[1]", "g2[1]"]).experts(1).keep is None


def test_experts_need_both_factors(m):
    with pytest.raises(KeyError, match=r"the experts of layer 1 have two factors; capture 'g2\[1\]' too"):
        m.capture(IDS, "g1[1]").experts(1)
    with pytest.raises(KeyError, match=r"no experts of layer 1 were captured"):
        m.capture(IDS, "z1[1]").experts(1)


# -- fingerprint -----------------------------------------------------------------------------------------------
def test_the_fingerprint_follows_the_mask(m):
    plain = m.fingerprint
    with masked(m.hf, MonetMask.from_ids(m.hf, {1: [7]})):
        one = m.fingerprint
        with masked(m.hf, MonetMask.from_ids(m.hf, {1: [8]})):
            two = m.fingerprint
    assert len({plain, one, two}) == 3
    assert m.fingerprint == plain
