"""Reading a model: as far as needed, under any mode and dtype, with gradients, also where it overwrites its tensors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from interp import edits
from interp.model import Model
from interp.sites import KINDS, Site
from interp.zoo.tiny import tiny

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))


def model(family: str, **how: Any) -> Model:
    return Model(tiny(family, **how), name=family)


@pytest.fixture(scope="module")
def m() -> Model:
    return model("llama")


@pytest.fixture(scope="module")
def moe() -> Model:
    return model("olmoe")


def everything(m: Model, *without: str) -> list[str]:
    names = sorted({name for name, _ in m.anatomy.places} - set(without))
    return [f"{n}[*]" if KINDS[n].layered else n for n in names]


# -- what it is ------------------------------------------------------------------------------------------------
def test_it_knows_its_sizes(m: Model, moe: Model) -> None:
    assert (m.n_layers, m.d_model, m.n_heads, m.n_kv_heads, m.d_head) == (3, 32, 4, 2, 16)
    assert (m.d_vocab, m.n_ctx, m.n_experts, m.top_k) == (101, 128, 0, 0)
    assert (moe.n_experts, moe.top_k, moe.d_head) == (8, 2, 8)
    assert (m.dtype, m.device) == (torch.float32, torch.device("cpu"))
    assert m.rotary
    assert not model("gpt2").rotary
    assert repr(moe) == "Model(olmoe: OlmoeForCausalLM, 3 layers, d_model 32, 4 heads, 8 experts top-2, float32 on cpu)"


def test_its_fingerprint_is_of_its_weights() -> None:
    one, same, other = model("llama"), model("llama"), model("llama", seed=1)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    with torch.no_grad():
        same.hf.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    assert Model(same.hf).fingerprint != one.fingerprint


# -- how far it runs -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sites", "layers", "head"),
    [
        ("embed", 0, 0), ("resid_pre[0]", 1, 0), ("q[1]", 2, 0), ("resid_post[1]", 2, 0), ("resid_post[*]", 3, 0),
        (["resid_post[0]", "z[2]"], 3, 0), ("ln_final_scale", 3, 0), ("logits", 3, 1), (["embed", "logits"], 3, 1),
    ],
)  # fmt: skip
def test_a_capture_ends_behind_the_last_site_it_wants(m: Model, sites: Any, layers: int, head: int) -> None:
    ran: list[str] = []
    counted = [*((layer, "layer") for layer in m.anatomy.layers), (m.hf.lm_head, "head")]
    handles = [mod.register_forward_hook(lambda mod, args, out, kind=kind: ran.append(kind)) for mod, kind in counted]
    m.resolve(sites)
    try:
        m.capture(IDS, sites)
        assert (ran.count("layer"), ran.count("head")) == (layers, head)
        ran.clear()
        m.capture(IDS, sites, logits=True)
        assert (ran.count("layer"), ran.count("head")) == (3, 1)
    finally:
        for handle in handles:
            handle.remove()


def test_logits_come_along_if_asked_for(m: Model) -> None:
    acts = m.capture(IDS, "resid_post[0]", logits=True)
    assert acts.logits is not None
    assert torch.equal(acts.logits, m(IDS))
    assert torch.equal(acts.logits, m.capture(IDS, "logits")["logits"])
    assert m.capture(IDS, "resid_post[0]").logits is None
    assert len(m.capture(IDS, [])) == 0


def test_logits_are_those_of_the_model_itself(m: Model) -> None:
    with torch.no_grad():
        assert torch.equal(m(IDS), m.hf(input_ids=IDS).logits)
    assert not m(IDS).requires_grad
    assert m(IDS, grad=True).requires_grad


def test_what_is_read_inside_an_intervention_is_what_the_model_goes_on_with(m: Model) -> None:
    v = torch.randn(32)
    with m.intervene(edits.add("resid_post[0]", v), edits.zero("z[1]")):
        acts = m.capture(IDS, ["resid_post[0]", "resid_pre[1]", "z[1]", "attn_out[1]", "resid_mid[1]"])
    plain = m.capture(IDS, "resid_post[0]")["resid_post[0]"]
    assert torch.equal(acts["resid_post[0]"], plain + v)
    assert torch.equal(acts["resid_pre[1]"], plain + v)
    assert not bool(acts["z[1]"].any())
    assert not bool(acts["attn_out[1]"].any())
    assert torch.equal(acts["resid_mid[1]"], plain + v)


def test_layers_run_by_hand_inside_a_context_are_refused(m: Model) -> None:
    with (
        m.intervene(edits.zero("z[1]")),
        pytest.raises(RuntimeError, match=r"call the model \(m\(...\) or m.hf\(...\)\)"),
    ):
        m.hf.model(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "stablelm", "olmo2", "bloom"])
def test_the_scale_of_a_norm_is_what_it_divides_by(family: str, dtype: torch.dtype) -> None:
    """The spread around the mean for a LayerNorm, the root mean square for the others, in any dtype."""
    m = model(family, dtype=dtype)
    centred = family in ("gpt2", "stablelm", "bloom")
    name = "ln_final_scale"
    acts = m.capture(IDS, ["resid_post[-1]", name])
    x = acts["resid_post[-1]"].double()
    want = (x - x.mean(-1, keepdim=True) if centred else x).pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(acts[name].double(), want, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-4)


# -- modes and dtypes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("family", ["llama", "olmoe", "falcon", "bloom"])
def test_the_mode_of_autograd_changes_no_value(family: str, mode: Any) -> None:
    m = model(family)
    want = m.capture(IDS, everything(m), logits=True)
    change = [edits.scale(f"{name}[1]", 1.5) for name in ("resid_pre", "z", "mlp_out", "resid_post")]
    change += [edits.scale("resid_mid[1]", 1.5)] if family in ("llama", "olmoe", "bloom") else []
    with m.intervene(change):
        edited = m(IDS)
    with mode():
        got = m.capture(IDS, everything(m), logits=True)
        with m.intervene(change):
            assert torch.equal(m(IDS), edited)
            assert torch.equal(m.hf(input_ids=IDS).logits, edited)
    for site in want:
        assert torch.equal(got[site], want[site]), site
        assert not got[site].requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmoe", "gpt_oss", "bloom"])
def test_half_precision_is_kept_and_comes_close(family: str) -> None:
    m, half = model(family), model(family, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    want, got = m.capture(IDS, everything(m), logits=True), half.capture(IDS, everything(half), logits=True)
    for site in [s for s in got.sites if s.name != "expert_ids"]:
        assert got[site].dtype == (torch.bfloat16 if site.name != "router_logits" else got[site].dtype), site
        if site.layer == 0 and not site.name.startswith(("router", "expert", "mlp_out", "resid_post")):
            error = (got[site].float() - want[site]).norm() / want[site].norm()
            assert float(error) < 0.03, site
    v = torch.randn(32)
    for edit in (
        edits.add("resid_post[0]", v),
        edits.project_out("resid_post[0]", v),
        edits.noise("resid_post[0]", 0.1),
    ):
        with m.intervene(edit), half.intervene(edit):
            a, b = m.capture(IDS, "resid_post[0]"), half.capture(IDS, "resid_post[0]")
        same = (want["resid_post[0]"] - got["resid_post[0]"].float()).norm(dim=-1) < 0.05 * want["resid_post[0]"].norm(
            dim=-1
        )
        moved = (a["resid_post[0]"] - b["resid_post[0]"].float()).norm(dim=-1) / a["resid_post[0]"].norm(dim=-1)
        assert bool(same.any())  # routing may flip for single tokens
        assert float(moved[same].max()) < 0.1
        assert b["resid_post[0]"].dtype == torch.bfloat16
    assert torch.equal(half.capture(IDS, "logits")["logits"], half(IDS))


def test_a_model_in_training_mode_stays_there_and_drops_out() -> None:
    m = model("gpt2", resid_pdrop=0.5)
    m.hf.train()
    assert m.n_layers == 3
    torch.manual_seed(1)
    a = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
    b = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
    assert all(module.training for module in m.hf.modules())
    assert not torch.equal(a, b)
    m.hf.eval()
    assert torch.equal(*(m.capture(IDS, "resid_post[1]")["resid_post[1]"] for _ in range(2)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_activation_that_is_not_finite_is_warned_of_with_its_site(value: float) -> None:
    m = model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m.capture(IDS, everything(m))
        with m.intervene(edits.scale("resid_post[1]", 1e36)):  # huge, but finite; the sum is not
            m.capture(IDS, "resid_post[1]")
    with torch.no_grad():
        m.hf.model.layers[1].mlp.down_proj.weight[7, 0] = value
    with pytest.warns(RuntimeWarning, match=r"^mlp_out\[1\]: 16 of 512 values are NaN or infinite"):
        m.capture(IDS, ["resid_post[0]", "mlp_out[1]"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m.capture(IDS, "resid_post[0]")
        m.capture(IDS, "mlp_out[1]", check=False)


# -- gradients -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe", "gpt_oss", "bloom", "jetmoe"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_every_site_also_of_a_frozen_model(family: str, frozen: bool) -> None:
    m = model(family)
    m.hf.requires_grad_(not frozen)
    acts = m.capture(IDS, everything(m, "expert_ids"), logits=True, grad=True)
    assert acts.logits is not None
    sites = [s for s in acts.sites if s.name != "expert_ids"]
    grads = torch.autograd.grad(acts.logits.sum() + acts.logits.pow(2).sum(), [acts[s] for s in sites])
    for site, g in zip(sites, grads, strict=True):
        assert bool(g.isfinite().all()), site
        assert bool(g.any()), site
    assert all(p.grad is None for p in m.hf.parameters())
    assert m.capture(IDS, "resid_post[1]")["resid_post[1]"].requires_grad is False


PARTS = [
    ("llama", "z[1, head=2]"),
    ("llama", "k[1, head=0]"),
    ("llama", "pattern[1, head=3]"),
    ("llama", "mlp_hidden[1, neuron=5]"),
    ("llama", "resid_mid[1, dim=3]"),
    ("olmoe", "expert_out[1, slot=1]"),
    ("olmoe", "expert_weight[1, slot=0]"),
    ("olmoe", "router_logits[1, expert=2]"),
    ("olmoe", "expert_out[1, expert={}]"),
    ("olmoe", "expert_hidden[1, expert={}, neuron=3]"),
]


@pytest.mark.parametrize(("family", "text"), PARTS)
def test_the_gradient_at_a_part_is_that_part_of_the_gradient(m: Model, moe: Model, family: str, text: str) -> None:
    """The part is in the graph itself, alone or beside other parts and the whole."""
    model = m if family == "llama" else moe
    ids = model.capture(IDS, "expert_ids[1]")["expert_ids[1]"] if model.n_experts else None
    site = Site.parse(text.format(0 if ids is None else int(ids[0, 0, 0])))
    whole = model.capture(IDS, site.base, logits=True, grad=True)
    assert whole.logits is not None
    (want,) = torch.autograd.grad(whole.logits.pow(2).sum(), whole[site.base])
    want_acts = copy.copy(whole)
    want_acts.tensors = {**whole.tensors, site.base: want}
    other = (
        site.base.at(**{k: 0 for k in site.kind.index if k in ("head", "slot", "dim", "neuron")})
        if not site.kind.routed
        else site
    )
    for sites in ([site], list(dict.fromkeys([site, other, site.base]))):
        acts = model.capture(IDS, sites, logits=True, grad=True)
        assert acts.logits is not None
        torch.testing.assert_close(acts.logits, whole.logits)
        (got,) = torch.autograd.grad(acts.logits.pow(2).sum(), acts.tensors[site])
        torch.testing.assert_close(got, want_acts[site], rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_edits(m: Model) -> None:
    v = torch.randn(32, requires_grad=True)
    with m.intervene(edits.add("resid_post[0]", v, scope="last")):
        logits = m(IDS, grad=True)
    (g,) = torch.autograd.grad(logits[:, -1].pow(2).sum(), v)
    step = 1e-2 * g / g.norm()
    values = []
    for sign in (1, -1):
        with m.intervene(edits.add("resid_post[0]", (v + sign * step).detach(), scope="last")):
            values.append(float(m(IDS)[:, -1].pow(2).sum().double()))
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(g.norm()), rel=0.02)


def test_weights_can_be_trained_under_an_edit() -> None:
    m = model("llama")
    before = m.hf.lm_head.weight.detach().clone()
    m.hf.train()
    optimiser = torch.optim.SGD(m.hf.parameters(), lr=0.1)
    with m.intervene(edits.zero("z[1, head=0]")):
        loss = m.hf(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
    used = m.hf.model.layers[1].self_attn.o_proj.weight.grad
    assert not bool(used[:, :16].any()), "the head that was zeroed has no gradient in the weights that read it"
    assert bool(used[:, 16:].any())
    assert not torch.equal(m.hf.lm_head.weight, before)


@pytest.mark.filterwarnings("ignore:.*checkpoint")
def test_gradient_checkpointing_runs_the_edits_again() -> None:
    grads = []
    for checkpointing in (False, True):
        m = model("llama")
        m.hf.train()
        if checkpointing:
            m.hf.gradient_checkpointing_enable()
        with m.intervene(edits.add("attn_out[1]", 1.0), edits.scale("z[1]", 2.0)):
            m.hf(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append(m.hf.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert bool(grads[0].any())


# -- tensors that the model overwrites -------------------------------------------------------------------------
class Overwriting(LlamaDecoderLayer):
    """A Llama layer that adds up in place: into attention's output, and the MLP's output into the stream's middle."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual = hidden_states
        stream, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        stream += residual
        stream += self.mlp(self.post_attention_layernorm(stream))
        return stream


