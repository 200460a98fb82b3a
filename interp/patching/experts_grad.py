"""Gradients with respect to experts that were not chosen.

An expert that a token was not sent to has weight 0, and its slope dL/dw = dL/dy . E(x) is well defined; only nobody
computes E(x). So for the gradient run the layer gets more slots, which change nothing: the source run's experts with
weight 0, and one slot of weight 1 whose output is replaced by 0, so that the gradient there is dL/dy itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.sites import Site


@dataclass(eq=False)
class Widened:
    """The writes of one layer: slots for more experts of weight 0, and one of weight 1 and output 0.

    Attributes:
        layer: the layer.
        more: experts to add [pair, pos, slot].
    """

    layer: int
    more: Tensor

    def writes(self) -> list[Any]:
        return [_Write(Site(name, self.layer), self) for name in ("expert_ids", "expert_weight", "expert_out")]


@dataclass(eq=False)
class _Write:
    site: Site
    widened: Widened

    def __call__(self, h: Tensor, clock: Any, ids: Tensor | None = None, inputs: Any = ()) -> Tensor:
        more = self.widened.more
        if self.site.name == "expert_ids":
            return torch.cat([h, more.to(h.dtype), torch.zeros_like(h[..., :1])], -1)
        if self.site.name == "expert_weight":
            added = torch.zeros(*h.shape[:-1], more.shape[-1] + 1, dtype=h.dtype, device=h.device)
            added[..., -1] = 1
            return torch.cat([h, added], -1)
        return torch.cat([h[..., :-1, :], h[..., -1:, :] * 0], -2)


def per_expert(ids: Tensor, values: Tensor, n_experts: int) -> Tensor:
    """One value per expert [pair, pos, expert] from one per slot [pair, pos, slot]; slots of one expert agree."""
    out = torch.zeros(*ids.shape[:-1], n_experts, dtype=torch.float32, device=ids.device)
    return out.scatter(-1, ids, values.float())
