"""Evaluation: the quick way equals the literal one, numbers their formulas, controls are what they say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import interp
import steering
import steering.maps
from interp import edits
from steering.baselines import random_like, shuffled
from steering.budget import budget, budgets, compare
from steering.continuation import log_likelihoods
from steering.damage import choices, fluency, neutral
from steering.errors import SteeringError
from steering.evaluate import evaluate, summarise, verdict
from steering.intervals import bootstrap, spread
from steering.pairs import Passage
from steering.pres import pres
from steering.propensity import propensities, slopes
from steering.sweep import sweep
from steering.vector import SteeringMap, SteeringVector

RAGGED = [(5, 3), (9, 2), (9, 4), (12, 1), (4, 6)]


def passages(seed: int = 0) -> list[Passage]:
    """Prompts of several lengths, two answers each."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, answer in RAGGED:
        head = torch.randint(3, 90, (prompt,), generator=g).tolist()
        rows += [Passage((*head, *torch.randint(3, 90, (answer,), generator=g).tolist()), prompt) for _ in range(2)]
    return rows


def literal(m, passage: Passage, edit: list) -> float:
    """One row alone, no padding, no cache; the scope written out as a window from the prompt's last token on."""
    ids = torch.tensor([passage.ids])
    with m.intervene(*[e.within(f"window({passage.answer - 1}, None)") for e in edit]):
        logp = m(ids)[0].log_softmax(-1)
    places = range(passage.answer, len(passage.ids))
    return float(sum(logp[i - 1, passage.ids[i]] for i in places))


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe", "gemma3", "falcon", "monet", "qwen3_next"])
def test_answers_score_as_in_the_literal_loop(family):
    m = interp.load(f"tiny:{family}")
    v = torch.randn(m.d_model, generator=torch.Generator().manual_seed(1))
    rows = passages()
    runs = {0.0: []}
    for layer in range(m.n_layers):
        for k in (-1.0, 2.0):
            runs[layer, k] = [edits.add(f"resid_post[{layer}]", k * v, scope="last | generated")]
    runs["two"] = [
        edits.add("resid_post[1]", v, scope="last | generated"),
        edits.scale("attn_out[0]", 0.5, scope="last | generated"),
    ]
    if family == "qwen3_next":  # its layers do not all have attention
        del runs["two"]
    scores = log_likelihoods(m, rows, runs, batch_tokens=24)  # several batches
    for key, edit in runs.items():
        wanted = torch.tensor([literal(m, p, edit) for p in rows], dtype=torch.float64)
        torch.testing.assert_close(scores.nats[key], wanted, atol=3e-5, rtol=0)
    assert bool(scores.literal) == (family == "qwen3_next")  # a recurrent state is no cache that can be gone back in
    assert scores.tokens.tolist() == [len(p.ids) - p.answer for p in rows]


@pytest.mark.parametrize("scope", ["all", "window(2, 4)", "generated", "last", "prompt", "after(7)", "~last"])
def test_every_scope_is_kept(scope):
    """Scopes that reach into the prompt leave nothing, or less, to share; the numbers stay."""
    m = interp.load("tiny:llama")
    v = torch.randn(m.d_model, generator=torch.Generator().manual_seed(1))
    rows = [Passage((*p.ids[:2], 7, *p.ids[3:]), p.answer) for p in passages()]
    runs = {
        0.0: [],
        1: [edits.add("resid_post[1]", v, scope=scope)],
        2: [edits.add("resid_post[0]", v, scope="generated")],
    }
    a = log_likelihoods(m, rows, runs)
    b = log_likelihoods(m, rows, runs, share=False)
    assert a.literal == ""
    assert b.literal
    for key in runs:
        torch.testing.assert_close(a.nats[key], b.nats[key], atol=3e-5, rtol=0)
    assert (a.nats[1] - a.nats[0.0]).abs().max() > 1e-3


