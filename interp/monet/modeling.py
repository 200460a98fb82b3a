"""The model: a Llama body in which each MLP is n^2 experts, and groups of layers share one routing.

    x   = resid + attention(norm1(resid))
    h   = norm2(x)
    g1, g2 = router(h)          in the first layer of a group; the next layers of the group reuse them
    out = x + experts(h, g1, g2)

Attention, rotary embedding and norms are transformers' own Llama parts, so every attention implementation works, and so
does everything that hooks into them. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from interp.monet import losses
from interp.monet.config import MonetConfig
from interp.monet.experts import Experts, make_experts
from interp.monet.masks import MaskError, MonetMask
from interp.monet.router import MonetRouter

#: g1, g2 [batch, pos, head, n] of one router.
RouterProbs = tuple[Tensor, Tensor]


@dataclass
class MonetModelOutput(ModelOutput):
    """What `MonetModel` returns.

    Attributes:
        last_hidden_state: [batch, pos, d_model], after the final norm.
        router_probs: one entry per layer: (g1, g2) where the layer has a router, None where it reuses them.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_probs: tuple[RouterProbs | None, ...] | None = None


@dataclass
class MonetCausalLMOutput(ModelOutput):
    """What `MonetForCausalLM` returns.

    Attributes:
        loss: the training objective lm_loss + aux_loss, if labels were given.
        aux_loss: coef * uniformity + coef * ambiguity, averaged over routers.
        logits: [batch, pos, vocab].
        router_probs: as in `MonetModelOutput`, if asked for.
        lm_loss: cross-entropy of the next token, nats.
        uniformity_loss, ambiguity_loss: the two routing losses before their coefficients (see `losses`).
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_probs: tuple[RouterProbs | None, ...] | None = None
    lm_loss: Tensor | None = None
    uniformity_loss: Tensor | None = None
    ambiguity_loss: Tensor | None = None


class MonetDecoderLayer(GradientCheckpointingLayer):
    """(hidden, g1, g2 of the layer before) -> (hidden, g1, g2): tensors side by side, as checkpointing wants them."""

    def __init__(self, config: MonetConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.router = MonetRouter(config) if layer_idx % config.moe_groups == 0 else None
        self.moe = make_experts(config, masked=layer_idx in (config.moe_masked_layers or ()))

    def forward(
        self, hidden_states: Tensor, g1: Any = None, g2: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`g1` and `g2` may be None where this layer has its own router, as layer 0 does."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if self.router is not None:
            g1, g2 = self.router(normed)
        return hidden_states + self.moe(normed, g1, g2), g1, g2


class MonetPreTrainedModel(PreTrainedModel):
    """What `MonetModel` and `MonetForCausalLM` share: loading, initialisation, expert masks."""

    config_class = MonetConfig
    config: MonetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MonetDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # the router's threshold compares with these: rounding them to half precision would change who is chosen
    _keep_in_fp32_modules_strict = ["router.norm1", "router.norm2"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": MonetDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for bias in module.parameters(recurse=False):
                init.zeros_(bias)
            if module.keep is not None:
                init.ones_(module.keep)

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs: Any
    ) -> Any:
        """transformers' `from_pretrained`, except that a checkpoint which does not fill the model is refused.

        Raises:
            ValueError: tensors are missing or, unless `ignore_mismatched_sizes`, of another shape.
            MaskError: an expert mask of another shape, or one that the configuration does not announce.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        where = args[0] if args else kwargs.get("pretrained_model_name_or_path", "checkpoint")
        wrong = sorted(info["mismatched_keys"])
        for key, found, expected in wrong:
            if key.endswith(".moe.keep"):
                raise MaskError(f"{where}: mask {key} has shape {tuple(found)}, expected {tuple(expected)}")
        if wrong and not ignore_mismatched_sizes:
            key, found, expected = wrong[0]
            raise ValueError(
                f"{where}: {len(wrong)} tensors have another shape than the configuration says, first "
                f"{key}: {tuple(found)} in the checkpoint, {tuple(expected)} expected"
            )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{where}: {len(missing)} tensors of {cls.__name__} are not in the checkpoint, first "
                f"{missing[0]}. They would be random numbers; get the whole checkpoint"
            )
        if silent := sorted(k for k in info["unexpected_keys"] if k.endswith(".moe.keep")):
            raise MaskError(
                f"{where}: holds an expert mask {silent[0]}, but config.moe_masked_layers "
                f"({model.config.moe_masked_layers}) does not list its layer, so it would not be applied"
            )
        return (model, info) if output_loading_info else model

    # -- masks -------------------------------------------------------------------------------------------------
    def experts(self) -> Iterator[Experts]:
        """The experts module of each layer, in order."""
        yield from (layer.moe for layer in self.base_model.layers)

    @property
    def expert_mask(self) -> MonetMask:
        """The experts that are switched off now."""
        off = {layer: ~moe.keep for layer, moe in enumerate(self.experts()) if moe.keep is not None}
        return MonetMask(self.config.moe_experts, self.config.num_hidden_layers, off)

    def set_expert_mask(self, mask: MonetMask) -> None:
        """Switches off exactly these experts; `save_pretrained` keeps it so. Raises MaskError if it does not fit.

        Replaces the mask that was set before: for more on top of it, `model.set_expert_mask(model.expert_mask | more)`.
        """
        mask.check(self.config)
        with torch.inference_mode(False):
            for layer, moe in enumerate(self.experts()):
                moe.keep = (~mask.off[layer]).to(next(moe.parameters()).device) if layer in mask.off else None
        self.config.moe_masked_layers = [*mask.off] or None

    def clear_expert_mask(self) -> None:
        """Switches every expert on."""
        self.set_expert_mask(MonetMask.none(self.config))


