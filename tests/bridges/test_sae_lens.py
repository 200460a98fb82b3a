"""SAELens's directory: what it writes we read, what we write it reads, with the same latents to the last bit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import interp
from interp import edits
from interp.bridges.sae_lens import SAE, SAEError, load, save, to_hook_name, to_site
from interp.sites import Site, SiteError
from interp.zoo.tiny import tiny

D_IN, D_SAE = 32, 48
METADATA = {
    "hook_name": "blocks.1.hook_resid_post",
    "model_name": "tiny-llama",
    "context_size": 16,
    "prepend_bos": False,
}

# name -> (architecture, settings of its SAELens config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard, b_dec out only": ("standard", {"apply_b_dec_to_input": False}),
    "standard, layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "standard, constant_norm_rescale": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "topk": ("topk", {"k": 5}),
    "topk, decoder norms": ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "topk, more than fire": ("topk", {"k": D_SAE}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu, layer_norm": ("jumprelu", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
    "jumprelu, bfloat16": ("jumprelu", {"dtype": "bfloat16"}),
}


@pytest.fixture
def x() -> torch.Tensor:
    """Activations [batch, pos, d_in], away from zero mean and unit norm."""
    return 3 * torch.randn(2, 7, D_IN) + 1


def theirs(arch: str, **settings: Any) -> Any:
    """An SAE of SAELens with random weights; none of its vectors has norm one, none of its biases is zero."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import SAEMetadata

    cls, config = sae_lens.registry.get_sae_class(arch)
    sae = cls(config(d_in=D_IN, d_sae=D_SAE, metadata=SAEMetadata(**METADATA), **settings))
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.copy_(torch.rand_like(weight) if name == "threshold" else 0.3 * torch.randn_like(weight))
    return sae


def reread(directory: Path) -> Any:
    sae_lens = pytest.importorskip("sae_lens")
    return sae_lens.SAE.load_from_disk(str(directory))


@pytest.mark.parametrize("case", CASES)
def test_read_what_sae_lens_writes(case: str, x: torch.Tensor, tmp_path: Path) -> None:
    arch, settings = CASES[case]
    original = theirs(arch, **settings)
    original.save_model(tmp_path)
    sae = load(tmp_path)
    assert (sae.arch, sae.d_in, sae.d_sae) == (arch, D_IN, D_SAE)
    assert sae.site == Site("resid_post", 1)
    assert sae.metadata["model_name"] == "tiny-llama"
    z = original.encode(x)
    assert 0 < int((z != 0).sum()) < z.numel() or settings.get("k") == D_SAE
    assert torch.equal(sae.encode(x), z)
    assert torch.equal(sae(x), original(x))
    assert torch.equal(sae.decode(sae.encode(x), x), original(x))


