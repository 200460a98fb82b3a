"""The shape of a Monet model, under the keys that published checkpoints use.

    moe_experts   n: each of the two key axes has n entries, so a layer has N = n^2 experts
    moe_dim       m: hidden neurons of one expert
    moe_heads     H: routing heads
    moe_topk      k: about k keys per head and axis survive the router's threshold
    moe_groups    layers that share one router; the first layer of each group holds it

Two keys are ours. `moe_masked_layers` lists the layers whose experts are partly switched off for good (their masks are
tensors of the checkpoint), and the two coefficients weigh the routing losses in training.
"""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

DECOMPOSITIONS = ("vertical", "horizontal")


@strict
class MonetConfig(LlamaConfig):
    """Configuration of `MonetModel`: a Llama body whose MLPs are n^2 experts made of 2n parts.

    Defaults are those of the published configuration class (a checkpoint's own values matter: the paper trains with
    moe_topk = 8) and the loss coefficients are the paper's, 1e-3.

    Raises (when made): ValueError for sizes that do not fit together.
    """

    model_type: ClassVar[str] = "monet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "lm_loss", "aux_loss", "uniformity_loss", "ambiguity_loss", "router_probs",
    ]  # fmt: skip
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }

    intermediate_size: int | None = None  # there is no dense MLP; published files say null
    mlp_bias: bool | None = None
    hidden_act: str = "relu2"
    moe_dim: int = 8
    moe_heads: int = 8
    moe_experts: int = 512
    moe_topk: int = 32
    moe_groups: int = 4
    moe_decompose: str = "vertical"
    output_router_probs: bool = False
    moe_uniformity_coef: float = 1e-3
    moe_ambiguity_coef: float = 1e-3
    moe_masked_layers: list[int] | None = None

    @property
    def n_groups(self) -> int:
        """Number of routers."""
        return -(-self.num_hidden_layers // self.moe_groups)

    def layers_of_group(self, group: int) -> range:
        """The layers that share router number `group`."""
        first = group * self.moe_groups
        return range(first, min(first + self.moe_groups, self.num_hidden_layers))

    def validate_architecture(self) -> None:
        """Called by `strict` after every field is set."""
        super().validate_architecture()
        if self.moe_decompose not in DECOMPOSITIONS:
            raise ValueError(f"moe_decompose={self.moe_decompose!r}: expected one of {', '.join(DECOMPOSITIONS)}")
        for name in ("moe_dim", "moe_heads", "moe_experts", "moe_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if not 1 <= self.moe_topk <= self.moe_experts:
            raise ValueError(f"moe_topk={self.moe_topk}: expected 1..{self.moe_experts} (moe_experts)")
        if self.moe_decompose == "vertical" and (self.moe_dim % 2 or self.hidden_size % 2):
            raise ValueError(
                f"moe_dim={self.moe_dim}, hidden_size={self.hidden_size}: a vertical expert is two halves, so both "
                "must be even (or choose moe_decompose='horizontal')"
            )
        beyond = [layer for layer in self.moe_masked_layers or [] if not 0 <= layer < self.num_hidden_layers]
        if beyond:
            raise ValueError(f"moe_masked_layers={beyond}: the model has layers 0..{self.num_hidden_layers - 1}")
