"""Fits that look at what the model does: refusal-type directions, function vectors, reversal, probe edits, experts."""

from __future__ import annotations

import math

import pytest
import torch

import interp
import steering
from interp import edits, experts
from interp.edits import Where
from steering import SteeringError
from steering.crossing import reachable
from steering.fit_functions import effects, head_means, written
from steering.fit_refusal import last_logits, score, tail
from steering.nonlinear import Cross, Route
from steering.pairs import Passage
from steering.tasks import prompts, question


@pytest.fixture(scope="module")
def m():
    return interp.load("tiny:llama")


def where(h):
    batch, pos = h.shape[:2]
    return Where("resid_post[0]", torch.arange(pos).expand(batch, pos), torch.ones(batch, pos, dtype=torch.bool))


# -- refusal ---------------------------------------------------------------------------------------------------
def asks(start, stop, offset):
    return [[10 + i, offset + i] for i in range(start, stop)]


def test_refusal_finds_erases_and_induces_the_planted_direction(refusing):
    m = refusing.m
    rows = asks(0, 12, 40), asks(0, 12, 10), asks(12, 20, 40), asks(12, 20, 10)
    found = steering.refusal(m, *rows, tokens=[5], positions=[-2, -1])
    assert found.vector.cosine(refusing.direction) > 0.99
    assert found.table.columns.tolist() == ["layer", "position", "bypass", "induce", "kl", "kept", "chosen"]
    best = found.table[found.table.chosen].iloc[0]
    assert best.position == -1
    assert not found.table[found.table.position == -2].kept.any()  # nothing is there
    held, other = m.tokens(asks(20, 30, 40)), m.tokens(asks(20, 30, 10))
    assert float(score(m(held)[:, -1], [5]).mean()) > 2
    with m.intervene(found.ablation):
        assert float(score(m(held)[:, -1], [5]).mean()) < -2
        left = m.capture(held, ["resid_post[2]"])["resid_post[2]"] @ found.vector.unit().vector
    assert float(left.abs().max()) < 1e-5
    assert float(score(m(other)[:, -1], [5]).mean()) < -2
    with m.intervene(found.vector):
        assert float(score(m(other)[:, -1], [5]).mean()) > 2


def test_refusal_scores_are_the_literal_ones(m):
    rows = [asks(i, i + 6, o) for i, o in ((0, 40), (0, 70), (6, 40), (6, 70))]
    found = steering.refusal(
        m, *rows, tokens=[5, 6], layer=[1], positions=[-1], filtered=False, max_kl=1e9, min_induce=-1e9, depth=2.0
    )

    def means(texts):
        site = "resid_pre[1]"
        return torch.stack([m.capture(torch.tensor([t]), site)[site][0, -1] for t in texts]).mean(0)

    r = means(rows[0]) - means(rows[1])
    torch.testing.assert_close(found.vector.vector, r, atol=1e-5, rtol=1e-5)

    def scores(texts, *changes):
        with m.intervene(*changes):
            p = m(torch.tensor(texts))[:, -1].double().softmax(-1)
        q = p[:, 5] + p[:, 6]
        return (q.log() - (1 - q).log()).mean(), p

    ablate = [edits.project_out(f"{name}[*]", r) for name in ("resid_pre", "attn_out", "mlp_out")]
    row = found.table.iloc[0]
    assert row.bypass == pytest.approx(float(scores(rows[2], *ablate)[0]), abs=1e-4)
    assert row.induce == pytest.approx(float(scores(rows[3], edits.add("resid_pre[1]", r))[0]), abs=1e-4)
    p, q = scores(rows[3])[1], scores(rows[3], *ablate)[1]
    assert row.kl == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), abs=1e-4)