def test_the_model_is_as_before(planted):
    m = planted.m
    before, layers = m(torch.arange(10, 20)[None]), list(m.hf.model.layers)
    v = steering.caa(m, planted.pairs(), layer=1)
    fingerprint = m.fingerprint
    evaluate(m, v, planted.pairs(4), controls=2)
    assert list(m.hf.model.layers) == layers
    assert m.clock.prompt is None
    assert m.clock.given is None
    assert not m.uses
    assert m.fingerprint == fingerprint
    assert torch.equal(m(torch.arange(10, 20)[None]), before)


def test_under_other_edits_nothing_is_shared(planted):
    m, rows = planted.m, passages()
    v = torch.ones(m.d_model)
    with m.intervene(edits.add("resid_post[0]", v, scope="prompt")):
        inside = log_likelihoods(m, rows, {0.0: []})
    assert "other edits" in inside.literal
    wanted = log_likelihoods(m, rows, {1: [edits.add("resid_post[0]", v, scope="prompt")]})
    torch.testing.assert_close(inside.nats[0.0], wanted.nats[1], atol=3e-5, rtol=0)


def test_evaluate_is_the_mean_difference_of_log_likelihoods(planted):
    m, pairs = planted.m, planted.pairs(6)
    v = steering.caa(m, planted.pairs(), layer=1)
    table = evaluate(m, v, pairs, [-1, 0, 1], controls=3)
    assert list(table.columns) == ["multiplier", "baseline", "metric", "value", "low", "high", "n"]
    assert set(table["baseline"]) == {"none", "random"}
    for k in (-1.0, 0.0, 1.0):
        each = []
        for prompt, positive, negative in pairs:
            rows = [Passage((*prompt, *side), len(prompt)) for side in (positive, negative)]
            a, b = (literal(m, p, (v * k).as_edits(m)) / (len(p.ids) - p.answer) for p in rows)
            each.append(a - b)
        row = table[(table.multiplier == k) & (table.baseline == "none")].iloc[0]
        assert row.value == pytest.approx(np.mean(each), abs=2e-5)
        assert row.low <= row.value <= row.high
        assert row.n == 6


def test_on_a_planted_direction_it_rises_and_leaves_the_controls():
    """A model whose unembedding reads the planted direction: steering along it works, random directions do not."""
    m = interp.load("tiny:llama")
    g = torch.Generator().manual_seed(3)
    d = torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0)
    with torch.no_grad():
        head = m.hf.lm_head.weight
        head -= (head @ d)[:, None] * d
        head[50:60] += 2 * d
        head[60:70] -= 2 * d
    pairs = [([3 + i, 9, 11], [50 + i % 10, 51], [60 + i % 10, 61]) for i in range(12)]
    v = SteeringVector.of(m, {"resid_post[2]": 3 * d})
    table = evaluate(m, v, pairs, controls=20)
    found = verdict(table)
    assert found["rises"]
    assert found["leaves"] == [-2.0, -1.0, 1.0, 2.0]
    assert found["wrong"] == []
    assert found["spearman"] == pytest.approx(1)
    assert table.attrs["flipped"] == 0
    assert table.attrs["slope"] > 0
    wrong = evaluate(m, -v, pairs, controls=20)
    assert verdict(wrong)["wrong"] == [-2.0, -1.0, 1.0, 2.0]
    assert wrong.attrs["flipped"] == 1
    own, other = table[table.baseline == "none"], wrong[wrong.baseline == "none"]
    np.testing.assert_allclose(own.value.to_numpy(), other.value.to_numpy()[::-1], atol=1e-5)


