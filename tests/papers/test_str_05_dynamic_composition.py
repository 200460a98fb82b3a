"""STR-05, Dynamic Activation Composition (Scalena et al. 2024, arXiv:2406.17563): a strength for each token.

Check: on a five-token toy alpha is the clipped KL worked out by hand; it is 0 where nothing diverges; a generation's
strengths are those of the literal loop (every pass whole, one row, no cache); two properties at once each beat random
vectors; perplexity is printed beside that of constant strength.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import interp
import steering
from steering import SteeringVector
from steering.dac import dac, divergence, nucleus
from steering.intervals import bootstrap


def test_on_five_tokens_by_hand():
    p = torch.tensor([[0.6, 0.3, 0.06, 0.03, 0.01]]).log()
    q = torch.tensor([[0.1, 0.2, 0.05, 0.05, 0.6]]).log()
    assert nucleus(p, 0.85).tolist() == [[True, True, False, False, False]]
    assert nucleus(q, 0.75).tolist() == [[False, True, False, False, True]]
    assert nucleus(p, 0.6 + 1e-6).tolist() == [[True, True, False, False, False]]  # with the one that crosses it
    # union of {0, 1} and {4, 1, 0}: q's nucleus at .85 needs .6 + .2 + .1
    kept_p, kept_q = np.array([0.6, 0.3, 0.01]) / 0.91, np.array([0.1, 0.2, 0.6]) / 0.9
    wanted = float((kept_p * np.log(kept_p / kept_q)).sum())
    assert float(divergence(p, q, 0.85)) == pytest.approx(wanted, rel=1e-5)
    assert float(divergence(p, p, 0.95)) == 0
    whole = float((p.exp() * (p - q)).sum())
    assert float(divergence(p, q, 1.0)) == pytest.approx(whole, rel=1e-5)


def literal(m, prompt, properties, steps, top_p=0.95, most=2.0):
    """Every pass over the whole sequence, alone: token ids and alphas, as the paper's loop does it."""
    ids, alphas = list(prompt), []
    start = len(prompt) - 1

    def run(strengths):
        """Logits at the end; strengths[i][j] scales property j at position start + i."""
        edits = []
        for i, row in enumerate(strengths):
            for v, k in zip(properties, row, strict=True):
                edits += (v * k).within(f"window({start + i}, {start + i + 1})").as_edits(m)
        with m.intervene(*edits):
            return m([ids])[:, -1]

    for step in range(steps):
        base, row = run([]), []
        for j in range(len(properties)):
            at_most = [[most if i == j else 0.0 for i in range(len(properties))]] * (step + 1)
            row.append(min(float(divergence(base, run(at_most), top_p)), most))
        alphas.append(row)
        ids.append(int(run(alphas).argmax()))
    return ids[len(prompt) :], alphas


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_the_literal_loop_batched_and_cached(family):
    m = interp.load(f"tiny:{family}")
    g = torch.Generator().manual_seed(21)
    properties = [
        SteeringVector.of(m, {"resid_post[1]": torch.randn(m.d_model, generator=g)}),
        SteeringVector.of(m, {"z[0]": 0.5 * torch.randn(m.n_heads, m.d_head, generator=g)}),
    ]
    prompts = [[5, 9, 3], [7, 4, 8, 2, 6], [11]]
    m.hf.generation_config.eos_token_id = None
    found = dac(m, prompts, properties, max_new_tokens=4, names=["a", "b"])
    for row, prompt in enumerate(prompts):
        ids, alphas = literal(m, prompt, properties, 4)
        assert found.ids[row].tolist() == ids
        mine = found.strengths[found.strengths.batch == row].pivot(index="step", columns="property", values="alpha")
        np.testing.assert_allclose(mine.to_numpy(), alphas, atol=2e-4)
    assert found.strengths.alpha.between(0, 2).all()
    assert not m.uses


