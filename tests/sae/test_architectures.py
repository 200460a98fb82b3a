"""Losses and gradients of every architecture against dense formulas written out, and against SAELens's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.sae import kernels, select
from interp.sae.architectures import FORWARD, State
from interp.sae.settings import DEFAULTS, Settings
from tests.sae.small import B, D, K, M, settings, setup


# -- the literal versions: dense codes, dense products, autograd ---------------------------------------------------
def literal(w: dict[str, Tensor], x: Tensor, y: Tensor, state: State, s: Settings) -> Tensor:
    """The loss of each paper, as one would write it down."""
    xc = x - w["b_dec"] if s.shape == "autoencoder" else x
    norms = w["decoder"].norm(dim=1)
    skip = x @ w["skip"].T if "skip" in w else 0.0
    total = (y - y.mean(0)).square().sum(1).mean()

    def out(z: Tensor, d: Tensor = w["decoder"], b: Tensor = w["b_dec"]) -> Tensor:
        return z @ d + b + skip

    if s.arch == "mp":
        r, z = xc, torch.zeros(B, M, dtype=x.dtype)
        for _ in range(int(s.k or 0)):
            j = (r @ w["decoder"].T).argmax(1)
            amount = (r * w["decoder"][j]).sum(1).relu()
            z = z + torch.nn.functional.one_hot(j, M) * amount[:, None]
            r = r - amount[:, None] * w["decoder"][j]
        return (y - out(z)).square().sum(1).mean() / total
    p = xc @ w["encoder"].T + w["b_enc"]
    if s.arch in ("topk", "batchtopk", "matryoshka"):
        q = p * norms if s.decoder_norm == "free" else p
        if s.arch == "topk":
            least = q.topk(int(s.k or 0), 1).values[:, -1:]
        else:
            least = q.relu().flatten().topk(int((s.k or 0) * B)).values[-1]
        z = q.relu() * (q >= least)
        amounts = z / norms if s.decoder_norm == "free" else z
        widths = s.widths if s.arch == "matryoshka" else (M,)
        errors = [(y - out(amounts * (torch.arange(M) < n))).square().sum(1).mean() for n in widths]
        loss = sum(errors) / len(errors) / total
        e = (y - out(amounts)).detach()
        dead = state.silent >= s.dead_after
        aux = (q - 1e9 * ~dead).topk(min(s.k_aux or 0, int(dead.sum())), 1)
        z_aux = torch.zeros_like(q).scatter(1, aux.indices, aux.values)
        z_aux = z_aux / norms if s.decoder_norm == "free" else z_aux
        variance = (e - e.mean(0)).square().sum(1).mean()
        return loss + s.aux * (e - z_aux @ w["decoder"]).square().sum(1).mean() / variance
    blocks = torch.stack([d.norm(dim=1) for d in w["decoder"].split(s.blocks, 1)]).sum(0)
    if s.arch == "gated":
        gate = p.relu()
        z = (p > 0) * ((p - w["b_enc"]) * w["r_mag"].exp() + w["b_mag"]).relu()
        helper = gate @ w["decoder"].detach() + w["b_dec"].detach()
        return ((y - out(z)).square().sum(1) + (y - helper).square().sum(1) + s.sparsity * gate @ blocks).mean()
    if s.arch == "standard":
        z = p.relu()
        return ((y - out(z)).square().sum(1) + s.sparsity * (z * blocks).sum(1)).mean()
    assert s.arch == "panneal"
    z = p.relu()
    penalty = state.factor * z[z > 0].pow(state.p).sum() / B
    return (y - out(z)).square().sum(1).mean() + s.sparsity * penalty


CASES = {
    **{arch: {"arch": arch} for arch in DEFAULTS if arch != "jumprelu"},
    "topk, free norms": {"arch": "topk", "decoder_norm": "free", "init_norm": 0.5},
    "batchtopk, free norms": {"arch": "batchtopk", "decoder_norm": "free", "init_norm": 0.5},
    "matryoshka, free norms": {"arch": "matryoshka", "decoder_norm": "free", "init_norm": 0.5},
    "topk transcoder": {"arch": "topk", "shape": "transcoder", "d_out": 7},
    "skip transcoder": {"arch": "standard", "shape": "transcoder", "d_out": 7, "skip": True},
    "crosscoder": {"arch": "standard", "shape": "crosscoder", "blocks": (5, 7)},
    "batchtopk crosscoder": {"arch": "batchtopk", "shape": "crosscoder", "blocks": (5, 7)},
}


WAYS = {"full": (0.0, 0.0), "dense": (0.0, 1.0), "sparse": (1.0, 1.0)}  # shares above which entries are not sparse


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_dense_ones(case: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DENSE_ABOVE", WAYS[way][0])
    monkeypatch.setattr(select, "BUSY", WAYS[way][1])
    s = settings(**CASES[case])
    w, x, y, state = setup(s)
    step = FORWARD[s.arch](w, x, y, state, s)
    names = list(w)
    found = torch.autograd.grad(step.loss, list(w.values()), allow_unused=True)
    expected_loss = literal(w, x, y, state, s)
    expected = torch.autograd.grad(expected_loss, list(w.values()), allow_unused=True)
    assert float(step.loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-8)
    for name, a, b in zip(names, found, expected, strict=True):
        assert a is not None, name
        assert b is not None, name
        assert float(b.abs().max()) > 0, name
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11), (name, float((a - b).abs().max()))


@pytest.mark.parametrize("target", [None, 3.0])
@pytest.mark.parametrize("way", WAYS)
def test_jumprelu_has_the_papers_pseudo_gradients(
    target: float | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "DENSE_ABOVE", WAYS[way][0])
    monkeypatch.setattr(select, "BUSY", WAYS[way][1])
    s = settings("jumprelu", k=target, bandwidth=0.8, threshold=0.5, sparsity=1.7)
    w, x, y, state = setup(s)
    step = FORWARD["jumprelu"](w, x, y, state, s)
    found = dict(zip(w, torch.autograd.grad(step.loss, list(w.values())), strict=True))
    with torch.no_grad():  # eqs. 11 and 12 by hand
        e, t, p = s.bandwidth or 0, w["threshold"], (x - w["b_dec"]) @ w["encoder"].T + w["b_enc"]
        near, on = ((p - t).abs() < e / 2).double(), (p > t).double()
        z = p * on
        error = z @ w["decoder"] + w["b_dec"] - y
        l0 = on.sum() / B
        per_latent = s.sparsity if target is None else 2 * s.sparsity * (l0 / target - 1) / target
        d_z = 2 * error @ w["decoder"].T / B
        expected = -(d_z * near * t / e).sum(0) - per_latent * near.sum(0) / e / B
        d_p = d_z * on
        loss = error.square().sum(1).mean() + s.sparsity * (l0 if target is None else (l0 / target - 1) ** 2)
        d_b = 2 * error.mean(0) - d_p.sum(0) @ w["encoder"]
    assert float(near.sum()) > 20
    assert torch.allclose(found["threshold"], expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found["encoder"], d_p.T @ (x - w["b_dec"].detach()), rtol=1e-9, atol=1e-12)
    assert torch.allclose(found["b_enc"], d_p.sum(0), atol=1e-12)
    assert torch.allclose(found["decoder"], 2 * z.T @ error / B, atol=1e-12)
    assert torch.allclose(found["b_dec"], d_b, atol=1e-12)
    assert float(step.loss.detach()) == pytest.approx(float(loss.detach()))
    assert torch.equal(step.fired, on.sum(0).long())


def test_revived_latents_get_gradients_that_others_do_not() -> None:
    """AuxK alone must teach the dead: encoder, decoder and bias (a published implementation gives the encoder none)."""
    s = settings("topk", aux=1.0)
    w, x, y, state = setup(s)
    with torch.no_grad():
        w["b_enc"][:9] -= 100  # never in the top k
        w["b_enc"].requires_grad_(True)
    step = FORWARD["topk"](w, x, y, state, s)
    grads = dict(zip(w, torch.autograd.grad(step.loss, list(w.values())), strict=True))
    chosen, _ = select.top_k(x - w["b_dec"].detach(), w["encoder"].detach(), w["b_enc"].detach(), K)
    assert not bool((chosen.ids < 9).any())
    for name in ("encoder", "decoder", "b_enc"):
        assert bool(
            (grads[name][:9].abs().flatten(1).sum(1) if grads[name].dim() > 1 else grads[name][:9].abs()).gt(0).all()
        )


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "standard", "matryoshka", "mp"])
def test_gradients_are_sae_lens_gradients(arch: str) -> None:
    """One loss with SAELens's own training classes: the same gradients, up to the units of the loss."""
    pytest.importorskip("sae_lens")
    import sae_lens
    from sae_lens.saes import matching_pursuit_sae as mp
    from sae_lens.saes.sae import TrainStepInput

    widths = [10, 20, M]
    s = settings(arch, decoder_norm="unit" if arch == "mp" else "free", aux=0.0, sparsity_warmup=0.0,
                 widths=tuple(widths) if arch == "matryoshka" else (), sparsity=3.0)  # fmt: skip
    common = {"d_in": D, "d_sae": M, "dtype": "float64"}
    theirs: Any = {
        "topk": lambda: sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**common, k=K)),
        "batchtopk": lambda: sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**common, k=K)),
        "standard": lambda: sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(**common)),
        "matryoshka": lambda: sae_lens.MatryoshkaBatchTopKTrainingSAE(
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**common, k=K, matryoshka_widths=widths)
        ),
        "mp": lambda: mp.MatchingPursuitTrainingSAE(
            mp.MatchingPursuitTrainingSAEConfig(
                **common, max_iterations=K, decoder_init_norm=1.0, stop_on_duplicate_support=False
            )
        ),
    }[arch]()
    w, x, y, state = setup(s)
    names = {"encoder": "W_enc", "decoder": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    with torch.no_grad():
        for ours, name in names.items():
            if ours in w:
                getattr(theirs, name).copy_(w[ours].T if ours == "encoder" else w[ours])
    given = TrainStepInput(
        sae_in=x, dead_neuron_mask=None, coefficients={"l1": 3.0}, n_training_steps=0, is_logging_step=False
    )
    loss = theirs.training_forward_pass(given).loss
    expected = torch.autograd.grad(loss, [getattr(theirs, names[n]) for n in w])
    step = FORWARD[arch](w, x, y, state, s)
    unit = {"standard": 1.0}.get(arch, float((y - y.mean(0)).square().sum(1).mean()))
    unit *= len(s.widths) if arch == "matryoshka" else 1  # they add the prefixes up, the paper averages them
    found = torch.autograd.grad(step.loss * unit, list(w.values()))
    assert float((step.loss * unit).detach()) == pytest.approx(float(loss.detach()))
    for name, a, b in zip(w, found, expected, strict=True):
        assert torch.allclose(a, b.T if name == "encoder" else b, rtol=1e-6, atol=1e-9), name


def test_the_penalty_of_panneal_is_continuous_when_p_changes() -> None:
    s = settings("panneal", p_start_at=0.5, sparsity=2.0)
    w, x, y, state = setup(s)
    state.done = 0.5
    before = FORWARD["panneal"](w, x, y, state, s)
    state.done = 0.8
    after = FORWARD["panneal"](w, x, y, state, s)
    assert state.p < 1
    assert before.parts["sparsity"] == pytest.approx(after.parts["sparsity"])
