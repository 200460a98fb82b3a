"""ACT-03. Zhang et al. 2024, ReLU^2 Wins (arXiv:2402.03804)."""

from __future__ import annotations

import pytest
import torch

import interp
import probes
from probes.sparsity import nonzero, threshold_curve, threshold_edits, thresholds


def batch(m, seed):
    return torch.randint(4, m.d_vocab, (6, 12), generator=torch.Generator().manual_seed(seed))


def test_thresholds_meet_the_error_asked_for_on_held_out_tokens():
    m = interp.load("tiny:llama")  # SwiGLU: no neuron is exactly zero
    kept = {}
    for error in (0.05, 0.3):
        table = thresholds(m, batch(m, 0), error)
        assert (table.error <= error).all()
        curve = threshold_curve(m, batch(m, 1), table)
        held_out = curve[curve.metric == "error"].value
        print(
            f"\nerror asked {error}: held out {held_out.round(3).tolist()}, kept {table.value.round(2).tolist()}, "
            f"recall {curve.attrs['recall']:.2f}\n",
            curve[curve.metric == "loss"].to_string(),
        )
        assert (held_out < error * 1.3 + 0.01).all()
        kept[error] = table.value.mean()
    assert kept[0.3] < kept[0.05] < 1


def test_the_error_is_that_of_the_outputs():
    m = interp.load("tiny:gpt2")
    table = thresholds(m, batch(m, 0), 0.2)
    plain = m.capture(batch(m, 0), "mlp_out[0]")["mlp_out[0]"]
    with m.intervene(*[e for e in threshold_edits(m, table) if e.site == "mlp_hidden[0]"]):
        cut = m.capture(batch(m, 0), "mlp_out[0]")["mlp_out[0]"]
    bias = m.anatomy.places["mlp_hidden", 0].module.bias
    mine = ((plain - cut).norm(dim=-1) / (plain - bias).norm(dim=-1)).mean()
    assert float(mine) == pytest.approx(table.error[0], abs=1e-4)


def test_at_threshold_zero_a_relu_model_gives_the_lazy_neurons():
    m = interp.load("tiny:opt")
    table = thresholds(m, batch(m, 0), 0.0)
    assert table.value.tolist() == pytest.approx(nonzero(m, batch(m, 0)).value.tolist(), abs=2e-3)
    with pytest.raises(probes.ProbeError, match=r"error=1\.5"):
        thresholds(m, batch(m, 0), 1.5)