def test_random_controls_are_the_map_in_a_turned_frame(planted):
    m = planted.m
    v = SteeringVector.of(m, {"resid_post[0]": torch.randn(32), "resid_post[1]": 5 * torch.randn(32)}) * 2
    for control in random_like(v, 3):
        assert isinstance(control, SteeringVector)
        assert {s: float(w.norm()) for s, w in control.vectors.items()} == pytest.approx(
            {s: float(w.norm()) for s, w in v.vectors.items()}, rel=1e-5
        )
        assert abs(control.cosine(v)) < 0.9
        assert control.scope.text == v.scope.text
    assert random_like(v, 2)[1].vectors["resid_post[0]"].equal(random_like(v, 2)[1].vectors["resid_post[0]"])
    u = torch.nn.functional.normalize(torch.randn(32), dim=0)
    erase = SteeringMap.of(
        m, {"resid_post[0]": steering.maps.projection(u), "resid_post[1]": steering.maps.projection(u)}
    )
    control = random_like(erase, 1)[0]
    h = torch.randn(1, 4, 32)
    ends = [part.map.ready(m.device, m.dtype)(h, None) for part in control]
    torch.testing.assert_close(ends[0], ends[1])  # one direction at both layers
    lost = (h - ends[0])[0]
    assert torch.linalg.matrix_rank(lost, atol=1e-4) == 1
    torch.testing.assert_close((ends[0] * lost).sum(-1), torch.zeros(1, 4), atol=1e-4, rtol=0)  # a projection still
    torch.testing.assert_close((control * 0).parts[0].map.ready(m.device, m.dtype)(h, None), h, atol=1e-5, rtol=0)


def test_shuffled_labels_point_nowhere(planted):
    pairs = planted.pairs(24)
    fit = lambda p: steering.caa(planted.m, p, layer=1)  # noqa: E731
    v = fit(pairs)
    found = shuffled(fit, pairs, 5, norm_of=v)
    assert [float(w.norm) for w in found] == pytest.approx([v.norm] * 5, rel=1e-4)
    plain = shuffled(fit, pairs, 5)
    assert max(w.norm for w in plain) < 0.2 * v.norm  # halves cancel exactly but for the answers' lengths
    table = evaluate(planted.m, v, planted.pairs(4), [0, 1], controls=0, baselines={"shuffled": found})
    assert set(table.baseline) == {"none", "shuffled"}
    assert table[table.baseline == "shuffled"].n.unique().tolist() == [5]


def test_slopes_and_the_share_steered_the_wrong_way():
    table = pd.DataFrame(
        [{"item": i, "multiplier": k, "baseline": "none", "draw": 0, "positive": 0.0, "negative": 0.0,
          "value": a + s * k}
         for i, (a, s) in enumerate([(0, 1), (1, -2), (5, 0.5)]) for k in (-1.0, 0.0, 2.0)]
    )  # fmt: skip
    found = slopes(table)
    np.testing.assert_allclose(found.slope, [1, -2, 0.5], atol=1e-12)
    np.testing.assert_allclose(found.residual, 0, atol=1e-12)
    assert found.attrs["flipped"] == pytest.approx(1 / 3)
    assert found.attrs["slope"] == pytest.approx(-0.5 / 3)


def test_pres_equals_its_formula():
    """Three queries, worked out: c = |mean(max negative, min positive)| of each model, hardest by the unsteered one."""
    base = {"positive": [-1.0, -3.0, -2.0], "negative": [-2.0, -4.0, -1.5]}
    ends = {"positive": [-0.5, -2.0, -1.0], "negative": [-3.0, -4.0, -2.0]}
    rows = [
        {"item": i, "multiplier": k, "baseline": "none", "draw": 0, "positive": side["positive"][i],
         "negative": side["negative"][i], "value": 0.0}
        for k, side in ((0.0, base), (2.0, ends)) for i in range(3)
    ]  # fmt: skip
    found = pres(pd.DataFrame(rows), 2.0).set_index(["metric", "share"]).value
    c0, c1 = abs((-1.5 - 3.0) / 2), abs((-2.0 - 2.0) / 2)
    promoted = [e / c1 - b / c0 for e, b in zip(ends["positive"], base["positive"], strict=True)]
    demoted = [b / c0 - e / c1 for e, b in zip(ends["negative"], base["negative"], strict=True)]
    assert found["promotes", 0.25] == pytest.approx(promoted[1])  # the positive it liked least
    assert found["demotes", 0.25] == pytest.approx(demoted[2])  # the negative it liked best
    assert found["promotes", 0.5] == pytest.approx((promoted[1] + promoted[2]) / 2)
    with pytest.raises(steering.SteeringError, match="no multiplier 1"):
        pres(pd.DataFrame(rows), 1.0)


def test_intervals():
    x = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(x)
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.1)
    assert bootstrap(x) == bootstrap(x)
    assert all(np.isnan(bootstrap([1.0])))
    assert spread(np.arange(101)) == pytest.approx((2.5, 97.5))


