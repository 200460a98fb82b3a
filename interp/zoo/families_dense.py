"""The dense families: decoders of every style, hybrids among them.

See `interp.zoo.families` for what an override is for.
"""

from __future__ import annotations

from typing import Any

from interp.zoo.families_common import DENSE, FULL, GRANITE, HYBRID, LINEAR, SLIDING, TEXT_ONLY, Family

_PLAIN = """apertus arcee biogpt bitnet bloom codegen ctrl cwm diffllama doge ernie4_5 exaone4 falcon gemma
gemma2 glm glm4 gpt2 gpt-sw3 gpt_bigcode gpt_neox gpt_neox_japanese gptj hunyuan_v1_dense internlm3
iquestcoder jais2 llama ministral ministral3 mistral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3
openai-gpt opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma xglm youtu"""
_OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.5},  # as cohere2_moe
    "cohere2": {"logit_scale": 0.5},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},  # its own list of layers
    "granite": GRANITE,
    "granite_swa": GRANITE,
    "helium": {"head_dim": 8},  # its output projection takes heads x head_dim to be d_model
    "hyperclovax": GRANITE,
    "lfm2": {"layer_types": ["conv", FULL, "conv"], "block_auto_adjust_ff_dim": False},  # MLP width as is
    "minicpm3": {"dim_model_base": 16},  # divides the logits by d_model / 16
}
DENSE_FAMILIES: dict[str, Family] = {
    name: Family(name, DENSE, _OVERRIDES.get(name, {})) for name in sorted([*_PLAIN.split(), *_OVERRIDES])
}

# A second style of checkpoint, by switches of the config.
DENSE_FAMILIES |= {
    "falcon_40b": Family(
        "falcon",
        DENSE,
        {"new_decoder_architecture": True},
        "two norms into parallel branches, grouped keys and values",
    ),
    "falcon_rw": Family(
        "falcon",
        DENSE,
        {"alibi": True, "multi_query": False, "num_kv_heads": 4, "parallel_attn": False, "bias": True},
        "ALiBi, sequential branches, biases",
    ),
    "gpt_neox_sequential": Family(
        "gpt_neox", DENSE, {"use_parallel_residual": False}, "attention first, then the MLP"
    ),
    "opt_350m": Family(
        "opt",
        DENSE,
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        "norms after the branches; embeddings narrower than the residual stream",
    ),
    "stablelm_12b": Family(
        "stablelm",
        DENSE,
        {"use_parallel_residual": True, "qk_layernorm": True},
        "parallel branches from one norm, queries and keys normed per head",
    ),
}

# The text part of a model for images or sound, or such a model run on text.
DENSE_FAMILIES |= {
    "cohere_compass": Family(
        "cohere_compass_text",
        DENSE,
        {  # the default has no rotary parameters and full attention only
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
                FULL: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "emu3": Family("emu3_text_model", DENSE, cls="Emu3ForCausalLM"),
    "fuyu": Family("fuyu", DENSE, note=TEXT_ONLY),
    "gemma3": Family("gemma3_text", DENSE),
    "gemma3n": Family(
        "gemma3n_text",
        DENSE,
        {  # the last two layers reuse keys and values; each kind needs a layer that makes them
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        "several residual streams: the layers pass on [stream, batch, pos, d_model]; late layers reuse keys "
        "and values",
    ),
    "gemma4_dense": Family(
        "gemma4_text",
        DENSE,
        {  # as gemma-4-E2B
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "num_kv_shared_layers": 2,
            "per_layer_config": {1: {"head_dim": 24}, 3: {"head_dim": 24}},
            "final_logit_softcapping": 30.0,
        },
        "embeddings per layer, late layers reuse keys and values, full-attention layers have wider heads",
    ),
    "gemma4_unified": Family(
        "gemma4_unified_text",
        DENSE,
        {"layer_types": [SLIDING, SLIDING, FULL], "per_layer_config": {2: {"head_dim": 24}}},
        "full-attention layers have wider heads",
    ),
    "mllama": Family("mllama_text_model", DENSE, cls="MllamaForCausalLM"),
    "moshi": Family("moshi", DENSE, note=TEXT_ONLY),
    "phi4_multimodal": Family("phi4_multimodal", DENSE, note=TEXT_ONLY),
}

DENSE_FAMILIES |= {
    name: Family(model_type, DENSE, overrides, HYBRID)
    for name, model_type, overrides in (
        ("bamba", "bamba", {"attn_layer_indices": [1]}),  # by default no attention
        ("falcon_h1", "falcon_h1", {"attention_in_multiplier": 0.7, "ssm_out_multiplier": 0.7}),
        ("lfm3", "lfm3", {}),
        ("olmo_hybrid", "olmo_hybrid", {}),
        ("qwen3_5", "qwen3_5_text", {}),
        ("recurrent_gemma", "recurrent_gemma", {}),
        # the attention block is one for all layers that have it: here two
        ("zamba", "zamba", {"layers_block_type": [LINEAR, "hybrid", "hybrid"]}),
        ("zamba2", "zamba2", {"layers_block_type": [LINEAR, "hybrid", "hybrid"]}),
    )
}
DENSE_FAMILIES |= {
    "hrm_text": Family("hrm_text", DENSE, note="two stacks of layers, each run several times per pass")
}
