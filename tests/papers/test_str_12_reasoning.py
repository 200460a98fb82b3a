"""STR-12, representation engineering for reasoning (Hoejer et al. 2025, arXiv:2504.19483).

Check: strength 0 gives KL 0; KL, entropy and accuracy over the strength stand in one frame with intervals, for a model
that was taught a little arithmetic; the vector comes from solved problems only, and problems that it was fitted on are
refused in the evaluation.
"""

from __future__ import annotations

import pytest
import torch

import interp
from steering import SteeringError
from steering.reasoning import final_logits, reasoning_vector, solved

PLUS, EQUALS = 20, 21


def problem(a: int, b: int):
    """a + b modulo 10; digits are the tokens 10..19."""
    return [10 + a, PLUS, 10 + b, EQUALS], [10 + (a + b) % 10]


@pytest.fixture(scope="module")
def arithmetic():
    """A tiny Llama trained on two thirds of the sums of two digits, and the sums it did not see."""
    m = interp.load("tiny:llama")
    every = [problem(a, b) for a in range(10) for b in range(10)]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    taught, rest = [every[i] for i in order[:66]], [every[i] for i in order[66:]]
    ids = torch.tensor([p + a for p, a in taught])
    step = torch.optim.Adam(m.hf.parameters(), lr=3e-3)
    m.hf.train()
    for _ in range(250):
        logits = m.hf(input_ids=ids).logits[:, 3]
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 4])
        step.zero_grad()
        loss.backward()
        step.step()
        if float(loss.detach()) < 0.15:
            break
    m.hf.eval().requires_grad_(False)
    return interp.Model(m.hf, name="arithmetic"), taught, rest


def test_one_frame_with_intervals(arithmetic):
    m, taught, rest = arithmetic
    assert solved(m, taught).double().mean() > 0.8  # it has learnt what it was taught
    fit, held_out = taught[:40], taught[40:] + rest
    v = reasoning_vector(m, fit, layer=1)
    table = final_logits(m, v, held_out, [-2, -1, 0, 1, 2])
    print("\n" + table.round(3).to_string(index=False))
    assert set(table.metric) == {"kl", "entropy", "accuracy"}
    kl = table[table.metric == "kl"].set_index("multiplier").value
    assert kl[0.0] == 0
    assert (kl.drop(0.0) > 0).all()
    assert kl[2.0] > kl[1.0]
    assert not table[["low", "high"]].isna().any().any()
    assert (table.low <= table.value + 1e-9).all()
    assert (table.value <= table.high + 1e-9).all()
    at_zero = table[(table.metric == "accuracy") & (table.multiplier == 0)].value.iloc[0]
    assert at_zero == pytest.approx(float(solved(m, held_out).double().mean()))


def test_numbers_are_those_of_the_logits(arithmetic):
    m, taught, rest = arithmetic
    v = reasoning_vector(m, taught[:40], layer=1)
    row = final_logits(m, v, [rest[0], rest[1]], [1]).set_index("metric").value
    kl, entropy = [], []
    for p, _ in (rest[0], rest[1]):
        base = m([p])[0, -1].log_softmax(-1)
        with m.intervene(v):
            steered = m([p])[0, -1].log_softmax(-1)
        kl.append(float((base.exp() * (base - steered)).sum()))
        entropy.append(float(-(steered.exp() * steered).sum()))
    assert row["kl"] == pytest.approx(sum(kl) / 2, rel=1e-3, abs=1e-5)
    assert row["entropy"] == pytest.approx(sum(entropy) / 2, rel=1e-3, abs=1e-5)


def test_from_solved_problems_only_and_scored_on_others(arithmetic):
    m, taught, rest = arithmetic
    good = [p for p, s in zip(taught, solved(m, taught).tolist(), strict=True) if s][:12]
    bad = [(p, [10 + (a[0] - 9) % 10]) for p, a in good]  # none of these is what it says
    v = reasoning_vector(m, good + bad, layer=1)
    alone = reasoning_vector(m, good, layer=1)
    assert v.record["solved"] == len(good)
    assert v.record["of"] == len(good) + len(bad)
    torch.testing.assert_close(v.vector, alone.vector)
    with pytest.raises(SteeringError, match="were fitted on"):
        final_logits(m, v, [good[0], *rest], [1])
    with pytest.raises(SteeringError, match="solves 0"):
        reasoning_vector(m, bad, layer=1)
    with pytest.raises(SteeringError, match="empty"):
        final_logits(m, v, [], [1])
