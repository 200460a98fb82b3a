"""One SAE over several processes, each with its share of the latents: for dictionaries that no one device holds.

With R processes and every process reading the same batch, process r has rows r d/R .. (r + 1) d/R of encoder and
decoder. Hardly anything has to be sent::

    choice      each finds its own largest entries; the k-th largest of all of them together is the bar for everyone
    decode      x' = sum over processes of (z_r D_r) + b_dec                      one sum of [row, d_out]
    penalties   sums over latents are sums over processes
    backward    dL/dx' is the same everywhere, so each has the gradients of its own rows without asking anybody

(tensor parallelism, as in Megatron-LM, arXiv 1909.08053, for a two-layer network whose hidden layer is sparse; Gao et
al. 2024, arXiv 2406.04093, appendix D, train their largest SAEs so). Only b_dec has a gradient through every encoder;
`centre` keeps that part apart until it is added up. `WHOLE` is the one process that has everything: all its methods
give back what they are given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from interp.bridges.sae_lens import SAEError

#: Weights that every process has whole; of all others it has its rows.
REPLICATED = ("b_dec", "skip")


class _Total(torch.autograd.Function):
    """The sum over processes; what depends on it is the same in all of them, so the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.detach().clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@dataclass(eq=False)
class Shard:
    """A process's part of the latents.

    Attributes:
        rank: which part.
        world: how many there are.
        device: where tensors are that are sent.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"
    _centre: Tensor | None = field(default=None, repr=False)

    @classmethod
    def here(cls, d_sae: int, device: torch.device | str) -> Shard:
        """This process's part. SAEError without ``torch.distributed``, or where the parts would differ in size."""
        if not (dist.is_available() and dist.is_initialized()):
            raise SAEError("parallel='latents': call torch.distributed.init_process_group first, in every process")
        world = dist.get_world_size()
        if d_sae % world:
            raise SAEError(f"parallel='latents': d_sae={d_sae} is no multiple of the {world} processes")
        return cls(dist.get_rank(), world, device)

    def rows(self, d_sae: int) -> slice:
        size = d_sae // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def cut(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of whole weights."""
        if self.world == 1:
            return weights
        return {name: w if name in REPLICATED else w[self.rows(len(w))].clone() for name, w in weights.items()}

    def joined(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole weights, in every process."""
        if self.world == 1:
            return weights
        return {name: w if name in REPLICATED else torch.cat(self._all(w)) for name, w in weights.items()}

    # -- sums --------------------------------------------------------------------------------------------------
    def total(self, x: Tensor) -> Tensor:
        """The sum over processes, differentiable."""
        return x if self.world == 1 else _Total.apply(x)

    def count(self, n: int) -> int:
        return n if self.world == 1 else int(self.total(torch.tensor(n, device=self.device)))

    def least(self, values: Tensor) -> float | None:
        """The smallest of all values, None where no process has any."""
        own = values.min() if len(values) else values.new_tensor(torch.inf)
        if self.world > 1:
            dist.all_reduce(own, dist.ReduceOp.MIN)
        return None if own == torch.inf else float(own)

    def norm(self, weights: dict[str, Tensor]) -> Tensor:
        """Norm of all gradients together."""
        squares = {name: torch.linalg.vector_norm(w.grad).square() for name, w in weights.items() if w.grad is not None}
        own = torch.stack([n for name, n in squares.items() if name not in REPLICATED]).sum()
        shared = torch.stack([n for name, n in squares.items() if name in REPLICATED]).sum()
        return (self.total(own) + shared).sqrt()

    # -- choosing ----------------------------------------------------------------------------------------------
    def above_bar(self, values: Tensor, k: int) -> Tensor:
        """True for those of a process's candidates [row, slot] that are among each row's k largest anywhere."""
        if self.world == 1:
            return torch.ones_like(values, dtype=torch.bool)
        everyone = torch.cat(self._all(values), 1)
        bar = everyone.topk(min(k, everyone.shape[1]), 1, sorted=True).values[:, -1:]
        return (values >= bar) & (values > -torch.inf)

    def best(self, values: Tensor, n: int) -> Tensor:
        """Which entries [entry] are among the n largest of all processes, ascending."""
        if self.world == 1:
            return values.topk(n, sorted=False).indices.sort().values
        longest = torch.tensor(len(values), device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        padded = torch.nn.functional.pad(values, (0, int(longest) - len(values)), value=-torch.inf)
        bar = torch.cat(self._all(padded)).topk(n).values[-1]
        return (values >= bar).nonzero().squeeze(1)

    # -- b_dec, which every encoder sees -------------------------------------------------------------------------
    def centre(self, b_dec: Tensor) -> Tensor:
        """b_dec as encoders see it: with gradients of its own, which `collect` adds up."""
        if self.world == 1:
            return b_dec
        if self._centre is None:
            self._centre = b_dec.detach().clone().requires_grad_(True)
        return self._centre

    def collect(self, b_dec: Tensor) -> None:
        """Adds to b_dec's gradient what it has through the encoders of all processes."""
        if self.world == 1:
            return
        centre, self._centre = self._centre, None
        if centre is not None:
            through = torch.zeros_like(b_dec) if centre.grad is None else centre.grad
            dist.all_reduce(through)
            assert b_dec.grad is not None
            b_dec.grad += through

    def _all(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous())
        return parts


WHOLE = Shard()
