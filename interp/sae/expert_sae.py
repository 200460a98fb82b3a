"""The autoencoders of a layer's experts: one dictionary, of which each expert may use a part.

Shape, choice and equations are told in `interp.sae.per_expert`, which trains them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.edits import Edit, Where
from interp.sae.kernels import Support, decode
from interp.sae.select import largest
from interp.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from interp.activations import Activations

_FORMAT = "interp.sae.per_expert/1"


@dataclass(frozen=True)
class Shape:
    """S shared latents, then `own` of each of `experts`: which a row may use, and where they are."""

    shared: int
    own: int
    experts: int

    @property
    def d_sae(self) -> int:
        return self.shared + self.own * self.experts

    def global_ids(self, local: Tensor, owner: Tensor) -> Tensor:
        """Latents 0 .. shared + own of rows' own dictionaries [row, slot] as latents of the whole; owner [row]."""
        return torch.where(local < self.shared, local, local + (owner * self.own)[:, None])

    def reach(self, counts: Tensor) -> Tensor:
        """Rows that could use each latent [d_sae], from the rows of each expert [expert]."""
        return torch.cat([counts.sum().expand(self.shared), counts.repeat_interleave(self.own)])


@torch.no_grad()
def choose(
    x: Tensor, owner: Tensor, encoder: Tensor, bias: Tensor, k: int, shape: Shape, allowed: Tensor | None = None
) -> tuple[Support, Tensor]:
    """The k largest pre-activations of each row in its expert's dictionary, and their values [entry].

    Args:
        x: rows, their expert's mean taken away [row, d].
        owner: expert of each row [row].
        encoder: [d_sae, d].
        bias: [d_sae].
        k: entries per row.
        shape: of the dictionary.
        allowed: latents that count [d_sae]; rows that reach fewer than k of them keep fewer.
    """
    split = [shape.shared, shape.own * shape.experts]
    (common, own), (b, b_own) = encoder.split(split), bias.split(split)
    own, b_own = own.view(shape.experts, shape.own, -1), b_own.view(shape.experts, shape.own)
    p = x.new_empty(len(x), shape.shared + shape.own)
    torch.addmm(b, x, common.T, out=p[:, : shape.shared])
    order = owner.argsort(stable=True)
    for e, rows in enumerate(order.split(torch.bincount(owner, minlength=shape.experts).tolist())):
        if len(rows) and shape.own:
            p[rows, shape.shared :] = torch.addmm(b_own[e], x[rows], own[e].T)
    if allowed is not None:
        mine = torch.cat([allowed[: shape.shared].expand(len(x), -1),
                          allowed[shape.shared :].view(shape.experts, shape.own)[owner]], 1)  # fmt: skip
        p.masked_fill_(~mine, -torch.inf)
    values, local = largest(p, min(k, p.shape[1]))
    support, found = Support.slots(shape.global_ids(local, owner), shape.d_sae), values.flatten()
    there = found > -torch.inf
    return (support, found) if bool(there.all()) else (support.where(there), found[there])


