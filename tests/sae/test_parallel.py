"""Two processes on halves of each batch take the steps that one process takes on whole batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

_CODE = """
import sys, torch
from safetensors.torch import save_file
from interp import sae
rank, world, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
x = torch.randn(2048, 12, generator=torch.Generator().manual_seed(0)) + 1
how = dict(tokens=2048, batch_size=128, progress=False, seed=3)
runs = [dict(arch="standard", d_sae=20, lr=1e-3, sparsity=0.5), dict(arch="batchtopk", d_sae=20, k=2, dead_after=300)]
for i, s in enumerate(sae.train_many(x, runs, **how)):
    save_file({n: t.contiguous() for n, t in s.tensors().items()}, f"{out}/{world}-{rank}-{i}.safetensors")
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    jobs = [
        subprocess.Popen([sys.executable, "-c", _CODE, str(rank), str(world), str(tmp_path)], stderr=subprocess.PIPE)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=600)
        assert job.returncode == 0, errors.decode()[-2000:]

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / f"{name}.safetensors")

    for i in range(2):  # both ranks hold the same weights, to the bit
        a, b = weights(f"2-0-{i}"), weights(f"2-1-{i}")
        assert all(torch.equal(v, b[n]) for n, v in a.items())
    alone, together = weights("1-0-0"), weights("2-0-0")
    assert all(torch.allclose(v, together[n], atol=1e-4) for n, v in alone.items())
