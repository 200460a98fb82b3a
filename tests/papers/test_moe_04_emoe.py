"""MOE-04. Emergent Mixture-of-Experts: Can Dense Pre-trained Transformers Benefit from Emergent Modular Structures?

EMoE (arXiv 2310.10908) clusters a layer's keys (the vectors that decide whether a neuron is active) and gates by the
mean of each cluster's keys, so it adds no parameters.

(a) Key-clustered experts with the centroid gate equal the dense model to 1e-5 with all on, and hold nothing but what
    the dense weights say.
(b) Planted modules are recovered (adjusted Rand index >= .95); in random weights there is nothing to find (about 0).
"""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import interp
from interp import experts

MODULES, WIDTH = 4, 16


def model(planted: bool) -> tuple[interp.Model, Tensor]:
    """A small Llama whose keys belong to four modules in shuffled order, or to none; and the module of each."""
    m = interp.load("tiny:llama", intermediate_size=MODULES * WIDTH)
    generator = torch.Generator().manual_seed(4)
    truth = (torch.arange(MODULES * WIDTH) % MODULES)[torch.randperm(MODULES * WIDTH, generator=generator)]
    if planted:
        with torch.no_grad():
            for layer in m.hf.model.layers:
                centres = torch.nn.functional.normalize(torch.randn(MODULES, m.d_model, generator=generator), dim=-1)
                noise = 0.08 * torch.randn(MODULES * WIDTH, m.d_model, generator=generator)
                layer.mlp.gate_proj.weight.copy_(centres[truth] + noise)
    return m, truth


def found(m: interp.Model, layer: int, seed: int = 0) -> Tensor:
    """The expert of each neuron of one layer."""
    group = experts.partition(m, MODULES, "weights", layers=[layer], seed=seed).groups[layer]
    owner = torch.zeros(MODULES * WIDTH, dtype=torch.long)
    for i, neurons in enumerate(group):
        owner[neurons] = i
    return owner


def test_a_nothing_is_added() -> None:
    m, _ = model(planted=True)
    moe = experts.split(m, n=MODULES, how="weights", gate="average")
    ids = torch.arange(5, 25).view(2, 10)
    assert float((moe(ids) - m(ids)).abs().max()) <= 1e-5
    groups = moe.card["partition"].groups
    for layer in range(m.n_layers):
        keys = m.hf.model.layers[layer].mlp.gate_proj.weight
        gate = moe.hf.model.layers[layer].mlp.gate
        torch.testing.assert_close(gate.weight, keys[groups[layer]].mean(1), rtol=0, atol=1e-6)
        assert gate.bias is None
    assert not any(p.requires_grad for block in moe.hf.model.layers for p in block.mlp.parameters())


@pytest.mark.parametrize("layer", [0, 2])
def test_b_planted_modules_are_recovered(layer: int) -> None:
    m, truth = model(planted=True)
    assert adjusted_rand_score(truth, found(m, layer)) >= 0.95


def test_b_random_weights_hold_no_modules() -> None:
    m, truth = model(planted=False)
    scores = [adjusted_rand_score(truth, found(m, layer, seed)) for layer in range(3) for seed in range(3)]
    again = [adjusted_rand_score(found(m, layer, 0), found(m, layer, 7)) for layer in range(3)]
    print(f"\nadjusted Rand index in random weights: {sum(scores) / len(scores):.3f}, of two runs {again}")
    assert abs(sum(scores) / len(scores)) < 0.05
    assert max(again) < 0.5  # not even two runs agree
