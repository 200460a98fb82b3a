"""Secants: each rule against its formula, the sum of a cut against the metric, and what tangents cannot see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interp
from interp.patching import attribute, pairs, patch
from interp.patching.secant import Secant, between, log_mean, secants

from .conftest import differing, logit_gap
from .nets import linear_net
from .planted import PlainConfig, PlainModel, induction, opened

METHODS: tuple[Any, ...] = ("secant", "secant+qk")


def rows(case: str) -> tuple[Tensor, Tensor]:
    """Attention scores of two runs [row, key], float64."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 7, generator=draw).double() for _ in range(2))
    if case == "saturated":  # each run looks at one key only, and not at the same
        a, b = 1000 * a, 1000 * b
    elif case == "one key moves":
        b = a.clone()
        b[:, 2] += 300
    elif case == "equal":
        b = a.clone()
    elif case == "nearly equal":
        b = a + 1e-9 * b
    elif case in ("masked", "very low"):
        low = -torch.inf if case == "masked" else torch.finfo(torch.float32).min
        hidden = torch.ones(6, 7).triu(2).bool()
        a, b = (30 * t.masked_fill(hidden, low) for t in (a, b))
    return a, b


CASES = ["usual", "saturated", "one key moves", "equal", "nearly equal", "masked", "very low"]


@pytest.mark.parametrize("case", CASES)
def test_the_matrix_carries_scores_to_probabilities_exactly(case: str) -> None:
    a, b = rows(case)
    weights = log_mean(a.log_softmax(-1), b.log_softmax(-1))
    d = torch.where((a - b).isfinite(), a - b, 0.0)
    assert bool((weights >= 0).all())
    assert float((between(weights, d) - (a.softmax(-1) - b.softmax(-1))).abs().max()) < 1e-12
    assert float(between(weights, torch.ones_like(d)).abs().max()) < 1e-12  # constants do nothing
    if case == "equal":
        p, x = a.softmax(-1), torch.randn(6, 7).double()
        assert torch.allclose(between(weights, x), p * x - p * (p * x).sum(-1, keepdim=True), atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_softmax_keeps_its_value_and_gets_the_secants_gradient(case: str) -> None:
    a, b = rows(case)
    x = torch.cat([a, b]).requires_grad_(True)
    with Secant(12):
        p = nn.functional.softmax(x, -1)
    assert torch.equal(p, torch.cat([a, b]).softmax(-1))
    g = torch.randn(6, 7, generator=torch.Generator().manual_seed(1)).double()
    (found,) = torch.autograd.grad((p[:6] * g).sum(), x)
    d = torch.where((a - b).isfinite(), a - b, 0.0)
    made, whole = (found[:6] * d).sum(), (g * (p[:6] - p[6:])).sum().detach()
    assert float(made - whole) == pytest.approx(0, abs=1e-10)
    assert not bool(found[6:].any())


FUNCTIONS: dict[str, Any] = {
    "relu": nn.functional.relu, "silu": nn.functional.silu, "gelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "soft cap": lambda x: 5 * torch.tanh(x / 5), "cube": lambda x: x**3, "relu squared": lambda x: x.relu().square(),
    "by hand": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x.pow(3)))), "clamp": lambda x: x.clamp(-1, 0.5),
    "rms norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer norm": lambda x: nn.functional.layer_norm(x, (5,), torch.arange(5.0).double(), torch.ones(5).double()),
    "root mean square norm": lambda x: nn.functional.rms_norm(x, (5,), None, 1e-6),
    "gated": lambda x: nn.functional.silu(x[..., :2]) * x[..., 2:4], "quotient": lambda x: x / (1 + x.square()),
    "outer": lambda x: x[..., None] @ x[:, None], "einsum": lambda x: torch.einsum("bi,bj->bij", x, x),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(
        *(9 * f(x).view(-1, 1, 5, 1) for f in (torch.sin, torch.cos, torch.exp)), is_causal=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_step_is_the_line_through_both_runs(name: str) -> None:
    """Values are the function's own; gradient x difference is the difference of the values, whatever it is asked of."""
    draw = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(8, 5, generator=draw)).double()
    x[5, 2], x[2, 3] = x[1, 2], -x[6, 3]  # one coordinate that does not move, one that only turns its sign
    truth, x = FUNCTIONS[name](x), x.requires_grad_(True)
    with Secant(8):
        y = FUNCTIONS[name](x)
    assert torch.allclose(y, truth, atol=1e-12)
    for _ in range(3):
        g = torch.randn(y[:4].shape, generator=draw).double()
        (found,) = torch.autograd.grad((y[:4] * g).sum(), x, retain_graph=True)
        made, whole = (found[:4] * (x[:4] - x[4:])).sum(), (g * (y[:4] - y[4:])).sum()
        assert float(made.detach()) == pytest.approx(float(whole.detach()), rel=1e-9, abs=1e-9)
        assert not bool(found[4:].any())


