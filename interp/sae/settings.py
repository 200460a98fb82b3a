"""What a training is told: every choice that changes its result, with each paper's defaults.

`Settings` is written into checkpoints, cards and the ``.attrs`` of tables. Fields left at None are filled in by
`complete` from the architecture's table below, which says where a default is not the paper's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from interp.bridges.sae_lens import SAEError


@dataclass(frozen=True)
class Settings:
    """The settings of one SAE. Inputs are in units in which the mean norm of an activation is sqrt(d_in).

    Attributes:
        arch: a key of `DEFAULTS`.
        d_in: width of what is read; for a crosscoder all its sites together.
        d_out: width of what is reconstructed.
        d_sae: latents.
        k: latents per token: exactly (topk), on average (batchtopk, matryoshka, jumprelu with a target), at most (mp).
        shape: autoencoder | transcoder (reads one site, predicts another) | crosscoder (several sites side by side).
        blocks: widths of the crosscoder's sites, or (d_out,).
        skip: a transcoder with a linear path beside its latents (Paulo et al. 2025, arXiv:2501.18823).
        lr, beta1, beta2, eps: of Adam.
        batch_size: tokens per step.
        tokens: tokens to train on.
        warmup, decay: parts of the training over which the learning rate rises from 0, and falls to 0 at its end.
        clip: largest norm of the gradient; None for none.
        decoder_norm: "unit": decoder rows are kept at norm 1, and gradients along them are dropped; "free": they are
            not, and topk-like choices are made as if they were 1 (SAELens's rescale_acts_by_decoder_norm).
        init_norm: norm of decoder rows at the start. The encoder starts as the decoder's transpose.
        centre: median | mean | zero: where b_dec starts (the geometric median of the first tokens; Gao et al.).
        sparsity: coefficient of the sparsity loss (standard, panneal, gated, jumprelu).
        sparsity_warmup: part of the training over which that coefficient rises from 0.
        p_end, p_start_at: panneal: the last p, and the part of the training after which p begins to fall from 1.
        bandwidth, threshold: jumprelu: width of the kernel, and where thresholds start.
        threshold_rate: batchtopk: weight of the newest batch in the threshold kept for inference; at least 10 / steps.
        aux: coefficient of the loss that revives dead latents (topk, batchtopk, matryoshka).
        k_aux: dead latents used in it, per token.
        dead_after: tokens without firing after which a latent counts as dead.
        widths: matryoshka: latents of each nested prefix; the last is d_sae.
        encode: float32, or bfloat16 where the processor is quicker at it (AVX512-BF16, AMX, GPUs): the precision in
            which it is found *which* latents fire (their values stay float32), and that of all products while most
            latents of an autoencoder with a ReLU fire.
        scale: inputs are divided so that their mean norm is sqrt(d_in); folded into the weights at the end.
        outliers: tokens whose norm exceeds the median's this many times are left out and counted; None keeps all.
        seed: of the initial weights and of the order of the data.
    """

    arch: str
    d_in: int
    d_out: int
    d_sae: int
    k: float | None = None
    shape: str = "autoencoder"
    blocks: tuple[int, ...] = ()
    skip: bool = False
    lr: float | None = None
    beta1: float | None = None
    beta2: float = 0.999
    eps: float | None = None
    batch_size: int = 4096
    tokens: int = 0
    warmup: float = 0.0
    decay: float = 0.2
    clip: float | None = None
    decoder_norm: str | None = None
    init_norm: float | None = None
    centre: str | None = None
    sparsity: float | None = None
    sparsity_warmup: float = 0.05
    p_end: float = 0.2
    p_start_at: float = 0.25
    bandwidth: float | None = None
    threshold: float | None = None
    threshold_rate: float = 0.01
    aux: float = 1 / 32
    k_aux: int | None = None
    dead_after: int | None = None
    widths: tuple[int, ...] = ()
    encode: str = "float32"
    scale: bool = True
    outliers: float | None = 10.0
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


#: Per architecture: its source, and the defaults that it sets.
#:
#: topk        Gao et al. 2024 (arXiv:2406.04093): lr 2e-4 / sqrt(d_sae / 2^14), eps 6.25e-10, unit decoder rows, b_dec
#:             at the geometric median, aux 1/32. Dead is 10 M tokens without firing there; here at most a tenth of the
#:             training, so that short ones revive latents too. k_aux d_in / 2 (a power of two near it there).
#: batchtopk   Bussmann et al. 2024 (arXiv:2412.06410): the same; threshold as a running mean of the batches' minima.
#: matryoshka  Bussmann et al. 2025 (arXiv:2503.17547): prefixes of d_sae / 16, / 8, / 4, / 2 and all, equal weights.
#: standard    Anthropic's April 2024 update: rows free, of norm 0.1 at first, penalty sum z |d|, coefficient 5, lr
#:             5e-5, beta1 0.9, lr to 0 over the last fifth. Here the encoder sees x - b_dec, as in SAELens.
#: panneal     Karvonen et al. 2024 (arXiv:2408.00113): p from 1 to 0.2; unit rows. Coefficient is tuned there.
#: gated       Rajamanoharan et al. 2024 (arXiv:2404.16014): unit rows, frozen decoder in the auxiliary term (SAELens
#:             does not freeze it), beta1 0. The coefficient is swept there; 1 is SAELens's.
#: jumprelu    Rajamanoharan et al. 2024 (arXiv:2407.14435): lr 7e-5, beta1 0, bandwidth and first threshold 0.001 at
#:             unit mean squared norm, which is 0.001 sqrt(d_in) in our units. Thresholds are learnt directly, not
#:             their logarithm, which hardly moves in short trainings; k sets a target (L0 / k - 1)^2.
#: mp          Costa et al. 2025 (arXiv:2506.03093): unit tied atoms, at most k steps of matching pursuit.
DEFAULTS: dict[str, dict[str, Any]] = {
    "topk": {"decoder_norm": "unit", "init_norm": 1.0, "centre": "median", "eps": 6.25e-10, "beta1": 0.9},
    "batchtopk": {"decoder_norm": "unit", "init_norm": 1.0, "centre": "median", "eps": 6.25e-10, "beta1": 0.9},
    "matryoshka": {"decoder_norm": "unit", "init_norm": 1.0, "centre": "median", "eps": 6.25e-10, "beta1": 0.9},
    "standard": {"decoder_norm": "free", "init_norm": 0.1, "centre": "zero", "lr": 5e-5, "sparsity": 5.0},
    "panneal": {"decoder_norm": "unit", "init_norm": 1.0, "centre": "median", "lr": 1e-3, "sparsity": 5.0},
    "gated": {"decoder_norm": "unit", "init_norm": 1.0, "centre": "zero", "lr": 3e-4, "beta1": 0.0, "sparsity": 1.0},
    "jumprelu": {"decoder_norm": "unit", "init_norm": 1.0, "centre": "zero", "lr": 7e-5, "beta1": 0.0},
    "mp": {"decoder_norm": "unit", "init_norm": 1.0, "centre": "mean", "lr": 3e-4},
}
_GENERAL = {"beta1": 0.9, "eps": 1e-8, "sparsity": 0.0}
NEEDS_K = ("topk", "batchtopk", "matryoshka", "mp")


def complete(s: Settings) -> Settings:
    """The same settings with every None filled in. SAEError for settings that cannot be trained."""
    if s.arch not in DEFAULTS:
        raise SAEError(f"arch={s.arch!r}: expected one of {', '.join(DEFAULTS)}")
    if s.d_sae < 1 or s.batch_size < 1:
        raise SAEError(f"d_sae={s.d_sae}, batch_size={s.batch_size}: expected at least 1")
    if s.k is None and s.arch in NEEDS_K:
        raise SAEError(f"arch={s.arch!r} needs k, the number of latents per token")
    if s.k is not None and not 0 < s.k <= s.d_sae:
        raise SAEError(f"k={s.k:g}: expected between 1 and d_sae={s.d_sae}, since a token cannot use more latents")
    if s.k is not None and s.arch in ("topk", "mp") and int(s.k) != s.k:
        raise SAEError(f"k={s.k:g}: {s.arch} takes a whole number; an average per token is batchtopk's")
    if s.arch == "mp" and s.shape != "autoencoder":
        raise SAEError(f"arch='mp' with shape={s.shape!r}: pursuit reconstructs what it reads, so it has one site")
    if s.decoder_norm not in (None, "unit", "free"):
        raise SAEError(f"decoder_norm={s.decoder_norm!r}: expected 'unit' or 'free'")
    if s.encode not in ("float32", "bfloat16"):
        raise SAEError(f"encode={s.encode!r}: expected 'float32' or 'bfloat16'")
    filled: dict[str, Any] = {**_GENERAL, **DEFAULTS[s.arch]}
    filled["lr"] = filled.get("lr", 2e-4 / (s.d_sae / 2**14) ** 0.5)
    filled["k_aux"] = max(1, min(s.d_in // 2, s.d_sae))
    filled["dead_after"] = min(10_000_000, max(s.batch_size, s.tokens // 10))
    root = s.d_in**0.5
    filled |= {"bandwidth": 0.001 * root, "threshold": 0.001 * root}
    if s.arch == "jumprelu":
        filled["sparsity"] = 1.0 if s.k is None else root  # in units of squared error
    new = {name: value for name, value in filled.items() if getattr(s, name) is None}
    if s.arch == "matryoshka":
        new["widths"] = _widths(s)
    if not s.blocks:
        new["blocks"] = (s.d_out,)
    return replace(s, **new)


def _widths(s: Settings) -> tuple[int, ...]:
    widths = s.widths or (*tuple(w for w in (s.d_sae // 16, s.d_sae // 8, s.d_sae // 4, s.d_sae // 2) if w), s.d_sae)
    if list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != s.d_sae:
        raise SAEError(f"widths={list(widths)}: expected rising numbers of latents that end at d_sae={s.d_sae}")
    return tuple(widths)


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """'k: 32 there, 64 here; ...' of all settings that differ; empty where none does."""
    keys = [*saved, *(key for key in wanted if key not in saved)]
    return "; ".join(
        f"{key}: {saved.get(key)!r} there, {wanted.get(key)!r} here"
        for key in keys
        if saved.get(key) != wanted.get(key)
    )