def test_refusal_says_when_nothing_passes_or_no_prompt_behaves(refusing):
    m = refusing.m
    rows = asks(0, 12, 40), asks(0, 12, 10), asks(12, 20, 40), asks(12, 20, 10)
    with pytest.raises(SteeringError, match="none of 2 candidates passes") as error:
        steering.refusal(m, *rows, tokens=[5], layer=[0], positions=[-2, -1], min_induce=1e9)
    assert len(error.value.table) == 2
    with pytest.raises(SteeringError, match=r"present: on none of 12 prompts .* shows"):
        steering.refusal(m, rows[1], *rows[1:], tokens=[5])
    with pytest.raises(SteeringError, match="tokens: give the first tokens"):
        steering.refusal(m, *rows, tokens=[])


def test_tail_is_what_all_prompts_end_with():
    assert tail([Passage((1, 2, 8, 9), 4), Passage((3, 8, 9), 3)]) == [-2, -1]
    assert tail([Passage((1, 2), 2), Passage((3, 4), 2)]) == [-1]


def test_last_logits_do_not_depend_on_the_batch(m):
    rows = [Passage(tuple(range(3, 3 + n)), n) for n in (2, 5, 3, 7)]
    torch.testing.assert_close(last_logits(m, rows, [], 7), last_logits(m, rows, [], 1000), atol=1e-5, rtol=1e-5)


def test_projections_tell_labels_apart(planted):
    table = steering.projections(planted.m, {"yes": asks(0, 9, 40), "no": asks(0, 9, 70)}, planted.direction)
    assert table.columns.tolist() == ["layer", "label", "value", "low", "high"]
    value = table.set_index(["label", "layer"]).value
    assert all(value["yes", i] > 0 > value["no", i] for i in range(3))


