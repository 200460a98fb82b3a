"""Masked layers equal the sum over every (i, j), whichever way the products of W are taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interp.monet import MonetConfig, MonetForCausalLM, mixing
from interp.monet.experts import Experts, make_experts

from .conftest import brute_force

N = 7


def sparse_rows(*shape: int, survivors: int) -> Tensor:
    """Routing weights: a few random keys per row, summing to 1."""
    logits = torch.randn(*shape, dtype=torch.float64)
    cut = logits.topk(survivors).values[..., -1:]
    return logits.masked_fill(logits < cut, -torch.inf).softmax(-1)


@pytest.fixture
def layer(decompose: str) -> Experts:
    config = MonetConfig(
        hidden_size=10,
        num_attention_heads=1,
        moe_experts=N,
        moe_dim=6,
        moe_heads=3,
        moe_topk=2,
        moe_decompose=decompose,
        num_hidden_layers=1,
    )
    experts = make_experts(config).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


@pytest.fixture(params=[2, N], ids=["sparse", "dense"])
def routed(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """x [1, token, d], g1 and g2 [1, token, head, n]"""
    gs = (sparse_rows(1, 5, 3, N, survivors=request.param) for _ in range(2))
    return (torch.randn(1, 5, 10, dtype=torch.float64), *gs)  # type: ignore[return-value]


@pytest.fixture(params=["pairs", "tokens"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one of the two ways, and chunks so small that every sum crosses their borders."""
    monkeypatch.setattr(mixing, "PAIR_COST", 0 if request.param == "pairs" else 10**9)
    monkeypatch.setattr(mixing, "CHUNK", {"cpu": 60})
    return str(request.param)


def masks() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    full = torch.ones(N, N, dtype=torch.bool)
    out = {f"random {share}": torch.rand(N, N, generator=g) >= share for share in (0.02, 0.25, 0.9)}
    out |= {name: full.clone() for name in ("rows", "cols", "rows and cols", "one pair", "two pairs", "all off")}
    out["rows"][[1, 4]] = False
    out["cols"][:, [0, 6]] = False
    out["rows and cols"][[2]] = out["rows and cols"][:, [3]] = False
    out["one pair"][5, 2] = False
    out["two pairs"][[0, 6], [0, 1]] = False
    out["all off"][:] = False
    return out


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-300))


@pytest.mark.parametrize("kind", masks())
def test_fast_equals_brute_force(layer: Experts, routed: tuple[Tensor, Tensor, Tensor], way: str, kind: str) -> None:
    x, g1, g2 = routed
    keep = masks()[kind]
    layer.keep = keep
    fast = layer(x, g1, g2)[0]
    slow = brute_force(layer, x[0], g1[0], g2[0], keep)
    assert torch.equal(fast, slow) if kind == "all off" else relative(fast, slow) < 1e-12


def test_unmasked_equals_brute_force(layer: Experts, routed: tuple[Tensor, Tensor, Tensor]) -> None:
    x, g1, g2 = routed
    assert relative(layer(x, g1, g2)[0], brute_force(layer, x[0], g1[0], g2[0])) < 1e-12


def test_each_head_by_itself_equals_brute_force_and_heads_add_up(
    layer: Experts, routed: tuple[Tensor, Tensor, Tensor], way: str
) -> None:
    x, g1, g2 = routed
    layer.keep = masks()["random 0.25"]
    total = layer(x, g1, g2)
    parts = []
    for head in range(g1.shape[2]):
        alone = torch.zeros_like(g1)
        alone[:, :, head] = g1[:, :, head]
        parts.append(layer(x, alone, g2))
        assert relative(parts[-1][0], brute_force(layer, x[0], alone[0], g2[0], layer.keep)) < 1e-12
    assert relative(sum(parts), total) < 1e-12  # type: ignore[arg-type]


def test_weights_that_were_edited_still_give_the_sum(layer: Experts, routed: tuple[Tensor, Tensor, Tensor]) -> None:
    """Scaled, negative, or zeroed key weights (what an intervention leaves) follow the definition, not a shortcut."""
    x, g1, g2 = routed
    g1, g2 = g1 * torch.randn(1, 5, 3, 1), g2.clone()
    g2[..., 3] = 0
    g2[:, 0] = 0
    for keep in (None, masks()["random 0.25"], masks()["rows"]):
        layer.keep = keep
        assert relative(layer(x, g1, g2)[0], brute_force(layer, x[0], g1[0], g2[0], keep)) < 1e-12


