"""Pre-activations of all latents, a thousand tokens at a time: the one dense product that a sparse step keeps.

torch multiplies on x86 processors by Intel's MKL, which leaves some of AMD's arithmetic unused. The OpenBLAS inside
NumPy has kernels for those too: on one thread a step with 18,432 latents, mostly this product, takes up to a tenth less
time. With more threads the two libraries' threads get into each other's way, so it is used with one alone. Which of
them multiplies is decided by the processor and the threads, not by a clock, so that a run which was resumed repeats the
unbroken one bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.sae.kernels import Scratch

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
            yield start, (x[start : start + CHUNK].bfloat16() @ short.T).float().add_(bias)
        return
    memory = scratch or Scratch()
    buffer = memory("p", (min(CHUNK, len(x)), len(encoder)), x)
    plain = x.device.type == "cpu" and x.dtype == encoder.dtype == torch.float32
    blas = _openblas() if plain and len(x) >= FEW and torch.get_num_threads() == 1 else None
    if blas is None:
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK]
            yield start, torch.addmm(bias, part, encoder.T, out=buffer[: len(part)])
        return
    import numpy as np

    rows, table = _beside(x, 1.0, "x, 1", memory), _beside(encoder, bias, "E, b", memory)
    for start in range(0, len(x), CHUNK):
        part = rows[start : start + CHUNK]
        p = buffer[: len(part)]
        with blas.limit(limits=1):  # by itself it would take every core
            np.matmul(part.numpy(), table.numpy().T, out=p.numpy())
        yield start, p


def _beside(x: Tensor, last: Tensor | float, name: str, memory: Scratch) -> Tensor:
    """`x` with one more column: [x, 1] [E, b]^T = x E^T + b without a second pass over the products."""
    out = memory(name, (len(x), x.shape[1] + 1), x)
    out[:, :-1] = x
    out[:, -1] = last
    return out


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
