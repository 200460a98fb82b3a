"""The mixtures of experts: those whose experts run through transformers' experts interface, then the others.

See `interp.zoo.families` for what an override is for.
"""

from __future__ import annotations

from typing import Any

from interp.zoo.families_common import (
    FULL,
    GRANITE,
    HYBRID,
    LINEAR,
    MOE,
    SLIDING,
    STREAMS,
    TEXT_ONLY,
    UNDECORATED,
    Family,
)

_PLAIN = """afmoe axk1 axk2 beam deepseek_v2 deepseek_v3 deepseek_v32 ernie4_5_moe exaone_moe flex_olmo
glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss hunyuan_v1_moe hy_v3 kolibri1 mimo_v2_flash minimax_m2 mixtral
olmoe phimoe qwen2_moe qwen3_moe solar_open"""
_OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"logit_scale": 0.5},  # 1/16 suits 8192 channels; here it would flatten the logits
    "dots1": {"layer_types": [SLIDING, FULL, SLIDING]},  # the default has full attention only
    "flint": {"mlp_only_layers": [0]},  # by default the first two are dense, which would leave one
    "granitemoe": GRANITE,
    "granitemoe_swa": GRANITE,
    "granitemoeshared": GRANITE,
    "laguna": {"layer_types": [SLIDING, FULL, SLIDING], "num_attention_heads_per_layer": [4, 4, 4]},
    "mellum": {"layer_types": [SLIDING, FULL, SLIDING]},
}
_HYBRIDS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": [LINEAR, FULL, LINEAR]},  # the default has one full layer in six
    "granitemoehybrid": GRANITE | {"layer_types": [LINEAR, FULL, LINEAR]},  # by default no attention
    # state space, attention, state space; experts in the middle layer, so that both kinds of MLP occur
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": [LINEAR, FULL, LINEAR]},
    "lfm2_moe": {"layer_types": ["conv", FULL, "conv"]},  # by default no list, which the model refuses
    # MiniMax-Text-01 adds 3.56 x the residual; its linear attention works in blocks, here of 4 positions
    "minimax": {
        "block_size": 4,
        "full_attn_alpha_factor": 1.5,
        "linear_attn_alpha_factor": 1.5,
        "mlp_alpha_factor": 1.5,
    },
    # each layer is one block: state space, experts, attention or plain MLP; the list decides the depth
    "nemotron_h": {"layer_types": [LINEAR, "moe", FULL, "mlp"], "use_mamba_kernels": False},
    "qwen3_next": {},
}
MOE_FAMILIES: dict[str, Family] = {
    **{name: Family(name, MOE) for name in _PLAIN.split()},
    **{name: Family(name, MOE, overrides) for name, overrides in _OVERRIDES.items()},
    **{name: Family(name, MOE, overrides, HYBRID) for name, overrides in _HYBRIDS.items()},
}

MOE_FAMILIES |= {
    # The summaries of 128 positions that the default makes would never be complete in a short text.
    "deepseek_v4": Family(
        "deepseek_v4",
        MOE,
        {
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "num_key_value_heads": 1,
            "o_groups": 2,
            "o_lora_rank": 12,
        },
        f"{STREAMS}; its first layer routes by token id, without a router",
    ),
    "hy_v4": Family("hy_v4", MOE, note=STREAMS),
    "mistral4": Family("mistral4", MOE, cls="Mistral4ForCausalLM"),
    # One expert per token is all that its code takes; the default has no sliding layers.
    "zaya": Family(
        "zaya",
        MOE,
        {
            "num_experts_per_tok": 1,
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
            "router_hidden_size": 12,
        },
        "one expert per token; attention and convolution mixed in every layer",
    ),
}