def test_kl_on_neutral_text_equals_its_formula(planted):
    m = planted.m
    v = SteeringVector.of(m, {"resid_post[1]": 4 * torch.randn(32, generator=torch.Generator().manual_seed(5))})
    texts = [torch.randint(10, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (4, 9, 9)]
    table = neutral(m, v, texts, [0, 1], controls=2)
    kls, losses = [], []
    for ids in texts:
        x = torch.tensor([ids])
        p = m(x)[0].log_softmax(-1)
        with m.intervene(v.within("all")):
            q = m(x)[0].log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1)[:-1])
        losses.append(-q[:-1].gather(1, x[0, 1:, None]).mean())
    row = table[(table.multiplier == 1) & (table.baseline == "none")].set_index(["metric", "position"]).value
    assert row.loc["kl"].loc[np.nan] == pytest.approx(float(torch.stack([k.mean() for k in kls]).mean()), rel=1e-4)
    assert row.loc["kl"].loc[0.0] == pytest.approx(float(torch.stack([k[0] for k in kls]).mean()), rel=1e-4)
    assert row.loc["kl"].loc[4.0] == pytest.approx(
        float(torch.stack([k[4:8].mean() for k in kls[1:]]).mean()), rel=1e-4
    )
    assert row.loc["perplexity"].iloc[0] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)
    zero = table[(table.multiplier == 0) & (table.metric == "kl")]
    assert (zero.value == 0).all()
    assert set(table.baseline) == {"none", "random"}


