"""PAT-02. Towards Best Practices of Activation Patching in Language Models (Zhang & Nanda 2023, arXiv 2309.16042).

One call sweeps {token replacement, Gaussian noise} x {logit difference, probability, KL} into one tidy frame. A planted
negative head is found by the logit difference and hidden by the probability, and the frame shows the disagreement.
"""

from __future__ import annotations

import pytest
import torch

import interp
from interp.patching import pairs
from interp.patching.sweeps import disagreement, sweep
from tests.patching.planted import ANSWER, BLANK, OFF, ON, WRONG, blank, opened, plant_copy, plant_positions

HELPS, HURTS = "z[0, head=0]", "z[0, head=1]"


@torch.no_grad()
def negative_head() -> interp.Model:
    """Two heads read the same bit: one writes 5 x it for the answer, the other 2 x it against."""
    model = blank(layers=1, heads=2, d_model=16, n_ctx=8, vocab=40)
    plant_positions(model)
    model.embed.weight[ON, 0], model.embed.weight[OFF, 0] = 1.0, -1.0
    plant_copy(model, 0, 0, start=1, end=3, reads=0, writes=1, gain=5.0)
    plant_copy(model, 0, 1, start=1, end=3, reads=0, writes=1, gain=-2.0)
    model.unembed.weight[ANSWER, 1], model.unembed.weight[WRONG, 1] = 1.0, -1.0
    return opened(model, "negative head")


def test_a_probability_hides_the_negative_head_that_the_logit_difference_finds() -> None:
    m = negative_head()
    made = pairs.of(
        m, torch.tensor([[BLANK, ON, BLANK, BLANK]]), torch.tensor([[BLANK, OFF, BLANK, BLANK]]), ANSWER, WRONG
    )
    frame = sweep(m, made, "z[*]@-1")
    combinations = set(zip(frame["corruption"], frame["metric"], strict=True))
    assert len(combinations) == 2 * 3  # one call, one frame
    assert len(frame) == 2 * 3 * 2
    share = frame.set_index(["corruption", "metric", "node"])["share"]
    tokens = share["token replacement"]
    assert tokens["logit_diff", HELPS] == pytest.approx(5 / 3, abs=1e-4)
    assert tokens["logit_diff", HURTS] == pytest.approx(-2 / 3, abs=1e-4)  # found, with its sign
    assert abs(tokens["probability", HURTS]) < 0.05  # hidden: the answer's probability has no room below
    assert tokens["probability", HELPS] > 1.0
    differing = disagreement(frame)
    assert (HURTS, 3) in differing.index
    seen = differing.loc[(HURTS, 3)]["token replacement"]
    assert seen["logit_diff"] < -0.5 < seen["probability"]
    said = frame.attrs["cautions"]
    assert any("saturates" in s for s in said["token replacement, probability"])
    assert any("gaussian noise" in s for s in said["gaussian noise, logit_diff"])
    print(frame[["corruption", "metric", "node", "value", "share"]].to_string(index=False))
