"""Schedules, stretches between tokens, conditions per sequence: which tokens, how strongly, cached or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import interp
import steering
from interp.edits import Where
from steering import SteeringError, SteeringMap, SteeringVector
from steering.gates import Condition, conditional, find_condition
from steering.schedules import between, cosine, exponential, first, linear, scheduled

PROMPTS = [[5, 9, 3], [7, 4, 8, 2, 6], [11]]


def strengths(m, v, cache: bool):
    """row -> {position: factor} by which the only vector was added while generating."""
    seen: dict[int, dict[int, float]] = {}
    part = v.parts[0]

    def probe(h, where: Where):
        factor = part.gate(h, where) if part.gate is not None else torch.ones(h.shape[:2])
        factor = factor[:, None].expand(h.shape[:2]) if factor.dim() == 1 else factor
        for row, column in where.mask.nonzero().tolist():
            seen.setdefault(row, {})[int(where.position[row, column])] = round(float(factor[row, column]), 5)
        return factor

    with m.intervene(replace(v, parts=(replace(part, gate=probe),))):
        m.generate(PROMPTS, max_new_tokens=4, min_new_tokens=4, use_cache=cache)
    return seen


@pytest.fixture
def m():
    return interp.load("tiny:llama")


@pytest.fixture
def v(m):
    return SteeringVector.of(m, {"resid_post[1]": torch.randn(32, generator=torch.Generator().manual_seed(7))})


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (linear(4), [1, 0.75, 0.5, 0.25]),
        (exponential(1), [1, 0.5, 0.25, 0.125]),
        (first(2), [1, 1, 0, 0]),
        (cosine(4), [1, 0.85355, 0.5, 0.14645]),
    ],
)
def test_a_schedule_counts_steps_from_the_prompts_last_token(m, v, cache, schedule, wanted):
    seen = strengths(m, scheduled(m, v, schedule), cache)
    for row, prompt in enumerate(PROMPTS):
        assert list(seen[row]) == [len(prompt) - 1 + i for i in range(4)]
        assert list(seen[row].values()) == pytest.approx(wanted, abs=1e-4)


def test_on_the_prompt_it_is_step_zero(m, v):
    seen = strengths(m, scheduled(m, v.within("all"), linear(4)), True)
    assert list(seen[1].values()) == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_schedule_multiplies_a_gate_and_its_effect_is_its_strength(m, v):
    half = v.gated(lambda h, where: torch.full((len(h),), 0.5))
    seen = strengths(m, scheduled(m, half, linear(2)), True)
    assert list(seen[0].values()) == pytest.approx([0.5, 0.25, 0, 0])
    ids = torch.tensor([PROMPTS[1]])
    m.clock.prompt = 3  # as if the last two tokens were generated
    try:
        with m.intervene(scheduled(m, v, linear(3))):
            got = m.capture(ids, "resid_post[1]")["resid_post[1]"]
    finally:
        m.clock.prompt = None
    plain = m.capture(ids, "resid_post[1]")["resid_post[1]"]
    factor = torch.tensor([0, 0, 1, 2 / 3, 1 / 3])[:, None]
    torch.testing.assert_close((got - plain)[0], factor * v.vector, atol=1e-5, rtol=0)


def test_a_scheduled_map_is_scored_like_any_other(m, v):
    pairs = [([5, 9, 3], [10, 11, 12], [20, 21])]
    timed = scheduled(m, v, first(1))
    table = steering.evaluate(m, timed, pairs, [0, 3], controls=2)
    slow = steering.evaluate(m, timed, pairs, [0, 3], controls=2, share=False)
    assert (table.value - slow.value).abs().max() < 2e-5
    whole = steering.evaluate(m, v, pairs, [0, 3], controls=0)
    assert abs(whole.value[1] - table.value[1]) > 1e-4


def test_between_tokens(m, v):
    """Token 90 starts, 91 stops; the second stretch is found as well, and padding does not matter."""
    ids = torch.tensor([[5, 90, 6, 7, 91, 8, 90, 9], [0, 0, 90, 91, 90, 3, 4, 5]])
    mask = torch.tensor([[True] * 8, [False, False] + [True] * 6])
    from interp.activations import Tokens

    with m.intervene(v.within(between(90, 91))) as run:
        m(Tokens(ids, mask))
    trace = run.trace()
    got = {row: sorted(part.position) for row, part in trace.groupby("batch")}
    assert got == {0: [2, 3, 4, 7], 1: [1, 3, 4, 5]}
    with m.intervene(v.within(between([90, 6], [91]))) as run:
        m(Tokens(ids, mask))
    assert sorted(run.trace().position) == [3, 4]


def test_a_condition_is_decided_per_sequence(m, v):
    """Rows whose prompt lies on one side are steered, the others are bit for bit as before; cached or not."""
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 90, (n,), generator=g).tolist() for n in (3, 6, 4, 5, 7, 2)]
    acts = m.capture(prompts, "resid_post[0]")
    mask = acts.tokens.mask[..., None]
    means = (acts["resid_post[0]"] * mask).sum(1) / mask.sum(1)
    direction = torch.randn(32, generator=g)
    sims = Condition("resid_post[0]", direction, 0.0).similarity(means)
    c = direction  # the paper's formula, written out
    for mean, sim in zip(means, sims, strict=True):
        projected = torch.tanh(torch.outer(c, c) / c.dot(c) @ mean)
        assert float(sim) == pytest.approx(float(mean.dot(projected) / mean.norm() / projected.norm()), abs=1e-5)
    order = sims.sort().values
    threshold = float((order[2] + order[3]) / 2)
    plain = m.generate(prompts, max_new_tokens=5, min_new_tokens=5)
    with m.intervene(v * 50):
        steered = m.generate(prompts, max_new_tokens=5, min_new_tokens=5)
    for above in (True, False):
        gate = conditional(m, v * 50, Condition("resid_post[0]", direction, threshold, above))
        for cache in (True, False):
            with m.intervene(gate):
                got = m.generate(prompts, max_new_tokens=5, min_new_tokens=5, use_cache=cache)
            for row in range(len(prompts)):
                met = bool(sims[row] > threshold) == above
                assert got.texts[row] == (steered if met else plain).texts[row]
    assert plain.texts != steered.texts
    again = conditional(m, v, Condition("resid_post[0]", direction, threshold)) * 50
    with m.intervene(again):
        got = m.generate(prompts, max_new_tokens=5, min_new_tokens=5)
    assert got.texts == [(steered if s > threshold else plain).texts[i] for i, s in enumerate(sims)]


def test_a_condition_must_come_first(m, v):
    with pytest.raises(SteeringError, match="read after"):
        conditional(m, v, Condition("resid_post[2]", torch.ones(32), 0.0))


def test_a_condition_is_found_on_planted_prompts(planted):
    g = torch.Generator().manual_seed(4)
    matching = [torch.randint(40, 70, (n,), generator=g).tolist() for n in (4, 6, 8, 5)]
    others = [torch.randint(10, 40, (n,), generator=g).tolist() for n in (4, 6, 8, 5)]
    with torch.no_grad():
        planted.table[40:70] += (
            20 * planted.direction
        )  # the similarity is blind to sign: others must lie at neither end
    found = find_condition(planted.m, matching, others)
    assert found.f1 == 1
    fresh = [torch.randint(40, 70, (6,), generator=g).tolist(), torch.randint(10, 40, (6,), generator=g).tolist()]
    h = planted.m.capture(fresh, found.site)[found.site].mean(1)
    assert found.met(h).tolist() == [True, False]


def test_random_controls_keep_the_condition(m, v):
    gated = conditional(m, v, Condition("resid_post[0]", torch.randn(32), 0.0))
    control = steering.random_like(gated, 1)[0]
    assert isinstance(control, SteeringMap)
    assert control.parts[0] is gated.parts[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0), "steps=0"),
        (lambda: exponential(-1), "half_life=-1"),
        (lambda: between([], 3), "start"),
        (lambda: between(3, "x"), "stop"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(SteeringError, match=message):
        make()


def test_a_schedule_must_give_a_factor_per_token(m, v):
    with pytest.raises(SteeringError, match="factors"), m.intervene(scheduled(m, v, lambda step: step.sum())):
        m([[3, 4]])
