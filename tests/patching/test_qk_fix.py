"""The QK fix against brute force through the softmax: saturated, in half precision, and by each family's own code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import edits
from interp.patching import Patcher, attribute, patch
from interp.patching.gather import grouped
from interp.patching.linear import Linear
from interp.patching.nodes import expand
from interp.patching.qk_fix import KeyMoves, Others, QueryMoves, Scores, sigmoid_difference
from interp.sites import Site

from .conftest import differing, logit_gap
from .nets import linear_net

HEADS, GROUP, WIDTH, D = 4, 2, 7, 5


def case(strength: float, dtype: torch.dtype = torch.float32, sink: bool = False, window: int = WIDTH) -> Any:
    """Queries, keys, the source run's, gradients and a recipe of scores, saturated where `strength` is large."""
    draw = torch.Generator().manual_seed(1)
    shape = (2, WIDTH, HEADS, D), (2, WIDTH, HEADS // GROUP, D)
    q, q2 = (strength * torch.randn(shape[0], generator=draw) for _ in range(2))
    k, k2 = (torch.randn(shape[1], generator=draw) for _ in range(2))
    g = torch.randn(2, HEADS, WIDTH, WIDTH, generator=draw)
    place = torch.arange(WIDTH)
    seen = (place[:, None] >= place) & (place[:, None] - place < window)
    bias = torch.zeros(WIDTH, WIDTH).masked_fill(~seen, -torch.inf)[None, None]
    score = torch.full((1, HEADS, WIDTH, 1), 0.3 if sink else -torch.inf)
    tensors = tuple(t.to(dtype) for t in (q, k, q2, k2, g))
    return (*tensors, Scores(0.4, None, bias, score))


def brute(scores: Scores, q: Tensor, k: Tensor, q2: Tensor, k2: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """One head, one position at a time, the softmax anew each time, in double precision [pair, pos, head]."""
    q, k, q2, k2, g = (t.double() for t in (q, k, q2, k2, g))
    wide = Scores(scores.factor, scores.cap, scores.bias.double(), scores.sink.double())
    before = wide.pattern(wide(q, k))
    queries, keys = torch.zeros(q.shape[:3]).double(), torch.zeros(k.shape[:3]).double()
    for of, tensor, other in ((queries, q, q2), (keys, k, k2)):
        for pos in range(of.shape[1]):
            for head in range(of.shape[2]):
                moved = tensor.clone()
                moved[:, pos, head] = other[:, pos, head]
                after = wide.pattern(wide(moved, k) if tensor is q else wide(q, moved))
                of[:, pos, head] = ((after - before) * g).flatten(1).sum(1)
    return queries, keys


def gap(made: Tensor, truth: Tensor) -> float:
    """Largest error relative to the node's own effect (below 1e-4 of the largest, to that)."""
    size = truth.abs().clamp_min(1e-4 * float(truth.abs().max()))
    return float(((made.double() - truth).abs() / size).max())


@pytest.mark.parametrize("strength", [0.5, 5.0, 60.0, 600.0])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("window", [WIDTH, 3])
def test_equals_brute_force_at_every_head_and_position(strength: float, sink: bool, window: int) -> None:
    q, k, q2, k2, g, scores = case(strength, sink=sink, window=window)
    queries, keys = brute(scores, q, k, q2, k2, g)
    assert gap(QueryMoves.of(scores, q, k, q2).effect(g), queries) < 1e-5
    assert gap(KeyMoves.of(scores, q, k, k2).effect(g), keys) < 1e-5


@pytest.mark.parametrize("strength", [0.5, 60.0])
def test_the_same_in_half_precision(strength: float) -> None:
    """What goes in is bfloat16; the softmax of the very same numbers is the truth."""
    q, k, q2, k2, g, scores = case(strength, torch.bfloat16, sink=True)
    queries, keys = brute(scores, q, k, q2, k2, g)
    assert gap(QueryMoves.of(scores, q, k, q2).effect(g), queries) < 1e-5
    assert gap(KeyMoves.of(scores, q, k, k2).effect(g), keys) < 1e-5


def naive_keys(scores: Scores, q: Tensor, k: Tensor, k2: Tensor, g: Tensor) -> Tensor:
    """The closed form that divides by 1 - p_t, its 0 / 0 set to 0, as other implementations have it."""
    old, new = scores(q, k), scores(q, k2)
    p = scores.pattern(old)
    after = (p.log() - (-p).log1p() + new - old).nan_to_num(-torch.inf, torch.inf, -torch.inf).sigmoid()
    share = ((after - p) / (1 - p)).nan_to_num(0.0, 0.0, 0.0)
    return (share * (g - (p * g).sum(-1, keepdim=True))).sum(2).unflatten(1, (-1, GROUP)).sum(2).transpose(1, 2)


def test_where_the_naive_form_fails() -> None:
    """Unsaturated both are right; saturated the naive one misses whole effects, and the slope sees next to nothing."""
    for strength, right in ((0.5, True), (60.0, False)):
        q, k, q2, k2, g, scores = case(strength)
        _, keys = brute(scores, q, k, q2, k2, g)
        largest = float(keys.abs().max())
        naive = float((naive_keys(scores, q, k, k2, g) - keys).abs().max()) / largest
        ours = float((KeyMoves.of(scores, q, k, k2).effect(g) - keys).abs().max()) / largest
        assert ours < 1e-5
        assert (naive < 1e-5) is right
        assert right or naive > 0.1


def test_others_leave_one_out_of_the_sums() -> None:
    scores = torch.tensor(
        [[0.0, 200.0, 3.0, -torch.inf], [5.0, 5.0, 5.0, 1.0], [2.0, -torch.inf, -torch.inf, -torch.inf]]
    )
    others, g = Others.of(scores), torch.tensor([1.0, -2.0, 4.0])
    for row in range(2):
        for t in range(3):
            rest = torch.cat([scores[row, :t], scores[row, t + 1 :]]).double()
            values = torch.cat([g[:t], g[t + 1 :], torch.zeros(1)]).double()
            assert others.lse[row, t].item() == pytest.approx(rest.logsumexp(0).item(), rel=1e-6)
            assert others.mean(g)[row, t].item() == pytest.approx(float(rest.softmax(0) @ values), rel=1e-5)
    assert others.lse[2, 0].item() == -math.inf  # nothing else is seen


def test_sigmoid_difference_keeps_small_differences() -> None:
    new, old = torch.tensor([30.0, -40.0, 0.1, torch.inf, 5.0]), torch.tensor([29.0, -41.0, 0.1, torch.inf, -torch.inf])
    truth = new.double().sigmoid() - old.double().sigmoid()
    truth[0] = torch.exp(torch.tensor(-29.0).double()) - torch.exp(torch.tensor(-30.0).double())
    assert torch.allclose(sigmoid_difference(new, old).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strength", [1.0, 1000.0])
def test_exact_where_all_behind_is_linear(strength: float) -> None:
    """A net whose only nonlinearity is the last layer's softmax: the estimate is the exact effect, saturated or not."""
    m, (clean, corrupt) = linear_net(strength), differing(2, 6, changed=(1, 3))
    truth = patch(m, clean, corrupt, logit_gap, ["q[1]", "k[1]"])
    fixed = attribute(m, clean, corrupt, logit_gap, ["q[1]", "k[1]"], method="atp+qk")
    slope = attribute(m, clean, corrupt, logit_gap, ["q[1]", "k[1]"], method="atp")
    largest = truth.value.abs().max()
    assert largest > 0.02
    assert (fixed.value - truth.value).abs().max() < 1e-5 * max(1.0, largest)
    assert not fixed.attrs["plain"]
    if strength > 1:
        top = truth.value.abs().idxmax()
        assert abs(slope.value[top]) < 0.1 * largest  # saturated: the slope sees nothing


#: Grouped heads; caps and windows; sinks and windows; queries and keys behind norms; biases of distance, by hand; by
#: hand, rotary; latent attention.
FAMILIES = ["llama", "gemma2", "gpt_oss", "qwen3_moe", "bloom", "gptj", "deepseek_v3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_familys_own_softmax(family: str) -> None:
    """Δp by the family's own code (one query or key replaced, the pattern captured) times dL/dp."""
    m, (clean, corrupt) = interp.load(f"tiny:{family}"), differing(1, 9)
    layer = m.anatomy.having("pattern")[-1]
    nodes = expand(m, [f"q[{layer}]", f"k[{layer}]"], m.tokens(clean))
    recorded = Patcher(m, clean, corrupt, logit_gap).recorded
    sites = [Site("q", layer), Site("k", layer)]
    there = m.capture(clean, sites)
    line = Linear(recorded, torch.tensor([0]), grouped(nodes, 9, m.device), there, fixes=True)
    assert not line.notes
    gradient = line.gradient()
    made = line.estimate(gradient, len(nodes))[:, 0]
    g, before = gradient[Site("pattern", layer)], m.capture(corrupt, f"pattern[{layer}]")[f"pattern[{layer}]"]
    truth = torch.zeros(len(nodes)).double()
    for i, node in enumerate(nodes):
        here = edits.replace(str(node.site), there[node.site], scope=f"window({node.position}, {node.position + 1})")
        with m.intervene(here):
            after = m.capture(corrupt, f"pattern[{layer}]")[f"pattern[{layer}]"]
        truth[i] = ((after - before).double() * g.double()).sum()
    assert float(truth.abs().max()) > 1e-5
    assert float((made - truth).abs().max()) < 2e-5 * max(1e-2, float(truth.abs().max()))


def test_a_layer_that_is_not_explained_says_so() -> None:
    """Sparse attention picks keys by content, which a run without queries does not show."""
    m, (clean, corrupt) = interp.load("tiny:deepseek_v32"), differing(1, 12)
    table = attribute(m, clean, corrupt, logit_gap, "q[*]", method="atp+qk")
    assert all("do not give this layer's pattern back" in why for why in table.attrs["plain"].values())
    assert table.attrs["plain"]


def test_a_coordinate_of_a_query_goes_by_its_slope() -> None:
    """The fix takes whole queries through the softmax; their coordinates keep AtP, and sum to AtP of the whole."""
    m, (clean, corrupt) = interp.load("tiny:llama"), differing(2)
    whole = attribute(m, clean, corrupt, logit_gap, "q[1, head=0]@-1", method="atp")
    parts = attribute(m, clean, corrupt, logit_gap, "q[1, head=0, dim=*]@-1", method="atp*")
    assert len(parts) > 1
    assert parts.value.abs().max() > 0
    assert parts.value.sum() == pytest.approx(whole.value[0], rel=1e-3, abs=1e-7)
