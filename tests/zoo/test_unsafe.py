"""Files that could run code when opened: refused, and opened without running any of it only when that is asked for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interp.zoo.errors import LoadError
from interp.zoo.load import resolve

IDS = torch.arange(12).reshape(2, 6)


def logits(hf) -> torch.Tensor:
    with torch.no_grad():
        return hf(IDS).logits


class Explosive:
    """What a pickle can do: run anything at all when opened."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickle_is_refused_then_allowed(copy, checkpoint):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="allow_pickle=True"):
        resolve(copy)
    assert torch.equal(logits(resolve(copy, allow_pickle=True).hf), logits(resolve(checkpoint).hf))


def test_allowed_pickle_still_runs_no_code(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**load_file(copy / "model.safetensors"), "x": Explosive()}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="UnpicklingError"):
        resolve(copy, allow_pickle=True)
    assert not Path("exploded").exists()
    pickle.loads(pickle.dumps(Explosive()))  # noqa: S301 -- the proof that the file would have
    assert Path("exploded").exists()


def test_pickle_beside_safetensors_is_ignored(copy, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Explosive()}, copy / "pytorch_model.bin")
    assert torch.equal(logits(resolve(copy).hf), logits(resolve(checkpoint).hf))
    assert not Path("exploded").exists()


def test_pickle_of_another_name_says_which_is_looked_for(copy):
    (copy / "model.safetensors").rename(copy / "consolidated.00.pth")
    with pytest.raises(LoadError, match=r"rename it to pytorch_model\.bin"):
        resolve(copy, allow_pickle=True)


def test_own_code_is_refused_then_run_only_when_asked(own_code, tmp_path, monkeypatch, checkpoint):
    import builtins

    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(builtins, "interp_test_ran", False, raising=False)
    with pytest.raises(LoadError, match=r"auto_map: custom\.Config, custom\.Custom.*trust_remote_code=True"):
        resolve(own_code)
    native = resolve(own_code, trust_remote_code="native")
    assert type(native.hf).__name__ == "LlamaForCausalLM"
    assert builtins.interp_test_ran is False  # neither of the two has run a line of it
    trusted = resolve(own_code, trust_remote_code=True)
    assert builtins.interp_test_ran is True
    assert type(trusted.hf).__name__ == "Custom"
    assert torch.equal(logits(trusted.hf), logits(native.hf))


def test_tokenizer_with_own_code_is_refused(copy):
    (copy / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok.T", None]}}))
    with pytest.raises(LoadError, match=r"tokenizer_config\.json names Python code"):
        resolve(copy)


def test_odd_answer_to_trust_is_refused(checkpoint):
    with pytest.raises(LoadError, match=r'expected False, True or "native"'):
        resolve(checkpoint, trust_remote_code="yes")