# Their language model is a part with a config and a causal-LM class of its own.
MOE_FAMILIES |= {
    "aria": Family("aria_text", MOE),
    "dots3_note": Family(
        "dots3_note_text",
        MOE,
        {  # sliding layers have sizes of their own, under old names that only the constructor takes
            "shared_experts_intermediate_size": 28,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 18,
            "swa_kv_lora_rank": 20,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 10,
            "swa_v_head_dim": 12,
        },
    ),
    "gemma4": Family(
        "gemma4_text",
        MOE,
        {  # as gemma-4-26B-A4B: in full layers wider heads, and values that are the keys
            "enable_moe_block": True,
            "layer_types": [SLIDING, SLIDING, FULL],
            "per_layer_config": {2: {"head_dim": 24}},
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 30.0,
        },
        "each layer adds a dense MLP and a mixture of experts; full-attention layers have wider heads",
    ),
    # Divides its logits by 24, which at this width would leave them nearly constant.
    "inkling": Family(
        "inkling_text", MOE, {"logits_mup_width_multiplier": 2.0}, "a convolution after attention and after the MLP"
    ),
    "inkling2": Family(
        "inkling2_text",
        MOE,
        {
            "n_layers_per_attn_res_block": 2,  # the residual stream starts anew every 2 layers, by default 6
            "log_scaling_n_floor": 4,  # queries grow with their position, by default from 128 000 on
        },
        "the residual stream starts anew in every block of layers, which read a mix of the blocks before",
    ),
    "minimax_m3_vl": Family(
        "minimax_m3_vl_text",
        MOE,
        {  # the default has full attention only; sparse attention keeps 2 blocks of 4 positions
            "layer_types": [FULL, "minimax_m3_sparse", "minimax_m3_sparse"],
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
    ),
    "qwen3_5_moe": Family("qwen3_5_moe_text", MOE, note=HYBRID),
    "qwen4_exp": Family(
        "qwen4_exp_text",
        MOE,
        {  # the scorer of its sparse attention, unset by default, which its model refuses
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
        f"{HYBRID}; several residual streams: the layers pass on [batch, pos, stream * d_model]",
    ),
}

_DEEPSEEK_OCR = {  # how far the image tower narrows its picture: sizes in a list
    "vision_config": {"sam_config": {"downsample_channels": [8, 32], "global_attn_indexes": [0]}}
}
# Here only the whole model has a language-modelling head. `mrope_section`: how many of a head's frequencies
# turn with time, height and width.
MOE_FAMILIES |= {
    "deepseek_ocr2": Family(
        "deepseek_ocr2",
        MOE,
        # the default has no list of MLPs, which the model refuses
        _DEEPSEEK_OCR | {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}},
        TEXT_ONLY,
        "DeepseekOcr2ForConditionalGeneration",
    ),
    "ernie4_5_vl_moe": Family(
        "ernie4_5_vl_moe",
        MOE,
        {
            "text_config": {
                "moe_intermediate_size": [24, 20],  # experts for text, experts for images
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1, 2]},
            }
        },
        f"{TEXT_ONLY}; two sets of experts, for text and for images",
        "Ernie4_5_VLMoeForConditionalGeneration",
    ),
    "glm4v_moe": Family(
        "glm4v_moe",
        MOE,
        {
            "text_config": {
                "head_dim": 16,  # not a field of the config, but read from it
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 1, 1],
                }
            }
        },
        TEXT_ONLY,
        "Glm4vMoeForConditionalGeneration",
    ),
    "glm5_next": Family(
        "glm5_next",
        MOE,
        # no rotary part; its scorer pools positions two by two
        {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2}},
        f"{TEXT_ONLY}; {HYBRID}; {STREAMS}",
        "Glm5NextForConditionalGeneration",
    ),
    "mistral_large4": Family("mistral_large4", MOE, {}, TEXT_ONLY, "MistralLarge4ForConditionalGeneration"),
    "muse_spark": Family(
        "muse_spark",
        MOE,
        {  # the experts work in a space of their own, here 20 wide; logits not damped as for 8192 channels
            "text_config": {"moe_hidden_size": 20, "output_multiplier": 1.0},
            "audio_config": {"patch_sizes": [16, 6, 5], "hidden_sizes": [8, 8, 8], "depths": [1, 1, 1]},
        },
        f"{TEXT_ONLY}; experts read and write a projection of the residual stream",
        "MuseSparkForConditionalGeneration",
    ),
    "qwen3_omni_moe": Family(
        # Its positions read a token id that the config class does not declare.
        "qwen3_omni_moe_thinker",
        MOE,
        {"vision_start_token_id": 5},
        TEXT_ONLY,
        "Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "qwen3_vl_moe": Family("qwen3_vl_moe", MOE, {}, TEXT_ONLY, "Qwen3VLMoeForConditionalGeneration"),
    "unlimited_ocr": Family(
        "unlimited_ocr", MOE, _DEEPSEEK_OCR, TEXT_ONLY, "UnlimitedOcrForConditionalGeneration"
    ),
}

# Mixtures of experts with code of their own.
UNDECORATED_FAMILIES: dict[str, Family] = {
    # The model reads `rope_theta`, which the released config has and the config class does not know.
    "dbrx": Family("dbrx", UNDECORATED, {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 1.0}}),
    "jetmoe": Family("jetmoe", UNDECORATED, note="experts in attention too"),
    "llama4": Family(
        "llama4_text",
        UNDECORATED,
        {  # as Maverick, experts in every other layer; queries grow with position, by default from 8192 on
            "interleave_moe_layer_step": 2,
            "moe_layers": [1],
            "floor_scale": 4,
        },
        "the router's weight scales the expert's input, not its output",
    ),
    "longcat_flash": Family(
        "longcat_flash",
        UNDECORATED,
        {"zero_expert_num": 4},
        "a layer has two attention blocks, two MLPs and the experts, 4 of which return their input",
    ),
    "step3p7": Family(
        "step3p7",
        UNDECORATED,
        {"text_config": {"share_expert_dim": 28}},
        TEXT_ONLY,
        "Step3p7ForConditionalGeneration",
    ),
}
