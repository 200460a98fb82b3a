"""SAE-02, Costa et al. 2025 (arXiv:2506.03093): codes by matching pursuit find hierarchical features.

Planted: 8 parents and 5 children each, in 12 dimensions; a child fires only with its parent, and is orthogonal to it
but to nobody else. A linear encoder that looks for both at once is misled by all that is not orthogonal; pursuit takes
the parent away before it looks for the child.
"""

from __future__ import annotations

import torch

from interp import sae
from interp.sae import pursuit


def hierarchy(
    rows: int, seed: int, parents: int = 8, children: int = 5, d: int = 12
) -> tuple[torch.Tensor, torch.Tensor]:
    """(activations [row, d], atoms [parent + child, d]); each token has one parent and one of its children."""
    g = torch.Generator().manual_seed(seed)
    top = torch.nn.functional.normalize(torch.randn(parents, d, generator=g), dim=1)
    own = torch.randn(parents, children, d, generator=g)
    own = own - (own * top[:, None]).sum(-1, keepdim=True) * top[:, None]  # a child adds what its parent lacks
    low = torch.nn.functional.normalize(own, dim=-1)
    p, c = torch.randint(parents, (rows,), generator=g), torch.randint(children, (rows,), generator=g)
    amount = 1 + torch.rand(rows, 2, generator=g)
    x = amount[:, :1] * 2 * top[p] + amount[:, 1:] * low[p, c] * 0.8
    return x + 0.01 * torch.randn(rows, d, generator=g), torch.cat([top, low.flatten(0, 1)])


def recovered(s: sae.SAE, atoms: torch.Tensor) -> float:
    """Share of planted atoms that some decoder row meets with a cosine above 0.9."""
    rows = torch.nn.functional.normalize(s.decoder, dim=1)
    return float(((rows @ atoms.T).amax(0) > 0.9).float().mean())


def test_more_atoms_than_a_linear_encoder_at_the_same_l0() -> None:
    options = {"d_sae": 58, "tokens": 50_000, "batch_size": 256, "lr": 5e-3, "progress": False}
    shares = []
    for seed in range(3):
        x, atoms = hierarchy(4096, seed)
        pursued = sae.train(x, arch="mp", k=2, seed=seed, **options)
        vanilla = sae.train(x, arch="topk", k=2, seed=seed, dead_after=5000, **options)
        l0 = [float((s.encode(x) > 0).float().sum(1).mean()) for s in (pursued, vanilla)]
        shares.append((recovered(pursued, atoms), recovered(vanilla, atoms)))
        print(f"seed {seed}: atoms found {shares[-1][0]:.2f} by pursuit, {shares[-1][1]:.2f} by topk; L0 {l0}")
        assert abs(l0[0] - l0[1]) < 0.3
    assert all(a > b for a, b in shares)


def test_the_residual_never_rises_and_l0_changes_at_inference() -> None:
    x, _ = hierarchy(400, 0)
    s = sae.train(x, arch="mp", d_sae=40, k=3, tokens=4000, batch_size=200, progress=False)
    centred, norms = x - s.b_dec, []
    for steps in range(1, 9):
        support, values, left = pursuit.matching(centred, s.decoder, steps, s.tolerance)
        norms.append(left.norm(dim=1))
        rebuilt = support.scatter(values) @ s.decoder
        assert torch.allclose(centred - rebuilt, left, atol=1e-5)
        assert int((support.scatter(values) > 0).sum(1).max()) <= steps
    steps_down = torch.stack(norms).diff(dim=0)
    assert float(steps_down.max()) <= 1e-6
    assert float(norms[-1].mean()) < 0.7 * float(norms[0].mean())


def test_the_gram_matrix_changes_nothing() -> None:
    """The choice by updated correlations is the choice by correlations computed anew."""
    g = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(64, 16, generator=g), dim=1)
    x = torch.randn(100, 16, generator=g)
    quick = pursuit.matching(x, atoms, 6)
    limit = pursuit._GRAM_LATENTS
    try:
        pursuit._GRAM_LATENTS = 0
        plain = pursuit.matching(x, atoms, 6)
    finally:
        pursuit._GRAM_LATENTS = limit
    assert torch.allclose(quick[0].scatter(quick[1]), plain[0].scatter(plain[1]), atol=1e-5)


def test_gradient_pursuit_is_no_worse_than_the_encoder() -> None:
    x, _ = hierarchy(500, 0)
    s = sae.train(x, arch="topk", d_sae=40, k=3, tokens=5000, batch_size=250, progress=False)
    z = s.pursue(x, 3)
    assert bool((z >= 0).all())
    assert int((z > 0).sum(1).max()) <= 3
    by_pursuit, by_encoder = (x - s.decode(z)).square().sum(), (x - s(x)).square().sum()
    assert float(by_pursuit) < float(by_encoder)