@pytest.mark.parametrize("case", CASES)
def test_sae_lens_reads_what_we_write(case: str, x: torch.Tensor, tmp_path: Path) -> None:
    arch, settings = CASES[case]
    dtype = getattr(torch, settings.get("dtype", "float32"))
    ours = SAE(
        0.3 * torch.randn(D_IN, D_SAE, dtype=dtype),
        torch.randn(D_SAE, dtype=dtype),
        torch.randn(D_SAE, D_IN, dtype=dtype),
        torch.randn(D_IN, dtype=dtype),
        arch,
        threshold=torch.rand(D_SAE, dtype=dtype) if arch == "jumprelu" else None,
        metadata=METADATA,
        **{k: v for k, v in settings.items() if k != "dtype"},
    )
    save(ours, tmp_path / "sae")
    again = reread(tmp_path / "sae")
    assert again.cfg.architecture() == arch
    assert again.cfg.metadata.hook_name == METADATA["hook_name"]
    assert again.cfg.metadata.context_size == 16
    assert torch.equal(again.encode(x), ours.encode(x))
    assert torch.equal(again(x), ours(x))


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same_directory(case: str, tmp_path: Path) -> None:
    arch, settings = CASES[case]
    theirs(arch, **settings).save_model(tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    before, after = (load_file(tmp_path / d / "sae_weights.safetensors") for d in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((tmp_path / d / "cfg.json").read_text()) for d in "ab")
    assert before == after


@pytest.mark.parametrize("rescale", [False, True])
def test_batchtopk_is_jumprelu_once_trained(rescale: bool, x: torch.Tensor, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, rescale_acts_by_decoder_norm=rescale)
    training = sae_lens.BatchTopKTrainingSAE(config)
    with torch.no_grad():
        training.W_enc.normal_()
        training.W_dec.mul_(10 * torch.rand(D_SAE, 1) + 5)
        training.topk_threshold.fill_(0.7)
    training.save_inference_model(tmp_path / "sae")
    sae = load(tmp_path / "sae")
    assert sae.arch == "jumprelu"
    assert sae.threshold is not None
    assert torch.allclose(sae.threshold, torch.tensor(0.7))
    again = reread(tmp_path / "sae")
    z = sae.encode(x)
    assert torch.equal(z, again.encode(x))
    assert float(z[z > 0].min()) > 0.7
    save(sae, tmp_path / "again")
    assert torch.equal(reread(tmp_path / "again").encode(x), z)
    training.save_model(tmp_path / "checkpoint")
    with pytest.raises(SAEError, match=r"'batchtopk' is not supported.*save_inference_model"):
        load(tmp_path / "checkpoint")


def test_heads_are_encoded_flat(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    original = StandardSAE(
        StandardSAEConfig(
            d_in=D_IN, d_sae=D_SAE, reshape_activations="hook_z", metadata=SAEMetadata(hook_name="blocks.2.attn.hook_z")
        )
    )
    with torch.no_grad():
        original.b_enc.normal_()
    original.save_model(tmp_path)
    sae, z = load(tmp_path), torch.randn(2, 5, 4, 8)
    assert sae.site == Site("z", 2)
    assert torch.equal(sae.encode(z), original.encode(z))
    assert sae(z).shape == z.shape
    assert torch.equal(sae(z), original(z))


OLD = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "hook_point": "blocks.1.hook_resid_pre",
    "hook_point_layer": 1,
    "model_name": "gpt2-small",
    "context_size": 128,
    "normalize_activations": False,
    "activation_fn_str": "relu",
}


@pytest.mark.parametrize(
    ("changes", "arch"),
    [
        ({}, "standard"),
        (
            {"architecture": "standard", "apply_b_dec_to_input": False, "normalize_activations": "layer_norm"},
            "standard",
        ),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}, "topk"),
    ],
)
def test_directories_from_before_version_6(changes: dict[str, Any], arch: str, x: torch.Tensor, tmp_path: Path) -> None:
    weights = {
        "W_enc": torch.randn(D_IN, D_SAE),
        "b_enc": torch.randn(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.randn(D_IN),
    }
    save_file(weights | {"scaling_factor": torch.ones(D_SAE)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(OLD | changes))
    sae, their = load(tmp_path), reread(tmp_path)
    assert sae.arch == arch == their.cfg.architecture()
    assert sae.site == Site("resid_pre", 1)
    assert torch.equal(sae.encode(x), their.encode(x))
    assert torch.equal(sae(x), their(x))


# -- what is refused, by name -----------------------------------------------------------------------------------------
def ours(**changes: Any) -> SAE:
    weights = {
        "W_enc": torch.randn(D_IN, D_SAE),
        "b_enc": torch.zeros(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.zeros(D_IN),
    }
    return SAE(**{**weights, "metadata": METADATA, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gated"}, r"architecture 'gated' is not supported; supported are standard, topk, jumprelu"),
        ({"architecture": "transcoder"}, r"architecture 'transcoder'"),
        (
            {"normalize_activations": "expected_average_only_in"},
            r"expected_average_only_in.*fold_activation_norm_scaling_factor",
        ),
        ({"normalize_activations": "covariance_whitening"}, r"covariance_whitening.*fold_activation_whitening"),
        ({"normalize_activations": "softmax"}, r"normalize_activations='softmax': expected one of none, layer_norm"),
        ({"reshape_activations": "hook_q"}, r"reshape_activations='hook_q'"),
        ({"architecture": "topk"}, r"k=None"),
        ({"architecture": "jumprelu"}, r"a jumprelu SAE has the tensors .*threshold"),
        ({"dtype": "int8"}, r"dtype 'int8'"),
    ],
)
def test_unsupported_settings(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save(ours(), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | changes))
    with pytest.raises(SAEError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("changes", [{"activation_fn_str": "tanh-relu"}, {"finetuning_scaling_factor": True}])
def test_unsupported_old_settings(changes: dict[str, Any], tmp_path: Path) -> None:
    save(ours(), tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(OLD | changes))
    with pytest.raises(SAEError, match=r"not supported"):
        load(tmp_path)


def test_damaged_directories(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match=r"no SAE directory: it has no cfg\.json"):
        load(tmp_path / "nowhere")
    save(ours(), tmp_path / "a")
    weights = tmp_path / "a" / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SAEError, match=r"damaged"):
        load(tmp_path / "a")
    weights.unlink()
    with pytest.raises(SAEError, match=r"it has no sae_weights\.safetensors"):
        load(tmp_path / "a")
    weights.write_bytes(whole)
    for text in ("{", "[]"):
        (tmp_path / "a" / "cfg.json").write_text(text)
        with pytest.raises(SAEError, match=r"damaged"):
            load(tmp_path / "a")


def test_extra_tensors_are_not_ignored(tmp_path: Path) -> None:
    save(ours(), tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"r_mag": torch.zeros(D_SAE)}, file)
    with pytest.raises(SAEError, match=r"here are .*r_mag"):
        load(tmp_path)
    save_file(tensors | {"scaling_factor": torch.full((D_SAE,), 2.0)}, file)
    with pytest.raises(SAEError, match=r"scaling factors are not supported"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"W_dec": torch.zeros(D_IN, D_SAE)}, rf"W_dec: expected \[{D_SAE}, {D_IN}\]"),
        ({"b_enc": torch.zeros(3)}, rf"b_enc: expected \[{D_SAE}\].*got \[3\]"),
        ({"arch": "jumprelu"}, rf"threshold: expected \[{D_SAE}\].*got None"),
        ({"arch": "topk", "k": D_SAE + 1}, rf"k={D_SAE + 1}"),
        ({"arch": "batchtopk"}, r"'batchtopk' is not supported"),
    ],
)
def test_wrong_parts(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SAEError, match=words):
        ours(**changes)


