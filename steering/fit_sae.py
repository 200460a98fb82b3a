"""Steering with one latent of a sparse autoencoder: add its direction, or set what it reads."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from steering.errors import SteeringError
from steering.nonlinear import Clamp
from steering.reading import one_site
from steering.vector import AFTER_PROMPT, SteeringMap, SteeringVector


def sae_latent(
    m: Any,
    sae: Any,
    latent: int,
    layer: Any,
    *,
    how: Literal["add", "clamp"] = "add",
    amount: float = 1.0,
    site: str = "resid_post",
    scope: Any = AFTER_PROMPT,
) -> SteeringMap:
    """``h + amount * d_f`` (a SteeringVector), or "clamp": ``h + (amount - a_f(h)) d_f``; d_f is its direction.

    `amount` is in the latent's own units: multiply its largest activation on ordinary text by a factor, as is usual
    (Templeton et al. 2024 clamp to 1..10 times that). Clamping takes the rest of h as it is, so the SAE's error is
    kept.

    Args:
        m: the model.
        sae: decoder weights [latent, d_model], or anything with ``W_dec`` (and for "clamp" ``W_enc`` [d_model,
            latent], ``b_enc``, ``b_dec``, and ``threshold`` if it is a JumpReLU). A latent's own activation is taken
            to be ReLU or JumpReLU of its pre-activation; TopK SAEs also compare latents, which clamping one leaves
            out.
        latent: which one.
        layer: where the SAE was trained.
        how: "add" or "clamp".
        amount: see above.
        site: where, with `layer` put in.
        scope: to which tokens it is applied.
    """
    place = one_site(m, layer, site)
    decoder = _part(sae, "W_dec") if not isinstance(sae, Tensor) else sae.detach().float().cpu()
    if decoder.dim() != 2 or decoder.shape[1] != m.d_model:
        raise SteeringError(
            f"sae: W_dec is {list(decoder.shape)}; expected [latent, {m.d_model}], one row per latent "
            f"({'transpose it' if decoder.shape[:1] == (m.d_model,) else 'is it a SAE of this model and site?'})"
        )
    if not 0 <= latent < len(decoder):
        raise SteeringError(f"latent={latent}: the SAE has latents 0..{len(decoder) - 1}")
    direction = decoder[latent].clone()
    record = {"latent": latent, "how": how, "amount": amount}
    if how == "add":
        return SteeringVector.of(m, {place: amount * direction}, method="sae_latent", scope=scope, record=record)
    if how != "clamp":
        raise SteeringError(f"how={how!r}: expected 'add' or 'clamp'")
    if isinstance(sae, Tensor):
        raise SteeringError("how='clamp' needs the encoder too; pass the SAE, not only its W_dec")
    clamp = Clamp(
        direction, _part(sae, "W_enc")[:, latent].clone(), _part(sae, "b_dec"), float(_part(sae, "b_enc")[latent]),
        _threshold(sae, latent), float(amount),
    )  # fmt: skip
    return SteeringMap.of(m, {place: clamp}, method="sae_latent", scope=scope, record=record)


def _threshold(sae: Any, latent: int) -> float:
    """JumpReLU's, one for all latents or one each; 0 is a ReLU."""
    value = getattr(sae, "threshold", None)
    if value is None:
        return 0.0
    flat = torch.as_tensor(value).reshape(-1)
    return float(flat[latent if len(flat) > 1 else 0])


def _part(sae: Any, name: str) -> Tensor:
    value = getattr(sae, name, None)
    if not isinstance(value, Tensor):
        raise SteeringError(f"sae: {type(sae).__name__} has no {name}; expected a SAE, or its W_dec as a tensor")
    return value.detach().float().cpu()


def largest_activation(m: Any, sae: Any, latent: int, layer: Any, texts: Any, *, site: str = "resid_post") -> float:
    """The latent's largest activation over all tokens but the first of `texts`, by ``sae.encode``."""
    from steering import pairs
    from steering.reading import each_token

    place, best = one_site(m, layer, site), 0.0
    with torch.no_grad():
        for _, h in each_token(m, pairs.texts(m, texts), [place], skip=1):
            best = max(best, float(sae.encode(h)[:, latent].max())) if len(h) else best
    return best
