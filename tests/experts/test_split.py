"""Dense models as experts: nothing is lost while all are on, partitions are balanced, every tool works on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import interp
from interp import experts
from interp.experts import ExpertError, ffn
from interp.experts.partition import balanced_kmeans, embedding, matched
from tests.experts.conftest import TEXTS, build, letters

#: Gated in two linears, gated in one, plain with biases and a transposed weight, plain, GELU with parallel blocks.
FAMILIES = ("llama", "phi3", "gpt2", "starcoder2", "gpt_neox", "gemma3")


@pytest.fixture(scope="module")
def dense() -> interp.Model:
    return build("neurons")


@pytest.mark.parametrize("name", FAMILIES)
def test_all_experts_on_is_the_dense_model(name: str) -> None:
    m = interp.load(f"tiny:{name}")
    before, ids = m.fingerprint, torch.arange(3, 19).view(2, 8)
    moe = experts.split(m, n=4)
    torch.testing.assert_close(moe(ids), m(ids), rtol=1e-5, atol=1e-5)
    assert (moe.n_experts, moe.top_k) == (4, 4)
    assert moe.anatomy.having("expert_out") == m.anatomy.having("mlp_hidden")
    assert m.fingerprint == before != moe.fingerprint
    acts = moe.capture(ids, ["expert_out[1]", "mlp_out[1]"])
    plain = m.capture(ids, "mlp_out[1]")["mlp_out[1]"]
    if name in ("llama", "phi3"):  # no bias, no norm behind the block
        torch.testing.assert_close(acts.experts(1).out.sum(2), plain, rtol=1e-4, atol=1e-5)


def test_the_real_model_loses_nothing(smollm2: interp.Model) -> None:
    m = smollm2
    moe = experts.split(m, n=16, how="random")
    text = "The court finds that the appeal has no merit, and that"
    error = (moe(text) - m(text)).abs().max()
    assert float(error) < 1e-4
    assert moe.n_experts == 16
    shared = {p.data_ptr() for p in m.hf.parameters()} & {p.data_ptr() for p in moe.hf.parameters()}
    assert len(shared) > 4 * m.n_layers  # attention, norms and embeddings are not copied


def test_an_expert_is_its_neurons(dense: interp.Model) -> None:
    moe = experts.split(dense, n=4, how="random")
    chosen = experts.ExpertSet(moe, {0: [1], 2: [0, 3]})
    same = experts.neurons(chosen, moe, dense)
    assert len(same) == 30
    with experts.switched_off(moe, chosen), experts.switched_off(dense, same):
        torch.testing.assert_close(moe(TEXTS["law"][0]), dense(TEXTS["law"][0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ExpertError, match=r"was not made by experts\.split"):
        experts.neurons(same, dense, dense)


def test_the_tools_run_on_splits(dense: interp.Model) -> None:
    moe = experts.split(dense, n=4, active=2, gate="average")
    texts = {label: documents[:1] for label, documents in TEXTS.items()}
    stats = experts.routing(moe, texts, norms=True)
    assert float(stats.used.sum()) == 2 * float(stats.tokens.sum()) * moe.n_layers
    chosen = experts.select(stats, "law", "contribution", ratio=1.01)
    table = experts.evaluate(moe, chosen, texts, controls=2, stats=stats)
    assert set(table["baseline"]) == {"none", "random"}
    everything = experts.split(dense, n=4)
    exact, guess = experts.sweep(everything, texts), experts.attribute(everything, texts)
    assert experts.agreement(guess, exact)["recall"].notna().all()


def test_fewer_experts_cost_less_with_a_better_gate(dense: interp.Model) -> None:
    """The norm of what is left out, per token, at equal size: oracle < fitted < random."""
    groups = experts.partition(dense, 8, "weights")
    x = TEXTS["law"][0] + TEXTS["bio"][0]
    truth = dense.capture(x, "mlp_out[0]")["mlp_out[0]"]
    lost = {}
    for gate in ("oracle", "fitted", "average", "similarity", "random"):
        moe = experts.split(dense, groups=groups, active=3, gate=gate, texts=TEXTS)
        lost[gate] = float((moe.capture(x, "mlp_out[0]")["mlp_out[0]"] - truth).norm())
        assert moe.top_k == 3
    assert lost["oracle"] < lost["fitted"] < lost["random"]


def test_the_oracle_scores_by_what_is_put_out(dense: interp.Model) -> None:
    groups = experts.partition(dense, 4, "random")
    oracle = experts.split(dense, groups=groups, active=2, gate="oracle")
    whole = experts.split(dense, groups=groups)
    acts = whole.capture("the court", "expert_out[0]").experts(0)
    size = torch.zeros(9, 4).scatter_(1, acts.ids[0], acts.out[0].norm(dim=-1).detach())
    chosen = oracle.capture("the court", "expert_ids[0]")["expert_ids[0]"][0]
    assert torch.equal(chosen.sort(-1).values, size.topk(2).indices.sort(-1).values)


def test_partitions_are_balanced_and_whole(dense: interp.Model) -> None:
    for how in ("weights", "coactivation", "random"):
        made = experts.partition(dense, 5, how, texts=TEXTS)
        for group in made.groups.values():
            assert group.shape == (5, 8)
            assert torch.equal(group.flatten().sort().values, torch.arange(40))


def test_matching_is_stable_and_near_the_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(60, 6, generator=generator)
    owner = matched(cost, 10)
    assert torch.equal(torch.bincount(owner), torch.full((6,), 10))
    price = cost.gather(1, owner[:, None])[:, 0]
    worst = torch.stack([price[owner == c].max() for c in range(6)])
    assert not bool(((cost < price[:, None]) & (cost < worst[None])).any())  # nobody would rather have each other
    rows, columns = linear_sum_assignment(np.repeat(cost.numpy(), 10, axis=1))
    best = float(cost[rows, columns // 10].sum())
    assert best <= float(price.sum()) < 1.25 * best


def test_planted_groups_are_found_by_weights_and_by_coactivation() -> None:
    from sklearn.metrics import adjusted_rand_score

    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(64) % 4
    centres = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    points = centres[truth] + 0.05 * torch.randn(64, 16, generator=generator)
    groups = balanced_kmeans(points, 4, generator)
    found = torch.zeros(64, dtype=torch.long)
    for i, group in enumerate(groups):
        found[group] = i
    assert adjusted_rand_score(truth, found) == 1
    active = (torch.rand(400, 4, generator=generator) < 0.3).float()[:, truth]
    active = active * torch.rand(400, 64, generator=generator) + 0.02 * torch.rand(400, 64, generator=generator)
    groups = balanced_kmeans(embedding(active.T @ active, 4), 4, generator)
    for i, group in enumerate(groups):
        found[group] = i
    assert adjusted_rand_score(truth, found) == 1


def test_ridge_is_sklearns() -> None:
    from sklearn.linear_model import Ridge

    from interp.experts.split import _ridge

    x, y = torch.randn(50, 6), torch.randn(50, 3)
    weight, bias = _ridge(x, y)
    centred = x.double() - x.double().mean(0)
    strength = 1e-2 * float((centred.T @ centred).diagonal().mean())
    model = Ridge(alpha=strength).fit(x.double().numpy(), y.double().numpy())
    np.testing.assert_allclose(weight.numpy(), model.coef_, rtol=1e-6)
    np.testing.assert_allclose(bias.numpy(), model.intercept_, rtol=1e-6)


def test_a_curve_falls_to_the_dense_loss(dense: interp.Model) -> None:
    table = experts.split_curve(dense, {"law": TEXTS["law"]}, n=4, shares=(0.25, 1.0), gates=("oracle",), fit_on=TEXTS)
    whole = table[table["share"] == 1.0]
    assert whole["value"].abs().max() < 1e-5
    assert set(table["how"]) == {"weights", "coactivation", "random"}
    assert (table[table["share"] == 0.25]["value"].abs() > 1e-4).all()


def test_bad_input_is_told(dense: interp.Model) -> None:
    with pytest.raises(ExpertError, match=r"n=7: layer 0 has 40 neurons, which 7 experts cannot share"):
        experts.split(dense, n=7)
    with pytest.raises(ExpertError, match=r"how='kmeans': expected one of weights"):
        experts.split(dense, how="kmeans")
    with pytest.raises(ExpertError, match=r"active=9: expected 1\.\.4"):
        experts.split(dense, n=4, active=9)
    with pytest.raises(ExpertError, match="pass texts="):
        experts.split(dense, n=4, how="coactivation")
    with pytest.raises(ExpertError, match="fitted to activations; pass texts="):
        experts.split(dense, n=4, gate="fitted")
    with pytest.raises(ExpertError, match=r"gate='best': expected one of average"):
        experts.split(dense, n=4, gate="best")
    with pytest.raises(ExpertError, match="has no dense MLP to split"):
        experts.split(build("routed"), n=4)
    with pytest.raises(ExpertError, match="cannot be split: its MLP is no module of its own"):
        experts.split(interp.load("tiny:opt"), n=4)


def test_biases_and_halves_are_read(dense: interp.Model) -> None:
    for name in ("gpt2", "phi3"):
        m: Any = interp.load(f"tiny:{name}", letters(), vocab_size=101)
        found = ffn.read(m, 0)
        acts = m.capture("the court", "mlp_hidden[0]")["mlp_hidden[0]"]
        assert found.down.shape == (m.d_model, acts.shape[-1])
        assert (found.gate is None) == (name == "gpt2")
        assert (found.up_bias is None) == (name == "phi3")