def test_wrong_activations() -> None:
    with pytest.raises(SAEError, match=rf"\[2, 5\]: this SAE takes d_in={D_IN}"):
        ours().encode(torch.zeros(2, 5))
    sae = ours(normalize_activations="layer_norm")
    with pytest.raises(SAEError, match=r"decode\(z, x\)"):
        sae.decode(torch.zeros(2, D_SAE))


def test_metadata_that_is_no_json_leaves_the_old_files(tmp_path: Path) -> None:
    save(ours(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        save(ours(metadata={"when": object()}), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# -- places ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hook_name", "site"),
    [
        ("model.layers.15", "resid_post[15]"),
        ("transformer.h.3", "resid_post[3]"),
        ("gpt_neox.layers.0", "resid_post[0]"),
        ("blocks.15.hook_resid_post", "resid_post[15]"),
        ("blocks.2.hook_mlp_out", "mlp_out[2]"),
        ("blocks.7.attn.hook_z", "z[7]"),
        ("blocks.4.mlp.hook_post", "mlp_hidden[4]"),
        ("expert_hidden[3]", "expert_hidden[3]"),
        ("hook_embed", "embed"),
    ],
)
def test_names_to_sites(hook_name: str, site: str) -> None:
    assert to_site(hook_name) == Site.parse(site)
    if hook_name.startswith(("blocks", "hook_")):
        assert to_hook_name(site) == hook_name


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe", "olmo2"])
def test_module_names_go_through_the_model(family: str) -> None:
    """Whatever is a module's output has a name there and back, and the module's output is what we capture."""
    m = interp.Model(tiny(family), name=family)
    there = {f"{name}[{layer}]" for name, layer in m.anatomy.places if name in ("resid_post", "attn_out", "mlp_out")}
    assert len(there) == 9
    ids = torch.tensor([[5, 6, 7, 8]])
    for name in sorted(there):
        hook_name = to_hook_name(name, m)
        assert to_site(hook_name, m) == Site.parse(name)
        seen: list[Any] = []
        handle = m.hf.get_submodule(hook_name).register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
        acts = m.capture(ids, name, logits=True)
        handle.remove()
        out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        assert torch.equal(out.reshape(acts[name].shape), acts[name])


def test_names_that_mean_nothing_here() -> None:
    m = interp.Model(tiny("llama"), name="llama")
    with pytest.raises(SiteError, match=r"pass the model"):
        to_site("model.layers.1.mlp")
    assert to_site("model.layers.1.mlp", m) == Site("mlp_out", 1)
    with pytest.raises(SiteError, match=r"no site of llama"):
        to_site("model.layers.1.mlp.gate_proj", m)
    with pytest.raises(SiteError, match=r"outputs of modules.*input of model\.layers\.1\.mlp\.down_proj"):
        to_hook_name("mlp_hidden[1]", m)
    with pytest.raises(SiteError, match=r"SAELens has no name"):
        to_hook_name("expert_out[1]")


def test_head_index_and_module_name_in_the_metadata() -> None:
    assert ours(metadata={}).site is None
    assert ours(metadata={"hf_hook_name": "model.layers.2"}).site == Site("resid_post", 2)
    assert ours(metadata={"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 3}).site == Site.parse("z[1, head=3]")


# -- in use ------------------------------------------------------------------------------------------------------------
def test_on_a_model_it_edits_what_it_encodes(tmp_path: Path) -> None:
    """Orthonormal directions and their negatives reconstruct exactly, so splicing them in changes nothing."""
    basis = torch.linalg.qr(torch.randn(D_IN, D_IN))[0]
    rows = torch.cat([basis, -basis])
    save(SAE(rows.T.contiguous(), torch.zeros(2 * D_IN), rows, torch.randn(D_IN), metadata=METADATA), tmp_path)
    sae, m = load(tmp_path), interp.Model(tiny("llama"))
    ids = torch.tensor([[5, 6, 7, 8]])
    acts = m.capture(ids, str(sae.site), logits=True)
    with m.intervene(edits.replace(str(sae.site), sae(acts[sae.site]))):
        assert torch.allclose(m(ids), acts.logits, atol=1e-4)
    assert int((sae.encode(acts[sae.site]) > 0).sum()) == acts[sae.site].numel()
    half = dataclasses.replace(sae, W_dec=sae.W_dec * 0.5)
    with m.intervene(edits.replace(str(sae.site), half(acts[sae.site]))):
        assert not torch.allclose(m(ids), acts.logits, atol=1e-2)


def test_moving() -> None:
    sae = ours(arch="jumprelu", threshold=torch.rand(D_SAE)).to(torch.float64)
    assert {sae.W_enc.dtype, sae.threshold.dtype, sae.encode(torch.randn(2, D_IN)).dtype} == {torch.float64}
    assert sae.metadata == METADATA


def test_reading_and_writing_need_no_sae_lens(tmp_path: Path) -> None:
    save(ours(), tmp_path)
    code = (
        "import sys; from interp.bridges.sae_lens import load, save;"
        f"save(load({str(tmp_path)!r}), {str(tmp_path / 'b')!r});"
        "print([m for m in ('sae_lens', 'transformer_lens', 'nnsight', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
