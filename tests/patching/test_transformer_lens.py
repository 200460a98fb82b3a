"""Our numbers are TransformerLens's: z by head and position on SmolLM2."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import metrics
from interp.patching import effects
from interp.patching.nodes import Node
from interp.sites import Site

CLEAN, CORRUPT = (f"When Mary and John went out, {name} gave a drink to" for name in ("John", "Mary"))


@pytest.mark.smollm2
def test_head_by_position_equals_transformer_lens(smollm2: interp.Model) -> None:
    pytest.importorskip("transformer_lens")
    import pandas as pd
    from transformer_lens import patching as peer
    from transformer_lens.model_bridge import TransformerBridge

    torch.set_num_threads(1)
    m = smollm2
    clean, corrupt = m.tokens(CLEAN).ids, m.tokens(CORRUPT).ids
    bridge = TransformerBridge.boot_transformers(
        # a model of its own: TransformerLens gives the output layer a bias and leaves it there
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        hf_model=interp.load("smollm2").hf,
        tokenizer=m.tokenizer,
        device="cpu",
        dtype=torch.float32,
    )
    metric = metrics.logit_diff(*(m.tokenizer(w, add_special_tokens=False).input_ids[0] for w in (" Mary", " John")))
    draw = torch.Generator().manual_seed(0)
    rows = [(int(i), int(p), int(h)) for i, p, h in zip(
        torch.randint(30, (12,), generator=draw), torch.randint(7, clean.shape[1], (12,), generator=draw),
        torch.randint(9, (12,), generator=draw), strict=True)]  # fmt: skip
    index = pd.DataFrame(rows, columns=["layer", "pos", "head_index"])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        before = metric(bridge(corrupt))[0]
        theirs = peer.generic_activation_patch(
            bridge, corrupt, cache, lambda x: metric(x)[0], peer.layer_pos_head_vector_patch_setter, "z", index_df=index
        )
    sets = [[Node(Site("z", i, (("head", h),)), p)] for i, p, h in rows]
    ours = effects(m, clean, corrupt, metric, sets)[:, 0]
    assert float(ours.abs().max()) > 1e-3
    assert float((ours - (theirs - before)).abs().max()) < 2e-4