def test_what_lies_on_the_flat_side_is_seen() -> None:
    """A gate that is shut in one run and open in the other has no tangent, and one that is shut in both no secant."""
    x = torch.tensor([[-1.0, -1.0, 2.0], [3.0, -2.0, 2.0]]).requires_grad_(True)
    with Secant(2):
        y = x.relu()
    (found,) = torch.autograd.grad(y[0].sum(), x)
    assert found[0].tolist() == [0.75, 0.0, 1.0]  # (3 - 0) / (3 + 1)


def test_rows_that_are_no_pairs_and_constants_keep_their_tangents() -> None:
    weight, odd = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True)
    with Secant(4):
        y = (weight * 2).relu() + (odd.relu().sum() * 0)
    assert torch.equal(y, (weight * 2).relu())
    (found,) = torch.autograd.grad(y.sum() + odd.square().sum(), odd)
    assert torch.equal(found, 2 * odd)


def random_plain(strength: float) -> interp.Model:
    """Random weights, no norms; `strength` sharpens the attention."""
    torch.manual_seed(0)
    hf = PlainModel(PlainConfig(layers=3, heads=2, d_head=4, d_model=12, d_mlp=16, vocab=40, n_ctx=8)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.copy_(torch.randn(p.shape) * 0.4)
        for layer in hf.layers:
            layer.attn.q.weight *= strength
    return opened(hf.double(), "random")  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", [1.0, 100.0])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_parts_of_a_cut_add_up_to_the_difference(strength: float, direction: Any) -> None:
    m, clean = random_plain(strength), torch.tensor([[3, 9, 4, 30, 7], [8, 2, 21, 5, 11]])
    corrupt = torch.tensor([[3, 12, 4, 33, 7], [9, 2, 22, 5, 11]])
    cuts = ["embed", *(f"resid_post[{i}]" for i in range(3)), *(f"resid_mid[{i}]" for i in range(3))]
    table = attribute(m, clean, corrupt, logit_gap, cuts, "secant", direction)
    ends = table.attrs["baseline"]
    gap = (ends["clean"] - ends["corrupt"]) * (1 if direction == "denoise" else -1)
    assert abs(gap) > 0.1
    assert table.attrs["unexplained"] < 1e-9
    for site, part in table.groupby(table.node.str.replace(r"\[.*", "", regex=True) + table.layer.astype(str)):
        assert part.value.sum() == pytest.approx(gap, rel=1e-5), site
    tangent = attribute(m, clean, corrupt, logit_gap, "embed", "atp", direction).value.sum()
    assert abs(tangent - gap) > 1e-2 * abs(gap)  # which is not so of tangents


#: Grouped heads; caps, windows and norms on both sides; queries and keys behind norms; LayerNorm and GELU by hand;
#: biases of distance, by hand; parallel blocks. Experts: sinks; queries and keys behind norms; latent heads; shared.
DENSE, ROUTED = ["llama", "gemma2", "gemma3", "gpt2", "mpt", "gptj"], ["gpt_oss", "qwen3_moe", "deepseek_v3"]


@pytest.mark.parametrize("family", DENSE)
def test_every_step_of_a_dense_family_is_a_secant(family: str) -> None:
    m, (clean, corrupt) = interp.load(f"tiny:{family}"), differing(2)
    m.hf.double()
    live = [p.requires_grad for p in m.hf.parameters()]
    for method in METHODS:
        table = attribute(m, clean, corrupt, logit_gap, ["q[*]", "resid_post[-1]", "z[*]"], method)
        assert not table.attrs["plain"]
        ends = table.attrs["baseline"]
        last = table[table.site == "resid_post"].value.sum()
        assert last == pytest.approx(ends["clean"] - ends["corrupt"], rel=1e-4)
        assert (table.attrs["unexplained"] < 1e-6) is (method == "secant")  # +qk does without the sum
    assert [p.requires_grad for p in m.hf.parameters()] == live
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in m.hf.modules())
    assert table.attrs["cost"]["backward"] == pytest.approx(2, abs=0.1)  # of one batch that holds both runs


