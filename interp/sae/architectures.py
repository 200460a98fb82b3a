"""Every architecture on one path: choose the support, make values of it, decode, add up the loss.

    xc = x - b_dec                                  (transcoders and crosscoders: x as it is)
    support <- choose(xc E^T + b_enc)               which entries exist
    p = pre-activations at the support              differentiable, sparse
    z = activate(p)                                 per architecture
    x' = z D + b_dec (+ x skip^T)
    loss = |y - x'|^2 + what the architecture adds

An architecture is one function ``(weights, x, y, state, settings) -> Step``; the table `FORWARD` is all of them. Losses
are in units of the variance of the batch (so the reconstruction loss *is* the fraction of variance unexplained) for the
topk family, and in squared norm per token for the others, as in their papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from interp.sae import pursuit
from interp.sae.kernels import Full, Support, decode, pre_activations
from interp.sae.scratch import Scratch
from interp.sae.select import above, batch_top_k, busy, top_k
from interp.sae.settings import Settings
from interp.sae.shards import WHOLE, Shard

Weights = dict[str, Tensor]
RELU = ("standard", "panneal", "gated", "jumprelu")  # what fires is not chosen but follows from the weights


@dataclass
class State:
    """What a training knows besides its weights.

    Attributes:
        silent: tokens seen since each latent last fired [d_sae].
        threshold: batchtopk: running mean of the smallest value that was kept.
        p, factor: panneal: the exponent, and what keeps the penalty continuous when it changes.
        done: part of the training that lies behind, 0..1.
        part: the latents that this process has; all of them, unless several processes share them.
        full: whether most latents fire on this batch, so that all are computed; None: not looked at yet.
        scratch: memory that every step uses again.
    """

    silent: Tensor
    threshold: float = 0.0
    p: float = 1.0
    factor: float = 1.0
    done: float = 0.0
    steps: int = 0
    part: Shard = WHOLE
    full: bool | None = None
    scratch: Scratch = field(default_factory=Scratch, repr=False)

    def scalars(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("silent", "part", "full", "scratch")}


@dataclass(frozen=True)
class Step:
    """What a forward pass gives.

    Attributes:
        loss: what is descended.
        fired: tokens at which each latent is positive [d_sae].
        output: the reconstruction [row, d_out].
        parts: terms of the loss.
    """

    loss: Tensor
    fired: Tensor
    output: Tensor
    parts: dict[str, float] = field(default_factory=dict)


def initial(s: Settings, y: Tensor) -> Weights:
    """Weights to begin with; `y` [row, d_out] are some of the (scaled) targets."""
    generator = torch.Generator().manual_seed(s.seed)
    decoder = torch.nn.functional.normalize(torch.randn(s.d_sae, s.d_out, generator=generator), dim=1)
    if s.shape == "transcoder":  # nothing to be the transpose of: it reads another space than it writes
        encoder = torch.nn.functional.normalize(torch.randn(s.d_sae, s.d_in, generator=generator), dim=1)
    else:
        encoder = decoder.clone()
    assert s.init_norm is not None
    weights = {
        "encoder": encoder * s.init_norm,
        "b_enc": torch.zeros(s.d_sae),
        "decoder": decoder * s.init_norm,
        "b_dec": _centre(y, s.centre or "zero"),
    }
    if s.arch == "mp":
        del weights["encoder"], weights["b_enc"]
    if s.arch == "gated":
        weights |= {"r_mag": torch.zeros(s.d_sae), "b_mag": torch.zeros(s.d_sae)}
    if s.arch == "jumprelu":
        weights["threshold"] = torch.full((s.d_sae,), float(s.threshold or 0.0))
    if s.skip:
        weights["skip"] = torch.zeros(s.d_out, s.d_in)
    return weights


def _centre(y: Tensor, how: str) -> Tensor:
    if how == "zero":
        return torch.zeros(y.shape[1])
    centre = y.double().mean(0)
    if how == "median":  # Weiszfeld's iteration for the point of least summed distance
        for _ in range(50):
            weight = 1 / (y - centre).norm(dim=1, keepdim=True).clamp_min(1e-8)
            centre = (weight * y).sum(0) / weight.sum()
    return centre.to(y.dtype)


# -- shared pieces ---------------------------------------------------------------------------------------------
def centred(w: Weights, x: Tensor, state: State, s: Settings) -> tuple[Tensor, Tensor | None]:
    """What the encoder sees [row, d_in], and the learnt centre that was taken away."""
    return (x - w["b_dec"].detach(), state.part.centre(w["b_dec"])) if s.shape == "autoencoder" else (x, None)


def reconstruct(w: Weights, x: Tensor, values: Tensor, support: Support | Full, part: Shard,
                scratch: Scratch | None = None) -> Tensor:  # fmt: skip
    out = part.total(decode(values, w["decoder"], support, scratch)) + w["b_dec"]
    return out + x @ w["skip"].T if "skip" in w else out


def squared_error(y: Tensor, output: Tensor) -> Tensor:
    """Squared norm of the error, mean over tokens."""
    return (y - output).square().sum(1).mean()


def variance(y: Tensor) -> Tensor:
    """Squared distance from the batch's mean, mean over tokens."""
    return (y - y.mean(0)).square().sum(1).mean().clamp_min(1e-12)


