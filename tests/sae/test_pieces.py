"""A batch in pieces, and products in other libraries and precisions, against the batch at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from interp.sae import architectures, dense, kernels, pieces, select
from interp.sae.pieces import learn
from interp.sae.settings import Settings
from tests.sae.small import B, M, settings, setup

CASES: dict[str, dict[str, Any]] = {
    "standard": {"arch": "standard", "sparsity_warmup": 0.0},
    "gated": {"arch": "gated"},
    "jumprelu": {"arch": "jumprelu", "bandwidth": 0.8, "threshold": 0.5},
    "panneal": {"arch": "panneal"},
    "skip transcoder": {"arch": "standard", "shape": "transcoder", "d_out": 7, "skip": True},
    "crosscoder": {"arch": "standard", "shape": "crosscoder", "blocks": (5, 7)},
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass, where everything fires and pieces have 25 tokens."""
    monkeypatch.setattr(select, "BUSY", 0.0)
    monkeypatch.setattr(pieces, "ENTRIES", 25 * M)
    monkeypatch.setattr(pieces, "LEAST", 1)
    sizes: list[int] = []

    def told(forward: Any) -> Any:
        return lambda w, x, *rest: sizes.append(len(x)) or forward(w, x, *rest)

    monkeypatch.setattr(pieces, "FORWARD", {name: told(forward) for name, forward in pieces.FORWARD.items()})
    return sizes


def learnt(s: Settings, **changes: Any) -> tuple[architectures.Step, dict[str, Tensor]]:
    w, x, y, state = setup(s)
    for name, value in changes.items():
        setattr(state, name, value)
    step = learn(w, x, y, state, s)
    return step, {name: weight.grad for name, weight in w.items() if weight.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_pieces_give_what_the_batch_gives(case: str, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    s = settings(**CASES[case])
    changes = {"p": 0.6, "done": 0.625, "factor": 1.3} if case == "panneal" else {}
    found, grads = learnt(s, **changes)
    assert seen == [25, 25, 14]
    monkeypatch.setattr(pieces, "ENTRIES", B * M)
    expected, whole = learnt(s, **changes)
    assert seen[3:] == [B]
    assert grads.keys() == whole.keys()
    for name, grad in whole.items():
        assert torch.allclose(grads[name], grad, rtol=1e-10, atol=1e-13), name
    assert float(found.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-12)
    assert found.parts == pytest.approx(expected.parts, rel=1e-12)
    assert torch.equal(found.fired, expected.fired)
    assert int(found.fired.sum()) > 100
    assert torch.allclose(found.output, expected.output)


@pytest.mark.parametrize(
    ("case", "changes"), [({"arch": "jumprelu", "k": 3.0}, {}), ({"arch": "panneal"}, {"done": 0.7})]
)
def test_what_looks_at_the_whole_batch_is_given_it(
    case: dict[str, Any], changes: dict[str, Any], seen: list[int]
) -> None:
    """A square of the batch's mean L0; and the step at which p changes, where the batch sets the penalty's factor."""
    learnt(settings(**case), **changes)
    assert seen == [B]


def test_every_batch_is_looked_at_anew(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "BUSY", 0.3)
    s = settings("standard")
    w, x, y, state = setup(s)
    learn(w, x, y, state, s)
    assert len(seen) == 3
    with torch.no_grad():
        w["b_enc"] -= 0.8
    step = learn(w, x, y, state, s)
    assert seen[3:] == [B]
    assert 0 < int(step.fired.sum()) < 0.3 * B * M


@pytest.mark.parametrize("busy", [0.0, 1.0], ids=["all products", "the choice alone"])
@pytest.mark.parametrize("case", ["standard", "gated", "jumprelu"])
def test_bfloat16_rounds_and_does_no_more(case: str, busy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "BUSY", busy)
    results = []
    for encode in ("float32", "bfloat16"):
        s = settings(**CASES[case], encode=encode)
        w, x, y, state = setup(s)
        w = {name: weight.detach().float().requires_grad_(True) for name, weight in w.items()}
        learn(w, x.float(), y.float(), state, s)
        results.append({name: weight.grad for name, weight in w.items()})
    for name, exact in results[0].items():
        rounded = results[1][name]
        assert exact is not None
        assert rounded is not None
        assert rounded.dtype == torch.float32
        difference = float((rounded - exact).norm() / exact.norm())
        assert difference < (0.15 if name == "threshold" else 0.03), (name, difference)
        if name == "decoder":
            assert (difference > 1e-3) == (busy == 0), difference


def test_dense_products_ask_numpys_library(monkeypatch: pytest.MonkeyPatch) -> None:
    blas, asked = ThreadpoolController().select(internal_api="openblas"), []
    monkeypatch.setattr(dense, "_openblas", lambda: asked.append(1) or blas)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.manual_seed(0)
    given = [torch.randn(30, 9), torch.randn(9), torch.randn(20, 9), torch.randn(20), torch.randn(20, 7)]
    x, centre, encoder, bias, decoder = (t.requires_grad_(i > 0) for i, t in enumerate(given))
    full = kernels.Full(30, 20)
    p = kernels.pre_activations(x - centre.detach(), centre, encoder, bias, full)
    found = torch.autograd.grad(
        kernels.decode(p.relu(), decoder, full).square().sum(), (centre, encoder, bias, decoder)
    )
    assert len(asked) == 5
    out = ((x - centre) @ encoder.T + bias).relu() @ decoder
    for a, b in zip(found, torch.autograd.grad(out.square().sum(), (centre, encoder, bias, decoder)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
