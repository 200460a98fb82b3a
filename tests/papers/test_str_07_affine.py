"""STR-07. Representation Surgery: Theory and Practice of Affine Steering (Singh et al. 2024, arXiv:2402.09631).

Check, on planted Gaussians: the mapped mean (and covariance) equal the target's to 1e-3; the maps move the states
less than 1,000 random maps that meet the same constraints; a fresh linear probe tells mapped source from target, on
states that the map was not fitted on, with an AUROC of .5 +- .05.
"""

from __future__ import annotations

import pytest
import torch

import steering
from interp.edits import Where
from steering.fit_affine import matrix_power
from steering.fit_directions import logistic

D, N = 6, 4000


def sample(seed, n=N):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(2):
        mix, mean = torch.randn(D, D, generator=g), 2 * torch.randn(D, generator=g)
        out.append(torch.randn(n, D, generator=g) @ mix + mean)
    return out


def run(map_, x):
    one = torch.ones(1, len(x), dtype=torch.bool)
    return map_(x[None], Where("resid_post[0]", torch.arange(len(x))[None], one))[0]


def moments(x):
    return x.double().mean(0), torch.cov(x.double().T)


@pytest.mark.parametrize("how", ["mean", "gaussian"])
def test_mapped_moments_are_the_targets(how):
    s, t = sample(0)
    got, want = moments(run(steering.affine_map(s, t, how), s)), moments(t)
    torch.testing.assert_close(got[0], want[0], atol=1e-3, rtol=0)
    if how == "gaussian":
        torch.testing.assert_close(got[1], want[1], atol=1e-3, rtol=0)


def test_moves_less_than_a_thousand_random_maps_that_meet_the_constraints():
    s, t = sample(1)
    ridge = 1e-5 * torch.eye(D, dtype=torch.float64)
    (ms, cs), (mt, ct) = moments(s), moments(t)
    g = torch.Generator().manual_seed(2)
    moved = {
        how: float((run(steering.affine_map(s, t, how), s) - s).square().sum(1).mean()) for how in ("mean", "gaussian")
    }
    least = {"mean": [], "gaussian": []}
    for _ in range(1000):
        any_matrix = torch.eye(D, dtype=torch.float64) + 0.3 * torch.randn(D, D, generator=g, dtype=torch.float64)
        q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
        w = (
            matrix_power(ct + ridge, 0.5) @ q @ matrix_power(cs + ridge, -0.5)
        )  # every W with W S W' = T is of this form
        for how, a in (("mean", any_matrix), ("gaussian", w)):
            mapped = (s.double() - ms) @ a.T + mt
            least[how].append(float((mapped - s).square().sum(1).mean()))
    for how, rivals in least.items():
        print(f"{how}: moved {moved[how]:.3f}, the least of 1,000 random ones {min(rivals):.3f}")
        assert moved[how] <= min(rivals)
    assert moved["mean"] <= moved["gaussian"]  # the more is asked for, the further


def test_a_fresh_probe_cannot_tell_mapped_source_from_target():
    from sklearn.metrics import roc_auc_score

    s, t = sample(3, 3 * N)
    for how in ("mean", "gaussian"):
        mapped = run(steering.affine_map(s[:N], t[:N], how), s[N:])
        half = N
        x = torch.cat([mapped[:half], t[N : N + half]])
        weight, bias = logistic(x, torch.tensor([1] * half + [0] * half))
        held = torch.cat([mapped[half:], t[N + half :]])
        score = held @ (weight[1] - weight[0]) + bias[1] - bias[0]
        truth = [1] * (len(mapped) - half) + [0] * (len(t) - N - half)
        auroc = roc_auc_score(truth, score.numpy())
        print(f"{how}: AUROC of a fresh probe {auroc:.3f}")
        assert abs(auroc - 0.5) <= 0.05