class MonetModel(MonetPreTrainedModel):
    """Token ids -> residual stream after the final norm."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MonetDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_probs: bool | None = None,
        **kwargs: Any,
    ) -> MonetModelOutput:
        """As in LlamaModel; `output_router_probs` (default: the configuration's) adds each router's g1 and g2."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        if output_router_probs is None:
            output_router_probs = self.config.output_router_probs
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        hidden_states, g1, g2 = inputs_embeds, None, None
        probs: list[RouterProbs | None] = []
        for layer in self.layers:
            hidden_states, g1, g2 = layer(
                hidden_states, g1, g2, attention_mask=causal_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
            router: MonetRouter | None = layer.router  # type: ignore[assignment]
            if self.training and router is not None:
                router.absorb()
            if output_router_probs:
                probs.append((g1, g2) if router is not None else None)
        return MonetModelOutput(
            self.norm(hidden_states), past_key_values, router_probs=tuple(probs) if output_router_probs else None
        )


class MonetForCausalLM(MonetPreTrainedModel, GenerationMixin):
    """Token ids -> next-token logits; with labels, the training objective and its parts."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.model = MonetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_probs: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MonetCausalLMOutput:
        """As in LlamaForCausalLM.

        The routing losses are computed whenever labels or `output_router_probs` are given, over real tokens only if
        `attention_mask` is [batch, pos]. `loss` is the training objective: for a perplexity take `lm_loss`.
        """
        wants_probs = self.config.output_router_probs if output_router_probs is None else output_router_probs
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_router_probs=wants_probs or labels is not None, **kwargs,
        )  # fmt: skip
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        result = MonetCausalLMOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if outputs.router_probs is not None:
            result.uniformity_loss, result.ambiguity_loss = _routing_losses(outputs.router_probs, attention_mask)
            result.aux_loss = (
                self.config.moe_uniformity_coef * result.uniformity_loss
                + self.config.moe_ambiguity_coef * result.ambiguity_loss
            )
        if labels is not None:
            result.lm_loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
            result.loss = result.lm_loss + result.aux_loss.to(result.lm_loss.device)  # type: ignore[union-attr]
        if wants_probs:
            result.router_probs = outputs.router_probs
        return result


def _routing_losses(
    router_probs: tuple[RouterProbs | None, ...], attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(uniformity, ambiguity), averaged over the routers."""
    routings = [pair for pair in router_probs if pair is not None]
    batch, pos = routings[0][0].shape[:2]
    mask = None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and attention_mask.shape[0] == batch:
        mask = attention_mask[:, -pos:]  # with a cache the mask also covers the past
    first = routings[0][0]
    uniform = [losses.uniformity(g1, g2, mask).to(first.device) for g1, g2 in routings]
    ambiguous = [losses.ambiguity(g1, g2, mask).to(first.device) for g1, g2 in routings]
    return torch.stack(uniform).mean(), torch.stack(ambiguous).mean()
