"""Monet: a language model whose experts are so many and so small that a single one can mean one thing.

Each layer has N = n^2 experts (262,144 in the paper) from 2n parts, so their number grows with the square of the
parameters. What that buys: the sparse dictionary that others fit to a finished model is built into this one, and a
domain, a language or a habit can be cut out by switching its experts off, exactly and without retraining.

    from interp.monet import MonetConfig, MonetForCausalLM, MonetMask, masked

    model = MonetForCausalLM(MonetConfig(hidden_size=256, num_hidden_layers=8, moe_experts=64, moe_dim=8, moe_topk=8))
    out = model(ids, labels=ids, output_router_probs=True)
    g1, g2 = out.router_probs[0]                     # expert (i, j) has weight sum_h g1[..., h, i] g2[..., h, j]
    with masked(model, MonetMask.from_pairs(model, {0: [(3, 5)]})):
        model(ids)                                   # without expert (3, 5) of layer 0

Read in this order: `router` (who is chosen), `experts` (what they compute), `mixing` (how n^2 weights act unwritten),
`masks` (switching experts off), `losses` (what makes them specialise), `modeling` (the whole).

Importing this package makes transformers' AutoConfig, AutoModel and AutoModelForCausalLM know the model type "monet";
checkpoints with the published parameter names and configuration keys load as they are. No code of the original
implementation is used, and none of a checkpoint is run.

Source: Park, Ahn, Kim, Kang: Monet: Mixture of Monosemantic Experts for Transformers, arXiv 2412.04139.
"""

from __future__ import annotations

from interp.monet.config import MonetConfig
from interp.monet.masks import MaskError, MonetMask, masked
from interp.monet.modeling import MonetCausalLMOutput, MonetForCausalLM, MonetModel, MonetModelOutput

__all__ = [
    "MaskError",
    "MonetCausalLMOutput",
    "MonetConfig",
    "MonetForCausalLM",
    "MonetMask",
    "MonetModel",
    "MonetModelOutput",
    "masked",
    "register",
]


def register() -> None:
    """Makes transformers' Auto classes know Monet; harmless when repeated."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    AutoConfig.register(MonetConfig.model_type, MonetConfig, exist_ok=True)
    AutoModel.register(MonetConfig, MonetModel, exist_ok=True)
    AutoModelForCausalLM.register(MonetConfig, MonetForCausalLM, exist_ok=True)


register()
