"""Codes by pursuit: one latent after another, each on what the ones before have left over.

`matching` is the encoder of MP-SAE (Costa et al. 2025, arXiv:2506.03093)::

    r = x - b;  repeat:  j = argmax <D, r>;  z_j += relu <D_j, r>;  r -= z D_j

so the norm of the residual never rises, and the number of steps, which is at most the number of latents that fire, can
be changed after training. `gradient` (Blumensath & Davies 2008) is the pursuit that finds better codes for the decoder
of *any* SAE at inference (Nanda et al. 2024): after each new latent all amounts of the support are improved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interp.sae.kernels import Support

#: A residual of this norm counts as explained.
TOLERANCE = 1e-2
_GRAM_LATENTS = 8192  # up to here D D^T is kept (256 MB), and a step looks a row up instead of multiplying by D


def matching(
    centred: Tensor, decoder: Tensor, steps: int, tolerance: float = TOLERANCE
) -> tuple[Support, Tensor, Tensor]:
    """Matching pursuit.

    Args:
        centred: x - b [row, d].
        decoder: atoms of norm 1 [d_sae, d].
        steps: latents per token at most (one may be chosen twice).
        tolerance: a token is done when its residual's norm is below.

    Returns:
        The support, its values [entry], and the residual [row, d]; the last two are differentiable.
    """
    ids, active = _choose(centred.detach(), decoder.detach(), steps, tolerance)
    residual, amounts = centred, []
    for j, on in zip(ids, active, strict=True):
        atom = decoder[j]
        amount = (residual * atom).sum(1).relu() * on
        residual = residual - amount[:, None] * atom
        amounts.append(amount)
    support, values = _merge(torch.stack(ids, 1), torch.stack(amounts, 1), len(decoder))
    return support, values, residual


@torch.no_grad()
def _choose(centred: Tensor, decoder: Tensor, steps: int, tolerance: float) -> tuple[list[Tensor], list[Tensor]]:
    """Atom of each step, and whether the token still takes it: two lists of [row].

    Correlations with all atoms are kept up to date by the Gram matrix (c -= z D D_j^T, as in Batch-OMP, Rubinstein
    et al. 2008), which turns a step from a product with D into the look-up of a row.
    """
    gram = decoder @ decoder.T if len(decoder) <= _GRAM_LATENTS and steps > 1 else None
    residual, correlation = centred.clone(), centred @ decoder.T
    on = torch.ones(len(centred), dtype=torch.bool, device=centred.device)
    ids, active = [], []
    for step in range(steps):
        j = correlation.argmax(1)
        on = on & (residual.norm(dim=1) >= tolerance)
        atom = decoder[j]
        amount = (residual * atom).sum(1).relu() * on
        ids.append(j)
        active.append(on.to(centred.dtype))
        residual.addcmul_(amount[:, None], atom, value=-1)
        if step + 1 == steps or not bool(on.any()):
            break
        if gram is None:
            correlation = residual @ decoder.T
        else:
            correlation.addcmul_(amount[:, None], gram[j], value=-1)
    return ids, active


def _merge(ids: Tensor, amounts: Tensor, d_sae: int) -> tuple[Support, Tensor]:
    """Entries of [row, step] atoms and amounts; an atom that was chosen twice becomes one entry."""
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    keep = amounts.detach() > 0
    places, back = torch.unique(rows[keep] * d_sae + ids[keep], return_inverse=True)
    values = amounts.new_zeros(len(places)).index_add(0, back, amounts[keep])
    return Support.flat(places, len(ids), d_sae), values


@torch.no_grad()
def gradient(centred: Tensor, decoder: Tensor, steps: int | Tensor) -> tuple[Tensor, Tensor]:
    """Gradient pursuit: (codes [row, d_sae], residual [row, d]), none of the codes negative.

    Args:
        centred: x - b [row, d].
        decoder: atoms of any norm [d_sae, d]; the choice is by direction.
        steps: latents per token, one number or [row].
    """
    unit = torch.nn.functional.normalize(decoder, dim=1)
    n = torch.as_tensor(steps, device=centred.device).expand(len(centred))
    code, residual = centred.new_zeros(len(centred), len(decoder)), centred.clone()
    chosen = torch.zeros_like(code, dtype=torch.bool)
    for step in range(int(n.max()) if len(n) else 0):
        on = n > step
        correlation = residual @ unit.T
        best = correlation.masked_fill(chosen, -torch.inf).max(1)
        take = on & (best.values > 0)
        chosen[take.nonzero().squeeze(1), best.indices[take]] = True
        slope = torch.where(chosen & on[:, None], correlation, 0.0)
        along = slope @ unit
        size = (along * residual).sum(1) / along.square().sum(1).clamp_min(1e-12)
        code = (code + size[:, None] * slope).relu()
        residual = centred - code @ unit
    return code / decoder.norm(dim=1).clamp_min(1e-12), residual
