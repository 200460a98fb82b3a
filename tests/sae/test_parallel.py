"""Two processes, on halves of each batch or with halves of the latents, take the steps that one process takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from interp import sae

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

#: Each trained with its latents in one process and in two, then stopped half-way and resumed.
SPLIT = [
    {"arch": "topk", "d_sae": 60, "k": 1, "dead_after": 128},
    {"arch": "topk", "d_sae": 20, "k": 12, "clip": 0.01, "decoder_norm": "free"},
    {"arch": "batchtopk", "d_sae": 60, "k": 1.5, "dead_after": 128},
    {"arch": "matryoshka", "d_sae": 20, "k": 3, "widths": (4, 14, 20)},
    {"arch": "standard", "d_sae": 20, "lr": 1e-3, "sparsity": 0.5},
    {"arch": "panneal", "d_sae": 20, "sparsity": 0.5},
    {"arch": "gated", "d_sae": 20, "sparsity": 0.5},
    {"arch": "jumprelu", "d_sae": 20, "k": 4, "lr": 1e-3},
]

_LATENTS = """
import sys, torch
from safetensors.torch import save_file
from interp import sae
from interp.sae import trainer
rank, world, out, runs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
torch.set_num_threads(1)
how = dict(tokens=2048, batch_size=128, progress=False, seed=3, log_every=4)
if world > 1:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
    how["parallel"] = "latents"
g = torch.Generator().manual_seed(0)
x = {"resid_post[0]": torch.randn(2048, 12, generator=g) + 1}
x["resid_post[1]"] = torch.relu(x["resid_post[0]"] @ torch.randn(12, 8, generator=g))
for run in runs:
    run["site"] = "resid_post[0]"
runs.append(dict(runs[0], target="resid_post[1]", skip=True))

def train(name, **more):
    for i, s in enumerate(sae.train_many(x, [dict(r) for r in runs], **how, **more)):
        save_file({n: t.contiguous() for n, t in s.tensors().items()}, f"{out}/{name}-{rank}-{i}.safetensors")
        if name in ("one", "whole"):
            s.history.to_json(f"{out}/{world}-{i}.json", orient="split")

train("whole" if world > 1 else "one")
step = trainer.Trainer.step
def stopping(self, *a, **k):
    if self.state.steps == 9:
        raise KeyboardInterrupt
    return step(self, *a, **k)
if world > 1:
    trainer.Trainer.step = stopping
    try:
        train("none", checkpoint=f"{out}/there", checkpoint_every=4)
    except KeyboardInterrupt:
        trainer.Trainer.step = step
    train("resumed", checkpoint=f"{out}/there", checkpoint_every=4)
    torch.distributed.barrier()
    how.pop("parallel")
    try:
        train("none", checkpoint=f"{out}/there")
    except sae.SAEError as error:
        assert "another number of processes" in str(error), error
"""


def run(code: str, out: Path, *more: str) -> None:
    """One process alone, and two together."""
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(world), str(out), *more], stderr=subprocess.PIPE)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=600)
        assert job.returncode == 0, errors.decode()[-2000:]


def test_latents_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """Choices, losses, dead latents, clipping and thresholds are those of the whole, up to the order of sums; both
    processes end with the same SAE, and a stopped training goes on bit for bit."""
    run(_LATENTS, tmp_path, repr(SPLIT))
    dead = []
    for i in range(len(SPLIT) + 1):
        alone, a, b, again = (load_file(tmp_path / f"{name}-{i}.safetensors")
                              for name in ("one-0", "whole-0", "whole-1", "resumed-1"))  # fmt: skip
        for name, value in alone.items():
            torch.testing.assert_close(a[name], value, atol=2e-4, rtol=1e-3, msg=lambda m, n=name, i=i: f"{i} {n}: {m}")
            assert torch.equal(a[name], b[name])
            assert torch.equal(again[name], b[name])
        one, two = (pd.read_json(tmp_path / f"{world}-{i}.json", orient="split") for world in (1, 2))
        for column in ("fvu", "l0", "dead", "loss"):
            assert two[column].tolist() == pytest.approx(one[column].tolist(), rel=2e-3, abs=2e-3), (i, column)
        dead.append(one["dead"].max())
    assert min(dead[0], dead[2]) > 0  # so that the auxiliary loss was part of it


@pytest.mark.parametrize(("how", "message"), [({"parallel": "rows"}, "expected 'data' or 'latents'"),
                                              ({"parallel": "latents"}, "init_process_group")])  # fmt: skip
def test_a_wrong_way_to_share_is_refused(how, message) -> None:
    with pytest.raises(sae.SAEError, match=message):
        sae.train(torch.randn(64, 4), d_sae=8, k=2, tokens=64, batch_size=32, progress=False, **how)


def test_two_processes_are_one(tmp_path: Path) -> None:
    run(_CODE, tmp_path)

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / f"{name}.safetensors")

    for i in range(2):  # both ranks hold the same weights, to the bit
        a, b = weights(f"2-0-{i}"), weights(f"2-1-{i}")
        assert all(torch.equal(v, b[n]) for n, v in a.items())
    alone, together = weights("1-0-0"), weights("2-0-0")
    assert all(torch.allclose(v, together[n], atol=1e-4) for n, v in alone.items())
