"""MOE-05. Autonomy-of-Experts Models (arXiv 2501.13074): no router, experts are ranked by their own activation norm.

Internal norms of all experts are read before any choice is made, in any fused Mixture of Experts; Kendall's tau between
the ranking by norm and the router's is printed per layer.

(a) A model that is routed by norm gives tau = 1.
(b) In a model whose router knows nothing of norms the interval covers 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from interp import Model, experts
from interp.experts.autonomy import internal_norms, kendall
from tests.experts.conftest import TEXTS, build


class ByNorm(nn.Module):
    """An Autonomy-of-Experts gate: the logits are the norms themselves."""

    def __init__(self, of: Any, top_k: int) -> None:
        super().__init__()
        self.__dict__["of"] = of
        self.top_k = top_k
        self.weight = nn.Parameter(torch.eye(of.num_experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(internal_norms(self.of, x), self.weight)
        ids = logits.topk(self.top_k, dim=-1).indices
        return logits, torch.ones_like(ids, dtype=x.dtype), ids


def test_kendall_is_scipys() -> None:
    a, b = torch.randn(5, 9), torch.randn(5, 9)
    expected = [kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(kendall(a, b).numpy(), expected)


def test_norms_are_those_of_the_experts(routed: Model) -> None:
    acts = routed.capture(TEXTS["law"][0], "expert_hidden[1]").experts(1)
    from interp.hooks.slots import given

    module = routed.anatomy.places["expert_weight", 1].module
    with given({1: module}) as inputs:
        routed(TEXTS["law"][0])
    norms = internal_norms(module, inputs[1])
    assert acts.hidden is not None
    torch.testing.assert_close(norms.gather(1, acts.ids[0]), acts.hidden[0].norm(dim=-1), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def routed() -> Model:
    return build("routed")


def test_a_routed_by_norm_is_one() -> None:
    m = experts.split(build("neurons"), n=8, how="random")
    for layer in m.hf.model.layers:
        layer.mlp.gate = ByNorm(layer.mlp.experts, 2)
    table = experts.autonomy(Model(m.hf, m.tokenizer, "by norm"), TEXTS)
    print("\n", table)
    assert np.allclose(table["value"], 1)
    assert np.allclose(table["overlap"], 1)


def test_b_a_router_that_knows_nothing_of_norms_covers_zero(routed: Model) -> None:
    """Norms of random experts are much the same in size; which is largest is not what the random router asks."""
    generator = torch.Generator().manual_seed(8)
    pooled = {"all": [t for texts in TEXTS.values() for t in texts]}
    letters = sorted({c for t in pooled["all"] for c in t})
    draws = [torch.randint(len(letters), (40,), generator=generator).tolist() for _ in range(30)]
    words = {"random": ["".join(letters[i] for i in row) for row in draws]}
    rows = []
    for seed in range(6):
        m = build("routed")
        with torch.no_grad():
            for layer in m.hf.model.layers:
                drawn = torch.randn(layer.mlp.gate.weight.shape, generator=torch.Generator().manual_seed(seed))
                layer.mlp.gate.weight.copy_(drawn)
        table = experts.autonomy(m, words)
        rows += [(seed, r.layer, r.value, r.low, r.high) for r in table.itertuples()]
        assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    values = np.array([value for _, _, value, _, _ in rows])
    error = values.std(ddof=1) / len(values) ** 0.5
    print(f"\ntau over {len(values)} random routers: {values.mean():.3f} +- {1.96 * error:.3f}")
    assert abs(values.mean()) < 1.96 * error + 1e-9
