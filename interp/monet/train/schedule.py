"""Learning rate and optimisers.

The learning rate is warmup - stable - decay: a linear rise, a constant, and a last part in which it falls linearly to
nothing. Unlike a cosine it knows the end of the run only in its last part, so a longer run can go on from where the
shorter one began to decay. Source: Hu et al., MiniCPM, arXiv 2404.06395, section 4.

Matrices may be trained by Muon (`muon`), the rest by AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.monet.train.muon import Muon

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a multiple of its peak: `warmup` steps up, then flat, then down over `decay` of all `steps`."""

    steps: int
    warmup: int
    decay: float

    @property
    def decay_start(self) -> int:
        """The first step of the decay."""
        return self.steps - round(self.decay * self.steps)

    def __call__(self, step: int) -> float:
        up = (step + 1) / self.warmup if step < self.warmup else 1.0
        left = (self.steps - step) / max(1, self.steps - self.decay_start)
        return max(0.0, min(up, left, 1.0))


def decays(name: str, parameter: Tensor) -> bool:
    """Is this parameter pulled towards zero? Matrices are; norms, biases and embeddings are not."""
    bias = name.rsplit(".", 1)[-1] in ("bias", "b", "b1", "b2")  # Monet's b are biases, one row per part
    return parameter.dim() >= 2 and not bias and "embed_tokens" not in name and "lm_head" not in name


def routes(name: str) -> bool:
    """Is this parameter a router's? A step moves a key's logit by about lr x the sum of |x| over d_model, for
    all tokens alike as long as they look alike; at the full rate a few keys run away in the first steps and the rest
    die.
    """
    return ".router." in name or ".mlp.gate." in name


def optimizers(
    model: nn.Module, kind: str, *, lr: float, router_lr: float, weight_decay: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """The optimisers of a model; each parameter belongs to exactly one. Groups keep their peak rate as `peak`."""
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer={kind!r}: expected one of {', '.join(OPTIMIZERS)}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if kind == "muon" and decays(name, p) and not routes(name)]
    taken = {id(p) for p in muon}
    rest = [(name, p) for name, p in named if id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in rest if routes(name)], "weight_decay": weight_decay, "lr": lr * router_lr},
        {"params": [p for name, p in rest if decays(name, p) and not routes(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in rest if not decays(name, p)], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=1e-10, fused=True)
    ]
    if muon:
        made.append(Muon(muon, lr=lr, weight_decay=weight_decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def set_rate(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Sets every group's learning rate to `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
