"""A GPU's sparse products: against the literal sums in Triton's interpreter, and compiled for two kinds of GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install triton, or a GPU build of torch)")

INTERPRETED = """
import torch
from interp.sae import kernels, triton_kernels as gpu
from interp.sae.kernels import Support

kernels._gpu = lambda *given: None if torch.is_grad_enabled() and any(t.requires_grad for t in given) else gpu
kernels._mkl = lambda support, x: False
kernels.DENSE_ABOVE = 2.0  # never through dense matrices
torch.manual_seed(0)
for n, d_sae, width in ((7, 23, 5), (24, 60, 48), (3, 50, 1500)):
    counts = torch.randint(0, 4, (n,))
    ids = torch.cat([torch.randperm(d_sae)[:c] for c in counts.tolist()])
    rows = torch.arange(n).repeat_interleave(counts)
    support = Support(rows, ids, n, d_sae)
    x, table, values = torch.randn(n, width), torch.randn(d_sae, width), torch.randn(len(ids))
    dense = support.scatter(values)
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.bag(values, ids, support.starts, table), dense @ table, **close)
    torch.testing.assert_close(kernels.sampled(support, x, table), (x @ table.T)[rows, ids], **close)
    out = torch.full((d_sae, width), torch.nan)  # latents without a token are written too
    found = kernels.transposed(support, values, x, out)
    assert found.data_ptr() == out.data_ptr()
    torch.testing.assert_close(found, dense.T @ x, **close)
    half = kernels.sampled(support, x.bfloat16(), table.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), (x @ table.T)[rows, ids], rtol=0.05, atol=0.5)

    # a whole step, through the functions that the trainer differentiates
    encoder, bias = torch.randn(d_sae, width).requires_grad_(), torch.randn(d_sae).requires_grad_()
    decoder = torch.randn(d_sae, width).requires_grad_()
    p = kernels.pre_activations(x, None, encoder, bias, support)
    kernels.decode(p, decoder, support).square().sum().backward()
    found = [t.grad.clone() for t in (encoder, bias, decoder)]
    for t in (encoder, bias, decoder):
        t.grad = None
    mask = support.scatter(torch.ones(len(ids)))
    (((x @ encoder.T + bias) * mask) @ decoder).square().sum().backward()
    for ours, t in zip(found, (encoder, bias, decoder)):
        torch.testing.assert_close(ours, t.grad, rtol=1e-4, atol=1e-3 * float(t.grad.abs().max()))
print("as the literal sums")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from interp.sae import triton_kernels as gpu

for arch in (80, 90):
    for number in ("*fp32", "*bf16"):
        bag = {"values": number, "ids": "*i64", "starts": "*i64", "table": number, "out": number, "width": "i32"}
        sampled = {"x": number, "table": number, "rows": "*i64", "ids": "*i64", "out": number, "width": "i32"}
        for kernel, types in ((gpu._bag, bag), (gpu._sampled, sampled)):
            source = triton.compiler.ASTSource(kernel, {**types, "SIZE": "constexpr"}, {"SIZE": 1024})
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
            assert len(made.asm["cubin"]) > 1000 and f"sm_{arch}" in made.asm["ptx"]
print("compiled")
"""


@pytest.mark.parametrize(
    ("script", "interpret", "said"), [(INTERPRETED, "1", "as the literal sums"), (COMPILED, "0", "compiled")]
)
def test_the_gpus_kernels(script: str, interpret: str, said: str, tmp_path: Path) -> None:
    """In a process of its own, since Triton reads its setting once, when it is imported."""
    env = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stdout
