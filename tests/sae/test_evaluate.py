"""Metrics at SAEs whose value is known: the identity, the mean, zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import interp
from interp import plots, progress, sae
from interp.sae.edits import reconstruction

IDS = torch.randint(0, 100, (12, 9), generator=torch.Generator().manual_seed(0))
SITE = "resid_post[1]"


def identity(d: int) -> sae.SAE:
    """x = relu(x) - relu(-x)."""
    rows = torch.cat([torch.eye(d), -torch.eye(d)])
    return sae.SAE(rows, torch.zeros(d), rows, torch.zeros(2 * d), sites=(SITE,), targets=(SITE,))


def constant(value: torch.Tensor) -> sae.SAE:
    """x' = value, without a latent that ever fires."""
    d = len(value)
    rows = torch.eye(d)
    return sae.SAE(rows, value, rows, torch.full((d,), -1e9), sites=(SITE,), targets=(SITE,))


def values(table: Any) -> dict[str, float]:
    return dict(zip(table.metric, table.value, strict=True))


@pytest.fixture(scope="module")
def m() -> interp.Model:
    return interp.load("tiny:llama")


def test_the_mean_explains_nothing_and_the_identity_everything() -> None:
    x = 3 * torch.randn(500, 10, generator=torch.Generator().manual_seed(1)) + 100  # far from zero: the trap
    mean = values(sae.evaluate(constant(x.mean(0)), acts=x, resamples=50))
    assert mean["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert mean["l0"] == 0
    assert mean["dead"] == 10
    exact = values(sae.evaluate(identity(10), acts=x, resamples=50))
    assert exact["explained_variance"] == pytest.approx(1)
    assert exact["norm_ratio"] == pytest.approx(1)
    assert exact["gamma"] == pytest.approx(1)
    assert exact["l0"] == 10


def test_tokens_unlike_any_it_was_trained_on_stay_as_they_are(m: interp.Model) -> None:
    """Attention sinks have norms a hundred times the others': they would be all there is in a sum of squares."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=g)
    some = sae.SAE(torch.eye(6), torch.zeros(6), torch.eye(6), torch.zeros(6), sites=(SITE,), targets=(SITE,), limit=9)
    sinks = torch.cat([x, 1000 * x[:200]])
    with_them, without = (values(sae.evaluate(some, acts=rows, resamples=0)) for rows in (sinks, x))
    assert with_them.pop("outliers") == pytest.approx(1 / 4)
    assert without.pop("outliers") == 0
    assert with_them == pytest.approx(without)

    acts = m.capture(IDS, SITE)[SITE]
    norms = acts.norm(dim=-1)
    limit = float(norms.median())
    s = replace(constant(torch.zeros(32)), limit=limit)
    with m.intervene(reconstruction(s)):
        after = m.capture(IDS, SITE)[SITE]
    assert torch.equal(after[norms > limit], acts[norms > limit])
    assert not after[norms <= limit].any()
    found = values(sae.evaluate(s, m, IDS.tolist(), resamples=0))
    assert found["ce_recovered"] == pytest.approx(0, abs=1e-4)  # zero in both, at the same tokens
    assert found["outliers"] == pytest.approx(float((norms > limit).float().mean()))


def test_long_work_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], m: interp.Model
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv(progress.VARIABLE, "1")
    sae.evaluate(identity(32), m, IDS.tolist(), resamples=0)
    sae.train(torch.randn(256, 6), d_sae=12, k=2, batch_size=64, tokens=256)
    shown = capfd.readouterr().err
    for word in ("reconstructing", "measuring the loss", "12/12", "training", "4/4", "fvu"):
        assert word in shown
    sae.train(torch.randn(256, 6), d_sae=12, k=2, batch_size=64, tokens=256, progress=False)
    assert "training" not in capfd.readouterr().err


def test_shrinkage_is_seen() -> None:
    x = torch.randn(300, 6)
    s = identity(6)
    half = sae.SAE(s.decoder / 2, s.b_dec, s.encoder, s.b_enc, sites=s.sites, targets=s.targets)
    found = values(sae.evaluate(half, acts=x, resamples=10))
    assert found["norm_ratio"] == pytest.approx(0.5)
    assert found["gamma"] == pytest.approx(0.5)
    assert found["fvu"] == pytest.approx(float(0.25 * x.square().sum() / (x - x.mean(0)).square().sum()), rel=1e-4)


def test_the_identity_recovers_the_loss_and_zero_recovers_none(m: interp.Model) -> None:
    table = sae.evaluate(identity(32), m, IDS.tolist(), resamples=50)
    found = values(table)
    assert found["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert found["kl_recovered"] == pytest.approx(1, abs=1e-4)
    logits = m(IDS)[:, :-1].log_softmax(-1)
    assert found["ce"] == pytest.approx(-float(logits.gather(-1, IDS[:, 1:, None]).mean()), rel=1e-4)
    nothing = values(sae.evaluate(constant(torch.zeros(32)), m, IDS.tolist(), resamples=50))
    assert nothing["ce_recovered"] == pytest.approx(0, abs=1e-4)
    assert nothing["kl_recovered"] == pytest.approx(0, abs=1e-4)
    mean = m.capture(IDS, SITE).mean(SITE)
    by_mean = values(sae.evaluate(constant(mean), m, IDS.tolist(), ablation="mean", resamples=50))
    assert by_mean["ce_recovered"] == pytest.approx(0, abs=1e-4)
    assert by_mean["fvu"] == pytest.approx(1, abs=1e-5)
    assert table.attrs["tokens"] == IDS.numel()


def test_intervals_hold_the_value_and_shrink_with_documents() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 6, generator=g)
    s = sae.SAE(torch.eye(6), torch.zeros(6), torch.eye(6), torch.zeros(6))  # relu: half of the variance or so
    widths = []
    for n in (100, 2000):
        row = sae.evaluate(s, acts=x[:n], resamples=200).set_index("metric").loc["fvu"]
        assert row.low < row.value < row.high
        widths.append(row.high - row.low)
    assert widths[1] < widths[0] / 2.5


def test_a_pareto_table_and_its_figure() -> None:
    x = torch.randn(400, 6)
    worse = sae.SAE(identity(6).decoder * 0.5, torch.zeros(6), identity(6).encoder, torch.full((12,), 0.5))
    saes = {"exact <b>": identity(6), "mean": constant(x.mean(0)), "worse": worse}
    table = sae.pareto(saes, acts=x, resamples=10)
    best = table.drop_duplicates("name").set_index("name").best
    assert best["exact <b>"]
    assert best["mean"]
    figure = plots.sae_frontier(table)  # no loss without a model: variance unexplained, on a plain axis from L0 = 0
    assert "exact &lt;b&gt;" in figure.data[1].text
    assert figure.layout.xaxis.type is None
    assert list(figure.data[0].x) == sorted(table[table.metric.eq("l0") & table.best].value)


def test_sources_are_checked(m: interp.Model) -> None:
    with pytest.raises(sae.SAEError, match="either"):
        sae.evaluate(identity(4))
    with pytest.raises(sae.SAEError, match="ablation='none'"):
        sae.evaluate(identity(4), acts=torch.randn(3, 4), ablation="none")
    with pytest.raises(sae.SAEError, match="takes d_in=4"):
        sae.evaluate(identity(4), m, IDS.tolist())
