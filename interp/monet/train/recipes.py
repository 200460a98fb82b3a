"""The three minis: same width, depth, tokenizer, data and active compute; another block after attention.

    monet-mini   6 x 4,096 experts of 8 neurons (horizontal, n = 64, H = 4), one router for every 2 layers
    olmoe-mini   6 x 32 SwiGLU experts of width 84, 4 of them for each token
    llama-mini   6 SwiGLU layers of width 336

Matrix entries that one token meets in one such block, d = 128: Monet 2 d n m = 131k (and 66k per router, of which there
are three), OLMoE 4 x 3 d 84 = 129k, Llama 3 d 336 = 129k. Monet computes all of its parts for every token, so its
parameters are about the dense model's; OLMoE's are four times as many, of which a token meets a part.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

CONTEXT = 256
VOCABULARY = 4096


@dataclass(frozen=True)
class Recipe:
    """A model to train.

    Attributes:
        name: its zoo name, also the name of its directory under data/models.
        summary: one line for the model card.
        config: fields of its transformers configuration.
        build: configuration fields -> model with fresh weights (from torch's global random state).
    """

    name: str
    summary: str
    config: Mapping[str, Any]
    build: Callable[[dict[str, Any]], Any]

    def model(self, vocabulary: int, special: Mapping[str, int], **overrides: Any) -> Any:
        """A fresh model for a tokenizer of `vocabulary` tokens; `special` are its bos, eos and pad ids.

        Raises ValueError for an override that the configuration does not know.
        """
        if unknown := sorted(set(overrides) - set(self.config)):
            raise ValueError(f"--set {unknown[0]}: {self.name} can override {', '.join(sorted(self.config))}")
        return self.build({**self.config, "vocab_size": vocabulary, **special, **overrides})


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`["hidden_size=64", "moe_decompose=vertical"]` as a dictionary; values are Python literals or else text."""
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r}: expected key=value, for instance hidden_size=64")
        try:
            overrides[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            overrides[key] = text
    return overrides


_BODY: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "use_cache": False,  # in training; export puts it back
}


def _monet(fields: dict[str, Any]) -> Any:
    from interp.monet import MonetConfig, MonetForCausalLM

    return MonetForCausalLM(MonetConfig(**fields))


def _olmoe(fields: dict[str, Any]) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM(OlmoeConfig(**fields))


def _llama(fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**fields))


_MONET = {"moe_decompose": "horizontal", "moe_experts": 64, "moe_dim": 8, "moe_heads": 4, "moe_topk": 4,
          "moe_groups": 2, "moe_uniformity_coef": 0.01, "moe_ambiguity_coef": 0.003}  # fmt: skip
_OLMOE = {"num_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 84, "norm_topk_prob": False,
          "output_router_logits": True, "router_aux_loss_coef": 0.01}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("monet-mini", "Monet, horizontal, 4,096 experts per layer", _BODY | _MONET, _monet),
        Recipe("olmoe-mini", "OLMoE, 32 experts per layer, 4 for each token", _BODY | _OLMOE, _olmoe),
        Recipe("llama-mini", "Llama, dense", _BODY | {"intermediate_size": 336}, _llama),
    )
}