@dataclass(frozen=True, eq=False)
class ExpertSAE:
    """The autoencoders of a layer's experts; latent i < shared is everyone's, shared + e * own + j is expert e's j-th.

    Attributes:
        decoder, encoder: a direction per latent [d_sae, d].
        b_enc: [d_sae].
        centres: mean row of each expert [expert, d].
        k: latents per row at most.
        shape: how latents are shared out.
        site: ``expert_out[layer]`` or ``expert_hidden[layer]``.
        about: how it was trained.
        history: the training: step, fvu (of the batch), dead.
    """

    decoder: Tensor
    encoder: Tensor
    b_enc: Tensor
    centres: Tensor
    k: int
    shape: Shape
    site: str
    about: dict[str, Any] = field(default_factory=dict)
    history: pd.DataFrame | None = None

    @property
    def d_sae(self) -> int:
        return self.shape.d_sae

    def owner(self, latent: int) -> int | None:
        """The expert to which a latent belongs; None for a shared one."""
        if not 0 <= latent < self.d_sae:
            raise SAEError(f"latent={latent}: there are 0..{self.d_sae - 1}")
        return None if latent < self.shape.shared else (latent - self.shape.shared) // self.shape.own

    @torch.no_grad()
    def codes(self, y: Tensor, owner: Tensor) -> tuple[Support, Tensor]:
        """Which (row, latent) pairs fire, and how much [entry], of rows [row, d] of experts `owner` [row]."""
        if y.shape[-1] != self.centres.shape[1] or len(y) != len(owner):
            raise SAEError(f"rows {list(y.shape)} of {len(owner)} experts: expected [row, {self.centres.shape[1]}]")
        x = y.float() - self.centres[owner]
        support, found = choose(x, owner, self.encoder, self.b_enc, self.k, self.shape)
        fires = found > 0
        return support.where(fires), found[fires]

    @torch.no_grad()
    def reconstruct(self, y: Tensor, owner: Tensor) -> Tensor:
        """[row, d] -> [row, d]."""
        support, values = self.codes(y, owner)
        return decode(values, self.decoder, support) + self.centres[owner]

    @torch.no_grad()
    def tokens(self, acts: Activations) -> Tensor:
        """Latents of the real tokens [row, d_sae]: over its slots the sum of weight x code, since outputs add up so."""
        y, owner, weight, token = rows(acts, self.site)
        support, values = self.codes(y, owner)
        out = y.new_zeros(int(acts.mask.sum()), self.d_sae)
        return out.index_put_((token[support.rows], support.ids), values * weight[support.rows], accumulate=True)

    @torch.no_grad()
    def quality(self, y: Tensor, owner: Tensor, *_: Any) -> pd.DataFrame:
        """Per expert on these rows: expert, rows, fvu (about the expert's mean here), l0, dead (own latents), shared
        (share of the codes' mass on shared latents). Experts without rows have no line."""
        import pandas as pd

        support, values = self.codes(y, owner)
        error = (y - decode(values, self.decoder, support) - self.centres[owner]).double().square().sum(1)
        at = support.fired(values)
        common = support.ids < self.shape.shared
        lines = []
        for e in owner.unique().tolist():
            mine, entries = owner == e, (owner == e)[support.rows]
            spread = (y[mine] - y[mine].mean(0)).double().square().sum()
            first = self.shape.shared + e * self.shape.own
            silent = at[first : first + self.shape.own] == 0
            lines.append({
                "expert": e, "rows": int(mine.sum()), "fvu": float(error[mine].sum() / spread.clamp_min(1e-12)),
                "l0": int(entries.sum()) / int(mine.sum()), "dead": int(silent.sum()),
                "shared": float(values[entries & common].sum() / values[entries].sum().clamp_min(1e-12)),
            })  # fmt: skip
        frame = pd.DataFrame(lines)
        frame.attrs.update({"site": self.site, **asdict(self.shape), "k": self.k})
        return frame

    def ablate(self, latents: int | Sequence[int], **how: Any) -> Edit:
        """An Edit that takes away what these latents add to what experts say; the rest of each output stays."""
        ids = [latents] if isinstance(latents, int) else list(latents)
        for latent in ids:
            self.owner(latent)
        off = torch.zeros(self.d_sae, dtype=torch.bool)
        off[torch.tensor(ids, dtype=torch.long)] = True
        return Edit(self.site, _Without(self, off), **{"name": "ablate", **how})

    def save(self, dir: str | os.PathLike[str]) -> Path:
        """Weights as safetensors, and what they are as JSON."""
        import json

        from safetensors.torch import save_file

        path = Path(dir)
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(self, name).contiguous() for name in _TENSORS}, path / "weights.safetensors")
        about = {"format": _FORMAT, "k": self.k, "shape": asdict(self.shape), "site": self.site, "about": self.about}
        (path / "config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        return path


_TENSORS = ("decoder", "encoder", "b_enc", "centres")


def load(dir: str | os.PathLike[str]) -> ExpertSAE:
    """What `ExpertSAE.save` has written."""
    import json

    from safetensors.torch import load_file

    path = Path(dir)
    if not (path / "config.json").is_file():
        raise SAEError(f"{path}: there is no config.json; expected what ExpertSAE.save writes")
    about = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if about.get("format") != _FORMAT:
        raise SAEError(f"{path}: format {about.get('format')!r}; expected {_FORMAT!r}")
    found = load_file(path / "weights.safetensors")
    decoder, encoder, b_enc, centres = (found[name] for name in _TENSORS)
    return ExpertSAE(
        decoder, encoder, b_enc, centres, about["k"], Shape(**about["shape"]), about["site"], about["about"]
    )


@dataclass(frozen=True, eq=False)
class _Without:
    """At a routed site: y -> y - what the latents in `off` add to it."""

    s: ExpertSAE
    off: Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        ids = where.inputs[0]
        there = (ids >= 0).flatten()
        y, owner = h.flatten(0, -2)[there], ids.flatten()[there]
        support, values = self.s.codes(y, owner)
        taken = self.off[support.ids]
        part = decode(values[taken], self.s.decoder, support.where(taken))
        out = h.flatten(0, -2).clone()
        out[there] -= part.to(h.dtype)
        return out.view_as(h)


# -- rows ------------------------------------------------------------------------------------------------------
def rows(acts: Activations, site: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each expert said at each real token: (y [row, d], expert [row], weight [row], token [row]).

    Tokens are counted among the real ones, in order. `site` is ``expert_out[layer]`` or ``expert_hidden[layer]``.
    """
    at = checked(site)
    assert at.layer is not None
    found = acts.experts(at.layer)
    inside = getattr(found, "hidden" if at.name == "expert_hidden" else "out", None)
    if inside is None:
        raise SAEError(f"site={site!r} was not captured, or its experts are never computed one by one (Monet's)")
    ids = found.ids[acts.mask]
    token, slot = (ids >= 0).nonzero(as_tuple=True)
    return (inside[acts.mask][token, slot].float(), ids[token, slot], found.weights[acts.mask][token, slot].float(),
            token)  # fmt: skip


def checked(site: str) -> Site:
    at = Site.parse(site)
    if at.name not in ("expert_out", "expert_hidden") or at.index:
        raise SAEError(f"site={site!r}: expected expert_out[layer] or expert_hidden[layer]")
    return at
