"""The identities of `interp.conformance` on Monet, both ways to share parts, with and without experts switched off."""

from __future__ import annotations

import pytest
import torch

from interp import conformance
from interp.hooks.anatomy import Place
from interp.model import Model
from interp.monet import MonetConfig, MonetForCausalLM, MonetMask

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
EXPERTS = {"moe_experts": 6, "moe_dim": 4, "moe_heads": 3, "moe_topk": 2, "moe_groups": 2}


def build(decompose: str) -> Model:
    torch.manual_seed(0)
    config = MonetConfig(**SIZES, **EXPERTS, num_key_value_heads=2, initializer_range=0.2, moe_decompose=decompose)
    hf = MonetForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in hf.named_parameters():
            if name.endswith((".b", ".b1", ".b2", ".bias")):
                tensor.normal_(std=0.3)
    return Model(hf, name=decompose)


def failed(m: Model) -> set[str]:
    return {f.check for f in conformance.check(m) if not f.ok}


@pytest.mark.parametrize("mask", ["none", "pairs", "rows and columns"])
@pytest.mark.parametrize("decompose", ["horizontal", "vertical"])
def test_every_identity_holds(decompose: str, mask: str) -> None:
    torch.set_num_threads(1)
    m = build(decompose)
    if mask == "pairs":
        generator = torch.Generator().manual_seed(1)
        keep = {la: torch.rand(6, 6, generator=generator) < 0.7 for la in (0, 2)}
        m.hf.set_expert_mask(MonetMask.from_keep(m.hf, keep))
    elif mask != "none":
        m.hf.set_expert_mask(MonetMask.full_rows(m.hf, {1: [0, 3]}) | MonetMask.full_cols(m.hf, {2: [1]}))
    findings = conformance.check(m)
    assert [f for f in findings if not f.ok] == []
    assert {"factors", "parts", "gradient", "cache", "padding", "restored"} <= {f.check for f in findings}
    assert not set(conformance.WHOLE["factored"]) - {name for name, _ in m.anatomy.places}


def test_a_layer_whose_experts_are_all_off_still_passes() -> None:
    m = build("vertical")
    m.hf.set_expert_mask(~MonetMask.from_ids(m.hf, {0: range(36), 1: range(36)}))  # every expert of the last layer
    assert failed(m) == set()


def test_a_factor_read_in_the_place_of_the_other_is_noticed() -> None:
    m = build("horizontal")
    one, two = m.anatomy.places["g1", 1], m.anatomy.places["g2", 1]
    m.anatomy.places["g1", 1], m.anatomy.places["g2", 1] = two, one
    assert "factors" in failed(m)


def test_neurons_of_the_other_axis_are_noticed() -> None:
    m = build("vertical")
    for name, act in (("z1", "act2"), ("z2", "act1")):
        place = m.anatomy.places[name, 2]
        m.anatomy.places[name, 2] = Place("grouped", getattr(place.other, act), groups=6, other=place.other)
    assert "parts" in failed(m)


def test_heads_and_keys_in_the_wrong_order_are_noticed() -> None:
    m = build("horizontal")
    place = m.anatomy.places["key_logits1", 2]
    m.anatomy.places["key_logits1", 2] = Place("grouped", place.module, groups=6)
    assert "factors" in failed(m)
