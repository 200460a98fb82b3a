"""PAT-01. AtP*: An efficient and scalable method for localizing LLM behaviour to components (arXiv 2403.00745).

Planted, in float32 and bfloat16: a net whose attention is saturated, where plain AtP misses what the QK fix finds, and
that equals brute force through the softmax to 1e-5; a net whose paths cancel, where AtP gives 0 and GradDrop does not.
Random models, dense, with grouped heads and with experts: recall@10 against exact patching of AtP and AtP*, and the
passes that each took. The certificate's bound covers the truth in at least 95% of simulated runs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import interp
from interp.patching import attribute, effects, expand, report_card
from interp.patching.certify import certify_effects
from interp.patching.gather import grouped
from interp.patching.linear import Linear
from interp.patching.runs import Patcher
from interp.sites import Site
from tests.patching.conftest import differing, logit_gap
from tests.patching.nets import cancelling, linear_net, sharpen

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_attention(dtype: torch.dtype) -> None:
    m, (clean, corrupt) = linear_net(1000.0), differing(1, 6, changed=(1, 3))
    m = interp.Model(m.hf.to(dtype), name="saturated")
    nodes = expand(m, ["q[1]", "k[1]"], m.tokens(clean))
    there = m.capture(clean, ["q[1]", "k[1]"])
    recorded = Patcher(m, clean, corrupt, logit_gap).recorded
    line = Linear(recorded, torch.tensor([0]), grouped(nodes, 6, m.device), there, fixes=True)
    assert not line.notes
    gradient = line.gradient()
    made = line.estimate(gradient, len(nodes))[:, 0].double()
    here = {name: line.run[Site(name, 1)].detach().double() for name in ("q", "k")}
    g, truth = gradient[Site("pattern", 1)].double(), torch.zeros(len(nodes)).double()
    before = softmax(here["q"], here["k"])
    for i, node in enumerate(nodes):
        moved = {name: t.clone() for name, t in here.items()}
        name, head = node.site.name, node.index("head")
        moved[name][:, node.position, head] = there[node.site.base][:, node.position, head].double()
        truth[i] = ((softmax(moved["q"], moved["k"]) - before) * g).sum()
    plain = torch.tensor(attribute(m, clean, corrupt, logit_gap, ["q[1]", "k[1]"], method="atp").value.to_numpy())
    top = int(truth.abs().argmax())
    print(
        f"{dtype}: true effect {truth[top]:.4f}, AtP {plain[top]:.1e}, QK fix off by {(made - truth).abs().max():.1e}"
    )
    assert float((made - truth).abs().max()) <= 1e-5 * float(truth.abs().max())
    assert abs(float(plain[top])) < 0.01 * abs(float(truth[top]))


def softmax(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention probabilities [pair, head, query, key] of q, k [pair, pos, head, d], literally."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    n = q.shape[1]
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cancelling_paths(dtype: torch.dtype) -> None:
    m, clean, corrupt = cancelling(), torch.tensor([[50, 10]]), torch.tensor([[50, 90]])
    m = interp.Model(m.hf.to(dtype), name="cancelling")
    truth = float(effects(m, clean, corrupt, logit_gap, [[n] for n in expand(m, "mlp_out[0]@1", m.tokens(clean))]))
    atp, dropped = (
        float(attribute(m, clean, corrupt, logit_gap, "mlp_out[0]@1", method=method).score[0])
        for method in ("atp", "atp+graddrop")
    )
    print(f"{dtype}: true effect {truth:.3f}, AtP {atp:.1e}, GradDrop {dropped:.3f}")
    assert abs(truth) > 1
    assert atp < 1e-3
    assert dropped > 0.5


def test_recall_and_passes_on_random_models() -> None:
    """Queries and keys of sharp attention, all of them verified; three shapes, one seed each, summed up."""
    total = {"atp": 0.0, "atp*": 0.0}
    for family, config in (("llama", {"num_key_value_heads": 4}), ("gemma3", {}), ("qwen3_moe", {})):
        m, (clean, corrupt) = sharpen(family, 10.0, **config), differing(6, 8)
        card = report_card(m, clean, corrupt, logit_gap, ["q[*]", "k[*]"], methods=["atp", "atp*"], sample=400)
        rows = card[(card.site == "all") & (card.measure == "recall@10")].set_index("method")
        for method in total:
            row, cost = rows.loc[method], card.attrs["cost"][method]
            total[method] += row.value
            print(
                f"{family}, {method}: recall@10 {row.value:.2f} [{row.low:.2f}, {row.high:.2f}], "
                f"{cost['forward']:.1f} forward + {cost['backward']:.1f} backward passes"
            )
            assert cost["forward"] + cost["backward"] <= m.n_layers + 4
    assert total["atp*"] > total["atp"]


def test_the_bound_covers_the_truth_in_simulated_runs() -> None:
    covered, unverified, runs, threshold = 0, 0, 100, 1.0
    for seed in range(runs):
        draw = torch.Generator().manual_seed(seed)
        effect = torch.randn(40, generator=draw) * 0.2
        effect[torch.randint(40, (1,), generator=draw)] = 1.5

        def run(sets: list[list[int]], effect: Tensor = effect) -> Tensor:
            return torch.stack([effect[list(s)].sum().expand(2) for s in sets])

        scores = effect.abs() * torch.rand(40, generator=draw)
        made = certify_effects(run, scores, threshold=threshold, confidence=0.95, budget=4000, seed=seed)
        left = effect.abs()[torch.tensor((made.frame.status == "bounded").to_numpy())]
        unverified += len(left)
        covered += not len(left) or float(left.max()) <= made.bound
    assert unverified > 10 * runs
    print(f"the bound covered the largest effect left in {covered} of {runs} runs at 95%")
    assert covered >= 0.95 * runs