# -- function vectors ------------------------------------------------------------------------------------------
def test_prompts_hold_no_answer_of_their_own_and_shuffle_outputs():
    data = [{"input": f"w{i}", "output": f"W{i}"} for i in range(20)]
    for prompt, answer in prompts(data, 8, 5):
        query = prompt.rsplit("Q: ", 1)[1].removesuffix("\nA:")
        assert answer == f" W{query[1:]}"
        assert prompt.count(f"Q: {query}\n") == 1
        assert prompt.count("Q: ") == 6
    assert question("a", [("x", "y")]) == "Q: x\nA: y\n\nQ: a\nA:"
    straight, mixed = prompts(data, 3, 5), prompts(data, 3, 5, shuffled=True)
    assert [a for _, a in straight] == [a for _, a in mixed]
    assert straight != mixed
    with pytest.raises(SteeringError, match="10 shots and a query need 11"):
        prompts(data[:5], 1)
    with pytest.raises(SteeringError, match=r"examples\[0\]: expected"):
        prompts([("a", "")], 1, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_heads_write_is_their_part_of_the_projection_without_its_bias(family):
    m = interp.load(f"tiny:{family}")
    means = {f"z[{i}]": torch.randn(m.n_heads, m.d_head) for i in range(3)}
    heads = [(1, 2), (0, 3), (1, 0)]
    total = torch.zeros(m.d_model)
    for layer, head in heads:
        if family == "llama":
            w = m.hf.model.layers[layer].self_attn.o_proj.weight  # [d_model, head * d_head]
        else:
            w = m.hf.transformer.h[layer].attn.c_proj.weight.T
        total += w[:, head * m.d_head : (head + 1) * m.d_head].detach() @ means[f"z[{layer}]"][head]
    torch.testing.assert_close(written(m, means, heads), total, atol=1e-5, rtol=1e-4)


def test_effects_are_those_of_single_patched_runs(m):
    data = [(f"{chr(97 + i)}", f"{chr(65 + i)}") for i in range(12)]
    spelt = interp.load("tiny:llama", letters(), vocab_size=len(letters()))
    items = prompts(data, 4, 3, seed=1)
    means = head_means(spelt, items)
    got = effects(spelt, items, means)
    for layer, head in ((0, 1), (2, 3)):
        change = []
        for prompt, answer in items:
            ids, target = spelt.tokens(prompt), int(spelt.tokens(answer, special=False).row(0)[0])
            patch = edits.replace(f"z[{layer}, head={head}]", means[f"z[{layer}]"][head], scope="last")
            with spelt.intervene(patch):
                patched = spelt(ids)[0, -1].softmax(-1)[target]
            change.append(float(patched - spelt(ids)[0, -1].softmax(-1)[target]))
        assert got[layer, head] == pytest.approx(sum(change) / 4, abs=1e-6)


def letters():
    """A tokenizer with one token per character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["\n"] + [chr(i) for i in range(32, 127)]
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(signs)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", pad_token="?")


def test_a_task_the_model_cannot_do_is_refused():
    spelt = interp.load("tiny:llama", letters(), vocab_size=len(letters()))
    with torch.no_grad():
        spelt.hf.lm_head.weight.zero_()  # so that it always says the first token, a line break
    with pytest.raises(SteeringError, match="gets none of 3 prompts right"):
        steering.function_vector(spelt, [(f"w{i}", "~~") for i in range(9)], n=3, shots=2)


# -- reversal --------------------------------------------------------------------------------------------------
def test_reversal_is_its_formula_and_keeps_each_layers_norm(m):
    text, bad, good = [9, 10, 11], [3, 4], [5, 6, 7]
    made = steering.reversal(m, text, bad, good)
    ids = torch.tensor([text])
    for layer in range(3):
        site = f"z[{layer}]"
        with m.intervene(*[made.only(i) for i in range(layer)]):
            z = m.capture(ids, site)[site]
        with m.intervene(*[made.only(i) for i in range(layer + 1)]):
            got = m.capture(ids, site)[site]
        delta = (
            m.capture(torch.tensor([bad + text]), site)[site][0, -1]
            - m.capture(torch.tensor([good + text]), site)[site][0, -1]
        )
        end = m.capture(torch.tensor([bad]), site)[site][0, -1]
        want = z[0, -1].clone()
        for head in range(4):
            v, d, e = z[0, -1, head], delta[head], end[head]
            cosine = float(v @ e / (v.norm() * e.norm()))
            want[head] = v - (1 + d.norm()) ** 0.4 * (1 + max(cosine, 0)) ** 0.6 * d
        want = want * z[0, -1].norm() / want.norm()
        torch.testing.assert_close(got[0, -1], want, atol=1e-5, rtol=1e-5)
        assert torch.equal(got[0, :-1], z[0, :-1])
        assert abs(float(got[0, -1].norm() - z[0, -1].norm())) < 1e-5


def test_reversed_generation_keeps_what_was_done_to_earlier_tokens(m):
    bad, good = [3, 4], [5, 6, 7]
    made = steering.reversed_generation(m, [[9, 10, 11], [12, 13]], bad, good, max_new_tokens=3)
    assert [len(r) for r in made.new_ids] == [3, 3]
    first = steering.reversal(m, [9, 10, 11], bad, good)
    with m.intervene(first):
        one = int(m(torch.tensor([[9, 10, 11]]))[0, -1].argmax())
    second = steering.reversal(m, [9, 10, 11, one], bad, good)
    with m.intervene(first, second):
        two = int(m(torch.tensor([[9, 10, 11, one]]))[0, -1].argmax())
    assert made.new_ids[0, :2].tolist() == [one, two]
    off = steering.reversed_generation(m, [[9, 10, 11]], bad, good, max_new_tokens=3, strength=0)
    assert off.new_ids.tolist() == m.generate([[9, 10, 11]], max_new_tokens=3).new_ids.tolist()
    with pytest.raises(SteeringError, match="two different prefixes"):
        steering.reversal(m, [9], bad, bad)


# -- probe edits -----------------------------------------------------------------------------------------------
def test_binary_edit_is_the_closed_form():
    w, b, goal = torch.randn(6), 0.3, 0.9
    cross = Cross(torch.stack([torch.zeros(6), w]), torch.tensor([0.0, b]), 1, goal)
    h = torch.randn(1, 50, 6)
    p = torch.sigmoid(h @ w + b)
    e = (math.log(goal / (1 - goal)) - b - h @ w) / w.norm()
    want = torch.where((p < goal)[..., None], h + e[..., None] * w / w.norm(), h)
    got = cross(h, where(h))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(got[p >= goal], h[p >= goal])


def test_edit_across_several_classes_reaches_the_goal_by_the_smallest_step():
    from scipy.optimize import minimize

    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        weight, bias, goal = (1 + seed) * torch.randn(4, 5, generator=g), torch.randn(4, generator=g), 0.8
        assert reachable(weight, 2)
        h = torch.randn(1, 12, 5, generator=g)
        got = Cross(weight, bias, 2, goal)(h, where(h))
        p, before = ((x @ weight.T + bias).softmax(-1)[0, :, 2] for x in (got, h))
        torch.testing.assert_close(p, before.clamp_min(goal), atol=1e-4, rtol=0)
        for i in range(2):
            x = h[0, i].double()

            def spare(d, x=x, weight=weight, bias=bias):
                logp = ((x + torch.tensor(d)) @ weight.double().T + bias).log_softmax(-1)
                return float(logp[2] - math.log(0.8))

            found = minimize(
                lambda d: float(d @ d), x.numpy() * 0, constraints={"type": "ineq", "fun": spare}, method="SLSQP"
            )
            assert float((got - h)[0, i].norm()) <= float((found.x @ found.x) ** 0.5) + 1e-3


def test_a_class_between_others_cannot_be_made_certain():
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    assert reachable(weight, 0)
    assert not reachable(weight, 2)


def test_probe_edit_steers_the_layers_it_can_trust(planted):
    texts = [[40 + i] for i in range(30)] + [[70 + i] for i in range(30)]
    made = steering.probe_edit(planted.m, texts, ["calm"] * 30 + ["loud"] * 30, "calm", goal=0.95)
    assert made.layers == [0, 1, 2]
    map_ = made.parts[0].map
    with planted.m.intervene(made.only(0).within("last")):
        h = planted.m.capture(torch.tensor([[75]]), "resid_post[0]")["resid_post[0]"]
    p = (h @ map_.weight.T + map_.bias).softmax(-1)[0, 0, map_.target]
    assert float(p) == pytest.approx(0.95, abs=1e-3)
    with pytest.raises(SteeringError, match="the labels are calm, loud"):
        steering.probe_edit(planted.m, texts, ["calm"] * 30 + ["loud"] * 30, "shy")
    with pytest.raises(SteeringError, match="expected a probability"):
        steering.probe_edit(planted.m, texts, ["calm"] * 30 + ["loud"] * 30, "calm", goal=1.0)
    g = torch.Generator().manual_seed(0)
    noise = [str(int(x)) for x in torch.randint(0, 2, (60,), generator=g)]
    with pytest.raises(SteeringError, match="no probe exceeds"):
        steering.probe_edit(planted.m, texts, noise, "1")


# -- experts ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def moe():
    return interp.load("tiny:olmoe", letters(), vocab_size=len(letters()))


YES, NO = ["aaa aa aaaa a", "aa aaaa"], ["zz zzz z", "zzzz zzz zz"]


def test_steermoe_ranks_by_the_difference_of_rates_and_routes_accordingly(moe):
    made = steering.steermoe(moe, YES, NO, lift=2, ban=2)
    rate = torch.zeros(2, 3, 8)
    for side, texts in enumerate((YES, NO)):
        count = 0
        for text in texts:
            acts = moe.capture(text, [f"expert_ids[{i}]" for i in range(3)])
            count += int(acts.mask.sum())
            for layer in range(3):
                for ids in acts[f"expert_ids[{layer}]"][acts.mask]:
                    rate[side, layer, ids] += 1
        rate[side] /= count
    difference = (rate[0] - rate[1]).flatten()
    top = {(int(i) // 8, int(i) % 8) for i in difference.topk(2).indices}
    low = {(int(i) // 8, int(i) % 8) for i in (-difference).topk(2).indices}
    assert {(int(k), e) for k, ids in made.record["lifted"].items() for e in ids} == top
    assert {(int(k), e) for k, ids in made.record["banned"].items() for e in ids} == low
    with moe.intervene(made):
        acts = moe.capture("az az", [f"expert_ids[{i}]" for i in range(3)])
    for layer, expert in top:
        assert bool((acts[f"expert_ids[{layer}]"] == expert).any(-1).all())
    for layer, expert in low:
        assert not bool((acts[f"expert_ids[{layer}]"] == expert).any())


def test_route_sets_lifted_and_banned_scores_and_turns_round():
    h = torch.randn(2, 3, 6)
    route = Route(torch.tensor([1, 4]), torch.tensor([0]), 0.01)
    out = route(h, where(h))
    torch.testing.assert_close(out[..., 1], h.amax(-1) + 0.01)
    torch.testing.assert_close(out[..., 0], h.amin(-1) - 0.01)
    assert torch.equal(out[..., [2, 3, 5]], h[..., [2, 3, 5]])
    torch.testing.assert_close(route.scaled(-1)(h, where(h))[..., 0], h.amax(-1) + 0.01)
    assert torch.equal(route.scaled(0)(h, where(h)), h)


def test_mote_switches_off_or_forces_the_experts_of_largest_difference(moe):
    off = steering.mote(moe, YES, NO, count=2)
    chosen = [(int(k), e) for k, ids in off.record["experts"].items() for e in ids]
    stats = experts.routing(moe, {"yes": YES, "no": NO})
    summed = stats.mass / stats.documents[:, None, None]
    difference = (summed[0] - summed[1]).flatten()
    assert set(chosen) == {(int(i) // 8, int(i) % 8) for i in difference.topk(2).indices}
    hand = [edits.zero(f"expert_weight[{layer}, expert={e}]") for layer, e in chosen]
    with moe.intervene(off):
        got = moe("az az")
    with moe.intervene(*hand):
        torch.testing.assert_close(got, moe("az az"))
    with moe.intervene(steering.mote(moe, YES, NO, count=2, mode="force")):
        for layer, expert in chosen:
            assert bool((moe.capture("az", f"expert_ids[{layer}]")[f"expert_ids[{layer}]"] == expert).any(-1).all())


@pytest.mark.parametrize("family", ["olmoe", "monet"])
def test_without_takes_a_set_out_by_degrees(family):
    m = interp.load(f"tiny:{family}")
    ids, layer = torch.arange(3, 11)[None], 1
    units = experts.units_of(m)
    chosen = experts.ExpertSet(m, {layer: range(units.size // 2)})
    site, plain = f"mlp_out[{layer}]", None
    plain = m.capture(ids, site)[site]
    outs = {}
    for k in (0.5, 1.0, -1.0):
        with m.intervene(steering.without(m, chosen) * k):
            outs[k] = m.capture(ids, site)[site]
    gone = plain - outs[1.0]
    assert float(gone.norm()) > 1e-3
    torch.testing.assert_close(outs[0.5], plain - 0.5 * gone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outs[-1.0], plain + gone, atol=1e-5, rtol=1e-4)
    with m.intervene(experts.ablate(chosen)):
        torch.testing.assert_close(m.capture(ids, site)[site], outs[1.0])


def test_expert_steering_refuses_what_it_cannot_do(m, moe):
    with pytest.raises(experts.ExpertError, match="is dense"):
        steering.steermoe(m, YES, NO)
    with pytest.raises(SteeringError, match="no router that chooses"):
        steering.steermoe(interp.load("tiny:monet"), YES, NO)
    with pytest.raises(SteeringError, match="would be lifted, and 2 are chosen"):
        steering.steermoe(moe, YES, NO, lift=24, ban=0)
    with pytest.raises(SteeringError, match="negative_texts: expected a list"):
        steering.steermoe(moe, YES, [])
    with pytest.raises(SteeringError, match="expected 'off' or 'force'"):
        steering.mote(moe, YES, NO, mode="maybe")
    with pytest.raises(SteeringError, match="the set is empty"):
        steering.without(moe, experts.ExpertSet(moe, {}))
