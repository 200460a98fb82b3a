"""Router logits are read where they are made at first, and where the router ends from then on: nobody may notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import edits
from interp.hooks import choice

IDS = torch.tensor([[5, 17, 3, 42, 8, 1], [2, 9, 9, 4, 30, 7]])
ROUTERS = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "granitemoe", "jamba"]


@pytest.fixture(params=ROUTERS)
def m(request: pytest.FixtureRequest) -> interp.Model:
    return interp.load(f"tiny:{request.param}")


def made(m: interp.Model, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Router logits where they are made, whatever has been seen of the routers."""
    with monkeypatch.context() as patch:
        patch.setattr(choice, "_returned", {})
        acts = m.capture(IDS, ["router_logits[*]", "expert_ids[*]"], logits=True)
    return {str(site): acts[site] for site in acts.sites}


def test_every_reading_is_the_first(m: interp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(m, monkeypatch)
    for _ in range(2):
        again = m.capture(IDS, ["router_logits[*]", "expert_ids[*]"], logits=True)
        for site, value in first.items():
            assert torch.equal(again[site], value), site


def test_writing_and_gradients_go_inside_as_before(m: interp.Model) -> None:
    site = m.resolve("router_logits[*]")[-1]
    before = m.capture(IDS, [site, f"expert_ids[{site.layer}]"], logits=True)
    acts = m.capture(IDS, site, logits=True, grad=True)
    assert acts.logits is not None
    (gradient,) = torch.autograd.grad(acts.logits[:, -1].square().sum(), acts[site], allow_unused=True)
    assert gradient is not None
    assert torch.equal(acts[site].detach(), before[site])
    with m.intervene(edits.add(f"router_logits[{site.layer}, expert=0]", float("-inf"))):
        without = m.capture(IDS, [site, f"expert_ids[{site.layer}]"], check=False)
    assert not (without[f"expert_ids[{site.layer}]"] == 0).any()
    after = m.capture(IDS, [site, f"expert_ids[{site.layer}]"], logits=True)
    assert torch.equal(after[site], before[site])
    assert torch.equal(after.logits, before.logits)


def test_a_router_that_changes_what_it_returns_is_read_inside() -> None:
    m = interp.load("tiny:olmoe")
    plain = m.capture(IDS, "router_logits[*]")
    gates: list[Any] = [layer.mlp.gate for layer in m.hf.model.layers]
    for gate in gates:
        choice._returned.pop(gate, None)
        run = type(gate).forward
        gate.forward = lambda x, gate=gate, run=run: (lambda out: (out[0] + 1, *out[1:]))(run(gate, x))
    for _ in range(2):
        acts = m.capture(IDS, "router_logits[*]")
        for site in plain.sites:
            assert torch.equal(acts[site], plain[site]), site
    assert not any(gate in choice._returned for gate in gates)
