"""Masks as objects and as part of a model: making, combining, keeping, refusing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.monet import MaskError, MonetConfig, MonetForCausalLM, MonetMask, masked

from .conftest import SIZES

CONFIG = MonetConfig(**SIZES)


def test_the_ways_of_naming_the_same_experts_agree() -> None:
    pairs = MonetMask.from_pairs(CONFIG, {1: [(2, 5), (0, 3)]})
    keep = torch.ones(6, 6, dtype=torch.bool)
    keep[2, 5] = keep[0, 3] = False
    assert pairs == MonetMask.from_ids(CONFIG, {1: [2 * 6 + 5, 3]}) == MonetMask.from_keep(CONFIG, {1: keep})
    assert pairs.ids(1).tolist() == [3, 17]
    assert pairs.pairs(1).tolist() == [[0, 3], [2, 5]]
    assert (1, 2, 5) in pairs
    assert (1, 5, 2) not in pairs
    assert (0, 2, 5) not in pairs
    assert len(pairs) == 2
    assert repr(pairs) == "MonetMask(2 of 144 experts off, in layers [1])"
    assert len(MonetMask.full_rows(CONFIG, {0: [1, 4]})) == 12
    assert MonetMask.full_cols(CONFIG, {0: [5]}).pairs(0).tolist() == [[i, 5] for i in range(6)]


def test_a_group_is_its_layers() -> None:
    by_layer = MonetMask.from_ids(CONFIG, {2: [7], 3: [7]})
    assert MonetMask.from_ids(CONFIG, {1: [7]}, by="group") == by_layer


def test_set_algebra_is_that_of_sets() -> None:
    def as_set(mask: MonetMask) -> set[tuple[int, int]]:
        return {(layer, expert) for layer in range(4) for expert in mask.ids(layer).tolist()}

    a = MonetMask.from_keep(CONFIG, {la: torch.rand(6, 6) > 0.3 for la in (0, 1)})
    b = MonetMask.from_keep(CONFIG, {la: torch.rand(6, 6) > 0.3 for la in (1, 3)})
    every = {(layer, expert) for layer in range(4) for expert in range(36)}
    assert as_set(a | b) == as_set(a) | as_set(b)
    assert as_set(a & b) == as_set(a) & as_set(b)
    assert as_set(a - b) == as_set(a) - as_set(b)
    assert as_set(~a) == every - as_set(a)
    assert not (a & ~a)
    assert (a | b) - b == a - b
    assert len(a) == len(as_set(a))


def test_a_mask_file_round_trips(tmp_path: Path) -> None:
    mask = MonetMask.from_ids(CONFIG, {0: [1, 2, 35], 3: [0]})
    mask.save(tmp_path / "mask.safetensors")
    assert MonetMask.load(tmp_path / "mask.safetensors") == mask
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MaskError, match=r"other\.safetensors"):
        MonetMask.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(("make", "says"), [
    (lambda: MonetMask.from_ids(CONFIG, {4: [0]}), "layer 4: the model has layers 0..3"),
    (lambda: MonetMask.from_ids(CONFIG, {2: [0]}, by="group"), "group 2: the model has groups 0..1"),
    (lambda: MonetMask.from_ids(CONFIG, {0: [36]}), "expert id 36: the model has experts 0..35"),
    (lambda: MonetMask.from_ids(CONFIG, {0: [-1]}), "expert id -1"),
    (lambda: MonetMask.from_ids(CONFIG, {0: [1.5]}), "whole numbers"),
    (lambda: MonetMask.from_pairs(CONFIG, {0: [(0, 6)]}), "key 6: the model has keys 0..5"),
    (lambda: MonetMask.from_pairs(CONFIG, {0: torch.zeros(2, 3, dtype=torch.long)}), r"expected \[expert, 2\]"),
    (lambda: MonetMask.full_cols(CONFIG, {0: [9]}), "column 9"),
    (lambda: MonetMask.from_keep(CONFIG, {0: torch.ones(5, 5) > 0}), r"\(5, 5\) of bool; expected \(6, 6\)"),
    (lambda: MonetMask.from_keep(CONFIG, {0: torch.ones(6, 6)}), "of float32; expected"),
    (lambda: MonetMask.none(CONFIG) | MonetMask(5, 4, {}), "masks of different models"),
    (lambda: MonetMask.none(object()), "expected a Monet model"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(MaskError, match=says):
        make()


def test_masked_restores_also_after_an_error_and_nests(model: MonetForCausalLM, ids: Tensor) -> None:
    a, b = MonetMask.from_ids(model, {0: [3, 4]}), MonetMask.full_rows(model, {1: [2]})
    plain = model(ids).logits
    with masked(model, a):
        only_a = model(ids).logits
        with masked(model, b):
            assert model.expert_mask == a | b
        assert torch.equal(model(ids).logits, only_a)
    assert not torch.equal(only_a, plain)
    with pytest.raises(ZeroDivisionError), masked(model, b):
        _ = 1 / 0
    assert torch.equal(model(ids).logits, plain)
    assert model.config.moe_masked_layers is None
    assert not any("keep" in name for name in model.state_dict())


def test_switching_experts_off_one_set_after_another_is_switching_off_their_union(
    model: MonetForCausalLM, ids: Tensor
) -> None:
    keep = {la: torch.rand(6, 6) > 0.4 for la in range(4)}
    mask = MonetMask.from_keep(model, keep)
    model.set_expert_mask(mask)
    whole = model(ids).logits
    model.set_expert_mask(MonetMask.from_keep(model, {la: keep[la] for la in (0, 2)}))
    with masked(model, MonetMask.from_keep(model, {la: keep[la] for la in (1, 3)})):
        assert torch.equal(model(ids).logits, whole)


def test_a_mask_of_another_model_is_refused(model: MonetForCausalLM) -> None:
    other = MonetMask.none(MonetConfig(**SIZES | {"moe_experts": 5}))
    with pytest.raises(MaskError, match="5 x 5 experts; the model has 4 of 6 x 6"):
        model.set_expert_mask(other)


def test_a_mask_travels_in_the_checkpoint(model: MonetForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    mask = MonetMask.from_keep(model, {1: torch.rand(6, 6) > 0.3, 2: torch.rand(6, 6) > 0.3})
    plain = model(ids).logits
    model.set_expert_mask(mask)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = MonetForCausalLM.from_pretrained(tmp_path).eval()
    assert again.expert_mask == mask
    assert torch.equal(again(ids).logits, expected)
    assert torch.equal(copy.deepcopy(again)(ids).logits, expected)
    again.clear_expert_mask()
    assert torch.equal(again(ids).logits, plain)
    again.save_pretrained(tmp_path)
    assert not MonetForCausalLM.from_pretrained(tmp_path).expert_mask


def test_a_checkpoint_whose_mask_is_wrong_or_missing_or_unannounced_is_refused(
    model: MonetForCausalLM, tmp_path: Path
) -> None:
    model.set_expert_mask(MonetMask.from_ids(model, {1: [4]}))
    model.save_pretrained(tmp_path)
    tensors, key = load_file(tmp_path / "model.safetensors"), "model.layers.1.moe.keep"

    def load_with(**changes: Tensor) -> None:
        kept = {name: t for name, t in (tensors | changes).items() if t.numel()}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        MonetForCausalLM.from_pretrained(tmp_path)

    load_with()
    with pytest.raises(MaskError, match=r"layers\.1\.moe\.keep has shape \(5, 5\)"):
        load_with(**{key: torch.ones(5, 5, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"layers\.1\.moe\.keep"):
        load_with(**{key: torch.ones(0)})
    with pytest.raises(MaskError, match="does not list its layer"):
        load_with(**{"model.layers.3.moe.keep": torch.ones(6, 6, dtype=torch.bool)})
