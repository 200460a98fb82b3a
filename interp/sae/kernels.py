"""The arithmetic of sparse codes: only what fires is computed, forward and backward.

Of the latents of a token a few in a thousand fire. A training step with dense codes spends its time multiplying by
zeros; here a code is its non-zero entries (`Support`), and with E the encoder, D the decoder (one row per latent), and
G the gradients of the entries, a step is::

    p  = (x E^T + b) at the support          one dense product, thrown away but for the entries
    x' = sum of p D[ids]                     an embedding bag: one bag per token
    dG = <dx', D[ids]>                       sampled products
    dD = P^T dx',   dE = G^T x               embedding bags again: one bag per *latent*, over its tokens

so of the five dense products of an ordinary step one is left (Gao et al. 2024, arXiv:2406.04093, appendix D).

Where codes are not sparse the same functions go through dense matrices: above a share of `DENSE_ABOVE` for single
products, and from the outset where every entry is kept (`Full`), as for a fresh ReLU SAE, which fires everywhere. All
ways are the same numbers up to rounding; the tests hold them against the literal dense formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from interp.sae import dense
from interp.sae.scratch import Scratch

#: Share of entries that fire above which the dense way is the quicker one: measured on a CPU, guessed for GPUs, whose
#: dense products are quicker by more than their memory is.
DENSE_ABOVE = 0.2
DENSE_ABOVE_ON_GPU = 0.03
_BLOCK = 1 << 16  # entries whose products are taken together, where there is no kernel for sampled products


@dataclass(frozen=True, eq=False)
class Support:
    """Which (token, latent) pairs hold an entry, ordered by token.

    Attributes:
        rows: token of each entry [entry], ascending.
        ids: latent of each entry [entry].
        n_rows: tokens.
        d_sae: latents.
    """

    rows: Tensor
    ids: Tensor
    n_rows: int
    d_sae: int

    @property
    def dense(self) -> bool:
        above = DENSE_ABOVE if self.ids.device.type == "cpu" else DENSE_ABOVE_ON_GPU
        return self.ids.numel() > above * self.n_rows * self.d_sae

    @cached_property
    def starts(self) -> Tensor:
        """First entry of each token, and one past the last [row + 1]."""
        return _starts(self.rows, self.n_rows)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same entries ordered by latent: their order [entry], their tokens [entry], each latent's first entry."""
        order = self.ids.argsort(stable=True)
        return order, self.rows[order], _starts(self.ids, self.d_sae, ordered=False)

    def scatter(self, values: Tensor) -> Tensor:
        """The entries as a dense matrix [row, d_sae]."""
        out = values.new_zeros(self.n_rows, self.d_sae)
        out[self.rows, self.ids] = values
        return out

    def at(self, per_latent: Tensor) -> Tensor:
        """A value per latent [d_sae] at the entries [entry]."""
        return per_latent[self.ids]

    def fired(self, values: Tensor) -> Tensor:
        """Tokens at which each latent is positive [d_sae]."""
        return torch.bincount(self.ids[values > 0], minlength=self.d_sae)

    def weighed(self, values: Tensor, per_latent: Tensor) -> Tensor:
        """The sum of all entries, each times its latent's number [d_sae]."""
        return (values * self.at(per_latent)).sum()

    def where(self, keep: Tensor) -> Support:
        """The entries for which `keep` [entry] is True."""
        return Support(self.rows[keep], self.ids[keep], self.n_rows, self.d_sae)

    @classmethod
    def flat(cls, places: Tensor, n_rows: int, d_sae: int) -> Support:
        """From ascending places row * d_sae + latent [entry]."""
        rows = torch.div(places, d_sae, rounding_mode="floor")
        return cls(rows, places - rows * d_sae, n_rows, d_sae)

    @classmethod
    def slots(cls, ids: Tensor, d_sae: int) -> Support:
        """From equally many latents per token [row, slot]."""
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        support = cls(rows, ids.flatten(), len(ids), d_sae)
        starts = torch.arange(0, ids.numel() + 1, max(1, ids.shape[1]), device=ids.device)
        support.__dict__["starts"] = starts if ids.shape[1] else starts.new_zeros(len(ids) + 1)
        return support


@dataclass(frozen=True)
class Full:
    """Every (token, latent) pair: values are a matrix [row, d_sae], and a value per latent is a row that broadcasts.

    With `half` the products are taken in bfloat16.
    """

    n_rows: int
    d_sae: int
    half: bool = False

    def at(self, per_latent: Tensor) -> Tensor:
        return per_latent

    def fired(self, values: Tensor) -> Tensor:
        return values.sign().sum(0).long()  # none is negative; three times quicker than counting booleans

    def weighed(self, values: Tensor, per_latent: Tensor) -> Tensor:
        return values.sum(0) @ per_latent


def _starts(keys: Tensor, n: int, ordered: bool = True) -> Tensor:
    if ordered:
        return torch.searchsorted(keys, torch.arange(n + 1, device=keys.device))
    return torch.nn.functional.pad(torch.bincount(keys, minlength=n).cumsum(0), (1, 0))


