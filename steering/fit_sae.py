"""Steering with one latent of a sparse autoencoder: add its direction, or set what it reads.

steering.sae_latent(m, s, 17, amount=4.0)                       s from interp.sae, at its own site
steering.sae_latent(m, sae_lens_sae, 17, layer=5, how="clamp")  or anything with W_dec (and W_enc, b_enc, b_dec)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from steering.errors import SteeringError
from steering.maps import Map
from steering.nonlinear import Clamp, Foreign
from steering.reading import one_site
from steering.vector import AFTER_PROMPT, SteeringMap, SteeringVector


def sae_latent(
    m: Any,
    sae: Any,
    latent: int,
    layer: Any = None,
    *,
    how: Literal["add", "clamp"] = "add",
    amount: float = 1.0,
    site: str = "resid_post",
    scope: Any = AFTER_PROMPT,
) -> SteeringMap:
    """``h + amount * d_f`` (a SteeringVector), or "clamp": ``h + (amount - a_f(h)) d_f``; d_f is its direction.

    `amount` is in the latent's own units: multiply its largest activation on ordinary text (`largest_activation`) by
    a factor, as is usual. Clamping takes the rest of h as it is, so the SAE's error is kept.

    Args:
        m: the model.
        sae: an `interp.sae.SAE`; decoder weights [latent, d_model]; or anything with ``W_dec`` (and for "clamp"
            ``W_enc`` [d_model, latent], ``b_enc``, ``b_dec``, and ``threshold`` if it is a JumpReLU). Of the last
            kind a latent's activation is taken to be ReLU or JumpReLU of its pre-activation.
        latent: which one.
        layer: where the SAE was trained; None for the site that it names itself.
        how: "add" or "clamp". Of an `interp.sae.SAE`, a clamp cannot be saved: save the SAE.
        amount: see above.
        site: where, with `layer` put in.
        scope: to which tokens it is applied.
    """
    place = _place(m, sae, layer, site)
    decoder = _decoder(sae)
    if decoder.dim() != 2 or decoder.shape[1] != m.d_model:
        raise SteeringError(
            f"sae: its decoder is {list(decoder.shape)}; expected [latent, {m.d_model}], one row per latent "
            f"({'transpose it' if decoder.shape[:1] == (m.d_model,) else 'is it a SAE of this model and site?'})"
        )
    if not 0 <= latent < len(decoder):
        raise SteeringError(f"latent={latent}: the SAE has latents 0..{len(decoder) - 1}")
    record = {"latent": latent, "how": how, "amount": amount}
    if how == "add":
        vector = amount * decoder[latent].clone()
        return SteeringVector.of(m, {place: vector}, method="sae_latent", scope=scope, record=record)
    if how != "clamp":
        raise SteeringError(f"how={how!r}: expected 'add' or 'clamp'")
    return SteeringMap.of(m, {place: _clamp(sae, latent, amount)}, method="sae_latent", scope=scope, record=record)


def _place(m: Any, sae: Any, layer: Any, site: str) -> str:
    if layer is not None or "[" in site:
        return one_site(m, layer, site)
    named = list(getattr(sae, "sites", ()))
    if len(named) != 1:
        raise SteeringError(f"layer: this SAE names {len(named)} sites of its own; say where it was trained")
    return one_site(m, None, str(named[0]))


def _decoder(sae: Any) -> Tensor:
    """[latent, d_model]."""
    if isinstance(sae, Tensor):
        return sae.detach().float().cpu()
    return _part(sae, "decoder" if isinstance(getattr(sae, "decoder", None), Tensor) else "W_dec")


def _clamp(sae: Any, latent: int, amount: float) -> Map:
    if isinstance(sae, Tensor):
        raise SteeringError("how='clamp' needs the encoder too; pass the SAE, not only its decoder")
    if isinstance(getattr(sae, "decoder", None), Tensor) and callable(getattr(sae, "clamp", None)):
        return Foreign(sae.clamp(latent, amount).map)  # ours knows its own architecture, TopK included
    return Clamp(
        _decoder(sae)[latent].clone(), _part(sae, "W_enc")[:, latent].clone(), _part(sae, "b_dec"),
        float(_part(sae, "b_enc")[latent]), _threshold(sae, latent), float(amount),
    )  # fmt: skip


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
        raise SteeringError(f"sae: {type(sae).__name__} has no {name}; expected a SAE, or its decoder as a tensor")
    return value.detach().float().cpu()


def largest_activation(
    m: Any, sae: Any, latent: int, layer: Any, texts: Any, *, site: str = "resid_post"
) -> float:  # fmt: skip
    """The latent's largest activation over all tokens but the first of `texts`, by ``sae.encode``."""
    from steering import pairs
    from steering.reading import each_token

    place, best = _place(m, sae, layer, site), 0.0
    with torch.no_grad():
        for _, h in each_token(m, pairs.texts(m, texts), [place], skip=1):
            best = max(best, float(sae.encode(h)[:, latent].max())) if len(h) else best
    return best
