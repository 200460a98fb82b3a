"""A tiny Monet of either decomposition, and literal versions of what the package computes cleverly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.monet import MonetConfig, MonetForCausalLM
from interp.monet.experts import Experts, HorizontalExperts, VerticalExperts

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3,
    "max_position_embeddings": 64, "initializer_range": 0.2,
    "moe_experts": 6, "moe_dim": 4, "moe_heads": 2, "moe_topk": 2, "moe_groups": 2,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture(params=["horizontal", "vertical"])
def decompose(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(decompose: str) -> Callable[..., MonetForCausalLM]:
    """make(**overrides): a random model in evaluation mode, biases and routing statistics away from their start."""

    def build(**overrides: Any) -> MonetForCausalLM:
        torch.manual_seed(0)
        model = MonetForCausalLM(MonetConfig(moe_decompose=decompose, **SIZES | overrides))
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if name.endswith((".b", ".b1", ".b2", ".bias")):
                    tensor.normal_(std=0.3)
            model.train()
            for _ in range(10):
                model(torch.randint(model.config.vocab_size, (4, 12)))
        return model.eval()

    return build


@pytest.fixture
def model(make: Callable[..., MonetForCausalLM]) -> MonetForCausalLM:
    return make()


@pytest.fixture
def ids() -> Tensor:
    """[batch, pos]"""
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))


def brute_force(experts: Experts, x: Tensor, g1: Tensor, g2: Tensor, keep: Tensor | None = None) -> Tensor:
    """sum_ij M_ij sum_h g1_hi g2_hj E_ij(x), an expert at a time, each made from its own slices of the weights.

    x [token, d], g1 and g2 [token, head, n] -> [token, d].
    """
    n = g1.shape[-1]
    y = torch.zeros_like(x)

    def s(t: Tensor) -> Tensor:
        return t.clamp(min=0) ** 2

    for i in range(n):
        for j in range(n):
            if keep is not None and not keep[i, j]:
                continue
            if isinstance(experts, HorizontalExperts):
                m = experts.u.out_features // n
                a, b = slice(i * m, (i + 1) * m), slice(j * m, (j + 1) * m)
                z = s(x @ experts.u.weight[a].T + experts.u.bias[a])
                e = z @ experts.v.weight[:, b].T + experts.b[j]
            else:
                assert isinstance(experts, VerticalExperts)
                m = experts.u1.out_features // n
                a, b = slice(i * m, (i + 1) * m), slice(j * m, (j + 1) * m)
                z1 = s(x @ experts.u1.weight[a].T + experts.u1.bias[a])
                z2 = s(x @ experts.u2.weight[b].T + experts.u2.bias[b])
                top = z1 @ experts.v11.weight[:, a].T + z2 @ experts.v12.weight[:, a].T + experts.b1[i]
                bottom = z1 @ experts.v21.weight[:, b].T + z2 @ experts.v22.weight[:, b].T + experts.b2[j]
                e = torch.cat((top, bottom), -1)
            y += (g1[:, :, i] * g2[:, :, j]).sum(1)[:, None] * e
    return y
