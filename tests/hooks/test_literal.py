"""Every site holds what a forward pass written out by hand has there, and an edit there does what it does by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import literal
import pytest
import torch
from torch import Tensor

from interp import edits
from interp.model import Model
from interp.sites import KINDS, Site
from interp.zoo.tiny import tiny

#: Tiny models whose clamps, caps and windows really bite at this size.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 20},
    "olmoe": {},
    "gpt_oss": {"swiglu_limit": 0.5},
    "qwen2_moe": {},
}
DENSE = ["embed", "resid_pre", "ln1_scale", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "ln2_scale",
         "mlp_hidden", "mlp_out", "resid_post", "ln_final_scale", "logits"]
ROUTED = ["router_logits", "expert_ids", "expert_weight", "expert_hidden", "expert_out"]
SHARED = ["shared_weight", "shared_out"]
NAMES = {
    "llama": DENSE, "gpt2": DENSE, "gemma2": DENSE,
    "olmoe": [n for n in DENSE if n != "mlp_hidden"] + ROUTED,
    "gpt_oss": [n for n in DENSE if n != "mlp_hidden"] + ROUTED,
    "qwen2_moe": [n for n in DENSE if n != "mlp_hidden"] + ROUTED + SHARED,
}
CASES = [(family, name) for family, names in NAMES.items() for name in names]
#: Zero divides nothing, and a choice of experts has no number to add to.
ZEROABLE = [(family, name) for family, name in CASES if not name.endswith("_scale")]
ADDABLE = [(family, name) for family, name in CASES if name != "expert_ids"]
MIDDLE = 1


@dataclass(frozen=True)
class Bench:
    m: Model
    ids: Tensor
    logits: Tensor
    values: dict[str, Tensor]


@cache
def bench(family: str) -> Bench:
    hf = tiny(family, **FAMILIES[family])
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    return Bench(Model(hf, name=family), ids, *literal.run(hf, ids))


def site(name: str) -> str:
    return f"{name}[{MIDDLE}]" if KINDS[name].layered else name


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert bool(torch.isfinite(b).all())
    assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def compare(b: Bench, edit: edits.Edit | list[edits.Edit], by_hand: literal.Edits) -> None:
    """The same edit in the model and by hand: the same logits, and not the plain ones."""
    with b.m.intervene(edit):
        ours = b.m(b.ids)
    theirs, _ = literal.run(b.m.hf, b.ids, by_hand)
    close(ours, theirs)
    assert float((theirs - b.logits).abs().max()) > 1e-4, "the edit does nothing, so it tests nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_by_hand_is_the_model(family: str) -> None:
    b = bench(family)
    with torch.no_grad():
        close(b.m.hf(input_ids=b.ids).logits, b.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_has_exactly_the_sites_that_the_forward_by_hand_has(family: str) -> None:
    b = bench(family)
    assert {str(Site(*place)) for place in b.m.anatomy.places} == set(b.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_holds_what_the_forward_by_hand_has_there(family: str) -> None:
    b = bench(family)
    acts = b.m.capture(b.ids, list(b.values))
    for name, value in b.values.items():
        assert acts[name].shape == value.shape, name
        assert torch.allclose(acts[name].float(), value.float(), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(("family", "name"), ADDABLE)
def test_adding_a_vector_does_what_it_does_by_hand(family: str, name: str) -> None:
    b = bench(family)
    v = torch.randn(b.values[site(name)].shape[-1])
    v = v.abs() if name.endswith("_scale") else v
    if name == "shared_weight":  # a gate stays within [0, 1]
        v = 0.5 * (1 - b.values[site(name)].max()).reshape(1)
    early = (torch.arange(9) < 5).float()  # the first five tokens: one vector on all keys alike would change no pattern
    axis = KINDS[name].pos_axis

    def by_hand(h: Tensor) -> Tensor:
        return h + v * early.reshape([-1 if i == axis else 1 for i in range(h.dim())])

    compare(b, edits.add(site(name), v, scope="window(0, 5)"), {site(name): by_hand})


@pytest.mark.parametrize(("family", "name"), ZEROABLE)
def test_zeroing_does_what_it_does_by_hand(family: str, name: str) -> None:
    b = bench(family)
    compare(b, edits.zero(site(name)), {site(name): torch.zeros_like})


@pytest.mark.parametrize("family", [f for f, names in NAMES.items() if "expert_ids" in names])
def test_sending_tokens_to_other_experts_does_what_it_does_by_hand(family: str) -> None:
    b = bench(family)

    def next_expert(h: Tensor, where: Any = None) -> Tensor:
        return (h + 1) % b.m.n_experts

    compare(b, edits.Edit(site("expert_ids"), next_expert), {site("expert_ids"): next_expert})


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_of_all_sites_at_once_do_what_they_do_by_hand(family: str) -> None:
    b = bench(family)
    chosen = [str(s) for s in b.m.resolve([site(n) for n in NAMES[family] if n not in ("expert_ids", "shared_weight")])]
    factors = {s: 1 + 0.2 * torch.rand(b.values[s].shape[-1]) for s in chosen}
    compare(b, [edits.scale(s, f) for s, f in factors.items()],
            {s: lambda h, f=f: h * f for s, f in factors.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_one_token_of_one_row_does_what_it_does_by_hand(family: str) -> None:
    b = bench(family)
    mask = torch.zeros_like(b.ids, dtype=torch.bool)
    mask[1, 4] = True
    for name in ("resid_pre", "z", "mlp_out"):
        v = torch.randn(b.values[site(name)].shape[-1])

        def by_hand(h: Tensor, v: Tensor = v) -> Tensor:
            h = h.clone()
            h[1, 4] += v
            return h

        compare(b, edits.add(site(name), v, scope=mask), {site(name): by_hand})
