"""Dense products: the one that a sparse step keeps, and the five of a step in which most latents fire.

torch multiplies on x86 processors by Intel's MKL, which leaves some of AMD's arithmetic unused. The OpenBLAS inside
NumPy has kernels for those too: on one thread a step takes up to a tenth less time. With more threads the two
libraries' threads get into each other's way, so it is used with one alone. Which of them multiplies is decided by the
processor and the threads, not by a clock, so that a run which was resumed repeats the unbroken one bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.sae.scratch import Scratch

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

CHUNK = 1024  # tokens
FEW = 256  # tokens for which a copy of the encoder is not worth it


def chunks(
    x: Tensor, encoder: Tensor, bias: Tensor, half: bool = False, scratch: Scratch | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(first token, pre-activations x E^T + b [token, d_sae]); the buffer is used again for the next.

    With `half` the products are taken in bfloat16.
    """
    if half:
        short = encoder.bfloat16()
        for start in range(0, len(x), CHUNK):
            yield start, product(x[start : start + CHUNK].bfloat16(), short.T).add_(bias)
        return
    memory = scratch or Scratch()
    buffer = memory("p", (min(CHUNK, len(x)), len(encoder)), x)
    if len(x) < FEW or _quicker(x, encoder) is None:
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK]
            yield start, torch.addmm(bias, part, encoder.T, out=buffer[: len(part)])
        return
    rows, table = _beside(x, 1.0, "x, 1", memory), _beside(encoder, bias, "E, b", memory)
    for start in range(0, len(x), CHUNK):
        part = rows[start : start + CHUNK]
        yield start, product(part, table.T, out=buffer[: len(part)])


def _beside(x: Tensor, last: Tensor | float, name: str, memory: Scratch) -> Tensor:
    """`x` with one more column: [x, 1] [E, b]^T = x E^T + b without a second pass over the products."""
    out = memory(name, (len(x), x.shape[1] + 1), x)
    out[:, :-1] = x
    out[:, -1] = last
    return out


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, in `out` if it is given; of matrices in bfloat16 the result is float32, rounded to bfloat16's digits."""
    if a.dtype == torch.bfloat16:
        return (a @ b).float()
    if (blas := _quicker(a, b)) is None:
        return torch.mm(a, b, out=out)
    import numpy as np

    out = torch.empty(a.shape[0], b.shape[1]) if out is None else out
    with blas.limit(limits=1):  # by itself it would take every core
        np.matmul(a.detach().numpy(), b.detach().numpy(), out=out.numpy())
    return out


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, centre: Tensor | None, encoder: Tensor, bias: Tensor, half: bool) -> Tensor:
        short = [t.bfloat16() if half else t for t in (x, encoder)]
        ctx.save_for_backward(short[0], encoder)
        return product(short[0], short[1].T).add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, encoder = ctx.saved_tensors
        needs, d_bias = ctx.needs_input_grad, grad.sum(0)
        d_encoder = product(grad.to(x.dtype).T, x) if needs[2] else None
        # one centre for all tokens: its gradient needs only the sum over them, which the bias has
        return None, -(d_bias @ encoder) if needs[1] else None, d_encoder, d_bias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, half: bool) -> Tensor:
        short = [t.bfloat16() if half else t for t in (values, decoder)]
        ctx.save_for_backward(*short)
        return product(*short)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, decoder = ctx.saved_tensors
        grad = grad.to(values.dtype).contiguous()
        needs = ctx.needs_input_grad
        return product(grad, decoder.T) if needs[0] else None, product(values.T, grad) if needs[1] else None, None


def encode(x: Tensor, centre: Tensor | None, encoder: Tensor, bias: Tensor, half: bool = False) -> Tensor:
    """x E^T + b [row, d_sae], differentiable in E, b and the centre that was taken from x, which itself is data."""
    return _Encode.apply(x, centre, encoder, bias, half)


def decode(values: Tensor, decoder: Tensor, half: bool = False) -> Tensor:
    """values D [row, d_out], differentiable in both."""
    return _Decode.apply(values, decoder, half)


def _quicker(a: Tensor, b: Tensor) -> ThreadpoolController | None:
    """NumPy's library, where it is the one to multiply these."""
    plain = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    return _openblas() if plain and torch.get_num_threads() == 1 else None


@cache
def _openblas() -> ThreadpoolController | None:
    """NumPy's OpenBLAS, where torch has MKL and the processor is AMD's (looked up on Linux alone)."""
    about = Path("/proc/cpuinfo")
    if not torch.backends.mkl.is_available() or not about.exists() or "AuthenticAMD" not in about.read_text():
        return None
    import numpy as np  # noqa: F401 - loads the library that is looked for
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().select(internal_api="openblas")
    return found if len(found) else None
