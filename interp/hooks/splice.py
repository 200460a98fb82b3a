"""Splices: a sparse autoencoder's latents and its error as places of the model, where its activation passes.

An autoencoder writes the activation h as latents z, a decoder and an error: ``h = decode(z) + e``. A splice takes h
apart so, runs the edits and readers of z and of e, and puts together what they left::

    h' = h + D (z' - z) + (e' - e)

So h' - h lies in the span of the latents that changed, the error stays as it was unless it is edited too (Marks et al.
2024, arXiv 2403.19647), and where nothing is changed h goes on, bit for bit.

In the graph, z and e are nodes of their own: ``autograd.grad`` gives dM/dz = D dM/dh and dM/de = dM/dh, the terms of
the linear estimate of what each is worth, while upstream of both the gradient is what it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from interp.sites import SPLICED, Site

if TYPE_CHECKING:
    from interp.hooks.tap import Tap


class Autoencoder(Protocol):
    """What is needed of a sparse autoencoder to stand in a model; `interp.sae.SAE` has it."""

    @property
    def shape(self) -> str:
        """autoencoder, transcoder or crosscoder."""
        ...

    @property
    def site(self) -> Site: ...

    @property
    def d_in(self) -> int: ...

    @property
    def d_sae(self) -> int: ...

    def encode(self, x: Tensor) -> Tensor:
        """Latents [batch, pos, latent]."""
        ...

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        """The reconstruction, shaped as `x`."""
        ...

    def shift(self, change: Tensor, x: Tensor) -> Tensor:
        """What a change of the latents changes in the reconstruction, shaped as `x`."""
        ...

    def to(self, *args: Any, **kwargs: Any) -> Autoencoder: ...


@dataclass
class Splice:
    """A sparse autoencoder at a tap, with the taps of its latents and of its error."""

    autoencoder: Autoencoder
    latents: Tap
    error: Tap

    @classmethod
    def at(cls, tap: Tap, autoencoder: Autoencoder) -> Splice:
        error, latents = (
            replace(tap, site=Site(f"{word}.{tap.site.name}", tap.site.layer), edits=[], readers=[], splice=None)
            for word in SPLICED
        )
        return cls(autoencoder, latents, error)

    def tap(self, site: Site) -> Tap:
        return self.latents if site == self.latents.site else self.error

    def __call__(self, h: Tensor) -> Tensor:
        s = self.autoencoder.to(h.device)
        codes = s.encode(h)
        graph = torch.is_grad_enabled() and h.requires_grad
        z, e = codes, None
        out, changed = h.detach() if graph else h, None
        if graph or self.error.edits or self.error.readers:
            rest = h - s.decode(codes, h).to(h.dtype).reshape(h.shape)
            e = self.error(rest)
        z = self.latents(codes.clone() if graph else codes)  # its own node: the error depends on the codes as well
        if graph:
            assert e is not None
            return out + s.shift(z - codes.detach(), h.detach()).to(h.dtype) + (e - rest.detach())
        if z is not codes:
            out, changed = out + s.shift(z - codes, h).to(h.dtype), (z != codes).any(-1)
        if e is not None and e is not rest:
            moved = (e != rest).flatten(2).any(-1)
            out, changed = out + (e - rest), moved if changed is None else changed | moved
        return h if changed is None else torch.where(changed.view(*changed.shape, *[1] * (h.dim() - 2)), out, h)
