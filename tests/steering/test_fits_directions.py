"""Directions from examples, against their formulas written out: actadd, pca, probe, iti, angular, sae_latent."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import interp
import steering
from interp.edits import Where
from steering import SteeringError, SteeringVector
from steering.fit_angular import plane
from steering.fit_directions import component, logistic
from steering.fit_heads import split
from steering.nonlinear import Clamp, Control, Rotate


@pytest.fixture(scope="module")
def m():
    return interp.load("tiny:llama")


def where(h):
    batch, pos = h.shape[:2]
    return Where("resid_post[0]", torch.arange(pos).expand(batch, pos), torch.ones(batch, pos, dtype=torch.bool))


def states(m, pairs, site, position=-1):
    """Both sides' activations at one token [pair, ...], one forward pass each."""

    def one(p, a):
        return m.capture(torch.tensor([p + a]), site)[site][0, position]

    return torch.stack([one(p, a) for p, a, _ in pairs]), torch.stack([one(p, b) for p, _, b in pairs])


# -- actadd ----------------------------------------------------------------------------------------------------
def test_actadd_adds_the_difference_to_the_first_tokens_only(m):
    positive, negative, prompt = [3, 4, 5, 6], [7, 8], torch.tensor([[9, 10, 11, 12, 13, 14], [15, 16, 17, 18, 19, 20]])
    site = "resid_pre[1]"
    a = m.capture(torch.tensor([positive]), site)[site][0]
    b = m.capture(torch.tensor([[*negative, 2, 2]]), site)[site][0]
    v = steering.actadd(m, positive, negative, layer=1, pad=2)
    plain = m.capture(prompt, site)[site]
    with m.intervene(5 * v) as handle:
        got = m.capture(prompt, site)[site]
    assert handle.trace().position.max() == 3
    torch.testing.assert_close(got[:, :4], plain[:, :4] + 5 * (a - b), atol=1e-5, rtol=1e-5)
    assert torch.equal(got[:, 4:], plain[:, 4:])
    with m.intervene(v) as handle:
        m.generate(prompt[:, :2], max_new_tokens=5)
    assert handle.trace().position.max() == 1  # a prompt of two tokens: generated ones are left alone
    with m.intervene(0 * v):
        zero = m(prompt)
    assert torch.equal(zero, m(prompt))


@pytest.mark.smollm2
def test_actadd_takes_the_papers_blank_side_and_pads_with_spaces(smollm2):
    v = steering.actadd(smollm2, " weddings and more", " ", layer=6)
    words = smollm2.tokens(" weddings and more").row(0).tolist()
    space = smollm2.tokenizer.encode(" ", add_special_tokens=False)
    assert len(space) == 1
    rows = [words, space * len(words)]
    a, b = (smollm2.capture(torch.tensor([r]), "resid_pre[6]")["resid_pre[6]"][0] for r in rows)
    torch.testing.assert_close(v.parts[0].map.tensors()["b"], a - b, atol=1e-3, rtol=1e-4)


def test_actadd_refuses_what_does_not_contrast_or_pad(m):
    with pytest.raises(SteeringError, match="both sides are equal"):
        steering.actadd(m, [3, 4], [3, 4], layer=1)
    with pytest.raises(SteeringError, match="makes no token here"):
        steering.actadd(m, [3, 4], " ", layer=1)
    with pytest.raises(SteeringError, match="no token for one space"):
        steering.actadd(m, [3, 4], [3], layer=1)
    with pytest.raises(SteeringError, match="same tokens once padded"):
        steering.actadd(m, [3, 4], [3], layer=1, pad=4)


# -- pca -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["pairs", "centred"])
def test_pca_is_scikit_learns_up_to_its_sign(m, planted, how):
    from sklearn.decomposition import PCA

    pairs = planted.pairs()
    a, b = states(m, pairs, "resid_post[1]")
    if how == "centred":
        rows = (a - b).numpy()
    else:
        centre = (a + b) / 2
        rows = torch.cat([a - centre, b - centre]).numpy()
    want = torch.tensor(PCA(1, svd_solver="full").fit(rows.astype(np.float64)).components_[0]).float()
    got = steering.pca(m, pairs, layer=1, how=how).vector
    torch.testing.assert_close(got * (got @ want).sign(), want, atol=1e-5, rtol=0)
    assert float(((a - b) @ got).sign().sum()) >= 0
    assert float(got.norm()) == pytest.approx(1)


