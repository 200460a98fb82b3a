"""ACT-02. Li et al. 2022, The Lazy Neuron Phenomenon (arXiv:2210.06313)."""

from __future__ import annotations

import pytest
import torch

import interp
import probes
from probes.sparsity import nonzero, top_k, top_k_curve


def opened(family: str = "tiny:opt"):
    m = interp.load(family)  # OPT's activation is ReLU
    return m, torch.randint(4, m.d_vocab, (3, 10), generator=torch.Generator().manual_seed(0))


def test_share_of_nonzero_neurons_is_the_count():
    m, ids = opened()
    table = nonzero(m, ids)
    print("\n", table.to_string())
    for row in table.itertuples():
        h = m.capture(ids, row.node)[row.node]
        assert row.value == pytest.approx(sum(float(v) != 0 for v in h.flatten()) / h.numel())
    assert 0.2 < table.value.mean() < 0.8


def test_top_k_leaves_exactly_k_and_all_of_them_is_the_identity():
    m, ids = opened("tiny:llama")
    width = m.anatomy.sizes["mlp_hidden", 0]["neuron"]
    before = m.capture(ids, "mlp_hidden[0]")["mlp_hidden[0]"]
    with m.intervene(top_k(m, 5)):
        after = m.capture(ids, "mlp_hidden[0]")["mlp_hidden[0]"]
    assert ((after != 0).sum(-1) == 5).all()
    assert torch.equal(after[after != 0], before[after != 0])
    assert torch.equal(after.abs().topk(5, -1).values, before.abs().topk(5, -1).values)
    plain = m(ids)
    with m.intervene(top_k(m, width)):
        assert torch.equal(m(ids), plain)
    with pytest.raises(probes.ProbeError, match="k=0"):
        top_k(m, 0)


def test_loss_and_calibration_against_k():
    m, ids = opened("tiny:llama")
    table = top_k_curve(m, ids, [1, 8, 40])
    print("\n", table.pivot(index="k", columns="metric", values="value").to_string())
    loss = table[table.metric == "loss"].set_index("k").value
    assert loss[40] == loss[-1]  # all forty neurons
    assert loss[1] != loss[-1]
    assert table[table.metric == "ece"].value.between(0, 1).all()
