"""Memory does not grow with the number of tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Runs in a fresh process: what others allocated before would hide what we look for. Prints the growth of the peak, in
# MiB, over `factor` times the work of a first write that has loaded and allocated everything that stays, and how much
# was written.
SCRIPT = """
import sys, resource, torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from fake_model import FakeModel
from interp import store
import fake_model
fake_model.D_MODEL = 64

def write(name, n):
    texts = (" ".join(f"w{{i}}x{{j}}" for j in range(60)) for i in range(n))
    labels = ("x" for _ in range(n))
    return store.write(FakeModel(), texts, ["resid_post[*]", "expert_hidden[1]"], {tmp!r} + "/" + name, labels=labels,
                       context=64, batch_size=16, dtype="float32", shard_tokens=4096, progress=False)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

base = write("first", {base})
before = peak()
ds = write("second", {factor} * {base})
assert len(ds) == {factor} * len(base)
print(peak() - before, ds.manifest["bytes"] / 2**20)
"""


@pytest.mark.parametrize("factor", [10])
def test_ten_times_the_tokens_take_no_more_memory(tmp_path, factor):
    script = SCRIPT.format(here=str(Path(__file__).parent), tmp=str(tmp_path), base=300, factor=factor)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    growth, written = map(float, done.stdout.split())
    assert written > 140, "it must be much more than the slack below"
    assert growth < 12, f"the peak grew by {growth:.1f} MiB while {written:.0f} MiB were written"