def test_pca_finds_the_planted_direction_in_every_layer(planted):
    v = steering.pca(planted.m, planted.pairs())
    assert v.layers == [0, 1, 2]
    assert all(steering.SteeringVector.cosine(v.only(i), planted.direction) > 0.9999 for i in v.layers)


def test_centred_components_do_not_see_what_all_pairs_share():
    """repeng's pca_diff: the shared direction is taken off with the mean."""
    shared, other = torch.eye(4)[0], torch.eye(4)[1]
    positive = torch.stack([shared + x * other for x in (1.0, -1.0, 0.5, -0.5)])
    assert float(component(positive, torch.zeros(4, 4)) @ shared) == pytest.approx(1)
    assert abs(float(component(positive, torch.zeros(4, 4), "centred") @ other)) == pytest.approx(1)


def test_operators_of_repe(planted):
    v = steering.pca(planted.m, planted.pairs(), layer=1)
    h = torch.randn(2, 3, 32)
    for signed in (False, True):
        for keep in (False, True):
            map_ = steering.operator(v * 2, signed=signed, keep_norm=keep).parts[0].map
            assert isinstance(map_, Control)
            side = (h @ v.vector).sign()[..., None] if signed else 1.0
            want = h + 2 * side * v.vector
            if keep:
                want = want * h.norm(dim=-1, keepdim=True) / want.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(map_(h, where(h)), want)


# -- probe -----------------------------------------------------------------------------------------------------
def test_logistic_regression_has_no_gradient_left():
    x, w = torch.randn(60, 5), torch.randn(5)
    y = (x @ w + 0.5 * torch.randn(60) > 0).long()
    weight, bias = (t.double().requires_grad_() for t in logistic(x, y, c=0.7))
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, y, reduction="sum")
    gw, gb = torch.autograd.grad(0.7 * loss, (weight, bias))
    torch.testing.assert_close(gw[1] + weight[1].detach(), torch.zeros(5, dtype=torch.float64), atol=2e-4, rtol=0)
    assert abs(float(gb[1])) < 2e-4
    assert float(weight[0].detach().abs().max()) == 0


def test_probe_finds_the_planted_direction_with_the_length_of_the_gap(planted):
    v = steering.probe(planted.m, planted.pairs(), layer=1)
    assert v.cosine(planted.direction) > 0.99
    assert v.norm == pytest.approx(2 * v.unit().cosine(planted.direction), rel=1e-3)
    assert steering.probe(planted.m, planted.pairs(), layer=1, unit=True).norm == pytest.approx(1)


def test_a_probe_needs_both_classes():
    with pytest.raises(SteeringError, match="class 1 is empty"):
        logistic(torch.randn(4, 3), torch.zeros(4).long())


# -- iti -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("direction", ["mass_mean", "probe"])
def test_iti_is_its_formula(m, planted, direction):
    pairs = planted.pairs(20)
    v = steering.iti(m, pairs, heads=3, alpha=5, direction=direction, seed=4)
    fit, held = split(20, 0.2, 4)
    ranked = []
    for layer in range(3):
        a, b = states(m, pairs, f"z[{layer}]")
        for head in range(4):
            p, n = a[:, head], b[:, head]
            weight, bias = logistic(torch.cat([p[fit], n[fit]]), torch.tensor([1] * 16 + [0] * 16))
            w, c = weight[1], bias[1]
            accuracy = float(torch.cat([(p[held] @ w + c > 0), (n[held] @ w + c <= 0)]).float().mean())
            theta = p.mean(0) - n.mean(0) if direction == "mass_mean" else w
            theta = theta / theta.norm()
            ranked.append((accuracy, layer, head, 5 * (torch.cat([p, n]) @ theta).std(correction=0) * theta))
    chosen = sorted(ranked, key=lambda r: -r[0])[:3]
    for _, layer, head, want in chosen:
        torch.testing.assert_close(
            v.vectors[f"z[{layer}]"][head], want, atol=2e-3 if direction == "probe" else 1e-5, rtol=1e-3
        )
    assert sum(int((x != 0).any(-1).sum()) for x in v.vectors.values()) == 3
    assert [row[:2] for row in v.record["heads"]] == [[f"z[{layer}]", head] for _, layer, head, _ in chosen]


