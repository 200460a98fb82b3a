"""An ablation as an Edit equals switching off, and acts on the tokens of its scope alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp import experts
from interp.experts import ExpertError, ExpertSet
from tests.experts.conftest import build


def chosen_of(model: Any, kind: str, texts: dict[str, list[str]]) -> ExpertSet:
    return experts.select(experts.routing(model, texts, kind=kind), "law", "top", count=3)


@torch.no_grad()
def test_on_all_tokens_it_is_switching_off(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    chosen = chosen_of(model, kind, texts)
    tokens = model.tokens([texts["law"][1], texts["code"][1]])  # padded
    with experts.switched_off(model, chosen):
        wanted = model(tokens)
    with model.intervene(experts.ablate(chosen)):
        found = model(tokens)
    torch.testing.assert_close(found[tokens.mask], wanted[tokens.mask], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_scope_leaves_earlier_tokens_as_they_were(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    chosen = chosen_of(model, kind, texts)
    ids = model.tokens(texts["law"][1]).ids
    plain = model(ids)
    with model.intervene(experts.ablate(chosen, scope="window(10, 20)")) as run:
        edited = model(ids)
    # equal up to rounding: experts work on tokens in groups, and later tokens may change groups
    torch.testing.assert_close(edited[:, :10], plain[:, :10], rtol=1e-5, atol=1e-5)
    assert (edited[:, 10:] - plain[:, 10:]).abs().max() > 1e-5
    assert set(run.trace()["position"]) <= set(range(10, 20))
    assert torch.equal(model(ids), plain)


@torch.no_grad()
def test_generation_with_and_without_a_cache_agree(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    chosen = chosen_of(model, kind, texts)
    with model.intervene(experts.ablate(chosen, scope="generated")):
        cached = model.generate("the court ", max_new_tokens=8, use_cache=True)
        whole = model.generate("the court ", max_new_tokens=8, use_cache=False)
    assert torch.equal(cached.tokens.ids, whole.tokens.ids)


@torch.no_grad()
def test_it_composes_with_a_mask_and_with_edited_routing(monet: Any) -> None:
    a, b = ExpertSet(monet, {0: [1, 9, 30], 2: [5]}), ExpertSet(monet, {0: [9, 12], 1: [3]})
    ids = monet.tokens("the court shall").ids
    with experts.switched_off(monet, a | b):
        wanted = monet(ids)
    with experts.switched_off(monet, a), monet.intervene(experts.ablate(b)):
        torch.testing.assert_close(monet(ids), wanted, rtol=1e-4, atol=1e-5)
    from interp import edits

    routed = edits.scale("g1[0]", 0.5)
    with monet.intervene(routed), experts.switched_off(monet, a):
        wanted = monet(ids)
    with monet.intervene(routed, experts.ablate(a)):
        torch.testing.assert_close(monet(ids), wanted, rtol=1e-4, atol=1e-5)


def test_half_a_gate_takes_half_out(monet: Any) -> None:
    chosen = ExpertSet(monet, {3: range(20)})
    ids = monet.tokens("the court shall").ids
    outs = []
    for strength in (0.0, 0.5, 1.0):
        gate = lambda h, where, strength=strength: torch.full(h.shape[:2], strength)  # noqa: E731
        with monet.intervene(experts.ablate(chosen, gate=gate)):
            outs.append(monet.capture(ids, "mlp_out[3]")["mlp_out[3]"])
    torch.testing.assert_close(outs[1], (outs[0] + outs[2]) / 2, rtol=1e-4, atol=1e-6)


def test_bad_input(monet: Any) -> None:
    chosen = ExpertSet(monet, {0: [1]})
    with pytest.raises(ExpertError, match="mode='magic': expected one of zero"):
        experts.ablate(chosen, "magic")  # type: ignore[arg-type]
    with pytest.raises(ExpertError, match="mean nothing in another"), build("routed").intervene(experts.ablate(chosen)):
        pass