def penalty_norms(decoder: Tensor, s: Settings) -> Tensor:
    """Norm of each latent's decoder row [d_sae]; of a crosscoder's, summed over its sites (Lindsey et al. 2024)."""
    return torch.stack([part.norm(dim=1) for part in decoder.split(s.blocks, dim=1)]).sum(0)


def auxiliary(w: Weights, xc: Tensor, centre: Tensor | None, error: Tensor, state: State, s: Settings,
              norms: Tensor | None) -> Tensor:  # fmt: skip
    """AuxK: the dead latents with the largest pre-activations reconstruct what the living leave over.

    |e - z_aux D|^2 / variance of e, with e frozen, without bias; 0 where nothing is dead (Gao et al., appendix A.2).
    """
    assert s.dead_after is not None
    assert s.k_aux is not None
    dead = (state.silent >= s.dead_after).nonzero().squeeze(1)
    if not (candidates := state.part.count(len(dead))):
        return error.new_zeros(())
    encoder, bias, decoder = w["encoder"][dead], w["b_enc"][dead], w["decoder"][dead]
    scale = None if norms is None else norms[dead]
    pick = (encoder, bias) if scale is None else (encoder * scale[:, None], bias * scale)
    support, _ = top_k(xc, pick[0].detach(), pick[1].detach(), min(s.k_aux, candidates), part=state.part)
    p = pre_activations(xc, centre, encoder, bias, support)  # |d| cancels: selected with it, decoded without
    left = state.part.total(decode(p, decoder, support)) - error.detach()
    loss = left.square().sum(1).mean() / variance(error.detach())
    return loss.nan_to_num(0.0)


# -- the topk family -------------------------------------------------------------------------------------------
def _kept(w: Weights, x: Tensor, state: State, s: Settings) -> Any:
    """What topk and batchtopk keep: (centred input, centre, row norms or None, support, values relu(p) [entry]).

    Where the decoder's norms are free, choices are made by p |d| and the decoder is given p |d| / |d| = p: norms
    decide, but no gradient goes through them.
    """
    xc, centre = centred(w, x, state, s)
    norms = w["decoder"].detach().norm(dim=1) if s.decoder_norm == "free" else None
    encoder, bias = w["encoder"].detach(), w["b_enc"].detach()
    if norms is not None:
        scaled = state.scratch("scaled", tuple(encoder.shape), encoder)
        encoder, bias = torch.mul(encoder, norms[:, None], out=scaled), bias * norms
    assert s.k is not None
    half = s.encode == "bfloat16"
    if s.arch == "topk":
        support, found = top_k(xc, encoder, bias, int(s.k), half, state.part, state.scratch)
    else:
        support, found = batch_top_k(xc, encoder, bias, s.k, state.threshold, half, state.part, state.scratch)
    given = None if half else found  # values are float32: what was found in bfloat16 is computed again
    if norms is not None and given is not None:
        given = given / norms[support.ids]
    p = pre_activations(xc, centre, w["encoder"], w["b_enc"], support, given, state.scratch)
    return xc, centre, norms, support, p.relu()


def _topk(w: Weights, x: Tensor, y: Tensor, state: State, s: Settings) -> Step:
    xc, centre, norms, support, amounts = _kept(w, x, state, s)
    z = amounts.detach() if norms is None else amounts.detach() * norms[support.ids]
    if s.arch != "topk":
        _follow(state, z, s)
    total = variance(y)
    if s.arch == "matryoshka":
        outputs = list(_prefixes(w, x, amounts, support, state.part, s))
        output = outputs[-1]
        loss = torch.stack([squared_error(y, part) for part in outputs]).mean() / total
    else:
        output = reconstruct(w, x, amounts, support, state.part, state.scratch)
        loss = squared_error(y, output) / total
    revive = auxiliary(w, xc, centre, y - output, state, s, norms) if s.aux else loss.new_zeros(())
    return Step(loss + s.aux * revive, support.fired(z), output.detach(), {"aux": float(revive.detach())})


