"""Shrink any Hugging Face language model to a toy of the same architecture, with random weights.

A family's code is decided by its config, not by its size: the same attention, router and expert code runs
with 32 channels as with 7168. So a model of a tenth of a million parameters is a fair test of a method on an
architecture, and needs no download:

    m = interp.load("tiny:olmoe")            # this module builds it
    hf = tiny("deepseek_v3", seed=1)         # or take the transformers model itself

The method has two halves. `shrink` walks over the fields of a config and replaces each size it knows
(`SIZES`), and leaves every switch as the family has it. `randomise` fills all weights so that nothing is
degenerate: a fresh model has norms of exactly one, biases of exactly zero and routers that prefer no expert,
so a test on it passes with the norm, the bias or the routing forgotten. Which families there are, and what
each needs beyond this general recipe, is in `interp.zoo.families`.
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

# What each known size becomes, and the names that families have for it. Widths differ wherever families allow
# it, so that mixing up two axes is an error of shapes and not a silent success.
_ROLES: tuple[tuple[int, str], ...] = (
    (101, "vocab_size vocab_size_per_layer_input"),
    (32, "hidden_size d_model n_embd embedding_size word_embed_proj_dim lru_width"),
    (N_LAYERS, "num_hidden_layers n_layer n_layers num_layers"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"),
    (16, "head_dim swa_head_dim kv_channels"),  # heads x head_dim = 64, not the hidden size
    (40, "intermediate_size ffn_dim ffn_hidden_size dff n_inner"),
    (40, "intermediate_size_mlp dense_intermediate_size"),  # beside experts
    (128, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length"),
    (5, "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size"),
    # experts: how many, how many of them a token visits, their width, the width of shared ones; how many of
    # those, and how many layers come before the first experts
    (8, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    (24, "moe_intermediate_size expert_ffn_hidden_size"),
    (28, "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers"),
    # latent attention: queries and keys are 8 + 6 = 14 wide, values 12; what they are made from, 18 and 20
    (8, "qk_nope_head_dim"),
    (6, "qk_rope_head_dim"),
    (12, "v_head_dim"),
    (18, "q_lora_rank"),
    (20, "kv_lora_rank"),
    # sparse attention: its scorer keeps 4 positions, fewer than a short text has, so that the choice matters
    (4, "index_topk keep_window_size"),
    (8, "index_head_dim"),
    (2, "index_n_heads"),
    # several residual streams per position (hyper-connections and their like)
    (3, "hc_mult hc_count altup_num_inputs"),
    (10, "hc_lowrank laurel_rank"),
    # linear attention and state space layers
    (2, "linear_num_key_heads n_groups"),
    (4, "linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads mamba_dt_rank"),
    (8, "linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state ssm_state_size"),
    (8, "mamba_chunk_size chunk_size"),
    (16, "mamba_d_head mamba_head_dim"),
    (64, "mamba_d_ssm"),
    # rotary width where it is a size, embeddings per layer, learned biases of distances
    (4, "rotary_dim d_rel"),
    (6, "hidden_size_per_layer_input rel_extent"),
    # towers for images and sound, as small as they get: the text part runs without them
    (1, "depth num_blocks encoder_layers"),
    (32, "out_hidden_size output_dim"),
    (4, "encoder_attention_heads"),
    (8, "mlp_dim output_channels projector_hidden_size projection_intermediate_size downsample_hidden_size"),
    (8, "nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel encoder_ffn_dim"),
    (16, "num_position_embeddings"),
    (112, "image_size"),
)
SIZES: dict[str, int] = {name: size for size, names in _ROLES for name in names.split()}

_COUNTS_OF_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
# Routers that first choose among groups of experts get two groups and choose one; others stay as they are.
_GROUPS = {"n_group": 2, "num_expert_group": 2, "topk_group": 1}


def tiny(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Build a tiny causal language model of a transformers family, with random weights, ready to run.

    Args:
        model_type: a family of `FAMILIES` (`"olmoe"`, `"gemma3"`), or another `model_type` of the installed
            transformers, to which the general recipe is then applied as it is.
        seed: decides every weight; torch's global random state is left alone.
        dtype: of the weights. They are drawn in float32 and rounded, so one seed gives the same model in two
            dtypes, up to rounding.
        **overrides: config fields that go before the recipe (`num_hidden_layers=5`). Fields of a part of a
            config are given as a dictionary (`text_config={"num_hidden_layers": 5}`).

    Returns:
        A `PreTrainedModel` in eval mode on the CPU: 3 layers (4 where a family needs them), 32 channels,
        4 heads (2 for keys and values where the family allows it), vocabulary 101, MLPs 40 wide; 8 experts,
        24 wide, of which each token visits 2.

    Raises:
        ValueError: if transformers has no such family, or it is none of causal language models (`UNBUILT`).

    Example:
        >>> from interp.zoo.tiny import tiny
        >>> model = tiny("olmoe")
        >>> model.model.layers[0].mlp.experts.down_proj.shape  # [expert, d_model, d_expert]
        torch.Size([8, 32, 24])
    """
    family = _family(model_type)
    config = shrink(_config_class(family.model_type), _merge(family.overrides, overrides))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are not installed: no matter at this size
        torch.manual_seed(seed)
        model = _model_class(family, config)._from_config(config, dtype=dtype)
        randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def shrink(
    config_class: type[PretrainedConfig], overrides: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """A config of `config_class` with every size that `SIZES` knows made small, every switch as it was.

    Lists with one entry per layer keep each kind of entry; special tokens get ids inside the small vocabulary
    (padding 0, start 1, end 2, all others at its end); parts with a config of their own are shrunk likewise.

    The config is built anew rather than changed, so that the fields that it derives from others follow.
    """
    default = config_class()
    overrides = dict(overrides or {})
    known = {field.name for field in fields(config_class)} | set(default.to_dict())
    values: dict[str, Any] = {name: size for name, size in SIZES.items() if name in known}
    if known & _COUNTS_OF_EXPERTS and "moe_intermediate_size" not in known:
        for name in known & {"intermediate_size", "ffn_hidden_size"}:  # then it is the width of an expert
            values[name] = SIZES["moe_intermediate_size"]
    if "kv_lora_rank" in known:  # latent attention: `head_dim` is the rotary part, and no heads share keys
        values |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    if any((getattr(default, name, None) or 1) > 1 for name in _GROUPS):
        values |= {name: size for name, size in _GROUPS.items() if name in known}
    values |= _per_layer_lists(default, n_layers=overrides.get("num_hidden_layers", N_LAYERS))
    values |= _token_ids(known)
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            values[name] = shrink(type(part), overrides.pop(name, None))
    return config_class(**{**values, **overrides})


def _per_layer_lists(config: PretrainedConfig, n_layers: int) -> dict[str, list[Any]]:
    """The lists of `config` with one entry per layer, cut to `n_layers`: its distinct entries in turn.

    The kinds of MLP are an exception: dense layers come first in every family, so they read dense, sparse,
    sparse, also where the default has no dense one.
    """
    depth = getattr(config, "num_hidden_layers", None)
    short = {}
    for name, value in config.to_dict().items():
        if not depth or not isinstance(value, list | tuple) or len(value) != depth:
            continue
        kinds = [SIZES[name]] if name in SIZES else list(dict.fromkeys(value))
        if name == "mlp_layer_types":
            kinds = ["dense", "sparse"] if kinds == ["sparse"] else kinds
            kinds += kinds[-1:] * n_layers
        short[name] = (kinds * n_layers)[:n_layers]
    return short


def _token_ids(known: set[str]) -> dict[str, int]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    others = (n for n in sorted(known) if n not in ids and n.endswith(("_token_id", "_token_index")))
    spare = {name: SIZES["vocab_size"] - 1 - i for i, name in enumerate(others)}
    return {name: value for name, value in {**ids, **spare}.items() if name in known}


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fill all weights of `model`, in place, so that every part of it has an effect that a test can see.

    Matrices, embeddings and experts become N(0, 0.2²), which at these widths keeps activations of order one.
    Vectors, and the decay rates of state space layers, keep what the family starts them with (one for a norm,
    zero for a bias) plus N(0, 0.1²). Some routers choose experts by a bias that is a buffer and no parameter:
    it is filled too, and so is the table from token to experts of a router that looks them up.
    """

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)  # in float32 whatever the dtype of the model

    with torch.no_grad():
        for name, weight in model.named_parameters():
            keep = weight.ndim < 2 or name.endswith("A_log")
            weight.copy_(weight.float() + 0.1 * noise(weight) if keep else 0.2 * noise(weight))
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias", "layer_scalar")):
                buffer.add_(0.1 * noise(buffer))
            elif name.endswith("tid2eid"):  # [token, slot]: distinct experts for each token
                order = torch.rand(len(buffer), SIZES["num_experts"], generator=generator).argsort(-1)
                buffer.copy_(order[:, : buffer.shape[1]])


def _family(name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    if name in UNBUILT:
        raise ValueError(f"tiny({name!r}): {UNBUILT[name]}")
    for family in FAMILIES.values():  # by its own model_type, as "gemma3_text"
        if family.model_type == name:
            return family
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if name in CONFIG_MAPPING_NAMES:
        return Family(name, "dense")
    near = difflib.get_close_matches(name, [*FAMILIES, *CONFIG_MAPPING_NAMES], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "interp.zoo.families.families() lists them"
    raise ValueError(f"tiny({name!r}): the installed transformers has no such family; {hint}")


def _config_class(model_type: str) -> type[PretrainedConfig]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type == "monet":
        import interp.monet  # noqa: F401 - makes the architecture known to transformers
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"tiny({model_type!r}): transformers {transformers.__version__} does not have this family; "
            "another version does"
        )
    return CONFIG_MAPPING[model_type]


def _model_class(family: Family, config: PretrainedConfig) -> type[PreTrainedModel]:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if family.cls:
        return getattr(transformers, family.cls)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"tiny({family.model_type!r}): transformers has no causal language model for it; "
            "interp.zoo.families.families() lists the families that have one"
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; where both have a dictionary, the two are merged likewise."""
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], Mapping) and isinstance(over[key], Mapping):
            merged[key] = _merge(base[key], over[key])
    return merged
