"""What leaves is what was there: control vectors parsed by gguf itself, a hook file run without us, imports back."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import interp
import steering
from steering import SteeringError, SteeringMap, SteeringVector
from steering.export_gguf import from_gguf, to_gguf
from steering.export_hook import to_hook
from steering.importers import from_repeng, from_steering_vectors
from steering.maps import Affine, projection


@pytest.fixture
def m():
    return interp.load("tiny:llama")


def vectors(m, *sites: str, scope="all") -> SteeringVector:
    g = torch.Generator().manual_seed(11)
    return SteeringVector.of(m, {site: torch.randn(m.d_model, generator=g) for site in sites}, scope=scope)


def test_a_control_vector_is_what_llama_cpp_reads(m, tmp_path):
    from gguf import GGUFReader

    v = vectors(m, "resid_post[1]", "resid_post[2]") * 1.5
    reader = GGUFReader(str(to_gguf(m, v, tmp_path / "v.gguf")))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2"]
    for tensor in reader.tensors:
        assert tensor.data.dtype == np.float32
        assert tensor.data.shape == (m.d_model,)
        wanted = v.vectors[f"resid_post[{tensor.name.rpartition('.')[2]}]"]
        np.testing.assert_array_equal(tensor.data, wanted.numpy())
    back = from_gguf(m, tmp_path / "v.gguf")
    assert back.scope.text == "all"
    ids = [[5, 9, 3, 7]]
    with m.intervene(v):
        wanted = m(ids)
    with m.intervene(back):
        torch.testing.assert_close(m(ids), wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: vectors(m, "resid_post[0]"), "no slot for layer 0"),
        (lambda m: vectors(m, "mlp_out[1]"), "behind a block"),
        (lambda m: vectors(m, "resid_post[1]", scope="last | generated"), "scope"),
        (lambda m: vectors(m, "resid_post[1]").gated(lambda h, where: torch.ones(len(h))), "a gate"),
        (lambda m: SteeringMap.of(m, {"resid_post[1]": projection(torch.ones(32))}, scope="all"), "low_rank"),
    ],
)
def test_what_a_control_vector_cannot_say_is_refused(m, tmp_path, make, message):
    with pytest.raises(SteeringError, match=message):
        to_gguf(m, make(m), tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_other_gguf_files_are_refused(m, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing of that kind" * 10)
    with pytest.raises(SteeringError, match="no gguf file"):
        from_gguf(m, tmp_path / "x.gguf")
    with pytest.raises(SteeringError, match="no such file"):
        from_gguf(m, tmp_path / "y.gguf")
    path = to_gguf(m, vectors(m, "resid_post[1]"), tmp_path / "v.gguf")
    with pytest.raises(SteeringError, match="gpt2"):
        from_gguf(interp.load("tiny:gpt2"), path)
    wide = interp.load("tiny:llama", hidden_size=48)
    with pytest.raises(SteeringError, match="width"):
        from_gguf(wide, path)


SCRIPT = """
import sys, torch
from importlib.util import module_from_spec, spec_from_file_location
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({model!r}).eval()
ids, mask = torch.tensor({ids}), torch.tensor({mask})
out = {{}}
with torch.no_grad():
    plain = model(ids, attention_mask=mask).logits
    for scope, path in {paths}.items():
        spec = spec_from_file_location("steer", path)
        steer = module_from_spec(spec)
        spec.loader.exec_module(steer)
        with steer.attach(model, strength=1.5):
            out[f"{{scope}} forward"] = model(ids, attention_mask=mask).logits
            for cache in (True, False):
                out[f"{{scope}} {{cache}}"] = model.generate(
                    ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache,
                    pad_token_id=0)
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
assert "interp" not in sys.modules and "steering" not in sys.modules
torch.save(out, {out!r})
"""


def test_a_hook_file_steers_without_us(m, tmp_path):
    """In a process of its own, from another directory: same logits, same generation, cached or not, padded."""
    from interp.activations import Tokens

    g = torch.Generator().manual_seed(12)
    affine = Affine(torch.eye(32) + 0.1 * torch.randn(32, 32, generator=g), torch.randn(32, generator=g))
    scopes = ["all", "last | generated", "generated", "prompt", "last"]
    maps = {
        scope: vectors(m, "resid_post[1]", scope=scope).then(SteeringMap.of(m, {"attn_out[2]": affine}, scope=scope))
        for scope in scopes
    }
    paths = {scope: str(to_hook(m, v, tmp_path / f"kind{i}")) for i, (scope, v) in enumerate(maps.items())}
    m.hf.save_pretrained(tmp_path / "model")
    ids, mask = [[0, 0, 5, 9], [7, 4, 8, 3]], [[0, 0, 1, 1], [1, 1, 1, 1]]
    script = SCRIPT.format(ids=ids, mask=mask, paths=paths, model=str(tmp_path / "model"), out=str(tmp_path / "out"))
    (tmp_path / "run.py").write_text(script)
    done = subprocess.run([sys.executable, "-I", "run.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "out", weights_only=True)
    tokens, real = Tokens(torch.tensor(ids), torch.tensor(mask).bool()), torch.tensor(mask).bool()
    for scope, v in maps.items():
        with m.intervene(v * 1.5):
            wanted = m(tokens)
            made = m.generate(tokens, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
        torch.testing.assert_close(got[f"{scope} forward"][real], wanted[real], atol=1e-5, rtol=0)
        assert got[f"{scope} True"].tolist() == made.tokens.ids.tolist()
        assert got[f"{scope} False"].tolist() == made.tokens.ids.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: vectors(m, "resid_post[1]", scope="window(0, 3)"), "the file knows"),
        (lambda m: SteeringVector.of(m, {"z[1, head=0]": torch.ones(m.d_head)}), "whole output"),
        (lambda m: vectors(m, "resid_post[1]").gated(lambda h, where: torch.ones(len(h))), "a gate is code"),
        (lambda m: SteeringMap.of(m, {"resid_post[1]": steering.maps.PerToken(torch.ones(2, 32))}), "not affine"),
    ],
)
def test_what_a_hook_file_cannot_hold_is_refused(m, tmp_path, make, message):
    with pytest.raises(SteeringError, match=message):
        to_hook(m, make(m), tmp_path / "kind")
    assert list(tmp_path.iterdir()) == []


def test_names_from_outside_cannot_break_out_of_the_file(m, tmp_path):
    v = vectors(m, "resid_post[1]")
    object.__setattr__(v, "method", 'x"""\nimport os\n"""\\')
    text = to_hook(m, v, tmp_path / "kind").read_text()
    compile(text, "steer.py", "exec")
    assert not [line for line in text.splitlines() if line.strip() == "import os"]


def test_repengs_vectors_come_in(m):
    given = SimpleNamespace(model_type="llama", directions={1: np.ones(32, dtype=np.float16), 2: np.zeros(32)})
    v = from_repeng(m, given)
    assert v.sites == ["resid_post[1]", "resid_post[2]"]
    assert v.scope.text == "all"
    assert v.vectors["resid_post[1]"].tolist() == [1.0] * 32
    with pytest.raises(SteeringError, match="gpt2"):
        from_repeng(m, SimpleNamespace(model_type="gpt2", directions=given.directions))
    with pytest.raises(SteeringError, match="directions"):
        from_repeng(m, object())
    with pytest.raises(SteeringError, match="width"):
        from_repeng(m, SimpleNamespace(directions={1: np.ones(7)}))


def test_steering_vectors_come_in(m):
    given = SimpleNamespace(layer_type="mlp", layer_activations={1: torch.ones(32)})
    v = from_steering_vectors(m, given)
    assert v.sites == ["mlp_out[1]"]
    with pytest.raises(SteeringError, match="layer_type"):
        from_steering_vectors(m, SimpleNamespace(layer_type="lm_head", layer_activations={1: torch.ones(32)}))
    with pytest.raises(SteeringError, match="layer_activations"):
        from_steering_vectors(m, object())