def test_a_step_that_no_function_of_torch_shows_is_told_by_the_sum() -> None:
    """BLOOM's GELU is an autograd function of its own, and goes by its tangent."""
    m, (clean, corrupt) = interp.load("tiny:bloom"), differing(2)
    table = attribute(m, clean, corrupt, logit_gap, ["z[*]"], "secant")
    assert 0.01 < table.attrs["unexplained"] < 1
    assert not any(mod._forward_hooks for mod in m.hf.modules())


@pytest.mark.parametrize("family", ROUTED)
def test_routed_experts_go_by_their_slope_and_say_so(family: str) -> None:
    m, (clean, corrupt) = interp.load(f"tiny:{family}"), differing(2)
    table = attribute(m, clean, corrupt, logit_gap, ["q[*]", "expert_weight[-1]"], "secant")
    assert all("routed experts" in why for why in table.attrs["plain"].values())
    assert table.attrs["unexplained"] > 0
    assert bool(table.value.notna().all())
    assert float(table.score.max()) > 0


def test_noised_embeddings_are_a_run_like_any_other() -> None:
    m, (clean, corrupt) = interp.load("tiny:llama"), differing(2)
    noised = pairs.of(m, clean, corrupt, [5, 5], [7, 7]).noised(m)
    for direction in ("denoise", "noise"):
        table = attribute(m, noised, None, noised.metric(), "embed", "secant", direction)  # type: ignore[arg-type]
        assert table.attrs["unexplained"] < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_what_makes_the_keys_of_a_saturated_head_is_found(dtype: torch.dtype, direction: Any) -> None:
    """... A B ... A -> B: the head that notes the token before acts through the keys of one that is saturated."""
    m = induction()
    m = interp.Model(m.hf.to(dtype), name="induction")
    clean, corrupt = torch.tensor([[1, 2, 3, 4, 5, 1]]), torch.tensor([[3, 2, 1, 4, 5, 1]])

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 2] - logits[:, -1, 4]

    nodes = ["z[0]", "k[1]", "v[0]"]
    truth = patch(m, clean, corrupt, metric, nodes, direction)
    made = {name: attribute(m, clean, corrupt, metric, nodes, name, direction).score for name in ("atp*", *METHODS)}
    behind = (truth.score > 0.1) & truth.layer.eq(0)
    assert int(behind.sum()) >= 1
    assert (made["atp*"][behind] < 1e-3).all()
    for name in METHODS:
        assert (made[name][behind] > 0.1 * truth.score[behind]).all()
        assert made[name].rank(ascending=False, method="max")[behind].max() <= (truth.score > 0.1).sum()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_values_alone_are_exact_where_all_behind_is_linear(direction: Any) -> None:
    """Where the pattern moves too, a complete sum gives half of what both do together to each; `alone` does not."""
    m, (clean, corrupt) = linear_net(1000.0), differing(2, 6, changed=(1, 3))
    truth = patch(m, clean, corrupt, logit_gap, "v[1]", direction)
    largest = truth.value.abs().max()
    alone, shared = (attribute(m, clean, corrupt, logit_gap, "v[1]", name, direction).value for name in METHODS[::-1])
    assert largest > 0.02
    assert (alone - truth.value).abs().max() < 1e-5 * max(1.0, largest)
    assert (shared - truth.value).abs().max() > 0.1 * largest


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    m = interp.load("tiny:qwen3_moe")
    apart = [m.anatomy.places["expert_weight", 1].module]
    with pytest.raises(ZeroDivisionError), secants(m.hf, 2, apart):
        raise ZeroDivisionError
    assert all(p.requires_grad for p in m.hf.parameters())
    assert not apart[0]._forward_hooks
