"""PAT-05. Circuit Component Reuse Across Tasks in Transformer Language Models (Merullo et al. 2024, arXiv 2310.08744).

Two planted tasks use 4 heads each and share 2. The overlap that is found is the planted value, its formula stands in
the output, and editing the reported shared heads lifts the second task's accuracy where random heads do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

import interp
from interp import edits
from interp.patching import circuits, patch
from tests.patching.planted import BLANK, OFF, ON, blank, gap, opened, plant_copy, plant_positions

FOR, AGAINST = 6, 7  # last tokens that push the metric by +1 and -1 whatever was asked
FIRST = {"z[0, head=0]", "z[1, head=1]", "z[0, head=2]", "z[1, head=3]"}
SECOND = {"z[0, head=0]", "z[1, head=1]", "z[0, head=3]", "z[1, head=0]"}
BITS = torch.tensor([1.0, -1.0, 1.0, -1.0])  # of the four prompts of a task
WEAK = 0.15  # weight of the second task's tokens: too little against the distracting last token


@torch.no_grad()
def two_tasks() -> interp.Model:
    """Task 1 writes its bit at position 1, task 2 its own, weaker, at position 2. Shared heads look at both places."""
    model = blank(layers=2, heads=4, d_model=20, n_ctx=8, vocab=10)
    plant_positions(model)
    model.embed.weight[ON, 0], model.embed.weight[OFF, 0] = 1.0, -1.0
    model.embed.weight[8, 0], model.embed.weight[9, 0] = WEAK, -WEAK
    model.embed.weight[FOR, 2], model.embed.weight[AGAINST, 2] = 1.0, -1.0
    for name in sorted(FIRST | SECOND):
        layer, head = int(name[2]), int(name[-2])
        for start, users in ((1, FIRST), (2, SECOND)):
            if name in users:
                gain = 2.0 if name in FIRST else 0.5
                plant_copy(model, layer, head, start=start, end=3, reads=0, writes=1, gain=gain)
    model.unembed.weight[4, 1] = model.unembed.weight[4, 2] = 1.0
    return opened(model, "two tasks")


def prompts(task: int) -> tuple[Tensor, Tensor]:
    """(clean, corrupt) with the bit on and off; every last token with every bit."""
    on, off = (ON, OFF) if task == 1 else (8, 9)
    cases = [(bit, last) for last in (FOR, AGAINST) for bit in (on, off)]
    rows = [[BLANK, bit, BLANK, last] if task == 1 else [BLANK, BLANK, bit, last] for bit, last in cases]
    clean = torch.tensor(rows)
    return clean, torch.tensor([[{on: off, off: on}.get(t, t) for t in row] for row in rows])


def accuracy(m: interp.Model, task: int, *changes: object) -> float:
    """Share of prompts whose metric has the sign of the bit."""
    clean, _ = prompts(task)
    with m.intervene(*changes):
        return float((gap(m(clean)).sign() == BITS).float().mean())


def test_overlap_is_the_planted_value_and_editing_the_shared_heads_repairs_the_second_task() -> None:
    m = two_tasks()
    tables = {f"task {t}": patch(m, *prompts(t), lambda x: gap(x) * BITS, "z[*]@-1", "noise") for t in (1, 2)}
    frame = circuits.reuse(tables, k=4)
    assert set(frame.attrs["nodes"]["task 1"]) == FIRST
    assert set(frame.attrs["nodes"]["task 2"]) == SECOND
    assert frame["value"].tolist() == [len(FIRST & SECOND) / 4] == [0.5]
    assert "/ 4" in frame.attrs["formula"]
    shared = [head for head in frame.attrs["nodes"]["task 1"] if head in frame["shared"].iloc[0]]
    assert set(shared) == FIRST & SECOND
    before = accuracy(m, 2)
    after = accuracy(m, 2, *(edits.scale(head, 6.0) for head in shared))
    others = [f"z[{layer}, head={h}]" for layer in range(2) for h in range(4)]
    control = []
    for seed in range(10):
        drawn = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:2].tolist()
        rest = [h for h in others if h not in shared]
        control.append(accuracy(m, 2, *(edits.scale(rest[i], 6.0) for i in drawn)))
    print(f"overlap {frame['value'].iloc[0]}, task 1 {accuracy(m, 1):.0%}, task 2 {before:.0%} -> {after:.0%}, "
          f"random heads {sum(control) / 10:.0%}")  # fmt: skip
    assert accuracy(m, 1) == 1.0
    assert before == 0.5
    assert after == 1.0
    assert sum(control) / 10 < 0.7
