"""An autoencoder for every expert of a layer, all learnt in one job.

    s = per_expert.train((m, texts), "expert_out[3]", shared=256, own=24, k=4)
    s.quality(*per_expert.rows(m.capture(held_out, "expert_out[3]"), s.site))     per expert: rows, fvu, l0, dead
    with m.intervene(s.ablate([300, 17])): ...                                    without what these latents say

A Mixture of Experts adds to each token the sum over slots of w_s y_s, where y_s is what the expert e in slot s says. So
there is one *row* y per (token, slot). Experts have things in common and things of their own, so an expert's dictionary
is S latents that all share and n that are its own::

    z  = TopK( [A; A_e] (y - c_e) + [b; b_e] )           c_e: mean of the expert's rows
    y' = [D; D_e]^T z + c_e

Together that is one dictionary of S + E n latents in which a row of expert e may use the first S and the n from
S + e n on. Only the *choice* knows about experts (`choose`); decoding, gradients and Adam are those of one sparse
autoencoder (`interp.sae.kernels`), whatever the number of experts. The loss is TopK's with AuxK (Gao et al. 2024,
arXiv:2406.04093, eq. 4 and appendix A.2): |y - y'|^2 over the mean |y - c_e|^2, plus 1/32 of how badly the dead latents
explain the rest.

Routing is uneven. A batch draws expert e in proportion to (rows of e)^balance: 1 as routed, 0 each alike. And a latent
is dead when it was silent over rows that *could* have used it: an expert's own latent waits for that expert's rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from interp.bridges.sae_lens import SAEError
from interp.edits import Edit, Where
from interp.progress import bar
from interp.sae.architectures import drop_parallel, renormalise
from interp.sae.kernels import Support, decode, pre_activations
from interp.sae.select import largest
from interp.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from interp.activations import Activations

_AUX = 1 / 32
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
    at = _checked(site)
    assert at.layer is not None
    found = acts.experts(at.layer)
    inside = getattr(found, "hidden" if at.name == "expert_hidden" else "out", None)
    if inside is None:
        raise SAEError(f"site={site!r} was not captured, or its experts are never computed one by one (Monet's)")
    ids = found.ids[acts.mask]
    token, slot = (ids >= 0).nonzero(as_tuple=True)
    return (inside[acts.mask][token, slot].float(), ids[token, slot], found.weights[acts.mask][token, slot].float(),
            token)  # fmt: skip


def _checked(site: str) -> Site:
    at = Site.parse(site)
    if at.name not in ("expert_out", "expert_hidden") or at.index:
        raise SAEError(f"site={site!r}: expected expert_out[layer] or expert_hidden[layer]")
    return at


def _gathered(source: Any, site: str, context: int, run: int) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    if not (isinstance(source, tuple) and len(source) == 2):
        raise SAEError("source: expected (model, texts), or (rows [row, d], expert of each row [row])")
    if isinstance(source[0], Tensor):
        y, owner = source
        if len(y) != len(owner) or not len(y) or owner.is_floating_point() or int(owner.min()) < 0:
            raise SAEError(f"source: {len(y)} rows and {len(owner)} expert numbers; one number, 0 or more, for each")
        return y.float(), owner.long(), int(owner.max()) + 1, {}
    m, texts = source
    parts = []
    with bar("reading experts", total=len(texts)) as advance:
        for first in range(0, len(texts), run):
            tokens = m.tokens(list(texts[first : first + run]), max_length=context, truncate=True)
            parts.append(rows(m.capture(tokens, site), site)[:2])
            advance(len(tokens.ids))
    y, owner = (torch.cat(piece) for piece in zip(*parts, strict=True))
    about = {"model_name": m.name, "model_hash": m.fingerprint, "context_size": context, "texts": len(texts)}
    return y, owner, m.n_experts, about


# -- training --------------------------------------------------------------------------------------------------
def draw(counts: Tensor, n: int, balance: float, generator: torch.Generator) -> Tensor:
    """n row numbers of a table sorted by expert, expert e in proportion to counts_e ^ balance [n]."""
    share = torch.where(counts > 0, counts.double().clamp_min(1) ** balance, 0.0)
    expert = torch.multinomial(share, n, replacement=True, generator=generator)
    starts = counts.cumsum(0) - counts
    return starts[expert] + (torch.rand(n, generator=generator, dtype=torch.float64) * counts[expert]).long()


def train(
    source: Any, site: str, *, own: int, shared: int = 0, k: int, n_rows: int | None = None, batch_size: int = 4096,
    lr: float = 1e-3, balance: float = 0.5, dead_after: int | None = None, context: int = 128, run: int = 8,
    seed: int = 0, log_every: int = 20,
) -> ExpertSAE:  # fmt: skip
    """One autoencoder per expert.

    Args:
        source: (model, texts), or rows with the expert of each: (Tensor [row, d], LongTensor [row]).
        site: ``expert_out[layer]`` or ``expert_hidden[layer]``.
        own: latents of each expert.
        shared: latents of all.
        k: latents that a row may use.
        n_rows: rows to train on, default four times those that there are.
        batch_size: rows per step.
        lr: of Adam; it falls to 0 over the last fifth.
        balance: how rows are drawn, see above.
        dead_after: silent rows after which a latent counts as dead, default a tenth of its expected rows.
        context: tokens per text.
        run: texts per forward pass.
        seed: of weights and draws.
        log_every: steps between rows of ``history``.

    Raises SAEError for NaN, k beyond an expert's dictionary, or a site of other shape.
    """
    import pandas as pd

    _checked(site)
    if own < 0 or shared < 0 or not 0 < k <= own + shared:
        raise SAEError(f"k={k}: expected between 1 and shared + own = {shared + own}")
    y, owner, n_experts, about = _gathered(source, site, context, run)
    if not bool(torch.isfinite(y).all()):
        raise SAEError(f"{int((~torch.isfinite(y)).any(1).sum())} of {len(y)} rows at {site} hold NaN or infinity")
    order = owner.argsort(stable=True)
    y, owner = y[order], owner[order]
    counts = torch.bincount(owner, minlength=n_experts)
    centres = torch.zeros(n_experts, y.shape[1]).index_add_(0, owner, y) / counts.clamp_min(1)[:, None]
    scale = y.shape[1] ** 0.5 / float((y - centres[owner]).norm(dim=1).mean())
    shape, generator = Shape(shared, own, n_experts), torch.Generator().manual_seed(seed)
    w = {"decoder": normalize(torch.randn(shape.d_sae, y.shape[1], generator=generator), dim=1)}
    w |= {"encoder": w["decoder"].clone(), "b_enc": torch.zeros(shape.d_sae)}
    optimizer = torch.optim.Adam([t.requires_grad_(True) for t in w.values()], lr, eps=6.25e-10, fused=True)
    n_rows = n_rows or 4 * len(y)
    steps, silent, lines = max(1, n_rows // batch_size), torch.zeros(shape.d_sae), []
    limit = shape.reach(counts.double() / len(y)) * (dead_after or n_rows // 10)
    if dead_after is not None:
        limit = torch.full_like(limit, dead_after)
    with bar("training", total=steps) as advance:
        for step in range(steps):
            at = draw(counts, min(batch_size, len(y)), balance, generator)
            x, e = (y[at] - centres[owner[at]]) * scale, owner[at]
            dead = silent >= limit.clamp_min(1)
            out = loss(w, x, e, k, shape, dead)
            optimizer.zero_grad(set_to_none=True)
            out.loss.backward()
            drop_parallel(w["decoder"])
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (steps - step) / max(1.0, 0.2 * steps))
            optimizer.step()
            renormalise(w["decoder"])
            silent += shape.reach(torch.bincount(e, minlength=n_experts))
            silent[out.fired > 0] = 0
            if step % log_every == 0 or step + 1 == steps:
                lines.append({"step": step + 1, "fvu": float(out.fvu), "dead": int(dead.sum())})
            advance(1, f"fvu {float(out.fvu):.4f}")
    about |= {"rows": len(y), "rows_seen": steps * batch_size, "lr": lr, "balance": balance, "seed": seed}
    done = {name: t.detach() for name, t in w.items()}
    return ExpertSAE(done["decoder"] / scale, done["encoder"] * scale, done["b_enc"], centres, k, shape, site,
                     about, pd.DataFrame(lines))  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """The loss to descend, the share of variance unexplained, and how often each latent fired [d_sae]."""

    loss: Tensor
    fvu: Tensor
    fired: Tensor


def loss(w: dict[str, Tensor], x: Tensor, owner: Tensor, k: int, shape: Shape, dead: Tensor) -> Loss:
    """TopK's loss with AuxK of centred rows [row, d] of experts [row]; `dead` [d_sae]."""

    def through(keep: int, allowed: Tensor | None) -> tuple[Support, Tensor]:
        encoder, bias = w["encoder"].detach(), w["b_enc"].detach()
        support, found = choose(x, owner, encoder, bias, keep, shape, allowed)
        return support, pre_activations(x, None, w["encoder"], w["b_enc"], support, found)

    support, p = through(k, None)
    z = p.relu()
    error = x - decode(z, w["decoder"], support)
    fvu = error.square().sum() / x.square().sum().clamp_min(1e-12)
    total = fvu
    if bool(dead.any()):
        few, p = through(max(1, x.shape[1] // 2), dead)
        left = error.detach() - decode(p, w["decoder"], few)
        total = fvu + _AUX * (left.square().sum() / error.detach().square().sum()).nan_to_num(0.0)
    return Loss(total, fvu.detach(), support.fired(z.detach()))
