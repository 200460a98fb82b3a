"""What one entry of the table of families looks like, and the words that the table uses often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOE, UNDECORATED, FACTORED, DENSE = "moe", "moe-undecorated", "factored", "dense"


@dataclass(frozen=True)
class Family:
    """One architecture of transformers and how to build a toy of it.

    Attributes:
        model_type: the `model_type` of its config in transformers.
        kind: "moe" (its experts run through transformers' experts interface), "moe-undecorated" (it has
            experts code of its own, which that interface does not reach), "factored" (ours: Monet) or "dense".
        overrides: config fields that go before the general recipe.
        note: what a user should know about it; empty if nothing.
        cls: name of the model class in transformers, where its table of causal language models has none.
    """

    model_type: str
    kind: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    cls: str | None = None


# Kinds of layers.
LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"

# Notes.
HYBRID = "hybrid: only some layers have attention"
STREAMS = "several residual streams: the layers pass on [batch, pos, stream, d_model]"
TEXT_ONLY = "a model for images or sound, run on text"

# Granite scales its embeddings, both branches, its attention scores and its logits; by default by 1.
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.5,
}
