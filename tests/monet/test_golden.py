"""The official implementation's numbers (random weights, both decompositions). Skips where they are not at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import interp.monet  # noqa: F401  (makes the Auto classes know "monet")
from interp.monet import MonetForCausalLM, MonetMask, masked


@pytest.fixture
def golden(shared: Callable[[str], Path], decompose: str) -> tuple[MonetForCausalLM, dict[str, Tensor]]:
    tensors = load_file(shared(f"golden/monet/{decompose}/golden.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(shared(f"golden/monet/{decompose}/pretrained"))
    assert isinstance(model, MonetForCausalLM)
    return model.eval(), tensors


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def run(model: MonetForCausalLM, tensors: dict[str, Tensor], **kw: Any) -> Any:
    with torch.no_grad():
        return model(tensors["input_ids"], output_hidden_states=True, output_router_probs=True, **kw)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_routing_and_hidden_states(golden: Any, attention: str) -> None:
    model, tensors = golden
    model.set_attn_implementation(attention)
    out = run(model, tensors)
    assert error(out.logits, tensors["logits"]) < 1e-5
    assert error(out.logits.double(), tensors["f64.logits"]) < 1e-5
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    for i, hidden in enumerate(out.hidden_states):
        assert error(hidden, tensors[f"hidden_states.{i}"]) < 1e-5
    routers = {int(key.split(".")[1]) for key in tensors if key.startswith("router.")}
    assert {layer for layer, probs in enumerate(out.router_probs) if probs is not None} == routers
    for layer in routers:
        for name, g in zip(("g1", "g2"), out.router_probs[layer], strict=True):
            assert error(g, tensors[f"router.{layer}.{name}"]) < 1e-6
            assert torch.equal(g > 0, tensors[f"router.{layer}.{name}"] > 0)


def test_masked_logits(golden: Any) -> None:
    model, tensors = golden
    plain = run(model, tensors).logits
    with masked(model, MonetMask.from_keep(model, dict(enumerate(tensors["mask"])), by="group")):
        out = run(model, tensors)
    assert error(out.logits, tensors["masked_logits"]) < 1e-5
    for i, hidden in enumerate(out.hidden_states):
        assert error(hidden, tensors[f"masked_hidden_states.{i}"]) < 1e-5
    assert error(out.logits, plain) > 0.1  # the mask does something
    assert torch.equal(run(model, tensors).logits, plain)


def test_every_tensor_is_loaded_and_saved_under_its_official_name(golden: Any, tmp_path: Path) -> None:
    model, tensors = golden
    official = {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == official.keys()
    assert all(torch.equal(saved[key], value) for key, value in official.items())
    again = MonetForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, tensors).logits, run(model, tensors).logits)
