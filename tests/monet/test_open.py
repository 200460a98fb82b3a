"""A Monet checkpoint opened like any other: by directory, with the general sites, a fingerprint that knows its mask."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import edits
from interp.monet import MonetConfig, MonetForCausalLM, MonetMask
from interp.sites import SiteError

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS = {"moe_experts": 8, "moe_dim": 4, "moe_heads": 2, "moe_topk": 3, "moe_groups": 2}


@pytest.fixture(params=["horizontal", "vertical"])
def hf(request):
    torch.manual_seed(0)
    return MonetForCausalLM(MonetConfig(**SIZES, **HEADS, **EXPERTS, moe_decompose=request.param)).eval()


def test_a_checkpoint_opens_by_its_directory(hf, tmp_path):
    hf.save_pretrained(tmp_path)
    m = interp.load(tmp_path)
    ids = torch.arange(3, 13)[None]
    assert torch.equal(m(ids), interp.Model(hf)(ids))


def test_the_general_sites_are_read_and_written(hf):
    m = interp.Model(hf)
    ids = torch.arange(3, 13)[None]
    acts = m.capture(ids, ["resid_mid[1]", "mlp_out[1]", "resid_post[1]", "pattern[1]"])
    assert torch.allclose(acts["resid_mid[1]"] + acts["mlp_out[1]"], acts["resid_post[1]"], atol=1e-6)
    with m.intervene(edits.zero("mlp_out[1]")):
        after = m.capture(ids, "resid_post[1]")["resid_post[1]"]
    assert torch.allclose(after, acts["resid_mid[1]"], atol=1e-6)


@pytest.mark.parametrize("site", ["expert_out[0]", "mlp_hidden[1]", "router_logits[0]"])
def test_sites_that_factored_experts_do_not_have_say_why(hf, site):
    with pytest.raises(SiteError, match="products of two sets of parts"):
        interp.Model(hf).resolve(site)


def test_every_pair_of_a_mask_counts_in_the_fingerprint(hf):
    seen = {interp.Model(hf).fingerprint}
    for pairs in ([(0, 0)], [(0, 1)], [(7, 7)]):
        hf.set_expert_mask(MonetMask.from_pairs(hf, {0: pairs}))
        seen.add(interp.Model(hf).fingerprint)
    assert len(seen) == 4
