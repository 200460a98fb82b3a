"""Attribution: AtP is exact where the net is linear, and one sign convention, one table, for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import metrics
from interp.patching import attribute, patch
from interp.patching.nodes import Node, window
from interp.patching.task import PatchError

from .conftest import differing, logit_gap
from .nets import linear_net

METHODS = ["atp", "atp+qk", "atp+graddrop", "atp*", "ig", "secant", "secant+qk"]
NODES = [
    "embed",
    "v[*]",
    "z[*]",
    "attn_out[*]",
    "mlp_hidden[0, neuron=*]",
    "mlp_out[*]",
    "resid_mid[*]",
    "resid_post[*]",
]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("method", METHODS)
def test_exact_on_a_linear_net(method: str, direction: Any) -> None:
    m, (clean, corrupt) = linear_net(layers=3), differing(3, 6, changed=(1, 3))
    truth = patch(m, clean, corrupt, logit_gap, NODES, direction)
    made = attribute(m, clean, corrupt, logit_gap, NODES, method, direction)  # type: ignore[arg-type]
    largest = truth.value.abs().max()
    assert largest > 0.1
    assert (made.value - truth.value).abs().max() < 2e-6 * max(1.0, largest)
    assert made.node.tolist() == truth.node.tolist()
    assert [*made] == [*truth]
    if method not in ("atp+graddrop", "atp*"):
        assert (made.score - truth.score).abs().max() < 2e-6 * max(1.0, largest)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "qwen3_moe", "gemma3n", "monet"])
def test_first_order_on_real_families(family: str) -> None:
    """Where corrupt differs from clean by next to nothing, every node's estimate is its exact effect."""
    m, (clean, corrupt) = interp.load(f"tiny:{family}"), differing(2, 6, changed=(2,))
    with torch.no_grad():  # two tokens whose embeddings are close
        table = m.hf.get_input_embeddings().weight
        for a, b in zip(clean[:, 2], corrupt[:, 2], strict=True):
            table[b] = table[a] + 2e-3 * torch.randn(table.shape[1])
    names = ["embed", "resid_post", "q", "k", "v", "z", "attn_out", "mlp_hidden", "router_logits", "expert_weight"]
    names += ["expert_out", "mlp_out", "g1", "pattern"]
    nodes = [n if n == "embed" else f"{n}[-1:]" for n in names if n == "embed" or m.n_layers - 1 in m.anatomy.having(n)]
    truth = patch(m, clean, corrupt, logit_gap, nodes)
    made = attribute(m, clean, corrupt, logit_gap, nodes, method="atp")
    for name, rows in truth.groupby("site"):
        size = rows.value.abs().max()
        gap = (made.value[rows.index] - rows.value).abs().max()
        assert gap <= 5e-2 * size + 5e-6, f"{name}: off by {gap:.2g} of {size:.2g}"


def test_the_absolute_value_is_taken_per_pair() -> None:
    """Two pairs that are each other's mirror image: signed effects cancel, scores do not."""
    m, (clean, corrupt) = interp.load("tiny:llama"), differing(1)
    both = torch.cat([clean, corrupt]), torch.cat([corrupt, clean])
    gap = abs(logit_gap(m(clean)) - logit_gap(m(corrupt))).item()
    table = patch(m, *both, logit_gap, "resid_post[2]@-1")
    assert table.value[0] == pytest.approx(0, abs=1e-5)
    assert table.score[0] == pytest.approx(gap, rel=1e-4)
    made = attribute(m, *both, logit_gap, "resid_post[2]@-1", method="atp")
    assert made.score[0] > 2 * abs(made.value[0])


def test_batches_of_pairs_do_not_matter() -> None:
    """The metric holds an answer per pair, and pairs run a few at a time."""
    m, (clean, corrupt) = interp.load("tiny:qwen3_moe"), differing(5)
    metric, nodes = metrics.logit_diff([3, 4, 5, 6, 7], [8, 9, 10, 11, 12]), ["q[*]", "z[*]", "expert_weight[1]"]
    whole = attribute(m, clean, corrupt, metric, nodes)
    few = attribute(m, clean, corrupt, metric, nodes, budget=1_500_000)
    assert (whole.value - few.value).abs().max() < 1e-6
    for i in range(2):
        alone = attribute(m, clean[i : i + 1], corrupt[i : i + 1], metrics.logit_diff(3 + i, 8 + i), nodes)
        assert len(alone) == len(whole)
    each = [
        attribute(m, clean[i : i + 1], corrupt[i : i + 1], metrics.logit_diff(3 + i, 8 + i), nodes) for i in range(5)
    ]
    assert (sum(t.value for t in each) / 5 - whole.value).abs().max() < 1e-6
    assert (sum(t.score for t in each) / 5 - whole.score).abs().max() < 1e-6