def _prefixes(w: Weights, x: Tensor, amounts: Tensor, support: Support, part: Shard, s: Settings) -> Any:
    """Reconstructions from the first widths[0] latents, from the first widths[1], ... Each adds its own latents."""
    output = w["b_dec"] + (x @ w["skip"].T if "skip" in w else 0.0)
    own = part.rows(s.d_sae)
    for low, high in pairwise(min(max(width, own.start), own.stop) - own.start for width in (0, *s.widths)):
        inside = (support.ids >= low) & (support.ids < high)
        band = Support(support.rows[inside], support.ids[inside] - low, support.n_rows, high - low)
        output = output + part.total(decode(amounts[inside], w["decoder"][low:high], band))
        yield output


def _follow(state: State, z: Tensor, s: Settings) -> None:
    """The inference threshold: a running mean of the smallest value that a batch kept.

    It runs over 1 / threshold_rate batches, in short trainings over the last tenth: values shrink while an autoencoder
    learns, and a mean that remembers its beginnings would keep too little afterwards.
    """
    least, rate = state.part.least(z[z > 0]), max(s.threshold_rate, min(1.0, 10 / s.steps))
    if least is not None:
        state.threshold = least if state.threshold == 0 else (1 - rate) * state.threshold + rate * least


# -- the relu family -------------------------------------------------------------------------------------------
def _reach(w: Weights, s: Settings) -> Tensor | float:
    """What a pre-activation must exceed to matter: 0, or where a threshold can still learn from it, [d_sae]."""
    return w["threshold"].detach().clamp(min=0) - (s.bandwidth or 0.0) / 2 if s.arch == "jumprelu" else 0.0