def test_iti_changes_only_its_heads(m, planted):
    v = steering.iti(m, planted.pairs(20), heads=1)
    (site, head, _), ids = v.record["heads"][0], torch.arange(3, 11)[None]
    plain = m.capture(ids, site)[site]
    with m.intervene(v):
        steered = m.capture(ids, site)[site]
    changed = (plain != steered).any(-1)[0]
    assert changed.nonzero().tolist() == [[7, head]]


def test_iti_refuses_splits_and_head_counts_that_cannot_be(m, planted):
    with pytest.raises(SteeringError, match=r"heads=13: .* has 12 heads"):
        steering.iti(m, planted.pairs(20), heads=13)
    with pytest.raises(SteeringError, match="leaves 2 to fit on and 0 to score on"):
        steering.iti(m, planted.pairs(2), heads=1)


def test_pas_takes_the_strength_that_scores_best(m, planted):
    def size(v):
        return float(next(iter(v.vectors.values())).norm())

    one = size(steering.iti(m, planted.pairs(20), heads=2, alpha=1))
    best, table = steering.pas(
        m, planted.pairs(20), lambda v: -abs(size(v) - 4 * one), heads=2, alphas=(1, 4, 9)
    )  # fmt: skip
    assert best.record["alpha"] == 4
    assert size(best) == pytest.approx(4 * one, rel=1e-4)
    assert table.alpha.tolist() == [1, 4, 9]


# -- angular ---------------------------------------------------------------------------------------------------
def test_rotation_keeps_norm_and_the_rest_and_reaches_the_angle():
    b1, b2 = torch.linalg.qr(torch.randn(8, 2)).Q.T
    h = torch.randn(2, 5, 8)
    for degrees in (0.0, 30.0, 180.0, 270.0):
        out = Rotate(b1, b2, degrees)(h, where(h))
        torch.testing.assert_close(out.norm(dim=-1), h.norm(dim=-1))
        t = torch.deg2rad(torch.tensor(degrees))
        length = (h @ torch.stack([b1, b2]).T).norm(dim=-1)
        torch.testing.assert_close(out @ b1, length * t.cos(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out @ b2, length * t.sin(), atol=1e-5, rtol=1e-5)
        p = torch.outer(b1, b1) + torch.outer(b2, b2)
        torch.testing.assert_close(out - out @ p, h - h @ p, atol=1e-5, rtol=1e-5)
    adaptive = Rotate(b1, b2, 90.0, adaptive=True)(h, where(h))
    untouched = h @ b1 <= 0
    assert torch.equal(adaptive[untouched], h[untouched])
    assert torch.equal(Rotate(b1, b2, 90.0).scaled(0)(h, where(h)), h)


def test_plane_is_the_literal_one(m, planted):
    pairs = planted.pairs()
    d = torch.stack([(a - b).mean(0) for a, b in (states(m, pairs, f"resid_post[{i}]") for i in range(3))])
    unit = d / d.norm(dim=1, keepdim=True)
    k = int((unit @ unit.T).mean(1).argmax())
    pc = torch.tensor(np.linalg.svd((unit - unit.mean(0)).numpy())[2][0])
    rest = pc - (pc @ unit[k]) * unit[k]
    made = steering.angular(m, pairs, degrees=20)
    got = made.parts[0].map
    torch.testing.assert_close(got.b1, unit[k], atol=1e-5, rtol=0)
    assert abs(float(got.b2 @ rest / rest.norm())) == pytest.approx(1, abs=1e-4)
    assert abs(float(got.b1 @ got.b2)) < 1e-5
    assert made.record["b1 from"] == f"resid_post[{k}]"


def test_a_plane_needs_two_directions(planted):
    with pytest.raises(SteeringError, match="at least two layers"):
        steering.angular(planted.m, planted.pairs(), layer=1)
    with pytest.raises(SteeringError, match="span no plane"):
        plane(torch.ones(3, 4))


# -- sae -------------------------------------------------------------------------------------------------------
def sae(d=32, n=50):
    g = torch.Generator().manual_seed(2)
    return SimpleNamespace(
        W_dec=torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1),
        W_enc=torch.randn(d, n, generator=g),
        b_enc=torch.randn(n, generator=g), b_dec=torch.randn(d, generator=g), threshold=torch.rand(n, generator=g),
    )  # fmt: skip


