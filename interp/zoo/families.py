"""The transformers families that `tiny` can shrink, and what each needs beyond the general recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOE, UNDECORATED, DENSE = "moe", "moe-undecorated", "dense"


@dataclass(frozen=True)
class Family:
    """One architecture of transformers and how to build a toy of it.

    Attributes:
        model_type: the `model_type` of its config in transformers (of the text part, where a family has several).
        kind: "moe" (its experts go through transformers' experts interface), "moe-undecorated" (own experts code:
            that interface does not reach them) or "dense".
        overrides: config fields that the general recipe cannot guess, for the reason given beside them.
        note: what a user should know about it, empty if nothing.
        cls: name of the model class in transformers, where the causal-LM mapping has none.
    """

    model_type: str
    kind: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    cls: str | None = None


FAMILIES: dict[str, Family] = {}
UNBUILT: dict[str, str] = {}
NO_ATTENTION: tuple[str, ...] = ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")


def families(kind: str | None = None) -> list[str]:
    """Names of the families that can be built, all or of one kind ("moe", "moe-undecorated", "dense")."""
    return [name for name, family in FAMILIES.items() if kind in (None, family.kind)]


# Mixture of experts through transformers' experts interface -------------------------------------------------------
# The general recipe is enough for these.
_MOE = """afmoe axk1 axk2 beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1 ernie4_5_moe
exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoeshared
hunyuan_v1_moe hy_v3 hy_v4 kimi_linear kolibri1 laguna mellum mimo_v2_flash minimax minimax_m2 mixtral olmoe phimoe
qwen2_moe qwen3_moe qwen3_next solar_open"""
FAMILIES |= {name: Family(name, MOE) for name in _MOE.split()}
# So it is for these, whose language model is the text part of a model for images or sound too.
_MOE_TEXT = "aria inkling inkling2 minimax_m3_vl qwen3_5_moe"
FAMILIES |= {name: Family(f"{name}_text", MOE) for name in _MOE_TEXT.split()}

# Undecorated
_UNDECORATED = "jetmoe longcat_flash"
FAMILIES |= {name: Family(name, UNDECORATED) for name in _UNDECORATED.split()}
FAMILIES |= {"llama4": Family("llama4_text", UNDECORATED)}

# Dense
_DENSE = """gpt2 gpt_neo gpt_neox gpt_neox_japanese gpt_bigcode llama mistral ministral ministral3 qwen2 qwen3 gemma
gemma2 vaultgemma phi phi3 olmo olmo2 olmo3 falcon bloom mpt opt xglm biogpt stablelm starcoder2 cohere cohere2 granite
granite_swa smollm3 persimmon glm glm4 nemotron exaone4 arcee apertus ernie4_5 seed_oss hunyuan_v1_dense hyperclovax
lfm2 lfm3 minicpm3 openai-gpt ctrl bitnet diffllama doge cwm jais2 modernbert-decoder nanochat youtu"""
FAMILIES |= {name: Family(name, DENSE) for name in _DENSE.split()}
FAMILIES |= {name: Family(f"{name}_text", DENSE) for name in ("gemma3", "gemma4_unified")}
