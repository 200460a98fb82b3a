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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from interp.bridges.sae_lens import SAEError
from interp.interrupted import salvaged
from interp.progress import bar
from interp.sae.architectures import drop_parallel, renormalise
from interp.sae.expert_sae import ExpertSAE, Shape, checked, choose, load, rows
from interp.sae.kernels import Support, decode, pre_activations

__all__ = ["ExpertSAE", "Loss", "Shape", "choose", "draw", "load", "loss", "rows", "train"]

_AUX = 1 / 32


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

    Interrupted, it leaves the autoencoder as it was by then (`interp.unfinished`); ``rows_seen`` counts to the last row
    of its ``history``. Raises SAEError for NaN, k beyond an expert's dictionary, or a site of other shape.
    """
    import pandas as pd

    checked(site)
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
    n_rows, batch_size = n_rows or 4 * len(y), min(batch_size, len(y))
    steps, silent = max(1, n_rows // batch_size), torch.zeros(shape.d_sae)
    lines: list[dict[str, Any]] = []
    limit = shape.reach(counts.double() / len(y)) * (dead_after or n_rows // 10)
    if dead_after is not None:
        limit = torch.full_like(limit, dead_after)

    def so_far() -> ExpertSAE | None:
        if not lines:
            return None
        told = about | {"rows": len(y), "rows_seen": lines[-1]["step"] * batch_size, "lr": lr, "balance": balance,
                        "seed": seed}  # fmt: skip
        done = {name: t.detach() for name, t in w.items()}
        return ExpertSAE(done["decoder"] / scale, done["encoder"] * scale, done["b_enc"], centres, k, shape, site,
                         told, pd.DataFrame(lines))  # fmt: skip

    with salvaged("sae.per_expert.train", so_far), bar("training", total=steps) as advance:
        for step in range(steps):
            at = draw(counts, batch_size, balance, generator)
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
    found = so_far()
    assert found is not None
    return found


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