def test_sae_latent_adds_its_direction_and_clamps_what_it_reads(m):
    s, h = sae(), torch.randn(2, 3, 32)
    added = steering.sae_latent(m, s, 7, layer=1, amount=3.0)
    assert isinstance(added, SteeringVector)
    torch.testing.assert_close(added.vector, 3 * s.W_dec[7])
    torch.testing.assert_close(steering.sae_latent(m, s.W_dec, 7, layer=1).vector, s.W_dec[7])
    clamp = steering.sae_latent(m, s, 7, layer=1, how="clamp", amount=3.0).parts[0].map
    assert isinstance(clamp, Clamp)

    def encode(x):
        pre = (x - s.b_dec) @ s.W_enc + s.b_enc
        return torch.where(pre > s.threshold, pre, 0 * pre)

    wanted = encode(h)
    changed = wanted.clone()
    changed[..., 7] = 3.0
    error = h - wanted @ s.W_dec  # the literal way: change the code, decode, put the error back
    torch.testing.assert_close(clamp(h, where(h)), changed @ s.W_dec + error, atol=1e-4, rtol=1e-5)


def test_our_own_sae_is_taken_at_its_site_and_clamped_by_itself(m):
    from interp.sae import SAE

    g = torch.Generator().manual_seed(4)
    ours = SAE(
        torch.nn.functional.normalize(torch.randn(50, 32, generator=g), dim=1), torch.randn(32, generator=g),
        torch.randn(50, 32, generator=g), torch.randn(50, generator=g), sites=("resid_post[1]",),
        targets=("resid_post[1]",),
    )  # fmt: skip
    added = steering.sae_latent(m, ours, 7, amount=2.0)
    assert added.sites == ["resid_post[1]"]
    torch.testing.assert_close(added.vector, 2 * ours.decoder[7])
    h = torch.randn(2, 3, 32)
    clamp = steering.sae_latent(m, ours, 7, how="clamp", amount=3.0).parts[0].map
    change = (3.0 - ours.encode(h)[..., 7])[..., None] * ours.decoder[7]
    torch.testing.assert_close(clamp(h, where(h)), h + change, atol=1e-5, rtol=1e-5)
    best = steering.largest_activation(m, ours, 7, None, [[3, 4, 5], [6, 7]])
    rows = torch.cat(
        [m.capture(torch.tensor([r]), "resid_post[1]")["resid_post[1]"][0, 1:] for r in ([3, 4, 5], [6, 7])]
    )
    assert best == pytest.approx(float(ours.encode(rows)[:, 7].max().clamp_min(0)), rel=1e-4)


def test_a_sae_that_does_not_fit_is_refused(m):
    with pytest.raises(SteeringError, match="transpose it"):
        steering.sae_latent(m, sae().W_dec.T, 7, layer=1)
    with pytest.raises(SteeringError, match=r"latents 0\.\.49"):
        steering.sae_latent(m, sae(), 50, layer=1)
    with pytest.raises(SteeringError, match="names 0 sites of its own"):
        steering.sae_latent(m, sae(), 7)
    with pytest.raises(SteeringError, match="needs the encoder"):
        steering.sae_latent(m, sae().W_dec, 7, layer=1, how="clamp")
    with pytest.raises(SteeringError, match="has no W_dec"):
        steering.sae_latent(m, object(), 7, layer=1)
