"""Autoencoders of every architecture, small enough for formulas written out, with nothing in them zero or tied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.sae.architectures import State, initial
from interp.sae.settings import NEEDS_K, Settings, complete

D, M, B, K = 12, 40, 64, 4


def settings(arch: str, **more: Any) -> Settings:
    given = {"k": K if arch in NEEDS_K else None, "batch_size": B, "tokens": 100 * B, "dead_after": 1000, **more}
    return complete(Settings(arch, D, given.pop("d_out", D), M, **given))


def setup(s: Settings) -> tuple[dict[str, Tensor], Tensor, Tensor, State]:
    g = torch.Generator().manual_seed(1)
    x = 1.5 * torch.randn(B, D, generator=g, dtype=torch.float64) + 0.5
    y = x if s.shape != "transcoder" else torch.randn(B, s.d_out, generator=g, dtype=torch.float64)
    w = initial(s, y.float())
    for name, weight in w.items():  # nothing is zero, one, or tied any more
        noise = torch.randn(weight.shape, generator=g, dtype=torch.float64)
        w[name] = weight.double() + (0.02 * noise.abs() if name == "threshold" else 0.1 * noise)
        if s.decoder_norm == "unit" and name == "decoder":
            w[name] = torch.nn.functional.normalize(w[name], dim=1)
    state = State(torch.zeros(M, dtype=torch.long), done=0.5)
    state.silent[:9] = 5000  # dead, as far as the loss knows
    return {n: t.requires_grad_(True) for n, t in w.items()}, x, y, state
