"""A trained SAE: sites it belongs to, weights, and what it makes of activations.

    s = sae.load("dir")
    z = s.encode(x)          latents [..., d_sae]
    x = s.decode(z)          reconstructions [..., d_out]
    s.error(x)               what no latent explains: x - x'

However it was trained, it is used in one of five ways (`ARCHITECTURES`); batchtopk and matryoshka SAEs become jumprelu
SAEs with their threshold, p-annealed ones standard SAEs, and the scaling of inputs and the norms of the decoder are
in the weights by then. Where training left out tokens of very large norm (attention sinks; `Settings.outliers`), the
SAE knows nothing about them: no latent fires on them, and its edits leave them alone (`SAE.limit`).

Three shapes: an autoencoder reads and writes one site, a transcoder reads one and predicts another, a crosscoder reads
and writes several sites side by side.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError, normalised
from interp.sae import pursuit
from interp.sae.kernels import Support, bag
from interp.sae.select import above, largest, top_k
from interp.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from interp.edits import Edit

ARCHITECTURES = ("standard", "gated", "topk", "jumprelu", "mp")


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder, transcoder or crosscoder.

    Attributes:
        decoder: a direction per latent [d_sae, d_out].
        b_dec: bias of the output [d_out].
        encoder: a direction per latent [d_sae, d_in]; for mp the decoder.
        b_enc: its bias [d_sae]; of a gated SAE the gate's.
        arch: standard | gated | topk | jumprelu | mp.
        k: latents kept (topk), steps at most (mp).
        threshold: jumprelu: what a pre-activation must exceed [d_sae].
        r_mag, b_mag: gated: logarithm of the magnitudes' scale and their bias [d_sae].
        skip: linear path from input to output [d_out, d_in], or None.
        sites: the site, or sites, that are read; empty where unknown.
        targets: those that are reconstructed.
        centred: the encoder sees x - b_dec.
        normalize: how activations are normalised on the way in, and back on the way out (SAELens's run-time kinds).
        tolerance: mp: a token is done when its residual's norm is below.
        limit: activations of a larger norm were left out of the training.
        metadata: how it was trained, and SAELens's metadata.
        history: the metrics of its training, a row per logged step; only on an SAE that was just trained.
    """

    decoder: Tensor
    b_dec: Tensor
    encoder: Tensor
    b_enc: Tensor
    arch: str = "standard"
    k: int | None = None
    threshold: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    skip: Tensor | None = None
    sites: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    centred: bool = True
    normalize: str = "none"
    tolerance: float = pursuit.TOLERANCE
    limit: float = math.inf
    metadata: Mapping[str, Any] = field(default_factory=dict)
    history: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise SAEError(f"arch={self.arch!r}: expected one of {', '.join(ARCHITECTURES)}")
        wanted = {"b_dec": (self.d_out,), "encoder": (self.d_sae, self.d_in), "b_enc": (self.d_sae,)}
        if self.arch == "jumprelu":
            wanted["threshold"] = (self.d_sae,)
        if self.arch == "gated":
            wanted |= {"r_mag": (self.d_sae,), "b_mag": (self.d_sae,)}
        if self.skip is not None:
            wanted["skip"] = (self.d_out, self.d_in)
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != shape:
                got = None if tensor is None else list(tensor.shape)
                raise SAEError(f"{name}: expected {list(shape)} beside decoder {list(self.decoder.shape)}, got {got}")
        if self.arch in ("topk", "mp") and not (isinstance(self.k, int) and 0 < self.k <= self.d_sae):
            raise SAEError(f"k={self.k!r}: expected between 1 and d_sae={self.d_sae}")

    # -- what it is --------------------------------------------------------------------------------------------
    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        return self.decoder.shape[1]

    @property
    def d_sae(self) -> int:
        return self.decoder.shape[0]

    @property
    def shape(self) -> str:
        """autoencoder | transcoder | crosscoder."""
        if self.sites != self.targets or self.d_in != self.d_out:
            return "transcoder"
        return "crosscoder" if len(self.sites) > 1 else "autoencoder"

    @property
    def site(self) -> Site:
        """The one site that it reads. SAEError where that is unknown, or several."""
        if len(self.sites) != 1:
            raise SAEError(f"this SAE reads {', '.join(self.sites) or 'an unknown site'}; one is needed here")
        return Site.parse(self.sites[0])

    def latent(self, i: int) -> str:
        """The name of a latent in tables: ``sae[resid_post[5], latent=9]``."""
        if not 0 <= i < self.d_sae:
            raise SAEError(f"latent={i}: this SAE has latents 0..{self.d_sae - 1}")
        return f"sae[{'+'.join(self.sites) or '?'}, latent={i}]"

    def __repr__(self) -> str:
        where = "+".join(self.sites) + (f" -> {'+'.join(self.targets)}" if self.shape == "transcoder" else "")
        trained = self.metadata.get("trained_as", self.arch)
        return f"SAE({trained} at {where or '?'}: {self.d_in} -> {self.d_sae} latents{f', k={self.k}' * bool(self.k)})"

    def _repr_html_(self) -> str:
        from interp.display import html

        return html(self)

    def tensors(self) -> dict[str, Any]:
        """Its weights by name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def to(self, *args: Any, **kwargs: Any) -> SAE:
        """The same SAE with its tensors moved or converted as ``Tensor.to`` does."""
        return replace(self, **{name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()})

    # -- what it computes --------------------------------------------------------------------------------------
    def read(self, acts: Mapping[Any, Tensor], *, target: bool = False) -> Tensor:
        """Its input [..., d_in] (with `target` what it should put out) from captured activations."""
        names = self.targets if target else self.sites
        if not names:
            raise SAEError("this SAE does not say which site it reads; give the activations themselves")
        parts = [acts[name] for name in names]
        return torch.cat([p.flatten(-2) if Site.parse(n).axes[-2:] == ("head", "d_head") else p
                          for n, p in zip(names, parts, strict=True)], -1)  # fmt: skip

    def codes(self, x: Tensor) -> tuple[Support, Tensor]:
        """The codes of activations [row, d_in] as entries: which (token, latent) pairs fire, and how much [entry]."""
        known = self.inside(x)
        x, _ = self._input(x)
        if self.arch == "mp":
            assert self.k is not None
            support, values, _ = pursuit.matching(x, self.decoder, self.k, self.tolerance)
        elif self.arch == "topk":
            assert self.k is not None
            support, values = top_k(x, self.encoder, self.b_enc, self.k)
        elif self.arch == "jumprelu":
            assert self.threshold is not None
            support, values = above(x, self.encoder, self.b_enc, self.threshold)
        else:
            support, values = above(x, self.encoder, self.b_enc, 0.0)
        if self.arch == "gated":
            values = self._magnitudes(values - self.b_enc[support.ids], support.ids)
        fires = values > 0
        if known is not None:
            fires &= known[support.rows]
        return (support, values) if bool(fires.all()) else (support.where(fires), values[fires])

    def inside(self, x: Tensor) -> Tensor | None:
        """True where an activation [..., d_in] is of the kind that the SAE was trained on [...]; None: it always is."""
        return None if math.isinf(self.limit) else self._flat(x).norm(dim=-1) <= self.limit

    def _magnitudes(self, linear: Tensor, ids: Tensor | slice = slice(None)) -> Tensor:
        assert self.r_mag is not None
        assert self.b_mag is not None
        return (linear * self.r_mag.exp()[ids] + self.b_mag[ids]).relu()

    def encode(self, x: Tensor) -> Tensor:
        """Latents [..., d_sae] of activations [..., d_in], none negative. Differentiable in `x`."""
        flat = self._flat(x)
        rows, _ = self._input(flat.reshape(-1, self.d_in))
        z = self._encode(rows).reshape(*flat.shape[:-1], self.d_sae)
        known = self.inside(flat)
        return z if known is None else z * known[..., None]

    def _encode(self, rows: Tensor) -> Tensor:
        if self.arch == "mp":
            assert self.k is not None
            support, values, _ = pursuit.matching(rows, self.decoder, self.k, self.tolerance)
            return support.scatter(values)
        p = rows @ self.encoder.T + self.b_enc
        if self.arch == "topk":
            assert self.k is not None
            values, kept = largest(p, self.k)
            return torch.zeros_like(p).scatter(-1, kept, values.relu())
        if self.arch == "jumprelu":
            assert self.threshold is not None
            return p.relu() * (p > self.threshold)
        if self.arch == "gated":
            return (p > 0) * self._magnitudes(p - self.b_enc)
        return p.relu()

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstructions [..., d_out] of latents [..., d_sae].

        `x`, the activation that they encode, is needed by SAEs that normalise and by skip transcoders.
        """
        out = z @ self.decoder + self.b_dec
        return self._output(out, x)

    def shift(self, change: Tensor, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """What a change of the latents [..., d_sae], or of some [..., latent], changes in the reconstruction of `x`."""
        out = change @ (self.decoder if latents is None else self.decoder[latents])
        if self.normalize != "none":
            undo = normalised(self._flat(x), self.normalize)[1]
            out = undo(out) - undo(torch.zeros_like(out))
        return out.reshape(x.shape)

    def _output(self, out: Tensor, x: Tensor | None) -> Tensor:
        if self.normalize == "none" and self.skip is None:
            return out if x is None or x.shape[-1] == self.d_out else out.reshape(*out.shape[:-1], *self._heads(x))
        if x is None:
            raise SAEError("decode: this SAE needs its input too (it normalises, or has a skip path): decode(z, x)")
        flat = self._flat(x)
        if self.skip is not None:
            out = out + flat @ self.skip.T
        elif self.normalize != "none":
            out = normalised(flat, self.normalize)[1](out)
        return out if x.shape[-1] == flat.shape[-1] else out.reshape(*out.shape[:-1], *self._heads(x))

    def _heads(self, x: Tensor) -> tuple[int, ...]:
        heads = tuple(x.shape[-2:])
        return heads if heads[0] * heads[1] == self.d_out else (self.d_out,)

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruction of activations [..., d_in] -> [..., d_out]."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The same for [row, d_in] through the sparse codes: quicker where few latents fire, no gradients."""
        support, values = self.codes(x)
        table = self.decoder
        out = support.scatter(values) @ table if support.dense else bag(values, support.ids, support.starts, table)
        return self._output(out + self.b_dec, x)

    def error(self, x: Tensor) -> Tensor:
        """What no latent explains: x - x' [..., d_in]."""
        if self.shape == "transcoder":
            raise SAEError("a transcoder has no error at the site that it reads; compare with its target yourself")
        return x - self(x).reshape(x.shape)

    @torch.no_grad()
    def pursue(self, x: Tensor, k: int | Tensor | None = None) -> Tensor:
        """Codes by gradient pursuit with this decoder [row, d_sae] (inference-time optimisation).

        `k` latents per token, by default as many as its own encoder uses for that token.
        """
        rows, _ = self._input(x)
        if k is None:
            k = (self._encode(rows) != 0).sum(1)
        return pursuit.gradient(rows if self.centred else rows - self.b_dec, self.decoder, k)[0]

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in and x.dim() > 1 and x.shape[-1] * x.shape[-2] == self.d_in:
            x = x.flatten(-2)
        if x.shape[-1] != self.d_in:
            raise SAEError(
                f"activations {list(x.shape)}: this SAE takes d_in={self.d_in}"
                + (f" at {', '.join(self.sites)}" if self.sites else "")
            )
        return x.to(self.decoder.dtype)

    def _input(self, x: Tensor) -> tuple[Tensor, Any]:
        """Activations as the encoder sees them, and the way back for reconstructions."""
        x, undo = normalised(self._flat(x), self.normalize)
        return (x - self.b_dec if self.centred else x), undo

    # -- what can be done with it ------------------------------------------------------------------------------
    def ablate(self, latents: int | Sequence[int], **how: Any) -> Edit:
        """Switch latents off; the error and everything else stays. See `interp.sae.edits`."""
        from interp.sae import edits

        return edits.clamp(self, latents, 0.0, **{"name": "ablate", **how})

    def clamp(self, latents: int | Sequence[int], value: float | Tensor, **how: Any) -> Edit:
        """Set latents to a value."""
        from interp.sae import edits

        return edits.clamp(self, latents, value, **how)

    def steer(self, latent: int, amount: float, **how: Any) -> Edit:
        """Add `amount` times the latent's decoder direction, whether it fires or not."""
        from interp.sae import edits

        return edits.steer(self, latent, amount, **how)

    def save(self, dir: str | os.PathLike[str]) -> Path:
        """Write the SAE as a directory that SAELens reads too, with a card. See `interp.sae.files.save`."""
        from interp.sae import files

        return files.save(self, dir)