@torch.no_grad()
def fires_everywhere(w: Weights, x: Tensor, state: State, s: Settings) -> bool:
    """Whether so many latents of a ReLU fire that all are computed, as in a fresh autoencoder; seen on 128 tokens."""
    if s.arch not in RELU:
        return False
    xc, _ = centred(w, x[:: max(1, len(x) // 128)][:128], state, s)
    return busy(xc, w["encoder"], w["b_enc"], _reach(w, s))


def _exceeding(w: Weights, x: Tensor, state: State, s: Settings) -> tuple[Support | Full, Tensor]:
    """Pre-activations that matter, or all of them where most do: (support, p)."""
    xc, centre = centred(w, x, state, s)
    half = s.encode == "bfloat16"
    full = fires_everywhere(w, x, state, s) if state.full is None else state.full
    if full:
        everything = Full(len(xc), len(w["encoder"]), half)
        return everything, pre_activations(xc, centre, w["encoder"], w["b_enc"], everything)
    support, found = above(xc, w["encoder"].detach(), w["b_enc"].detach(), _reach(w, s), half)
    return support, pre_activations(xc, centre, w["encoder"], w["b_enc"], support, None if half else found)


def _relu(w: Weights, x: Tensor, y: Tensor, state: State, s: Settings) -> Step:
    support, p = _exceeding(w, x, state, s)
    z = p.relu()
    output = reconstruct(w, x, z, support, state.part)
    error = squared_error(y, output)
    coefficient = _sparsity(state, s)
    if s.arch == "panneal":
        _anneal(state, z.detach(), s)
        penalty = state.factor * state.part.total(_power(z, state.p).sum()) / len(x)
    else:
        penalty = state.part.total(support.weighed(z, penalty_norms(w["decoder"], s))) / len(x)
    parts = {"mse": float(error.detach()), "sparsity": float(penalty.detach())}
    return Step(error + coefficient * penalty, support.fired(z.detach()), output.detach(), parts)


def _sparsity(state: State, s: Settings) -> float:
    assert s.sparsity is not None
    return s.sparsity * (min(1.0, state.done / s.sparsity_warmup) if s.sparsity_warmup else 1.0)


def _power(z: Tensor, p: float) -> Tensor:
    """z^p, 0 at 0, with a finite slope there."""
    return z if p == 1 else z * (z + 1e-12).pow(p - 1)


def exponent(state: State, s: Settings) -> float:
    """panneal: the p of the next step."""
    along = max(0.0, (state.done - s.p_start_at) / max(1e-9, 1 - s.p_start_at))
    return 1 - (1 - s.p_end) * min(1.0, int(along * 10 + 1e-9) / 10)


def _anneal(state: State, z: Tensor, s: Settings) -> None:
    """p falls in ten steps from 1 to p_end; at each the penalty keeps its size on this batch."""
    if (p := exponent(state, s)) != state.p:
        before, after = (state.part.total(_power(z, power).sum()) for power in (state.p, p))
        if before > 0:
            state.factor *= float(before / after.clamp_min(1e-12))
            state.p = p


def _gated(w: Weights, x: Tensor, y: Tensor, state: State, s: Settings) -> Step:
    support, p = _exceeding(w, x, state, s)
    at, gate = support.at, p.relu()
    z = (p > 0) * ((p - at(w["b_enc"])) * at(w["r_mag"].exp()) + at(w["b_mag"])).relu()
    output = reconstruct(w, x, z, support, state.part)
    error = squared_error(y, output)
    frozen = {name: weight.detach() for name, weight in w.items()}  # the decoder learns from the real codes alone
    helper = squared_error(y, reconstruct(frozen, x, gate, support, state.part))
    penalty = state.part.total(support.weighed(gate, penalty_norms(w["decoder"], s))) / len(x)
    parts = {"mse": float(error.detach()), "sparsity": float(penalty.detach()), "gate": float(helper.detach())}
    return Step(error + helper + _sparsity(state, s) * penalty, support.fired(z.detach()), output.detach(), parts)


# -- jumprelu --------------------------------------------------------------------------------------------------
class _Jump(torch.autograd.Function):
    """z = p 1[p > t] with the paper's pseudo-derivative in t (eq. 11): -(t / e) K((p - t) / e), K rectangular."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.width = width
        return p * (p > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, threshold = ctx.saved_tensors
        near = (p - threshold).abs() < ctx.width / 2
        return grad * (p > threshold), -grad * near * threshold / ctx.width, None


class _Count(torch.autograd.Function):
    """1[p > t] with the paper's pseudo-derivative in t (eq. 12): -(1 / e) K((p - t) / e); none in p."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.width = width
        return (p > threshold).to(p.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, threshold = ctx.saved_tensors
        near = (p - threshold).abs() < ctx.width / 2
        return None, -grad * near / ctx.width, None


def _jumprelu(w: Weights, x: Tensor, y: Tensor, state: State, s: Settings) -> Step:
    assert s.bandwidth is not None
    with torch.no_grad():
        w["threshold"].clamp_(min=0)
    support, p = _exceeding(w, x, state, s)
    threshold = support.at(w["threshold"]).expand_as(p)
    z = _Jump.apply(p, threshold, s.bandwidth)
    output = reconstruct(w, x, z, support, state.part)
    error = squared_error(y, output)
    l0 = state.part.total(_Count.apply(p, threshold, s.bandwidth).sum()) / len(x)
    penalty = l0 if s.k is None else (l0 / s.k - 1).square()  # l0 is the batch's mean
    parts = {"mse": float(error.detach()), "sparsity": float(penalty.detach())}
    loss = error + _sparsity(state, s) * penalty
    return Step(loss, support.fired(z.detach()), output.detach(), parts)


# -- matching pursuit ------------------------------------------------------------------------------------------
def _pursuit(w: Weights, x: Tensor, y: Tensor, state: State, s: Settings) -> Step:
    assert s.k is not None
    support, values, left = pursuit.matching(x - w["b_dec"], w["decoder"], int(s.k))
    loss = left.square().sum(1).mean() / variance(y)
    return Step(loss, support.fired(values.detach()), (y - left).detach(), {})


Forward = Callable[[Weights, Tensor, Tensor, State, Settings], Step]
FORWARD: dict[str, Forward] = {
    "topk": _topk,
    "batchtopk": _topk,
    "matryoshka": _topk,
    "standard": _relu,
    "panneal": _relu,
    "gated": _gated,
    "jumprelu": _jumprelu,
    "mp": _pursuit,
}


# -- between steps ---------------------------------------------------------------------------------------------
def has_unit_rows(s: Settings) -> bool:
    return s.decoder_norm == "unit"


@torch.no_grad()
def drop_parallel(decoder: Tensor) -> None:
    """Takes from the gradient of each decoder row what would only change its norm, which is fixed."""
    if decoder.grad is not None:
        along = (decoder.grad * decoder).sum(1, keepdim=True)
        decoder.grad.addcmul_(along, decoder, value=-1)


@torch.no_grad()
def renormalise(decoder: Tensor) -> None:
    decoder.div_(decoder.norm(dim=1, keepdim=True).clamp_min(1e-12))
