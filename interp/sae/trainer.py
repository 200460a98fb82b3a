"""One SAE in training: its weights, its optimiser, and one step.

Adam with its moments in one pass over the weights (``fused``). Every latent's moments decay in every step, also where
it did not fire: skipping those rows would change the loss curve, and costs more than it saves as long as a batch makes
most latents fire.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.sae.architectures import (
    State,
    Step,
    Weights,
    drop_parallel,
    has_unit_rows,
    initial,
    renormalise,
    squared_error,
    variance,
)
from interp.sae.autoencoder import SAE
from interp.sae.pieces import learn
from interp.sae.settings import Settings
from interp.sae.shards import WHOLE, Shard
from interp.sae.sources import UNNAMED

Row = dict[str, float]


@dataclass
class Counts:
    """Tokens seen, and those that were left out."""

    tokens: int = 0
    outliers: int = 0


class Trainer:
    """The training of one SAE.

    Args:
        settings: complete settings.
        sites: what it reads, in this order side by side.
        targets: what it reconstructs.
        sample: tokens by site [row, d] from which the scale of the inputs and b_dec are estimated.
        device: where the weights live.
        part: the latents that this process has, where several processes share them.
    """

    def __init__(self, settings: Settings, sites: tuple[str, ...], targets: tuple[str, ...],
                 sample: dict[str, Tensor], device: torch.device | str = "cpu",
                 part: Shard = WHOLE) -> None:  # fmt: skip
        self.settings, self.sites, self.targets, self.device = settings, sites, targets, torch.device(device)
        x, y = self._gather(sample, sites), self._gather(sample, targets)
        good = _finite(x, y, self.sites, self.targets)
        norms, aims = x[good].norm(dim=1), y[good].norm(dim=1)
        self.limit = float(norms.median()) * settings.outliers if settings.outliers else float("inf")
        kept = norms <= self.limit
        self.scale = settings.d_in**0.5 / float(norms[kept].mean()) if settings.scale else 1.0
        self.scale_out = settings.d_out**0.5 / float(aims[kept].mean()) if settings.scale else 1.0
        self.weights: Weights = {
            name: weight.to(self.device).requires_grad_(True)
            for name, weight in part.cut(initial(settings, y[good][kept] * self.scale_out)).items()
        }
        self.copies = _world() if part.world == 1 else 1  # processes that each have all latents and some of the tokens
        silent = torch.zeros(len(self.weights["decoder"]), dtype=torch.long, device=self.device)
        self.state = State(silent, part=part)
        self.counts = Counts()
        self.rows: list[Row] = []
        assert settings.lr is not None
        assert settings.beta1 is not None
        assert settings.eps is not None
        self.optimizer = torch.optim.Adam(
            self.weights.values(), settings.lr, (settings.beta1, settings.beta2), settings.eps, fused=True
        )

    def _gather(self, batch: dict[str, Tensor], sites: tuple[str, ...]) -> Tensor:
        return torch.cat([batch[site] for site in sites], 1) if len(sites) > 1 else batch[sites[0]]

    def prepared(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scaled (inputs, targets) of a batch, outliers left out and counted."""
        x = self._gather(batch, self.sites).to(self.device)
        y = x if self.targets == self.sites else self._gather(batch, self.targets).to(self.device)
        norms = x.norm(dim=1)
        if not bool(torch.isfinite(norms.sum())) or not bool(torch.isfinite(y.sum())):
            _finite(x, y, self.sites, self.targets)
        self.counts.tokens += len(x)
        keep = norms <= self.limit
        if not bool(keep.all()):
            self.counts.outliers += int((~keep).sum())
            same = y is x
            x = x[keep]
            y = x if same else y[keep]
        if y is x:
            x = y = x * self.scale
            return x, y
        return x * self.scale, y * self.scale_out

    def step(self, batch: dict[str, Tensor], *, log: bool = False) -> Step:
        """Forward, backward, update. With `log` a row of metrics is added."""
        s, state = self.settings, self.state
        x, y = self.prepared(batch)
        state.done = state.steps / s.steps
        self.optimizer.zero_grad(set_to_none=True)
        out = learn(self.weights, x, y, state, s)
        state.part.collect(self.weights["b_dec"])
        self._shared()
        if has_unit_rows(s):
            drop_parallel(self.weights["decoder"])
        if s.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights.values(), s.clip, state.part.norm(self.weights))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        if has_unit_rows(s):
            renormalise(self.weights["decoder"])
        fired = out.fired > 0
        state.silent += len(x) * self.copies
        state.silent[_any(fired) if self.copies > 1 else fired] = 0
        state.steps += 1
        if log:
            self.log(out, y)
        return out

    def _shared(self) -> None:
        """Data parallel: every process has its part of each batch, and all take the same step."""
        if (world := self.copies) == 1:
            return
        for weight in self.weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            torch.distributed.all_reduce(weight.grad)
            weight.grad /= world
        if self.settings.arch in ("batchtopk", "matryoshka"):
            threshold = torch.tensor([self.state.threshold], dtype=torch.float64)
            torch.distributed.all_reduce(threshold)
            self.state.threshold = float(threshold) / world

    def learning_rate(self) -> float:
        """Of the coming step: up over the warm-up, flat, down to 0 over the decay."""
        s, step = self.settings, self.state.steps
        assert s.lr is not None
        up = min(1.0, (step + 1) / (s.warmup * s.steps)) if s.warmup else 1.0
        down = min(1.0, (s.steps - step) / (s.decay * s.steps)) if s.decay else 1.0
        return s.lr * min(up, max(0.0, down))

    @property
    def dead(self) -> int:
        assert self.settings.dead_after is not None
        return self.state.part.count(int((self.state.silent >= self.settings.dead_after).sum()))

    def log(self, out: Step, y: Tensor) -> None:
        s, loss = self.settings, float(out.loss.detach())
        if not torch.isfinite(out.loss):
            raise SAEError(f"step {self.state.steps}: the loss is {loss}; try a lower lr (it is {s.lr:g})")
        fires, dead = self.state.part.count(int(out.fired.sum())), self.dead
        self.rows.append({
            "step": self.state.steps, "tokens": self.counts.tokens, "loss": loss,
            "fvu": float(squared_error(y, out.output) / variance(y)), "l0": fires / max(1, len(y)),
            "dead": dead, "lr": self.learning_rate(), "threshold": self.state.threshold,
            "outliers": self.counts.outliers, **out.parts,
        })  # fmt: skip
        if dead == s.d_sae or (not fires and self.state.steps > 10):
            raise SAEError(
                f"step {self.state.steps}: all {s.d_sae} latents are dead. Lower sparsity (it is {s.sparsity:g}) or "
                f"lr (it is {s.lr:g}), raise k, or look at the data: are the activations constant?"
            )

    # -- the result --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def finished(self, metadata: dict[str, Any] | None = None) -> SAE:
        """The SAE in the units of the model: input scale, decoder norms and threshold folded into the weights."""
        import pandas as pd

        s, own = self.settings, {name: weight.detach().clone() for name, weight in self.weights.items()}
        w = {name: weight.cpu() for name, weight in self.state.part.joined(own).items()}
        decoder = w["decoder"]
        encoder, b_enc = w.get("encoder", decoder), w.get("b_enc", torch.zeros(s.d_sae))
        extra: dict[str, Any] = {name: w[name] for name in ("threshold", "r_mag", "b_mag") if name in w}
        arch = {"panneal": "standard", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(s.arch, s.arch)
        if s.arch in ("topk", "batchtopk", "matryoshka") and s.decoder_norm == "free":
            norms = decoder.norm(dim=1)
            encoder, b_enc, decoder = encoder * norms[:, None], b_enc * norms, decoder / norms[:, None]
        if s.arch in ("batchtopk", "matryoshka"):
            extra["threshold"] = torch.full((s.d_sae,), self.state.threshold)
        if self.counts.outliers:
            extra["limit"] = self.limit
        if "skip" in w:
            extra["skip"] = w["skip"] * (self.scale / self.scale_out)
        if s.arch == "mp":  # tied, so amounts and not atoms take the scale
            encoder = decoder
            extra["tolerance"] = 1e-2 / self.scale
        else:
            encoder, decoder = encoder * self.scale, decoder / self.scale_out
        about = {
            **(metadata or {}),
            "trained_as": s.arch,
            "training": s.to_dict(),
            "tokens_seen": self.counts.tokens,
            "outlier_tokens": self.counts.outliers,
            "dead_latents": self.dead,
        }
        history = pd.DataFrame(self.rows)
        history.attrs.update(about)
        return SAE(
            decoder, w["b_dec"] / self.scale_out, encoder, b_enc, arch,
            k=int(s.k) if arch in ("topk", "mp") and s.k is not None else None,
            sites=named(self.sites), targets=named(self.targets), centred=s.shape == "autoencoder", metadata=about,
            history=history, **extra,
        )  # fmt: skip


def named(sites: tuple[str, ...]) -> tuple[str, ...]:
    """The sites of an SAE; none where it was trained on a tensor without a name."""
    return () if sites == (UNNAMED,) else sites


def _world() -> int:
    """Processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _any(fired: Tensor) -> Tensor:
    """True where a latent fired in any process."""
    counts = fired.int()
    torch.distributed.all_reduce(counts)
    return counts > 0


def _finite(x: Tensor, y: Tensor, sites: tuple[str, ...], targets: tuple[str, ...]) -> Tensor:
    """True at rows without NaN or infinity [row]; SAEError where there are others, or none are left."""
    good = torch.isfinite(x).all(1) & torch.isfinite(y).all(1)
    if not bool(good.all()):
        names = ", ".join(dict.fromkeys((*sites, *targets)))
        raise SAEError(
            f"{int((~good).sum())} of {len(x)} tokens at {names} hold NaN or infinity. Find out where they come from "
            "(m.capture warns and names the site; a store counts them in ds.statistics(site).nonfinite), or filter them"
        )
    return good


def warn_if_few(rows: int | None, s: Settings) -> None:
    """Warns where a dictionary is large for the tokens it is learnt from."""
    seen = s.tokens if rows is None else min(rows, s.tokens)
    if seen < 10 * s.d_sae:
        warnings.warn(
            f"d_sae={s.d_sae} latents are to be learnt from {seen} tokens, fewer than ten each: many will be dead or "
            "memorise single tokens; take more tokens or fewer latents",
            stacklevel=4,
        )
