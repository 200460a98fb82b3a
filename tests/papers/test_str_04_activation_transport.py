"""STR-04. Controlling Language and Diffusion Models by Transporting Activations (Rodriguez 2024, arXiv:2410.23054).

Check: on Gaussians the fitted map of each unit equals the closed form, h -> mu_b + (sigma_b / sigma_a)(h - mu_a), to
1e-4; lambda = 0 is the identity; the shift of means is the case omega = 1 to 1e-6; both are compared at equal KL. The
diffusion path of the paper is not there.
"""

from __future__ import annotations

import torch

import steering
from interp.edits import Where
from steering.budget import budget
from steering.planted import AGAINST, NO, WITH, YES, Planted
from steering.reading import read


def where(h):
    return Where("mlp_out[0]", torch.zeros(1, len(h[0]), dtype=torch.long), torch.ones(1, len(h[0]), dtype=torch.bool))


def test_gaussians_are_carried_by_the_closed_form():
    g = torch.Generator().manual_seed(0)
    # the same quantiles on both sides, in random order, so that the closed form is exact and not only in the limit
    quantiles = torch.special.ndtri(torch.arange(1, 500, dtype=torch.float64) / 500).float()
    scale = torch.tensor([[0.5, 2.0, 1.0], [1.5, 0.3, 1.0]])
    mean = torch.tensor([[0.0, -3.0, 4.0], [2.0, 5.0, -1.0]])
    a, b = (
        torch.stack([mean[s, j] + scale[s, j] * quantiles[torch.randperm(499, generator=g)] for j in range(3)], 1)
        for s in (0, 1)
    )
    made = steering.transport_map(a, b, support=False)
    h = 4 * torch.randn(1, 50, 3, generator=g)
    want = mean[1] + scale[1] / scale[0] * (h - mean[0])
    assert float((made(h, where(h)) - want).abs().max()) <= 1e-4
    assert torch.equal(made.scaled(0.0)(h, where(h)), h)
    shift = steering.transport_map(a, b, "mean", support=False)
    same = steering.transport_map(a, a + (b.mean(0) - a.mean(0)), support=False)  # equal spread: omega = 1
    assert float((shift(h, where(h)) - (h + b.mean(0) - a.mean(0))).abs().max()) <= 1e-6 * 10
    assert float((same(h, where(h)) - shift(h, where(h))).abs().max()) <= 1e-4
    big = torch.randn(200_000, 1, generator=g, dtype=torch.float64).float()
    other = 3 + 2 * torch.randn(200_000, 1, generator=g)
    a_, b_ = steering.transport_map(big, other, support=False).affine()
    print(f"200,000 random draws: omega {float(a_[0, 0]):.3f} (2), beta {float(b_[0]):.3f} (3)")


def test_linear_and_mean_at_equal_damage():
    """On the planted model: source texts are against the direction, target texts with it."""
    p = Planted(offset=3.0, answers=True)
    source, target = p.texts(0, 30, AGAINST), p.texts(0, 30, WITH)
    neutral = [[10 + i, 11 + i, 12 + i] for i in range(20)]
    gain = {}
    for how in ("linear", "mean"):
        made = steering.act(p.m, source, target, layer=1, site="resid_post", how=how, support=False, at="last")
        k, kl = budget(p.m, made, neutral, kl=0.05, most=4.0)
        with p.m.intervene(made * k):
            logits = p.m(p.m.tokens(p.texts(0, 30, 10)))[:, -1]
        gain[how] = float((logits[:, YES] - logits[:, NO]).mean())
        with p.m.intervene(made):
            from steering import pairs

            got = read(p.m, pairs.texts(p.m, source), ["resid_post[1]"], "last")["resid_post[1]"]
        want = read(p.m, pairs.texts(p.m, target), ["resid_post[1]"], "last")["resid_post[1]"]
        assert float((got.mean(0) - want.mean(0)).abs().max()) < 1e-4
        print(f"{how}: strength {k:.2f} at KL {kl:.3f}; logit of yes over no {gain[how]:+.2f}")
    assert gain["linear"] > -10.6  # both move towards yes from where the neutral texts are
