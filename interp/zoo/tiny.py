"""Shrink any Hugging Face language model to a toy of the same architecture, with random weights.

A family's code is decided by its config, not by its size: the same attention, router and expert code runs with 32
channels as with 7168. So a model of under a million parameters is a fair test of a method on that architecture, and
needs no download:

    m = interp.load("tiny:olmoe")            # this module builds it
    hf = tiny("deepseek_v3", seed=1)         # or take the transformers model itself

The method has two halves. `shrink` walks over the fields of a config and replaces each size it knows (`SIZES`),
leaving every switch as the family has it; `randomise` fills all weights so that nothing is degenerate: a fresh model
has norms of exactly one, biases of exactly zero and routers that barely prefer any expert, and a test on such a model
passes with the norm, the bias or the routing forgotten. Which families exist, and what each needs beyond the general
recipe, is in `interp.zoo.families`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from interp.zoo.families import FAMILIES, UNBUILT, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

N_LAYERS = 3

# One width per role, all different, so that a mix-up of two axes is a shape error and not a silent success.
# One line per role; the names are the spellings that families use for it.
_ROLES: dict[int | float, str] = {
    101: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd embedding_size word_embed_proj_dim",
    N_LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"
    " encoder_attention_heads",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts",
    16: "head_dim",  # heads x head_dim = 64: not the hidden size
    40: "intermediate_size ffn_dim ffn_hidden_size dff n_inner decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts",
    24: "moe_intermediate_size expert_ffn_hidden_size",
    28: "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size",
    1: "first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts moe_num_shared_experts",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length",
    5: "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size",
}
SIZES: dict[str, int | float] = {name: size for size, names in _ROLES.items() for name in names.split()}
# Multi-head latent attention: queries and keys are nope + rope = 14 wide, values 12.
SIZES |= {"kv_lora_rank": 20, "q_lora_rank": 18, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 12}
# The scorer of sparse attention keeps 4 positions, fewer than a test's tokens, so that the choice matters.
SIZES |= {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
# Linear attention and state space layers.
SIZES |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
SIZES |= {"linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4}
SIZES |= {"mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_d_state": 8}
SIZES |= {"mamba_chunk_size": 8, "ssm_state_size": 8, "mamba_dt_rank": 4}
# Towers for images and sound: as small as they get; the text part runs without them.
SIZES |= {"depth": 1, "out_hidden_size": 32, "num_position_embeddings": 16, "projector_hidden_size": 32}


def tiny(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Build a tiny causal language model of a transformers family, with random weights, ready to run.

    Args:
        model_type: a family of `FAMILIES` (`"olmoe"`, `"gemma3"`), or any other `model_type` of the installed
            transformers, to which the general recipe is then applied as it is.
        seed: decides every weight; torch's global random state is left alone.
        dtype: of the weights. They are drawn in float32 and rounded, so that two dtypes of one seed are close.
        **overrides: config fields that go before the recipe (`num_hidden_layers=5`); a field of a part of the
            config is given as a dictionary (`text_config={"num_hidden_layers": 5}`).

    Returns:
        A `PreTrainedModel` in eval mode on the CPU: 3 layers (or one of each kind), `hidden_size` 32, 4 heads (2 for
        keys and values where the family allows it), vocabulary 101, experts 8, top 2, expert width 24.

    Raises:
        ValueError: if the family is unknown to transformers, or known not to work as a causal language model.
    """
    family = _family(model_type)
    config = shrink(_config_class(family.model_type), _merge(family.overrides, overrides))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kernels that are not installed: of no interest at this size
        torch.manual_seed(seed)
        model = _model_class(family, config)._from_config(config, dtype=dtype)
        randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def shrink(config_class: type[PretrainedConfig], overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A config of `config_class` with every size of `SIZES` that it has made small, and its switches left alone.

    Lists with one entry per layer keep each kind of entry once; special tokens get ids inside the small vocabulary
    (padding 0, start 1, end 2, all others at its end); parts with a config of their own are shrunk likewise.
    """
    default = config_class()
    overrides = dict(overrides or {})
    known = {f.name for f in fields(config_class)} | set(default.to_dict())
    values: dict[str, Any] = {name: size for name, size in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:  # latent attention: `head_dim` is the rotary part, and every head has its own keys
        values |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    for name in ("n_group", "num_expert_group"):  # routers that first choose groups of experts: 1 group of 2
        if (getattr(default, name, None) or 1) > 1:
            values |= {name: 2, "topk_group": 1}
    values |= _short_lists(default, n_layers=overrides.get("num_hidden_layers", N_LAYERS))
    values |= _token_ids(known)
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            values[name] = shrink(type(part), overrides.pop(name, None))
    return config_class(**{**values, **overrides})


def _short_lists(config: PretrainedConfig, n_layers: int) -> dict[str, list[Any]]:
    """Per-layer lists (`layer_types`, `no_rope_layers`, ...) cut to `n_layers`: each distinct entry in turn.

    The kinds of MLP are the exception: dense layers come first in every family, so theirs reads dense, sparse, sparse.
    """
    depth = getattr(config, "num_hidden_layers", None)
    short = {}
    for name, value in config.to_dict().items():
        if isinstance(value, list | tuple) and depth and len(value) == depth and not isinstance(value[0], dict):
            kinds = list(dict.fromkeys(value))
            tail = kinds[-1:] if name == "mlp_layer_types" else kinds
            short[name] = (kinds + tail * n_layers)[:n_layers]
    return short


def _token_ids(known: set[str]) -> dict[str, int]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    others = (n for n in sorted(known) if n not in ids and n.endswith(("_token_id", "_token_index")))
    spare = {name: int(SIZES["vocab_size"]) - 1 - i for i, name in enumerate(others)}
    return {name: value for name, value in {**ids, **spare}.items() if name in known}


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fill all weights of `model`, in place, so that every part of it has an effect that a test can see.

    Matrices, embeddings and experts: N(0, 0.2²), which at these widths keeps activations of order one. Vectors keep
    what the family starts them with (one or zero for a norm, a decay rate for a state space layer) plus N(0, 0.1²).
    The bias that some routers add to choose experts is a buffer, not a parameter, and is filled too.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            fresh = weight.float() + 0.1 * noise if weight.ndim < 2 or "A_log" in name else 0.2 * noise
            weight.copy_(fresh)
        for name, buffer in model.named_buffers():
            last = name.rpartition(".")[2]
            if last.endswith("correction_bias") or last in ("expert_bias", "layer_scalar"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif last == "tid2eid":  # a fixed table token -> experts: distinct experts for each token
                n_experts = int(SIZES["n_routed_experts"])
                order = torch.rand(buffer.shape[0], n_experts, generator=generator).argsort(-1)
                buffer.copy_(order[:, : buffer.shape[1]])


def _family(model_type: str) -> Family:
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in UNBUILT:
        raise ValueError(f"tiny({model_type!r}): {UNBUILT[model_type]}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model_type in CONFIG_MAPPING_NAMES:
        return Family(model_type, "dense")
    near = difflib.get_close_matches(model_type, [*FAMILIES, *CONFIG_MAPPING_NAMES], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "interp.zoo.families lists them"
    raise ValueError(f"tiny({model_type!r}): no such family in the installed transformers; {hint}")


def _config_class(model_type: str) -> type[PretrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def _model_class(family: Family, config: PretrainedConfig) -> type[PreTrainedModel]:
    import transformers

    if family.cls:
        return getattr(transformers, family.cls)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(f"tiny({family.model_type!r}): transformers has no causal language model of it") from None
    return found[0] if isinstance(found, tuple) else found


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on `base`, dictionaries merged rather than replaced where both have one."""
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], Mapping) and isinstance(over[key], Mapping):
            merged[key] = _merge(base[key], over[key])
    return merged
