"""`interp.load`: every kind of source opens, and everything that should not is refused in words that help."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.zoo import load as zoo
from interp.zoo.errors import LoadError
from interp.zoo.load import resolve

IDS = torch.arange(12).reshape(2, 6)


def edit_config(path: Path, **changes) -> Path:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


def edit_weights(path: Path, change) -> Path:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def logits(hf) -> torch.Tensor:
    with torch.no_grad():
        return hf(IDS).logits


# what opens


def test_directory_opens_as_transformers_opens_it(checkpoint):
    from transformers import AutoModelForCausalLM

    found = resolve(checkpoint)
    assert torch.equal(logits(found.hf), logits(AutoModelForCausalLM.from_pretrained(checkpoint)))
    assert found.name == "little-llama"
    assert found.tokenizer is None  # there is none, and none is invented
    assert found.card["source"] == "directory"
    assert not found.hf.training


def test_text_and_path_are_the_same_source(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    by_text = resolve("little-llama")
    assert torch.equal(logits(by_text.hf), logits(resolve(Path("little-llama")).hf))


def test_gguf_opens_with_its_tokenizer(gguf_file):
    found = resolve(str(gguf_file))
    assert found.name == "little.Q4_1"
    assert found.card["weights"] == "dequantised from little.Q4_1.gguf"
    assert found.tokenizer.decode(found.tokenizer("the cat").input_ids) == "the cat"
    assert logits(found.hf).isfinite().all()


def test_gguf_is_dequantised_as_its_format_says(gguf_file):
    """Q4_1: blocks of 32 weights, each w = scale * q + minimum, q in 0..15 (here unpacked by hand)."""
    import gguf
    import numpy as np

    tensor = next(t for t in gguf.GGUFReader(gguf_file).tensors if t.name == "blk.1.ffn_down.weight")
    blocks = np.asarray(tensor.data).reshape(-1, 20)
    scale, minimum = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    by_hand = (scale * quants + minimum).reshape(64, 96)
    assert np.array_equal(
        resolve(gguf_file).hf.model.layers[1].mlp.down_proj.weight.detach().numpy(), by_hand
    )


def test_loaded_model_is_taken_as_it_is(checkpoint):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    tokenizer = object()
    found = resolve(hf, tokenizer)
    assert found.hf is hf
    assert found.tokenizer is tokenizer
    assert found.name == "little-llama"
    assert hf.dtype == torch.bfloat16  # the default dtype is for weights read from disk


def test_tiny_family_opens(monkeypatch):
    found = resolve("tiny:olmoe")
    assert found.hf.config.model_type == "olmoe"
    assert found.name == "tiny:olmoe"
    assert found.card["weights"] == "random"


def test_project_checkpoint_is_a_zoo_name(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "little-mini")
    monkeypatch.setattr(zoo, "trained_dir", lambda: tmp_path)
    assert zoo.names() == ["little-mini", "smollm2"]
    assert resolve("little-mini").card["source"] == "zoo"


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        (None, torch.float32),
        ("bf16", torch.bfloat16),
        ("auto", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_is_float32_unless_said_and_recorded(copy, asked, got):
    edit_weights(copy, lambda w: w.update({k: v.half() for k, v in w.items()}))
    edit_config(copy, dtype="float16")
    found = resolve(copy, dtype=asked)
    assert {p.dtype for p in found.hf.parameters()} == {got}
    assert f"torch.{found.card['dtype']}" == str(got)


def test_tokenizer_from_elsewhere(checkpoint, gguf_file, tmp_path):
    resolve(gguf_file).tokenizer.save_pretrained(tmp_path)
    found = resolve(checkpoint, str(tmp_path))
    assert found.tokenizer("the").input_ids
    with pytest.raises(LoadError, match="no tokenizer files in"):
        resolve(checkpoint, str(checkpoint))


def test_bridge_is_told_by_its_class_name(monkeypatch):
    """Without importing transformer_lens: a class of that name and module, and a subclass of it."""
    base = type("TransformerBridge", (), {"__module__": "transformer_lens.model_bridge.bridge"})
    child = type("MyBridge", (base,), {"__module__": "notebook"})
    other = type("TransformerBridge", (), {"__module__": "somewhere_else"})
    assert zoo._is_bridge(base())
    assert zoo._is_bridge(child())
    assert not zoo._is_bridge(other())
    hooked = type("HookedTransformer", (), {"__module__": "transformer_lens.HookedTransformer"})
    with pytest.raises(LoadError, match="pass a TransformerBridge"):
        zoo._is_bridge(hooked())


# what does not exist


def test_misspelt_zoo_name_gets_a_suggestion():
    with pytest.raises(LoadError, match=r"did you mean smollm2\?"):
        resolve("smolm2")


def test_unknown_word_lists_the_zoo_and_what_was_tried():
    with pytest.raises(LoadError, match=r"zoo names are .*smollm2.*hub cannot be asked: offline mode"):
        resolve("xyzzy")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c", "model.gguf"])
def test_path_that_is_not_there(path):
    with pytest.raises(LoadError, match=r"no such file or directory"):
        resolve(path)


def test_text_that_can_be_nothing():
    with pytest.raises(LoadError, match="no zoo name, no path and no hub id"):
        resolve("not a name")


def test_unknown_family_is_a_load_error():
    with pytest.raises(LoadError, match="lama"):
        resolve("tiny:lamma")


@pytest.mark.parametrize("thing", [3, torch.nn.Linear(2, 2), None])
def test_object_that_is_no_model(thing):
    with pytest.raises(LoadError, match="is no source; expected a name, a path"):
        resolve(thing)


@pytest.mark.parametrize("wrong", ["float8", "int8", torch.int64, 32])
def test_unknown_dtype(checkpoint, wrong):
    with pytest.raises(LoadError, match=r"dtype=.*expected auto"):
        resolve(checkpoint, dtype=wrong)


def test_unknown_device(checkpoint):
    with pytest.raises(LoadError, match="device='gpu'"):
        resolve(checkpoint, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(LoadError, match="sees no CUDA device; use device='cpu'"):
            resolve(checkpoint, device="cuda")


# what is not whole


def test_empty_directory(tmp_path):
    with pytest.raises(LoadError, match=r"empty directory; expected config\.json"):
        resolve(tmp_path)


def test_directory_without_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(LoadError, match=r"no config\.json"):
        resolve(copy)


def test_config_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"config\.json but no weights"):
        resolve(copy)


def test_directory_that_holds_a_gguf(gguf_file):
    with pytest.raises(LoadError, match=r"pass the file itself, .*little\.Q4_1\.gguf"):
        resolve(gguf_file.parent)


def test_missing_tensors_are_an_error_not_random_numbers(copy):
    edit_weights(copy, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        LoadError, match=r"1 tensors of LlamaForCausalLM .* first model\.layers\.1\.mlp\.up_proj"
    ):
        resolve(copy)


def test_renamed_tensors_are_named(copy):
    edit_weights(copy, lambda w: w.update({"mdl.norm.weight": w.pop("model.norm.weight")}))
    with pytest.raises(LoadError, match=r"names that the model lacks, first mdl\.norm\.weight"):
        resolve(copy)


def test_misshapen_tensors_are_named_with_both_shapes(copy):
    edit_weights(copy, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 32)}))
    with pytest.raises(LoadError, match=r"up_proj\.weight: \(3, 32\) in the file, \(48, 32\) expected"):
        resolve(copy)


def test_truncated_weights(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(LoadError, match="the model cannot be opened"):
        resolve(copy)


def test_missing_shard(checkpoint, tmp_path):
    hf = resolve(checkpoint).hf
    hf.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(resolve(tmp_path).hf), logits(hf))
    shards[-1].unlink()
    with pytest.raises(LoadError, match="the model cannot be opened"):
        resolve(tmp_path)


def test_gguf_that_is_none(tmp_path, gguf_file):
    (tmp_path / "text.gguf").write_text("no weights here")
    with pytest.raises(LoadError, match=r"not a GGUF file \(it starts with b'no w'"):
        resolve(tmp_path / "text.gguf")
    (tmp_path / "half.gguf").write_bytes(gguf_file.read_bytes()[:20_000])
    with pytest.raises(LoadError, match=r"half\.gguf: the model cannot be opened"):
        resolve(tmp_path / "half.gguf")


def test_other_file(checkpoint):
    with pytest.raises(LoadError, match=r"expected a \.gguf file or the directory"):
        resolve(checkpoint / "model.safetensors")


def test_config_that_is_no_json(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"config\.json: not valid JSON"):
        resolve(copy)


def test_unknown_architecture_and_no_language_model(copy):
    with pytest.raises(LoadError, match="grok9000"):
        resolve(edit_config(copy, model_type="grok9000"))
    with pytest.raises(LoadError, match="ViTConfig"):
        resolve(edit_config(copy, model_type="vit"))


def test_damaged_tokenizer_is_an_error(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match="the tokenizer cannot be opened"):
        resolve(copy)


# the hub, on this machine


def test_hub_id_opens_and_is_cached(hub, checkpoint):
    hub.add("someone/little", checkpoint)
    found = resolve("someone/little")
    assert torch.equal(logits(found.hf), logits(resolve(checkpoint).hf))
    assert found.name == "someone/little"
    assert found.card == {"source": "hub", "repo": "someone/little", "revision": "c" * 40, "dtype": "float32"}
    hub.asked.clear()
    resolve("someone/little")
    assert not [path for path in hub.asked if path.endswith("safetensors")]


def test_cached_hub_model_opens_without_network(hub, checkpoint, monkeypatch):
    hub.add("someone/little", checkpoint)
    resolve("someone/little")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    assert resolve("someone/little").name == "someone/little"
    assert not hub.asked
    with pytest.raises(LoadError, match="someone/other: not in the local Hugging Face cache"):
        resolve("someone/other")


def test_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LoadError, match=r"no answer from http://127\.0\.0\.1:9"):
        resolve("someone/little")


def test_hub_id_that_does_not_exist(hub):
    with pytest.raises(LoadError, match="someone/nothing: no such model at"):
        resolve("someone/nothing")


def test_hub_pickle_is_refused_before_it_is_downloaded(hub, copy, checkpoint):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    hub.add("someone/pickled", copy)
    with pytest.raises(LoadError, match=r"pytorch_model\.bin.*allow_pickle=True"):
        resolve("someone/pickled")
    assert not [path for path in hub.asked if path.endswith(".bin")]
    allowed = resolve("someone/pickled", allow_pickle=True)
    assert torch.equal(logits(allowed.hf), logits(resolve(checkpoint).hf))


def test_hub_code_is_refused_before_weights_and_code_are_downloaded(hub, own_code):
    hub.add("someone/custom", own_code)
    with pytest.raises(LoadError, match="trust_remote_code=True"):
        resolve("someone/custom")
    assert not [path for path in hub.asked if path.endswith((".py", ".safetensors"))]


def test_tokenizer_from_the_hub(hub, checkpoint, gguf_file, tmp_path):
    resolve(gguf_file).tokenizer.save_pretrained(tmp_path / "tok")
    hub.add("someone/tok", tmp_path / "tok")
    assert resolve(checkpoint, "someone/tok").tokenizer("the").input_ids


# the whole way, to a Model


def test_load_gives_a_model_with_its_card(checkpoint):
    import interp

    model = interp.load(checkpoint)
    assert isinstance(model, interp.Model)
    assert model.name == "little-llama"
    assert model.card["source"] == "directory"
    assert model.tokenizer is None
    assert interp.load(model) is model
    with pytest.raises(LoadError, match=r"already an interp\.Model"):
        interp.load(model, dtype="bfloat16")


def test_bridge_goes_to_its_own_module(monkeypatch):
    import interp

    bridge = type("TransformerBridge", (), {"__module__": "transformer_lens.model_bridge"})()
    module = types.ModuleType("interp.bridges.transformer_lens")
    module.from_bridge = lambda given, tokenizer: ("bridged", given, tokenizer)
    monkeypatch.setitem(sys.modules, "interp.bridges", types.ModuleType("interp.bridges"))
    monkeypatch.setitem(sys.modules, "interp.bridges.transformer_lens", module)
    assert interp.load(bridge, "its tokenizer") == ("bridged", bridge, "its tokenizer")
    with pytest.raises(LoadError, match="boot it with the dtype and device"):
        interp.load(bridge, dtype="bfloat16")