def bag(values: Tensor, ids: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """Weighted sums of rows of `table`: sum over the entries of bag i of values * table[ids] [bag, width]."""
    if not ids.numel():
        return table.new_zeros(len(starts) - 1, table.shape[1])
    if gpu := _gpu(table, values):
        return gpu.bag(values, ids, starts, table)
    return embedding_bag(
        ids, table, starts, mode="sum", per_sample_weights=values.to(table.dtype), include_last_offset=True
    )


def sampled(support: Support, x: Tensor, table: Tensor) -> Tensor:
    """Inner products <x[row], table[id]> of the entries only [entry]."""
    if support.dense:
        return (x @ table.T)[support.rows, support.ids]
    if _mkl(support, x):
        return _sampled_mkl(support, x, table)
    if support.ids.numel() and (gpu := _gpu(x, table)):
        return gpu.sampled(support.rows, support.ids, x, table)
    pieces = [
        (x[r] * table[i]).sum(-1) for r, i in zip(support.rows.split(_BLOCK), support.ids.split(_BLOCK), strict=True)
    ]
    return torch.cat(pieces) if pieces else x.new_zeros(0)


def _gpu(*given: Tensor) -> Any:
    """The Triton kernels, where there is a GPU with Triton and nothing given is differentiated through them."""
    if not all(t.is_cuda for t in given) or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return None
    return _triton()


@cache
def _triton() -> Any:
    try:
        from interp.sae import triton_kernels
    except ImportError:  # builds of torch for other devices do not bring it
        return None
    return triton_kernels


def _mkl(support: Support, x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.backends.mkl.is_available() and support.ids.numel() > 0


def _csr(starts: Tensor, ids: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    import warnings

    with warnings.catch_warnings():  # torch calls its CSR layout beta, once per process
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, ids, values, shape, check_invariants=False)


def _sampled_mkl(support: Support, x: Tensor, table: Tensor) -> Tensor:
    nothing = x.new_zeros(support.ids.numel())
    if support.d_sae <= support.n_rows:
        pattern = _csr(support.starts, support.ids, nothing, (support.n_rows, support.d_sae))
        return torch.sparse.sampled_addmm(pattern, x, table.T, beta=0.0).values()
    # latent by latent: the larger matrix is read from front to back, and the smaller one by rows here and there
    order, rows, starts = support.by_latent
    pattern = _csr(starts, rows, nothing, (support.d_sae, support.n_rows))
    return nothing.index_copy_(0, order, torch.sparse.sampled_addmm(pattern, table, x.T, beta=0.0).values())


def transposed(support: Support, values: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Values^T x: for each latent the weighted sum of its tokens [d_sae, width]; into `out` where the kernel can."""
    if support.dense:
        return support.scatter(values).T @ x
    order, rows, starts = support.by_latent
    if out is not None and _mkl(support, x):
        matrix = _csr(starts, rows, values[order].to(x.dtype), (support.d_sae, support.n_rows))
        return torch.addmm(out, matrix, x, beta=0, out=out)
    if len(rows) and (gpu := _gpu(x, values)):
        return gpu.bag(values[order], rows, starts, x, out)
    return bag(values[order], rows, starts, x)


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        centre: Tensor | None,
        encoder: Tensor,
        bias: Tensor,
        support: Support,
        given: Tensor | None,
        scratch: Scratch | None,
    ) -> Tensor:
        ctx.support, ctx.scratch = support, scratch
        ctx.save_for_backward(x, encoder)
        return sampled(support, x, encoder) + bias[support.ids] if given is None else given.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, encoder = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_encoder = transposed(ctx.support, grad, x, _into(ctx.scratch, "d_encoder", encoder)) if needs[2] else None
        d_bias = torch.zeros_like(encoder[:, 0]).index_add_(0, ctx.support.ids, grad)
        # one centre for all tokens: its gradient needs only the sum over them, which the bias has
        d_centre = -(d_bias @ encoder) if needs[1] else None
        return None, d_centre, d_encoder, d_bias, None, None, None


def _into(scratch: Scratch | None, name: str, like: Tensor) -> Tensor | None:
    """Where a gradient is written: a new view each time, so that autograd takes it for the gradient as it is."""
    return None if scratch is None else scratch(name, tuple(like.shape), like).view(like.shape)


def pre_activations(
    x: Tensor,
    centre: Tensor | None,
    encoder: Tensor,
    bias: Tensor,
    support: Support | Full,
    given: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """(x E^T + b) at the entries of a support [entry], differentiable in E, b and the centre.

    Args:
        x: activations [row, d_in] from which the centre has been taken away. They are data and get no gradient.
        centre: what was taken away [d_in], if it is learnt.
        encoder: E [d_sae, d_in].
        bias: b [d_sae].
        support: the entries.
        given: the result [entry], where the choice of the support has computed it already.
        scratch: where E's gradient is written; it is overwritten by the next backward pass that is given the same.
    """
    if isinstance(support, Full):
        return dense.encode(x, centre, encoder, bias, support.half)
    return _PreActivations.apply(x, centre, encoder, bias, support, given, scratch)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, support: Support, scratch: Scratch | None) -> Tensor:
        ctx.support, ctx.scratch = support, scratch
        ctx.save_for_backward(values, decoder)
        if support.dense:
            return support.scatter(values) @ decoder
        return bag(values, support.ids, support.starts, decoder)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, decoder = ctx.saved_tensors
        grad = grad.contiguous()
        d_values = sampled(ctx.support, grad, decoder) if ctx.needs_input_grad[0] else None
        into = _into(ctx.scratch, "d_decoder", decoder)
        d_decoder = transposed(ctx.support, values, grad, into) if ctx.needs_input_grad[1] else None
        return d_values, d_decoder, None, None


def decode(values: Tensor, decoder: Tensor, support: Support | Full, scratch: Scratch | None = None) -> Tensor:
    """Sum of values * D[ids] per token [row, d_out], differentiable in values [entry] and D [d_sae, d_out].

    D's gradient is written into `scratch`, as in `pre_activations`.
    """
    if isinstance(support, Full):
        return dense.decode(values, decoder, support.half)
    return _Decode.apply(values, decoder, support, scratch)