def test_pairs_of_different_length_and_metrics_of_the_whole_sequence() -> None:
    m = interp.load("tiny:gpt_oss")
    clean, corrupt = [[9, 8, 7, 6, 5], [9, 8, 7]], [[9, 4, 7, 6, 5], [9, 4, 7]]
    padded = attribute(m, clean, corrupt, metrics.logit_diff(3, 4), ["q[*]", "k[*]", "resid_post[*]"])
    alone = attribute(m, clean[1:], corrupt[1:], metrics.logit_diff(3, 4), ["q[*]", "k[*]", "resid_post[*]"])
    first = attribute(m, clean[:1], corrupt[:1], metrics.logit_diff(3, 4), ["q[*]", "k[*]", "resid_post[*]"])
    key = ["node", "position"]
    merged = padded.merge(first, on=key, suffixes=("", "_first")).merge(
        alone, on=key, suffixes=("", "_alone"), how="left"
    )
    expected = merged.score_first.where(merged.score_alone.isna(), (merged.score_first + merged.score_alone) / 2)
    assert (merged.score - expected).abs().max() < 1e-5

    def everywhere(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[..., 3].mean(1)

    short, other = torch.tensor(clean[:1]), torch.tensor(corrupt[:1])
    last = attribute(m, short, other, everywhere, "resid_post[-1]", method="atp")
    exact = patch(m, short, other, everywhere, "resid_post[-1]")
    assert abs(last.value.corr(exact.value)) > 0.8


def test_joint_nodes_add_up_and_parts_are_projected() -> None:
    m, (clean, corrupt) = interp.load("tiny:llama"), differing()
    single = attribute(m, clean, corrupt, logit_gap, "mlp_out[*]@5", method="atp")
    joint = attribute(m, clean, corrupt, logit_gap, window(m, "mlp_out[*]", m.tokens(clean), 3, [5]), method="atp")
    assert joint.value[0] == pytest.approx(single.value.sum(), rel=1e-4)
    everywhere = attribute(m, clean, corrupt, logit_gap, "mlp_out[1]@all", method="atp")
    each = attribute(m, clean, corrupt, logit_gap, "mlp_out[1]", method="atp")
    assert everywhere.value[0] == pytest.approx(each.value.sum(), rel=1e-4)
    u = torch.nn.functional.normalize(torch.randn(m.d_model), dim=0)
    site = single_site = window(m, "mlp_out[1]", m.tokens(clean), 1, [5])[0].site
    along = Node(site, 5, part=lambda here, there: here + ((there - here) @ u)[..., None] * u)
    across = Node(single_site, 5, part=lambda here, there: there - ((there - here) @ u)[..., None] * u)
    parts = attribute(m, clean, corrupt, logit_gap, [along, across], method="atp")
    assert parts.value.sum() == pytest.approx(single.value[1], rel=1e-3)
    with pytest.raises(PatchError, match="a window of layers has no layer of its own"):
        attribute(m, clean, corrupt, logit_gap, window(m, "mlp_out[*]", m.tokens(clean), 2, [5]), method="atp*")


def test_integrated_gradients_converge_to_the_whole_gap() -> None:
    """Completeness: over the embeddings, which are what is interpolated, estimates sum to the metric's gap."""
    m, (clean, corrupt) = interp.load("tiny:gemma3"), differing()
    gap = (logit_gap(m(clean)) - logit_gap(m(corrupt))).mean().item()
    errors = []
    for steps in (1, 4, 64):
        table = attribute(m, clean, corrupt, logit_gap, "embed", method="ig", steps=steps)
        errors.append(abs(table.value.sum() - gap))
    assert errors[2] < 1e-2 * abs(gap)
    assert errors[2] < errors[0]


def test_what_it_costs() -> None:
    m, (clean, corrupt) = interp.load("tiny:llama", num_hidden_layers=8), differing(2)
    cost = {
        method: attribute(m, clean, corrupt, logit_gap, ["q[*]", "z[*]"], method=method).attrs["cost"]  # type: ignore[arg-type]
        for method in METHODS
    }
    total = {method: c["forward"] + c["backward"] for method, c in cost.items()}
    assert cost["atp"]["backward"] == pytest.approx(1, abs=0.15)
    assert cost["atp*"]["backward"] == pytest.approx((8 + 1) / 2 + 1 / 2, abs=0.1)  # one pair of two checks the walk
    assert total["atp"] <= 6
    assert total["atp*"] <= 8 + 4
    assert total["atp"] < total["atp+qk"] < total["atp*"]


def test_the_model_is_as_it_was() -> None:
    m, (clean, corrupt) = interp.load("tiny:gpt_oss"), differing()
    before, implementation = m(clean), m.config._attn_implementation
    attribute(m, clean, corrupt, logit_gap, ["q[*]", "expert_out[*]"])
    assert torch.equal(m(clean), before)
    assert m.config._attn_implementation == implementation
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in m.hf.modules())
    assert all(p.grad is None for p in m.hf.parameters())


@pytest.mark.parametrize(
    ("metric", "how", "message"),
    [
        (lambda x: x[:, -1].argmax(-1).float(), {}, "has no gradient"),
        (lambda x: x[:, -1, 3].detach(), {}, "has no gradient"),
        (logit_gap, {"method": "atp**"}, "expected one of atp, atp\\+qk"),
        (logit_gap, {"method": "ig", "steps": 0}, "at least one step"),
        (lambda x: torch.ones(len(x)), {}, "gives the same value"),
    ],
)
def test_bad_questions_are_refused(metric: Any, how: dict[str, Any], message: str) -> None:
    clean, corrupt = differing()
    with pytest.raises(PatchError, match=message):
        attribute(interp.load("tiny:llama"), clean, corrupt, metric, "z[*]", **how)


def test_graddrop_needs_a_residual_stream() -> None:
    clean, corrupt = differing()
    with pytest.raises(ValueError, match="several residual streams"):
        attribute(interp.load("tiny:gemma3n"), clean, corrupt, logit_gap, "z[*]", method="atp*")