def overwriting(m: Model) -> Model:
    """The same weights, and layers that overwrite."""
    hf = copy.deepcopy(m.hf)
    for layer in hf.model.layers:
        layer.__class__ = Overwriting
    return Model(hf, name="overwriting")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_model_overwrites_is_read_as_it_was(m: Model, mode: Any) -> None:
    rash = overwriting(m)
    assert set(rash.anatomy.places) == set(m.anatomy.places)
    want = m.capture(IDS, everything(m), logits=True)
    for how in ("capture", "recording", "generate"):
        rash = overwriting(m)  # each way must find out for itself
        with mode():
            if how == "capture":
                got = rash.capture(IDS, everything(rash), logits=True)
            elif how == "recording":
                with rash.recording(everything(rash)) as rec:
                    rash.hf(input_ids=IDS)
                got = rec.activations()
            else:
                made = rash.generate(IDS, max_new_tokens=1, capture=everything(rash), eos_token_id=None).acts
                assert made is not None
                got = made
        for site in want:
            torch.testing.assert_close(got[site], want[site], rtol=1e-5, atol=1e-5, msg=lambda s, at=site: f"{at}: {s}")


def test_edits_of_a_model_that_overwrites_do_what_they_do_elsewhere(m: Model) -> None:
    rash = overwriting(m)
    for site in ("resid_pre[1]", "attn_out[1]", "resid_mid[1]", "mlp_out[1]", "resid_post[1]", "z[1]", "mlp_hidden[1]"):
        with m.intervene(edits.scale(site, -2.0)), rash.intervene(edits.scale(site, -2.0)):
            torch.testing.assert_close(rash(IDS), m(IDS), rtol=1e-5, atol=1e-5)


def test_falcons_parallel_sum_is_read_before_it_is_made() -> None:
    m = model("falcon")
    layer = m.anatomy.layers[1]
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            kept[name] = (out[0] if isinstance(out, tuple) else out).detach().clone()

        return hook

    handles = [
        layer.mlp.register_forward_hook(keep("mlp_out")),
        layer.self_attention.register_forward_hook(keep("attn_out")),
    ]
    try:
        acts = m.capture(IDS, ["mlp_out[1]", "attn_out[1]", "resid_pre[1]", "resid_post[1]"])
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(acts["mlp_out[1]"], kept["mlp_out"])
    assert torch.equal(acts["attn_out[1]"], kept["attn_out"])
    total = acts["resid_pre[1]"] + acts["attn_out[1]"] + acts["mlp_out[1]"]
    torch.testing.assert_close(acts["resid_post[1]"], total, rtol=0, atol=1e-5)
