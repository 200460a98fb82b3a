"""Baked weights equal the steered model, and what weights cannot do is refused and leaves nothing behind."""

from __future__ import annotations

import sys

import pytest
import torch

import interp
import steering
from interp.cards import Card
from steering import SteeringError, SteeringMap, SteeringVector
from steering.bake import bake, folded
from steering.maps import Affine, Shift, projection


def vector(m, seed: int = 0, width: int | None = None) -> torch.Tensor:
    return torch.randn(width or m.d_model, generator=torch.Generator().manual_seed(100 + seed))


def same(path, m, v) -> None:
    """The checkpoint alone, opened by transformers, against the model under the edit."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(1))
    baked = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        got = baked(ids).logits
    with m.intervene(v):
        wanted = m(ids)
    assert (wanted - m(ids)).abs().max() > 1e-2  # the map does something
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "site"),
    [("llama", "resid_post[1]"), ("llama", "resid_mid[0]"), ("llama", "resid_pre[2]"), ("llama", "mlp_out[1]"),
     ("llama", "attn_out[2]"), ("gpt2", "resid_post[1]"), ("gpt2", "resid_mid[1]"), ("olmoe", "attn_out[1]")],
)  # fmt: skip
def test_a_vector_becomes_a_bias(family, site, tmp_path):
    m = interp.load(f"tiny:{family}")
    before = m.fingerprint
    v = SteeringVector.of(m, {site: vector(m)}, scope="all") * 1.5
    same(bake(m, v, tmp_path / "out"), m, v)
    assert m.fingerprint == before
    card = Card.load(tmp_path / "out")
    assert "parity" in card.fields["method"]
    assert card.fields["model_hash"] == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["z[1]", "z[1, head=2]", "mlp_hidden[1]"])
def test_what_a_projection_reads(family, site, tmp_path):
    m = interp.load(f"tiny:{family}")
    shape = m.capture([[3, 4]], site)[site].shape[2:]
    v = SteeringMap.of(m, {site: Shift(torch.randn(shape, generator=torch.Generator().manual_seed(2)))}, scope="all")
    same(bake(m, v, tmp_path / "out"), m, v)


@pytest.mark.parametrize("site", ["mlp_out[1]", "attn_out[0]", "mlp_hidden[2]"])
def test_an_affine_map_folds(site, tmp_path):
    m = interp.load("tiny:llama")
    d = m.capture([[3, 4]], site)[site].shape[-1]
    g = torch.Generator().manual_seed(3)
    full = Affine(torch.eye(d) + 0.3 * torch.randn(d, d, generator=g), torch.randn(d, generator=g))
    v = SteeringMap.of(m, {site: full}, scope="all") * 0.7
    same(bake(m, v, tmp_path / "out"), m, v)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe", "qwen3_moe"])
def test_directional_ablation_is_orthogonal_weights(family, tmp_path):
    """Every write loses the direction; projections of the stream say nothing new then."""
    m = interp.load(f"tiny:{family}")
    r = projection(vector(m))
    sites = dict.fromkeys(("embed", "attn_out[*]", "mlp_out[*]", "resid_pre[1:]"), r)
    if family == "gpt2":  # learned positions are written to the stream as well
        sites = dict.fromkeys(("resid_pre[*]", "attn_out[*]", "mlp_out[*]"), r)
    v = SteeringMap.of(m, sites, scope="all")
    path = bake(m, v, tmp_path / "out", untie=True)
    same(path, m, v)
    acts = interp.load(str(path)).capture([[3, 4, 5]], "resid_post[*]")
    unit = vector(m) / vector(m).norm()
    for site in acts:
        assert (acts[site] @ unit).abs().max() < 1e-4


def test_several_parts_at_once(tmp_path):
    m = interp.load("tiny:llama")
    v = SteeringVector.of(m, {"resid_post[0]": vector(m, 1), "resid_post[1]": vector(m, 2)}, scope="all")
    w = SteeringMap.of(m, {"attn_out[1]": Affine(torch.full((m.d_model,), 0.5))}, scope="all")
    same(bake(m, v.then(w), tmp_path / "out"), m, v.then(w))


def test_tied_embeddings_are_refused_or_untied(tmp_path):
    m = interp.load("tiny:llama", tie_word_embeddings=True)
    assert m.hf.lm_head.weight is m.hf.model.embed_tokens.weight
    r = projection(vector(m))
    v = SteeringMap.of(m, dict.fromkeys(("embed", "attn_out[*]", "mlp_out[*]"), r), scope="all")
    with pytest.raises(SteeringError, match="untie=True"):
        bake(m, v, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    same(bake(m, v, tmp_path / "out", untie=True), m, v)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_norm_behind_the_projection_is_refused(family, tmp_path):
    m = interp.load(f"tiny:{family}")
    v = SteeringVector.of(m, {"resid_post[1]": vector(m)}, scope="all")
    with pytest.raises(SteeringError, match="norm"):
        bake(m, v, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("site", "map_", "scope", "message"),
    [
        ("resid_post[1]", Shift(torch.ones(32)), "last | generated", r"within\('all'\)"),
        ("resid_post[1]", Affine(2 * torch.ones(32)), "all", "no weight of the model"),
        ("resid_post[1]", projection(torch.ones(32)), "all", "every write"),
        ("mlp_out[1, dim=3]", Shift(torch.ones(())), "all", "not one of its dimensions"),
        ("q[1, head=0]", Shift(torch.ones(16)), "all", "no weights write or read this alone"),
    ],
)
def test_what_weights_cannot_do(site, map_, scope, message, tmp_path):
    m = interp.load("tiny:llama")
    with pytest.raises(SteeringError, match=message):
        bake(m, SteeringMap.of(m, {site: map_}, scope=scope), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_experts_add_no_constant(tmp_path):
    m = interp.load("tiny:olmoe")
    with pytest.raises(SteeringError, match="weighted per token"):
        bake(m, SteeringVector.of(m, {"resid_post[1]": vector(m)}, scope="all"), tmp_path / "out")


def test_gates_other_models_and_full_directories_are_refused(tmp_path):
    m = interp.load("tiny:llama")
    v = SteeringVector.of(m, {"resid_post[1]": vector(m)}, scope="all")
    with pytest.raises(SteeringError, match="gate"):
        bake(m, v.gated(lambda h, where: torch.ones(len(h))), tmp_path / "out")
    with pytest.raises(SteeringError, match="fitted on"):
        bake(interp.load("tiny:llama", seed=1), v, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(SteeringError, match="not empty"):
        bake(m, v, tmp_path / "full")


def test_a_wrong_fold_would_be_seen(tmp_path, monkeypatch):
    """Parity is measured: with the fold's sign turned, the checkpoint is refused."""
    m = interp.load("tiny:llama")
    v = SteeringVector.of(m, {"resid_post[1]": vector(m)}, scope="all")
    right = folded(m, v)
    wrong = {k: -t if k.endswith("layers.1.mlp.down_proj.bias") else t for k, t in right[1].items()}
    monkeypatch.setattr(sys.modules["steering.bake"], "folded", lambda *a, **k: (right[0], wrong))
    with pytest.raises(SteeringError, match="differ"):
        bake(m, v, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_steering_exports_it():
    assert steering.bake is bake