def test_nothing_diverges_nothing_is_steered():
    m = interp.load("tiny:llama")
    nothing = SteeringVector.of(m, {"resid_post[1]": torch.zeros(m.d_model)})
    found = dac(m, [[5, 9, 3]], nothing, max_new_tokens=4)
    assert found.strengths.alpha.tolist() == [0.0] * len(found.strengths)
    plain = m.generate([[5, 9, 3]], max_new_tokens=4)
    assert found.ids[0].tolist() == plain.new_ids[0].tolist()[: found.ids.shape[1]]


def two_readers():
    """A tiny Llama whose unembedding reads two directions: one favours tokens 50..59, the other 60..69."""
    m = interp.load("tiny:llama")
    m.hf.generation_config.eos_token_id = None
    g = torch.Generator().manual_seed(31)
    d, e = torch.linalg.qr(torch.randn(32, 2, generator=g))[0].T
    with torch.no_grad():
        head = m.hf.lm_head.weight
        for u in (d, e):
            head -= (head @ u)[:, None] * u
        head[50:60] += 1.5 * d
        head[60:70] += 1.5 * e
    return m, SteeringVector.of(m, {"resid_post[2]": 4 * d}), SteeringVector.of(m, {"resid_post[2]": 4 * e})


def mass(m, ids: torch.Tensor, prompts, low: int, high: int) -> np.ndarray:
    """Share of each continuation's tokens that belong to a property."""
    return ((ids >= low) & (ids < high)).double().mean(1).numpy()


def test_two_properties_at_once_each_beat_control():
    m, a, b = two_readers()
    g = torch.Generator().manual_seed(32)
    prompts = [torch.randint(3, 50, (4,), generator=g).tolist() for _ in range(40)]
    how = {"max_new_tokens": 8, "sample": True, "seed": 0}
    found = dac(m, prompts, [a, b], **how)
    control = dac(m, prompts, [steering.random_like(v, 1, seed=s)[0] for v, s in ((a, 1), (b, 2))], **how)
    for low, high in ((50, 60), (60, 70)):
        gain = mass(m, found.ids, prompts, low, high) - mass(m, control.ids, prompts, low, high)
        assert bootstrap(gain)[0] > 0

    # perplexity under the unsteered model, beside constant strengths that condition as much
    def perplexity(ids):
        from steering.continuation import log_likelihoods
        from steering.pairs import Passage

        s = log_likelihoods(
            m, [Passage((*p, *row), len(p)) for p, row in zip(prompts, ids.tolist(), strict=True)], {0.0: []}
        )
        return math.exp(float(-(s.nats[0.0] / s.tokens).mean()))

    share = float(mass(m, found.ids, prompts, 50, 70).mean())
    print(f"\ndynamic: {share:.2f} of the tokens carry a property, perplexity {perplexity(found.ids):.1f}")
    for k in (0.5, 1.0, 1.5):
        torch.manual_seed(0)
        with m.intervene((a + b) * k):
            static = m.generate(prompts, max_new_tokens=8, do_sample=True, top_k=0)
        carried = float(mass(m, static.new_ids, prompts, 50, 70).mean())
        print(f"constant {k}: {carried:.2f}, perplexity {perplexity(static.new_ids):.1f}")


def test_a_vector_per_step():
    m, a, b = two_readers()
    found = dac(m, [[5, 9, 3]], [[a, b]], max_new_tokens=4)  # a at the first step, then b
    alone = dac(m, [[5, 9, 3]], [a], max_new_tokens=1)
    assert found.ids[0, 0] == alone.ids[0, 0]


@pytest.mark.parametrize(
    ("how", "message"),
    [({"properties": []}, "empty"), ({"top_p": 0}, "top_p"), ({"most": -1}, "most"), ({"names": ["a", "b"]}, "names")],
)
def test_bad_settings(how, message):
    m, a, _ = two_readers()
    with pytest.raises(steering.SteeringError, match=message):
        dac(m, [[5]], **{"properties": [a], **how})


def test_other_contexts_are_refused():
    m, a, _ = two_readers()
    with m.intervene(a), pytest.raises(steering.SteeringError, match="side by side"):
        dac(m, [[5]], a)
