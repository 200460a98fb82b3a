"""Vectors of other libraries: repeng's ControlVector and steering-vectors' SteeringVector, as objects in memory.

Files of repeng are gguf (`steering.from_gguf`). Pickles are never opened: unpickle what you trust yourself and hand the
object over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steering.errors import SteeringError
from steering.vector import AFTER_PROMPT, SteeringVector


def from_repeng(m: Any, given: Any) -> SteeringVector:
    """A repeng ControlVector: ``directions`` {layer: [d_model]}, added behind the block on all tokens.

    Raises SteeringError for another kind of object, or another model type.
    """
    directions = getattr(given, "directions", None)
    if not isinstance(directions, dict) or not directions:
        raise SteeringError(
            f"expected a repeng ControlVector, with .directions {{layer: array}}; got {type(given).__name__}"
        )
    kind = getattr(given, "model_type", None)
    if kind is not None and kind != m.config.model_type:
        raise SteeringError(
            f"this ControlVector was made for a model of type {kind!r}; {m.name} is {m.config.model_type!r}"
        )
    vectors = {f"resid_post[{int(layer)}]": _tensor(value) for layer, value in directions.items()}
    return SteeringVector.of(m, vectors, method="repeng", scope="all")


#: steering-vectors' layer types, as sites of ours
LAYER_TYPES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}


def from_steering_vectors(m: Any, given: Any, scope: Any = AFTER_PROMPT) -> SteeringVector:
    """A SteeringVector of the package steering-vectors: ``layer_activations`` {layer: [d_model]} and ``layer_type``.

    There the tokens are chosen when it is applied (``min_token_index``), so `scope` is yours to say.
    """
    layers, kind = getattr(given, "layer_activations", None), getattr(given, "layer_type", "decoder_block")
    if not isinstance(layers, dict) or not layers:
        raise SteeringError(
            "expected a steering-vectors SteeringVector, with .layer_activations {layer: tensor}; got "
            f"{type(given).__name__}"
        )
    if kind not in LAYER_TYPES:
        raise SteeringError(f"layer_type={kind!r}: there are {', '.join(LAYER_TYPES)}")
    vectors = {f"{LAYER_TYPES[kind]}[{int(layer)}]": _tensor(value) for layer, value in layers.items()}
    return SteeringVector.of(m, vectors, method="steering-vectors", scope=scope)


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().float().flatten()
