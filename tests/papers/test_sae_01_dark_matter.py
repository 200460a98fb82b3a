"""SAE-01, Engels et al. 2024 (arXiv:2410.14670): the linear and the nonlinear part of an SAE's error.

A planted error A x + b + noise gives back its known share; each part is put back into a model and the loss is printed;
inference-time pursuit lowers the error, or says that it did not.
"""

from __future__ import annotations

import pytest
import torch

import interp
from interp import sae
from interp.sae import dark
from tests.sae.conftest import planted


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_planted_error_gives_its_known_share(share: float) -> None:
    g = torch.Generator().manual_seed(0)
    n, d = 12_000, 16
    x = torch.randn(n, d, generator=g) + 5
    matrix = torch.randn(d, d, generator=g) / d**0.5
    linear = x @ matrix.T + 3  # with an offset, which a regression without intercept would not find
    linear_variance = (linear - linear.mean(0)).square().mean(0)
    noise = torch.randn(n, d, generator=g) * (linear_variance * (1 - share) / share).sqrt()
    table = dark.dark_matter(x, x - (linear + noise))
    found = dict(zip(table.metric, table.value, strict=True))
    assert found["r2_error"] == pytest.approx(share, abs=0.02)
    error = linear + noise
    left = noise.square().sum() / (x - x.mean(0)).square().sum()
    assert found["fvu_nonlinear"] == pytest.approx(float(left), rel=0.05)
    assert found["fvu"] == pytest.approx(float(error.square().sum() / (x - x.mean(0)).square().sum()), rel=0.05)


def test_the_size_of_the_error_is_predicted_where_it_is_linear() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8000, 6, generator=g)
    size = (x @ torch.randn(6, generator=g) + 9).clamp_min(0.1)  # |e|^2 is linear in x
    direction = torch.nn.functional.normalize(torch.randn(8000, 6, generator=g), dim=1)
    table = dark.dark_matter(x, x - direction * size.sqrt()[:, None])
    found = dict(zip(table.metric, table.value, strict=True))
    assert found["r2_error_norm"] > 0.97
    assert abs(found["r2_error"]) < 0.02


def test_what_has_no_linear_part_scores_nothing_held_out() -> None:
    """Fitted and scored on the same few tokens, noise looks explained; held out it does not."""
    g = torch.Generator().manual_seed(0)
    x, e = torch.randn(120, 40, generator=g), torch.randn(120, 40, generator=g)
    assert dark.r2(e, dark.Linear.fit(x, e)(x)) > 0.25
    table = dark.dark_matter(x, x - e)
    assert dict(zip(table.metric, table.value, strict=True))["r2_error"] < 0.05


def test_pursuit_and_the_loss_of_each_part() -> None:
    data = planted(3000, d=16, features=40, active=3)
    s = sae.train(data.x, arch="topk", d_sae=40, k=3, tokens=30_000, batch_size=256, lr=1e-2, progress=False)
    table = dark.dark_matter(data.x, s)
    wide = table.pivot_table(index="method", columns="metric", values="value")
    print(wide.round(4).to_string())
    better = wide.fvu["pursuit"] < wide.fvu["encoder"]
    print("pursuit lowers the error" if better else "pursuit did not lower the error")
    assert better
    assert (wide.fvu_nonlinear <= wide.fvu + 1e-6).all()
    m = interp.load("tiny:llama")
    ids = torch.randint(0, 100, (40, 12), generator=torch.Generator().manual_seed(0))
    x = m.capture(ids, "resid_post[1]")["resid_post[1]"].flatten(0, 1)
    small = sae.train(x, "resid_post[1]", arch="topk", d_sae=16, k=2, tokens=3000, batch_size=40, progress=False)
    loss = dark.loss_of_parts(small, m, ids[:30].tolist(), ids[30:].tolist())
    print(loss.round(4).to_string())
    by = loss.set_index("method").change
    assert list(by.index) == ["clean", "reconstruction", "+ linear", "+ nonlinear"]
    assert by["clean"] == 0
    assert by["reconstruction"] != 0


def test_the_parts_add_up_in_the_model() -> None:
    m = interp.load("tiny:llama")
    ids = torch.randint(0, 100, (20, 12), generator=torch.Generator().manual_seed(0))
    h = m.capture(ids, "resid_post[1]")["resid_post[1]"]
    x = h.flatten(0, 1)
    s = sae.train(x, "resid_post[1]", arch="topk", d_sae=16, k=2, tokens=400, batch_size=40, progress=False)
    linear = dark.Linear.fit(x, x - s(x))
    parts = {p: dark._Inserted(s, linear, p)(h, None) for p in ("reconstruction", "+ linear", "+ nonlinear")}
    assert torch.allclose(parts["+ linear"] + parts["+ nonlinear"], parts["reconstruction"] + h, atol=1e-4)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(sae.SAEError, match="takes more than that many"):
        dark.dark_matter(torch.randn(20, 16), torch.randn(20, 16))
