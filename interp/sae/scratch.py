"""Memory that a training uses again."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Memory that is used again in every step.

    Fresh memory comes from the kernel page by page: for the gradients and buffers of 18,432 latents that took a sixth
    of a step. What is kept under a name is overwritten by the next who asks for it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of that shape on `like`'s device, with anything in it."""
        found, dtype = self._kept.get(name), dtype or like.dtype
        if found is None or found.shape != shape or found.dtype != dtype or found.device != like.device:
            found = self._kept[name] = torch.empty(shape, dtype=dtype, device=like.device)
        return found
