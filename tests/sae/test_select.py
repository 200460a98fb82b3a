"""Which entries are chosen: against torch.topk on the whole matrix."""

from __future__ import annotations

import pytest
import torch
from threadpoolctl import ThreadpoolController

from interp.sae import dense, select
from interp.sae.kernels import Scratch, Support, bag, decode, pre_activations, sampled, transposed


@pytest.mark.parametrize(("width", "k"), [(40, 4), (512, 16), (512, 1), (513, 5), (64, 64), (0, 0), (8, 0)])
def test_largest_are_the_largest(width: int, k: int) -> None:
    p = torch.randn(33, width)
    values, places = select.largest(p, k)
    expected = p.topk(k)
    assert torch.equal(values.sort(descending=True).values, expected.values)
    assert torch.equal(p.gather(1, places), values)


def test_equal_entries_and_nan_are_chosen_as_by_torch() -> None:
    p = torch.randn(20, 30)
    p[3] = 1.0
    p[5, :7] = p[5].max()
    values, places = select.largest(p, 4)
    assert torch.equal(values.sort(descending=True).values, p.topk(4).values)
    assert torch.equal(p.gather(1, places), values)
    assert all(len(set(row)) == 4 for row in places.tolist())
    p[8, 2] = torch.nan
    assert bool(select.largest(p, 4)[0][8].isnan().any())


@pytest.mark.parametrize("library", ["torch", "NumPy"])
@pytest.mark.parametrize("n", [dense.FEW - 1, 700])
def test_pre_activations_are_the_dense_product(library: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both libraries, whichever this processor has; in several chunks, with memory that is used again."""
    blas = ThreadpoolController().select(internal_api="openblas") if library == "NumPy" else None
    asked: list[int] = []
    monkeypatch.setattr(dense, "_openblas", lambda: asked.append(n) or blas)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(dense, "CHUNK", 200)
    before = ThreadpoolController().info()
    scratch = Scratch()
    for seed in range(2):
        torch.manual_seed(seed)
        x, encoder, bias = torch.randn(n, 33), torch.randn(90, 33, requires_grad=True), torch.randn(90)
        with torch.no_grad():
            found = {start: p.clone() for start, p in dense.chunks(x, encoder, bias, scratch=scratch)}
        assert list(found) == list(range(0, n, 200))
        torch.testing.assert_close(torch.cat(list(found.values())), x @ encoder.T + bias, rtol=1e-5, atol=1e-5)
    assert bool(asked) == (n >= dense.FEW)
    assert ThreadpoolController().info() == before  # the library's own number of threads stands again


@pytest.mark.parametrize("guess", [0.0, 0.5, 1.9, 50.0], ids=["none", "low", "near", "far too high"])
def test_batch_topk_does_not_depend_on_the_guess(guess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "CHUNK", 50)  # several chunks, the last one smaller
    x, encoder, bias = torch.randn(170, 9), torch.randn(30, 9), torch.randn(30)
    p = (x @ encoder.T + bias).relu()
    support, values = select.batch_top_k(x, encoder, bias, 2.5, guess)
    least = p.flatten().topk(425).values[-1]
    assert len(values) == 425
    assert torch.allclose(support.scatter(values), p * (p >= least), atol=1e-5)
    assert bool((support.rows.diff() >= 0).all())


def test_fewer_positive_than_wanted_are_all_kept() -> None:
    x, encoder = torch.randn(20, 4), torch.randn(6, 4)
    support, values = select.batch_top_k(x, encoder, torch.full((6,), -2.0), 6)
    assert torch.allclose(support.scatter(values), (x @ encoder.T - 2).relu(), atol=1e-5)


@pytest.mark.parametrize("tokens", [50, 90], ids=["fewer tokens than latents", "more tokens than latents"])
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_kernels_are_the_dense_products(share: float, tokens: int) -> None:
    mask = torch.rand(tokens, 70) < share
    mask[3] = False  # a token and a latent without entries
    mask[:, 5] = False
    rows, ids = mask.nonzero(as_tuple=True)
    support = Support(rows, ids, tokens, 70)
    assert support.dense == (share > 0.1)
    values, table, x = torch.randn(len(ids)), torch.randn(70, 8), torch.randn(tokens, 8)
    code = support.scatter(values)
    assert torch.allclose(bag(values, ids, support.starts, table), code @ table, atol=1e-4)
    assert torch.allclose(decode(values, table, support), code @ table, atol=1e-4)
    assert torch.allclose(transposed(support, values, x), code.T @ x, atol=1e-4)
    assert torch.allclose(sampled(support, x, table), (x @ table.T)[mask], atol=1e-4)
    assert torch.equal(Support.flat(mask.flatten().nonzero().squeeze(1), tokens, 70).ids, ids)


def test_kept_memory_changes_no_number() -> None:
    """The same choices and gradients with memory that is used again, step after step, as with fresh memory."""
    scratch, mask = Scratch(), torch.rand(50, 70) < 0.02
    rows, ids = mask.nonzero(as_tuple=True)
    support = Support(rows, ids, 50, 70)
    table, bias = torch.randn(70, 8, requires_grad=True), torch.zeros(70, requires_grad=True)
    for _ in range(3):
        x = torch.randn(50, 8)
        found = []
        for memory in (None, scratch):
            p = pre_activations(x, None, table, bias, support, None, memory)
            out = decode(p.relu(), table, support, memory)
            found.append(torch.autograd.grad(out.square().sum() + p.sum(), (table, bias)))
            chosen = select.batch_top_k(x, table, bias, 2.5, 0.3, scratch=memory)
            found[-1] += (chosen[1], select.top_k(x, table, bias, 3, scratch=memory)[1])
        for fresh, kept in zip(*found, strict=True):
            torch.testing.assert_close(kept, fresh, atol=1e-4, rtol=1e-4)
    assert scratch("p", (3, 2), table).shape == (3, 2)


def test_nothing_fires() -> None:
    support, values = select.above(torch.randn(5, 3), torch.randn(4, 3), torch.full((4,), -100.0), 0.0)
    assert len(values) == 0
    table = torch.randn(4, 3, requires_grad=True)
    out = decode(values, table, support)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(5, 3))
    assert table.grad is not None
    assert not bool(table.grad.any())
