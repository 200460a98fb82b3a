"""SAE latents as places: read them, and write them, while the model runs.

Nothing is ever replaced by its reconstruction unless that is asked for. To set a latent, what changes between its old
and its new value is *added* along its decoder row::

    h' = h + (z' - z) D          so h' - h lies in the span of the changed latents, and the error x - x' stays as it was

(Marks et al. 2024, arXiv:2403.19647). Codes are computed inside the run, from what arrives, so edits upstream count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.edits import Edit, Gate, Where

if TYPE_CHECKING:
    from interp.model import Model
    from interp.sae.autoencoder import SAE


def _one(s: SAE, latents: int | Sequence[int]) -> Tensor:
    """Checked latent numbers [latent]."""
    ids = torch.tensor([latents] if isinstance(latents, int) else list(latents), dtype=torch.long)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= s.d_sae:
        raise SAEError(f"latents={ids.tolist()}: expected numbers in 0..{s.d_sae - 1}, at least one")
    return ids


def _same_site(s: SAE) -> str:
    if s.shape != "autoencoder":
        raise SAEError(f"a {s.shape} does not write where it reads, so its latents cannot be set there")
    return str(s.site)


@dataclass(frozen=True, eq=False)
class Clamp:
    """Sets latents: h + (value - z) D over the chosen ones. `value`: a number, one per latent, or [batch, pos, latent]
    by token position."""

    s: SAE
    ids: Tensor
    value: float | Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        s = self.s.to(h.device)
        ids = self.ids.to(h.device)
        z = s.encode(h)[..., ids]
        value = self.value
        if isinstance(value, Tensor):
            value = value.to(z)
            if value.dim() == 3:
                value = value[torch.arange(len(value))[:, None].expand_as(where.position), where.position]
        return h + s.shift(value - z, h, ids).to(h.dtype)


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """Puts the reconstruction in place of the activation; `error` of it is left (0: none, 1: nothing changes)."""

    s: SAE
    error: float = 0.0

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        out = self.s.to(h.device)(h).to(h.dtype).reshape(h.shape)
        return out + self.error * (h - out)


def clamp(s: SAE, latents: int | Sequence[int], value: float | Tensor, **how: Any) -> Edit:
    """Latents are set to `value`; 0 ablates them, another run's codes [batch, pos, latent] patch them."""
    return Edit(_same_site(s), Clamp(s, _one(s, latents), value), **{"name": "clamp", **how})


def steer(s: SAE, latent: int, amount: float, **how: Any) -> Edit:
    """`amount` times the latent's decoder row is added, whether the latent fires or not."""
    from interp import edits

    row = s.decoder[_one(s, latent)[0]]
    return edits.add(_same_site(s), amount * row, **{"name": "steer", **how})


def reconstruction(s: SAE, error: float = 0.0, **how: Any) -> Edit:
    """The activation is replaced by its reconstruction, plus `error` times what no latent explains.

    Tokens of a kind that the SAE was not trained on (`SAE.limit`) stay as they are, unless `gate` says otherwise.
    """
    return Edit(_same_site(s), Reconstructed(s, error), **{"name": "reconstruction", "gate": known(s), **how})


def known(s: SAE) -> Gate | None:
    """A gate that is open at tokens of the kind that the SAE was trained on; None where that is every token."""
    if math.isinf(s.limit):
        return None

    def gate(h: Tensor, where: Where) -> Tensor:
        inside = s.inside(h)
        assert inside is not None
        return inside.to(h.dtype)

    return gate


def capture(m: Model, s: SAE, x: Any) -> tuple[Tensor, Tensor, Any]:
    """(latents [batch, pos, d_sae], error [batch, pos, d_in], activations) of texts; padding is 0."""
    acts = m.capture(x, list(dict.fromkeys((*s.sites, *s.targets))))
    h = s.read(acts).float()
    with torch.no_grad():
        z = s.encode(h) * acts.mask[..., None]
        aim = s.read(acts, target=True).float()
        error = (aim - s.decode(z, h).reshape(aim.shape)) * acts.mask[..., None]
    return z, error, acts


def attribute(m: Model, s: SAE, x: Any, metric: Any) -> tuple[Tensor, Tensor]:
    """Estimated effect of each latent, and of the error, on a metric, by one backward pass.

    z * <dM/dh, D> per latent [batch, pos, d_sae] and <dM/dh, error> [batch, pos]: the first-order estimate of what is
    lost when it is taken away (Marks et al. 2024, eq. 3). `metric` maps logits [batch, pos, vocab] to [batch].
    """
    site = _same_site(s)
    acts = m.capture(x, site, logits=True, grad=True)
    assert acts.logits is not None
    h = acts[site]
    (slope,) = torch.autograd.grad(metric(acts.logits).sum(), h)
    with torch.no_grad():
        flat = s._flat(h.detach().float())
        slope = slope.float().reshape(flat.shape)
        z = s.encode(flat) * acts.mask[..., None]
        error = (flat - s.decode(z, flat)) * acts.mask[..., None]
        return z * (slope @ s.decoder.T), (error * slope).sum(-1)
