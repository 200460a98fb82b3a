"""The fingerprint follows what a checkpoint would hold, and is not worked out twice for nothing."""

from __future__ import annotations

import pytest
import torch

from interp import fingerprint as module
from interp.fingerprint import Fingerprint, fingerprint
from interp.zoo.tiny import tiny


@pytest.fixture
def hf():
    return tiny("llama")


def test_it_is_remembered_until_a_weight_is_written_to(hf, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(module, "fingerprint", lambda hf: calls.append(1) or fingerprint(hf))
    remembered = Fingerprint(hf)
    first = str(remembered)
    assert str(remembered) == first == fingerprint(hf)
    assert len(calls) == 1
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert str(remembered) == fingerprint(hf) != first
    assert len(calls) == 2


def test_it_follows_a_weight_that_is_replaced_or_added(hf):
    remembered = Fingerprint(hf)
    seen = {str(remembered)}
    down = hf.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.detach() * 2)
    seen.add(str(remembered))
    down.register_buffer("keep", torch.ones(3000, dtype=torch.bool))
    seen.add(str(remembered))
    down.keep = torch.ones(3000, dtype=torch.bool).index_fill_(0, torch.tensor([1501]), False)  # every entry counts
    seen.add(str(remembered))
    assert len(seen) == 4


def test_it_does_not_depend_on_buffers_that_no_checkpoint_holds(hf):
    before = fingerprint(hf)
    hf.model.rotary_emb.inv_freq = hf.model.rotary_emb.inv_freq * 2  # as families do that stretch it for long texts
    assert fingerprint(hf) == before


def test_it_reads_weights_made_under_inference_mode():
    with torch.inference_mode():
        made = tiny("gpt2")
    assert str(Fingerprint(made)) == fingerprint(tiny("gpt2"))