def test_experts_read_one_by_one_add_up_to_the_layer(layer: Experts, routed: tuple[Tensor, Tensor, Tensor]) -> None:
    x, g1, g2 = routed
    layer.keep = keep = masks()["random 0.25"]
    i, j = keep.nonzero().T
    weights = mixing.pair_weights(g1, g2, i, j)  # [1, token, pair]
    assert relative((weights[..., None] * layer.expert(x, i, j)).sum(-2), layer(x, g1, g2)) < 1e-12


def test_gradients_go_through_a_mask(layer: Experts, way: str) -> None:
    """Every weight's gradient through the fast path = the gradient through the literal sum."""
    x, g1, g2 = torch.randn(1, 5, 10).double(), *(sparse_rows(1, 5, 3, N, survivors=2).double() for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, g1, g2)]
    layer.keep = masks()["random 0.25"]
    mine = torch.autograd.grad(layer(x, g1, g2).square().sum(), [*inputs, *layer.parameters()])
    slow = brute_force(layer, x[0], g1[0], g2[0], layer.keep)
    theirs = torch.autograd.grad(slow.square().sum(), [*inputs, *layer.parameters()])
    alive = [None, g1 != 0, g2 != 0, *[None] * len([*layer.parameters()])]
    for a, b, where in zip(mine, theirs, alive, strict=True):
        # a key that did not survive is outside the list of pairs, so its weight has no derivative there
        kept = torch.ones_like(a, dtype=torch.bool) if where is None or way == "tokens" else where
        assert relative(a[kept], b[kept]) < 1e-12


def test_structure_is_recognised() -> None:
    found = {kind: mixing.structure(keep) for kind, keep in masks().items()}
    outer = {kind for kind, kept in found.items() if kept is not None and kept.rows is not None}
    assert outer == {"rows", "cols", "rows and cols", "all off"}
    assert mixing.structure(torch.ones(3, 3, dtype=torch.bool)) is None


def test_a_mask_edited_in_place_is_noticed(layer: Experts, routed: tuple[Tensor, Tensor, Tensor]) -> None:
    x, g1, g2 = routed
    plain = layer(x, g1, g2)
    layer.keep = torch.ones(N, N, dtype=torch.bool)
    assert torch.equal(layer(x, g1, g2), plain)
    layer.keep[2] = False
    assert relative(layer(x, g1, g2)[0], brute_force(layer, x[0], g1[0], g2[0], layer.keep)) < 1e-12


def test_all_ones_is_bit_for_bit_the_fast_path(model: MonetForCausalLM, ids: Tensor) -> None:
    plain = model(ids).logits
    for moe in model.experts():
        moe.keep = torch.ones(6, 6, dtype=torch.bool)
    assert torch.equal(model(ids).logits, plain)


class Largest(TorchDispatchMode):
    """The most numbers in any one tensor that an operation returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return out


@pytest.mark.parametrize("survivors", [2, 64])
def test_no_tensor_grows_with_keys_squared_times_tokens(
    decompose: str, survivors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n^2 x tokens would be 4.2 million numbers here; nothing beyond one chunk or one tensor of neurons is made."""
    n, tokens, m, chunk = 64, 1024, 2, 2**15
    monkeypatch.setattr(mixing, "CHUNK", {"cpu": chunk})
    config = MonetConfig(
        hidden_size=8,
        num_attention_heads=1,
        moe_experts=n,
        moe_dim=m,
        moe_heads=2,
        moe_topk=2,
        moe_decompose=decompose,
        num_hidden_layers=1,
    )
    layer = make_experts(config)
    layer.keep = torch.rand(n, n) > 0.25
    g1, g2 = (sparse_rows(1, tokens, 2, n, survivors=survivors).float() for _ in range(2))
    x = torch.randn(1, tokens, 8, requires_grad=True)
    saved = {}  # numbers that wait for the backward pass, by storage

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x, g1, g2)
    assert sum(saved.values()) < tokens * n * n / 4
    with Largest() as seen_back:
        y.sum().backward()
    assert max(seen.most, seen_back.most) <= max(tokens * n * max(m, 2), 2 * chunk) < tokens * n * n / 10