def test_a_budget_is_met_and_methods_are_ranked_at_it(planted):
    m = planted.m
    texts = [torch.randint(10, 90, (12,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(6)]
    v = SteeringVector.of(m, {"resid_post[1]": 0.01 * torch.randn(32)})
    for factor in (1.0, 300.0):
        k, reached = budget(m, v * factor, texts, kl=0.05)
        assert reached == pytest.approx(0.05, rel=0.05)
        assert neutral(m, v * factor, texts, [k], max_tokens=48).iloc[0].value == pytest.approx(reached, rel=0.02)
    erase = SteeringMap.of(m, {"resid_post[0]": steering.maps.projection(torch.randn(32))})
    assert budget(m, erase, texts, kl=1e6)[0] == 1.0  # a projection is whole at 1
    pairs = planted.pairs(5)
    good = steering.caa(m, planted.pairs(), layer=1)
    table = compare(m, {"planted": {"caa": good, "opposite": -good}}, {"planted": pairs}, texts, kl=0.05, controls=3)
    assert set(table.method) == {"caa", "opposite", "random"}
    assert ((table.kl - 0.05).abs() < 0.0026).all()
    with pytest.raises(steering.SteeringError, match="kl=0"):
        budget(m, v, texts, kl=0)
    several = {"small": v, "large": v * 300.0, "erase": erase}  # one search each, run together
    for name, found in budgets(m, several, texts, kl=0.05).items():
        assert found == pytest.approx(budget(m, several[name], texts, kl=0.05), rel=1e-4)


def test_a_sweep_is_each_layer_alone(planted):
    m, pairs = planted.m, planted.pairs(5)
    v = steering.caa(m, planted.pairs(), layer="*")
    table = sweep(m, v, pairs, [-1, 0, 1])
    assert len(table) == m.n_layers * 3
    for layer in range(m.n_layers):
        alone = evaluate(m, v.only(layer), pairs, [-1, 0, 1], controls=0)
        np.testing.assert_allclose(table[table.layer == layer].value, alone.value, atol=1e-5)
    slow = sweep(m, v, pairs, [-1, 0, 1], share=False)
    np.testing.assert_allclose(table.value, slow.value, atol=1e-5)


def test_a_sweep_computes_less(planted):
    """Work, not time: how many tokens the layers see."""
    m = planted.m
    pairs = [([10 + i] * 20, [40, 41], [70, 71]) for i in range(4)]
    v = steering.caa(m, pairs, layer="*")
    seen = {True: 0, False: 0}
    for share in seen:

        def count(module, args, share=share):
            seen[share] += args[0].shape[0] * args[0].shape[1]

        hooks = [layer.register_forward_pre_hook(count) for layer in m.hf.model.layers]
        sweep(m, v, pairs, [-3, -2, -1, 1, 2, 3], share=share)
        for hook in hooks:
            hook.remove()
    assert seen[False] > 6 * seen[True]


def test_multiple_choice_counts_the_likeliest_option(planted):
    m = planted.m
    rows = [([10, 11], [[40], [70, 71], [72]]), ([12], [[41, 42], [73]])]
    best = [
        int(np.argmax([literal(m, Passage((*q, *o), len(q)), []) / len(o) for o in options])) for q, options in rows
    ]
    zero = SteeringVector.of(m, {"resid_post[0]": torch.zeros(32)})
    right = [(q, options, i) for (q, options), i in zip(rows, best, strict=True)]
    assert choices(m, zero, right, [0]).value.tolist() == [1.0]
    wrong = [(q, options, (i + 1) % len(options)) for q, options, i in right]
    assert choices(m, zero, wrong, [0]).value.tolist() == [0.0]
    with pytest.raises(steering.SteeringError, match=r"questions\[0\]"):
        choices(m, zero, [([10], [[40]], 0)], [0])


def test_bad_input(planted):
    m, pairs = planted.m, planted.pairs(3)
    v = steering.caa(m, pairs, layer=1)
    with pytest.raises(steering.SteeringError, match="multipliers"):
        evaluate(m, v, pairs, [])
    with pytest.raises(steering.SteeringError, match="multipliers"):
        evaluate(m, v, pairs, [1, float("nan")])
    with pytest.raises(steering.SteeringError, match="multipliers"):
        evaluate(m, v, pairs, [1, 1])
    with pytest.raises(steering.SteeringError, match="controls=-1"):
        evaluate(m, v, pairs, controls=-1)
    with pytest.raises(steering.SteeringError, match="both sides are equal"):
        evaluate(m, v, [([3], [4], [4])])
    with pytest.raises(steering.SteeringError, match="there is none"):
        evaluate(m, v, [])
    with pytest.raises(steering.SteeringError, match="name of our own"):
        evaluate(m, v, pairs, baselines={"random": v})
    with pytest.raises(steering.SteeringError, match="fitted on"):
        evaluate(interp.load("tiny:gpt2"), v, pairs)
    with pytest.raises(steering.SteeringError, match="chat"):
        evaluate(m, v, [("a", "b", "c")], chat=True)
    with pytest.raises(steering.SteeringError, match="no answer"):
        log_likelihoods(m, [Passage((3, 4), 2)], {0.0: []})
    with pytest.raises(steering.SteeringError, match="prompt of at least one"):
        log_likelihoods(m, [Passage((3, 4), 0)], {0.0: []})


def test_a_model_that_gives_nan_is_not_scored():
    m = interp.load("tiny:llama")
    v = SteeringVector.of(m, {"resid_post[1]": torch.ones(32)})
    pairs = [([3, 4], [5, 6], [7]), ([8], [9], [10])]
    with torch.no_grad():
        m.hf.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(SteeringError, match="gives NaN as logits, unsteered"):
        evaluate(m, v.on(m), pairs, [0, 1], controls=0)
    with pytest.raises(SteeringError, match="gives NaN as logits"):
        neutral(m, v.on(m), [[3, 4, 5]], [1.0])


def test_what_is_written_is_judged(planted):
    v = steering.caa(planted.m, planted.pairs(), layer=1)
    with pytest.raises(ValueError, match="tokenizer"):
        fluency(planted.m, v, ["a text"], [0])


def test_summaries_say_their_settings(planted):
    table = propensities(
        planted.m, steering.caa(planted.m, planted.pairs(), layer=1), planted.pairs(3), [0, 1], controls=2
    )
    assert set(table.columns) == {"item", "multiplier", "baseline", "draw", "positive", "negative", "value"}
    out = summarise(table)
    assert out.attrs["method"] == "caa"
    assert out.attrs["scope"] == "(last | generated)"
    assert out.attrs["controls"] == 2
