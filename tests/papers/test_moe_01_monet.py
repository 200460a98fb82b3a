"""MOE-01. Monet: Mixture of Monosemantic Experts for Transformers (arXiv 2412.04139). Parts (a) and (b) of seven.

(a) Captured gates g1, g2 and the experts' own terms add up to the layer's output to 1e-5, horizontal and vertical; with
    pairs masked, the layer equals the same sum without them to 1e-5.
(b) The weights of all experts together grow as the square root of their number: over N = 4^2, 8^2, 16^2, 32^2 the
    log-log slope is .50 +- .02.

Checked on random weights, where both are exact. Parts (c) to (g), on domains, languages, toxicity, side effects and
examples of every expert, are about what training puts into experts: `test_moe_01_monet_trained`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.monet import MonetConfig, MonetForCausalLM, MonetMask, masked
from interp.monet.experts import Experts
from interp.monet.mixing import pair_weights

DECOMPOSITIONS = ["horizontal", "vertical"]


def small(decompose: str, **sizes: Any) -> MonetForCausalLM:
    defaults: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "moe_experts": 8,
        "moe_dim": 4, "moe_heads": 3, "moe_topk": 3, "moe_groups": 2, "initializer_range": 0.15,
    }  # fmt: skip
    model = MonetForCausalLM(MonetConfig(moe_decompose=decompose, **defaults | sizes))
    for moe in model.experts():
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.15)  # also the output biases, which start at zero
    return model.eval()


def captured(model: MonetForCausalLM, ids: Tensor) -> list[tuple[Experts, Tensor, Tensor, Tensor, Tensor]]:
    """Of each layer: its experts, their input [batch, pos, d], g1 and g2 as routed, their output."""
    calls: list[tuple[Experts, Tensor, Tensor, Tensor, Tensor]] = []
    handles = [
        moe.register_forward_hook(lambda module, args, out: calls.append((module, *args, out)))  # type: ignore[arg-type]
        for moe in model.experts()
    ]
    with torch.no_grad():
        router_probs = model(ids, output_router_probs=True).router_probs
    for handle in handles:
        handle.remove()
    groups = [probs for probs in router_probs if probs is not None]
    per_group = model.config.moe_groups
    return [(moe, x, *groups[layer // per_group], y) for layer, (moe, x, _, _, y) in enumerate(calls)]


def term(moe: Experts, x: Tensor, g1: Tensor, g2: Tensor, i: int, j: int) -> Tensor:
    """What expert (i, j) adds to the residual stream [batch, pos, d]."""
    at_i, at_j = torch.tensor([i]), torch.tensor([j])
    return (pair_weights(g1, g2, at_i, at_j)[..., None] * moe.expert(x, at_i, at_j))[..., 0, :]


@pytest.mark.parametrize("decompose", DECOMPOSITIONS)
def test_a_gates_and_terms_add_up_to_the_layer(decompose: str) -> None:
    model = small(decompose)
    for moe, x, g1, g2, y in captured(model, torch.randint(50, (2, 7))):
        with torch.no_grad():
            terms = [term(moe, x, g1, g2, i, j) for i in range(8) for j in range(8)]
        assert float((torch.stack(terms).sum(0) - y).abs().max()) <= 1e-5
        assert sum(float(t.abs().max()) > 1e-3 for t in terms) > 8  # many experts at work, not one


@pytest.mark.parametrize("decompose", DECOMPOSITIONS)
@pytest.mark.parametrize("kind", ["random", "row", "column", "pair"])
def test_a_masked_pairs_equal_the_sum_without_them(decompose: str, kind: str) -> None:
    model = small(decompose)
    mask = {
        "random": lambda: MonetMask.from_keep(model, {la: torch.rand(8, 8) > 0.3 for la in range(4)}),
        "row": lambda: MonetMask.full_rows(model, {la: [1, 6] for la in range(4)}),
        "column": lambda: MonetMask.full_cols(model, {la: [5] for la in range(4)}),
        "pair": lambda: MonetMask.from_pairs(model, {la: [(3, 4)] for la in range(4)}),
    }[kind]()
    with masked(model, mask):
        calls = captured(model, torch.randint(50, (2, 7)))
    for layer, (moe, x, g1, g2, y) in enumerate(calls):
        with torch.no_grad():
            kept = [term(moe, x, g1, g2, i, j) for i in range(8) for j in range(8) if (layer, i, j) not in mask]
        assert len(kept) == 64 - len(mask.ids(layer)) < 64
        assert float((torch.stack(kept).sum(0) - y).abs().max()) <= 1e-5


@pytest.mark.parametrize("decompose", DECOMPOSITIONS)
def test_b_expert_weights_grow_as_the_square_root_of_their_number(decompose: str) -> None:
    points = []
    for n in (4, 8, 16, 32):
        moe = next(small(decompose, moe_experts=n, num_hidden_layers=1).experts())
        points.append((math.log(n * n), math.log(sum(p.numel() for p in moe.parameters()))))
    mean_x, mean_y = (sum(v) / len(points) for v in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    assert slope == pytest.approx(0.50, abs=0.02)
