"""The factored view of n^2 experts, against every expert of every token written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interp import factored
from interp.factored import FactoredExperts

BATCH, POS, HEADS, N = 2, 7, 3, 5
MASK = torch.ones(BATCH, POS, dtype=torch.bool)
MASK[0, 5:] = False


def keys(seed: int, survive: float = 0.4) -> Tensor:
    """Random weights [batch, pos, head, key], most of them exactly zero, some heads without any."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.rand(BATCH, POS, HEADS, N, generator=generator, dtype=torch.float64)
    return g * (torch.rand(g.shape, generator=generator) < survive)


def literal(g1: Tensor, g2: Tensor, keep: Tensor | None) -> Tensor:
    """W [batch, pos, n^2], entry by entry."""
    w = torch.zeros(BATCH, POS, N * N, dtype=g1.dtype)
    for b in range(BATCH):
        for t in range(POS):
            for i in range(N):
                for j in range(N):
                    if keep is None or keep[i, j]:
                        w[b, t, i * N + j] = sum(g1[b, t, h, i] * g2[b, t, h, j] for h in range(HEADS))
    return w


@pytest.fixture(params=["all on", "some off"])
def keep(request: pytest.FixtureRequest) -> Tensor | None:
    if request.param == "all on":
        return None
    return torch.rand(N, N, generator=torch.Generator().manual_seed(9)) < 0.6


@pytest.fixture(params=[2**20, 1])
def e(keep: Tensor | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FactoredExperts:
    """In one go, and token by token."""
    monkeypatch.setattr(factored, "PAIRS", request.param)
    return FactoredExperts(3, keys(1), keys(2), MASK, keep)


@pytest.fixture
def w(e: FactoredExperts) -> Tensor:
    return literal(e.g1, e.g2, e.keep)


def test_weights_of_chosen_experts(e, w):
    assert (e.n, e.n_experts) == (N, N * N)
    torch.testing.assert_close(e.weights(range(N * N)), w, rtol=1e-12, atol=0)
    torch.testing.assert_close(e.weights([7, 7, 0]), w[..., [7, 7, 0]], rtol=1e-12, atol=0)
    torch.testing.assert_close(e.weights(7), w[..., 7], rtol=1e-12, atol=0)
    torch.testing.assert_close(e.weights(torch.tensor([[1, 2], [3, 4]])), w[..., [[1, 2], [3, 4]]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 4, N * N])
def test_the_heaviest_are_those_of_a_full_sort(e, w, k):
    ids, weights = e.top(k)
    expected = w.sort(-1, descending=True).values[..., :k]
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    has = ids >= 0
    assert torch.equal(has, expected > 0)  # -1 is where no weight is left
    torch.testing.assert_close(w.gather(-1, ids.clamp(min=0))[has], weights[has], rtol=1e-12, atol=0)
    for row in ids.flatten(0, 1):
        real = row[row >= 0].tolist()
        assert len(set(real)) == len(real)


def test_of_equals_the_smaller_id_comes_first():
    half = torch.full((1, 1, 1, 4), 0.5)
    e = FactoredExperts(0, half, half, torch.ones(1, 1, dtype=torch.bool))
    assert e.top(5).ids.flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_counts_per_token_and_per_expert(e, w, threshold):
    assert torch.equal(e.count(threshold), (w > threshold).sum(-1))
    assert torch.equal(e.load(threshold), (w > threshold)[MASK].sum(0))


def test_the_frame_holds_the_heaviest_of_real_tokens(e, w):
    frame = e.frame(3)
    assert list(frame) == ["batch", "position", "rank", "layer", "expert", "i", "j", "weight"]
    assert (frame.expert == frame.i * N + frame.j).all()
    assert len(frame) == int(((w.sort(-1, descending=True).values[..., :3] > 0) & MASK[..., None]).sum())
    for row in frame.itertuples():
        assert abs(row.weight - float(w[row.batch, row.position, row.expert])) < 1e-6
    assert frame[frame.batch == 0].position.max() == 4


def test_positions_count_real_tokens_whatever_the_padding():
    left = FactoredExperts(3, keys(1), keys(2), MASK.flip(1))
    assert set(left.frame(1).query("batch == 0").position) <= set(range(5))


def test_tokens_without_any_weight_have_no_experts():
    none = torch.zeros(1, 2, 2, 4)
    e = FactoredExperts(0, none, none, torch.ones(1, 2, dtype=torch.bool))
    assert e.top(2).ids.eq(-1).all()
    assert e.top(2).weights.eq(0).all()
    assert e.count().eq(0).all()
    assert len(e.frame(2)) == 0


def test_gradients_pass_through_the_weights_of_the_heaviest():
    g1 = keys(1).requires_grad_()
    FactoredExperts(0, g1, keys(2), MASK).top(2).weights.sum().backward()
    assert g1.grad is not None
    assert bool(g1.grad.abs().sum() > 0)


def test_a_large_layer_is_never_written_out():
    """n = 512: one token's experts of a head are a quarter of a million; only the pairs of surviving keys are made."""
    n, heads = 512, 8
    g = torch.zeros(2, 64, heads, n)
    generator = torch.Generator().manual_seed(0)
    g.scatter_(-1, torch.randint(n, (2, 64, heads, 16), generator=generator), 1 / 16)
    e = FactoredExperts(0, g, g.flip(-1), torch.ones(2, 64, dtype=torch.bool))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        top = e.top(4)
        counts = e.count()
    assert largest <= factored.PAIRS < 2 * 64 * n * n
    assert int(counts.max()) <= heads * 16 * 16
    torch.testing.assert_close(e.weights(top.ids[0, 0])[0, 0], top.weights[0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.weights([0, 25]), r"expert 25: layer 3 has experts 0\.\.24 \(i \* 5 \+ j\)"),
        (lambda e: e.weights(-1), r"expert -1: layer 3 has experts 0\.\.24"),
        (lambda e: e.weights([0.5]), r"expert of torch.float32"),
        (lambda e: e.top(0), r"k=0: layer 3 has 25 experts, so k is 1\.\.25"),
        (lambda e: e.top(26), r"k=26"),
        (lambda e: e.count(-0.1), r"threshold=-0.1: expected at least 0"),
        (lambda e: e.load(-1), r"threshold=-1: expected at least 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(FactoredExperts(3, keys(1), keys(2), MASK))
