"""Experts as nodes in attribution, and the fix for saturated routers against brute force through the choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import edits
from interp.patching import Patcher, attribute, patch
from interp.patching.gather import grouped
from interp.patching.linear import Linear
from interp.patching.nodes import expand
from interp.patching.router_fix import Rule, dense, entering, moved, rule_of
from interp.sites import SiteError
from interp.zoo.families import families

from .conftest import differing, logit_gap, one_by_one

SOFTMAX, GPT_OSS, SIGMOID = Rule("softmax", False, 2), Rule("softmax", True, 2), Rule("sigmoid", True, 3, 2.5)


@pytest.mark.parametrize("rule", [SOFTMAX, GPT_OSS, SIGMOID, Rule("sigmoid", False, 1)])
def test_the_rule_is_found_from_what_it_made(rule: Rule) -> None:
    logits = 3 * torch.randn(20, 8)
    weights = rule(logits)
    chosen = weights.topk(rule.top_k, -1)
    found = rule_of(logits, chosen.indices, chosen.values)
    assert found is not None
    assert torch.allclose(found(logits), weights, atol=1e-5)
    assert rule_of(logits, chosen.indices, torch.rand_like(chosen.values)) is None


@pytest.mark.parametrize("rule", [SOFTMAX, GPT_OSS, SIGMOID])
@pytest.mark.parametrize("strength", [1.0, 200.0])
def test_moves_equal_brute_force(rule: Rule, strength: float) -> None:
    """One token and one expert at a time; also where one expert takes all."""
    here, there = strength * torch.randn(5, 8), strength * torch.randn(5, 8)
    change = moved(rule, here, there)
    chosen = rule(here).topk(rule.top_k, -1).indices
    brought = entering(change, chosen)
    for token in range(5):
        came = set()
        for expert in range(8):
            logits = here[token].clone()
            logits[expert] = there[token, expert]
            after = rule(logits[None])[0]
            assert torch.allclose(change[token, expert], after - rule(here[token][None])[0], atol=1e-6)
            came |= set(after.nonzero().flatten().tolist()) - set(chosen[token].tolist())
        assert came <= set(brought[token].tolist())


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("strength", [1.0, 8.0])
def test_equals_the_familys_own_router(family: str, strength: float) -> None:
    """Change of every expert's weight by the family's own code, times the slope of that weight by differences."""
    m, (clean, corrupt) = interp.load(f"tiny:{family}"), differing(1, 7)
    layer = 2
    with torch.no_grad():
        m.anatomy.places["router_logits", layer].module.weight.mul_(strength)  # type: ignore[operator]
    nodes = expand(m, f"router_logits[{layer}]@6", m.tokens(clean))
    recorded = Patcher(m, clean, corrupt, logit_gap).recorded
    there = m.capture(clean, f"router_logits[{layer}]")
    line = Linear(recorded, torch.tensor([0]), grouped(nodes, 7, m.device), there, fixes=True)
    assert not line.notes
    made = line.estimate(line.gradient(), len(nodes))[:, 0]
    sites = [f"expert_ids[{layer}]", f"expert_weight[{layer}]"]
    before, slopes = m.capture(corrupt, sites), weight_slopes(m, corrupt, layer, 6)
    old = dense(before[sites[0]], before[sites[1]], 8)[0, 6]
    truth = torch.zeros(8)
    for expert, node in enumerate(nodes):
        swap = edits.replace(str(node.site), there[node.site], scope="window(6, 7)")
        with m.intervene(swap):
            after = m.capture(corrupt, sites)
        truth[expert] = (dense(after[sites[0]], after[sites[1]], 8)[0, 6] - old) @ slopes
    assert float(truth.abs().max()) > 1e-4
    assert float((made - truth).abs().max()) < 2e-2 * float(truth.abs().max())


def weight_slopes(m: interp.Model, ids: Tensor, layer: int, position: int, step: float = 1e-2) -> Tensor:
    """dL / d weight of every expert at one token [expert], by adding step x its output to what the layer adds."""
    seen: list[Tensor] = []
    block: Any = m.anatomy.layers[layer].mlp
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    m(ids)
    handle.remove()
    place = m.anatomy.places["expert_out", layer].module
    from interp.hooks import experts

    out, scope = torch.zeros(8), f"window({position}, {position + 1})"
    for expert in range(8):
        with torch.no_grad():
            row = experts.down(place, expert, experts.up(place, expert, seen[0][0, position][None]))[0]
        values = []
        for sign in (1, -1):
            with m.intervene(edits.add(f"mlp_out[{layer}]", sign * step * row, scope=scope)):
                values.append(logit_gap(m(ids)).item())
        out[expert] = (values[0] - values[1]) / (2 * step)
    return out


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_experts_that_were_not_chosen_have_a_slope(family: str) -> None:
    """In the last layer the estimate of a small switch is the exact effect; of both kinds of node, at every expert."""
    m, (clean, corrupt) = interp.load(f"tiny:{family}"), differing(2, 6, changed=(2,))
    with torch.no_grad():  # what the last layer adds is small beside the stream, so behind it all is nearly linear
        experts: Any = m.anatomy.places["expert_out", 2].module
        experts.down_proj.mul_(0.02)
        if getattr(experts, "down_proj_bias", None) is not None:
            experts.down_proj_bias.mul_(0.02)
    nodes = ["expert_weight[2]@-1", "expert_out[2]@-1"]
    truth = patch(m, clean, corrupt, logit_gap, nodes)
    made = attribute(m, clean, corrupt, logit_gap, nodes, method="atp")
    largest = truth.value.abs().max()
    assert (truth.value != 0).sum() >= 4
    assert largest > 1e-5
    assert (made.value - truth.value).abs().max() < 0.1 * largest + 2e-6


@pytest.mark.parametrize("family", families("moe-undecorated"))
def test_families_outside_the_experts_interface(family: str) -> None:
    """An expert that was not chosen has no slot there: experts are refused, what is named instead is exact."""
    m, (clean, corrupt) = interp.load(f"tiny:{family}"), differing(2, 6)
    routed = m.anatomy.having("router_logits")
    layer = max(routed, default=1)
    for name in ("expert_weight", "expert_out"):
        with pytest.raises(SiteError, match=r"outside transformers' experts interface|no weight x output exists"):
            patch(m, clean, corrupt, logit_gap, f"{name}[{layer}, expert=1]")
    nodes = expand(
        m, [f"{n}[{layer}]@-1" for n in (["router_logits"] if routed else []) + ["mlp_out"]], m.tokens(clean)
    )
    table = patch(m, clean, corrupt, logit_gap, nodes)
    truth = one_by_one(m, corrupt, clean, logit_gap, [[node] for node in nodes]).mean(1)
    assert float((torch.tensor(table.value.to_numpy()) - truth).abs().max()) < 1e-5
    made = attribute(m, clean, corrupt, logit_gap, nodes, method="atp+qk")
    assert all("outside transformers' experts interface" in why for why in made.attrs["plain"].values())
    assert list(made.attrs["plain"]) == ([layer] if routed else [])
    assert made.value.abs().max() > 0


def test_a_router_without_a_known_rule_says_so() -> None:
    m, (clean, corrupt) = interp.load("tiny:deepseek_v3"), differing(1)  # groups, and a bias of the choice
    table = attribute(m, clean, corrupt, logit_gap, "router_logits[*]", method="atp+qk")
    assert all("no known rule" in why for why in table.attrs["plain"].values())
    assert table.attrs["plain"]
