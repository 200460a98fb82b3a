"""The conformance suite itself: it must notice when something is read or written wrongly."""

from __future__ import annotations

import pytest
import torch

from interp import conformance
from interp.conformance.bench import Bench, close, fit
from interp.hooks.anatomy import Place
from interp.model import Model
from interp.zoo.tiny import tiny


def failed(m: Model) -> set[str]:
    return {f.check for f in conformance.check(m) if not f.ok}


def test_a_sound_model_passes():
    assert failed(Model(tiny("llama"))) == set()


def test_a_site_read_at_the_wrong_place_is_noticed():
    m = Model(tiny("llama"))
    layer = m.anatomy.layers[1]
    m.anatomy.places["resid_mid", 1] = Place("stream", layer.input_layernorm)  # really resid_pre
    assert "stream" in failed(m)


def test_neurons_of_the_wrong_projection_are_noticed():
    m = Model(tiny("llama"))
    layer = m.anatomy.layers[2]
    m.anatomy.places["mlp_hidden", 2] = Place("input", layer.mlp.up_proj)
    with_wrong_place = failed(m)
    assert with_wrong_place  # surgery cuts the same wrong weights, but padding, slopes or shapes give it away
    assert m.capture([[3, 4]], "mlp_hidden[2]")["mlp_hidden[2]"].shape[-1] == m.d_model


def test_a_router_read_elsewhere_is_noticed():
    m = Model(tiny("olmoe"))
    block = m.anatomy.layers[2].mlp
    stray = torch.nn.Linear(block.gate.weight.shape[1], block.gate.weight.shape[0], bias=False)
    m.anatomy.places["router_logits", 2] = Place("output", stray)
    assert {"logits", "router"} & failed(m)


def test_a_hook_left_behind_is_noticed():
    m = Model(tiny("gpt2"))
    bench = Bench(m, torch.tensor([[3, 4, 5]]), torch.Generator())
    before = bench.state()
    m.hf.register_forward_hook(lambda *_: None)
    assert bench.state() != before


def test_a_changed_weight_is_noticed():
    m = Model(tiny("gpt2"))
    bench = Bench(m, torch.tensor([[3, 4, 5]]), torch.Generator())
    before = bench.state()
    with torch.no_grad():
        next(m.hf.parameters()).view(-1)[0] += 1
    assert bench.state()["weights"] != before["weights"]


def test_fit_finds_a_planted_combination_and_no_other():
    torch.manual_seed(0)
    a, b = torch.randn(2, 10, 4), torch.randn(2, 10, 4)
    target = 2 * a - torch.tensor([1.0, 2.0, 3.0, 4.0]) * b + 0.5
    assert close("", fit(target, a, b), target)[0]
    assert not close("", fit(torch.randn(2, 10, 4), a, b), target)[0]


@pytest.mark.parametrize("name", ["olmoe", "gpt2"])
def test_the_table_has_a_line_per_family_and_totals(name):
    frame = conformance.table([name])
    assert list(frame.columns) == ["family", "kind", "whole", "logit_error", "failed", "refused"]
    assert bool(frame.whole.all())
    assert int(conformance.totals(frame).families.sum()) == 1
