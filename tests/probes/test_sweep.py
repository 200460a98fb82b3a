"""Sweeps over layers, heads and routers: one pass, held-out scores, controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
import probes
from interp import progress
from interp.activations import Tokens
from probes.concepts import sensitivities


def examples(m, n: int = 300, length: int = 3, seed: int = 0):
    """Rows of a few tokens; the label is which of two stands last, so the embedding knows it."""
    ids = torch.randint(6, 9, (n, length), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = ids[:, -1] % 2 + 4
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), (ids[:, -1] % 2).numpy()


def test_by_layer_finds_what_the_last_token_is_and_the_shuffle_does_not():
    m = interp.load("tiny:llama")
    tokens, y = examples(m)
    table = probes.by_layer(m, tokens, y, controls=("shuffled", "random model", "bag of tokens"))
    real = table[table.baseline == "none"]
    assert list(real.layer) == list(range(m.n_layers))
    assert real.value.min() > 0.9
    assert table[table.baseline == "shuffled"].value.max() < 0.8
    assert (table[table.baseline == "random model"].value > 0.9).all()  # the words alone give it away, as they do here
    assert (real.selectivity > 0.15).all()
    assert ((table.low <= table.value) & (table.value <= table.high)).all()
    assert table.attrs["best"] in set(real.node)


def test_the_data_is_read_once(monkeypatch):
    m = interp.load("tiny:llama")
    tokens, y = examples(m)
    calls = []
    capture = type(m).capture
    monkeypatch.setattr(type(m), "capture", lambda self, *a, **k: calls.append(1) or capture(self, *a, **k))
    probes.by_site(m, tokens, y, ["resid_post[*]", "z[*, head=*]"], batch_size=300)
    assert len(calls) == 1


def test_long_sweeps_show_how_far_they_are(monkeypatch, capfd):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv(progress.VARIABLE, "1")
    m = interp.load("tiny:llama")
    tokens, y = examples(m, 60)
    probes.by_layer(m, tokens, y, controls=())
    out, err = capfd.readouterr()
    assert out == ""
    assert "reading" in err
    assert "60/60" in err
    assert "fitting probes" in err
    assert f"{m.n_layers}/{m.n_layers}" in err


def test_heads_are_probed_one_by_one():
    m = interp.load("tiny:llama")
    tokens, y = examples(m)
    table = probes.by_site(m, tokens, y, "z[*, head=*]", controls=())
    assert len(table) == m.n_layers * m.n_heads
    read = probes.features(m, tokens, "z[0]")["z[0]"]
    one = probes.features(m, tokens, "z[0, head=1]")["z[0, head=1]"]
    np.testing.assert_array_equal(np.split(read, m.n_heads, axis=1)[1], one)


@pytest.mark.parametrize("family", ["tiny:olmoe", "tiny:monet"])
def test_routing_as_features_is_what_the_router_gave(family):
    m = interp.load(family)
    tokens, _ = examples(m, n=5)
    got = probes.features(m, tokens, "routing[*]", at="all")
    layer = next(iter(got))
    if family == "tiny:monet":
        acts = m.capture(tokens, ["g1[0]", "g2[0]"])
        expected = torch.cat([acts["g1[0]"].sum(2), acts["g2[0]"].sum(2)], -1).flatten(0, 1)
    else:
        routed = m.capture(tokens, "expert_weight[0]").experts(0)
        expected = torch.zeros(len(tokens) * tokens.ids.shape[1], m.n_experts)
        for row, (ids, weights) in enumerate(zip(routed.ids.flatten(0, 1), routed.weights.flatten(0, 1), strict=True)):
            for e, w in zip(ids, weights, strict=True):
                expected[row, e] += w
    np.testing.assert_allclose(got[layer], expected.numpy(), atol=1e-6)


def test_experts_are_probed_one_by_one():
    """Their outputs, each with its weight, add up to what the block returned: none is lost, none counted twice."""
    m = interp.load("tiny:olmoe")
    tokens, y = examples(m, n=60)
    read = probes.features(m, tokens, ["expert_out[0, expert=*]", "routing[0]", "mlp_out[0]"], at="all")
    said = np.stack([read[f"expert_out[0, expert={e}]"] for e in range(m.n_experts)], 1)  # [row, expert, d_model]
    np.testing.assert_allclose((read["routing[0]"][..., None] * said).sum(1), read["mlp_out[0]"], atol=1e-5)
    assert (np.abs(said).sum(-1) > 0).sum(1).max() < m.n_experts  # silent where it was not chosen
    table = probes.by_site(m, tokens, y, ["expert_out[*, expert=*]", "expert_hidden[0, expert=1]"], controls=())
    assert len(table) == m.n_layers * m.n_experts + 1
    assert table.expert.tolist() == [*list(range(m.n_experts)) * m.n_layers, 1]
    with pytest.raises(probes.ProbeError, match=r"expert_out\[0\]: it has a row per chosen expert. Probe one expert"):
        probes.features(m, tokens, "expert_out[0]")


def test_neurons_and_latents_are_features_of_their_layer():
    from interp.sae import SAE

    m = interp.load("tiny:llama")
    tokens, y = examples(m, n=200)
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(22, m.d_model, generator=g), dim=1)
    s = SAE(rows, torch.zeros(m.d_model), rows, torch.zeros(22), sites=("resid_post[0]",))
    codes = probes.features(m, tokens, s)["sae[resid_post[0]]"]
    h = m.capture(tokens, "resid_post[0]")["resid_post[0]"][:, -1]
    np.testing.assert_allclose(codes, (h @ rows.T).relu().numpy(), atol=1e-5)
    sites = [s, "mlp_hidden[0]", "mlp_hidden[1, neuron=3]"]
    found = probes.survey(m, tokens, y, sites, probe=probes.KSparseProbe(k=2), controls=("shuffled",))
    real = found.table[found.table.baseline == "none"].set_index("node")
    assert real.layer.tolist() == [0, 0, 1]
    assert real.site.tolist() == ["sae", "mlp_hidden", "mlp_hidden"]
    assert real.value["sae[resid_post[0]]"] > 0.95
    assert len(found.probes["sae[resid_post[0]]"].support_) == 2
    assert found.read["mlp_hidden[1, neuron=3]"].shape == (200, 1)


def test_a_survey_keeps_the_probes_that_its_table_scores():
    m = interp.load("tiny:llama")
    tokens, y = examples(m)
    found = probes.survey(m, tokens, y, "resid_post[*]", controls=())
    for row in found.table.to_dict("records"):
        probe, test = found.probes[row["node"]], found.parts.test
        assert probe.score(found.read[row["node"]][test], y[test]) == row["value"]
        assert row["C"] == probe.C


def test_pooling_is_over_real_tokens_only():
    m = interp.load("tiny:llama")
    ids = torch.randint(4, m.d_vocab, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    tokens = Tokens(ids, mask)
    h = m.capture(tokens, "resid_post[1]")["resid_post[1]"]
    site = "resid_post[1]"
    np.testing.assert_allclose(probes.features(m, tokens, site)[site][0], h[0, 3], atol=1e-6)
    np.testing.assert_allclose(probes.features(m, tokens, site, at="mean")[site][0], h[0, 1:4].mean(0), atol=1e-6)
    np.testing.assert_allclose(probes.features(m, tokens, site, at="max")[site][0], h[0, 1:4].max(0).values, atol=1e-6)
    every = probes.features(m, tokens, site, at="all")
    assert every.text.tolist() == [0] * 4 + [1] * 6
    assert every.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_causal_check_follows_a_direction_that_the_metric_reads():
    m = interp.load("tiny:llama")
    tokens, _ = examples(m)
    last = f"resid_post[{m.n_layers - 1}]"
    metric = interp.metrics.logit_diff(7, 9)
    # A probe planted along the gradient of the metric, and one across it.
    slope = sensitivities(m, tokens, metric, last).mean(0)
    along = probes.MeanDifference().fit(np.stack([-slope, slope]), [0, 1])
    rng = np.random.default_rng(0)
    across = rng.normal(size=len(slope))
    across -= across @ slope / (slope @ slope) * slope
    good = probes.causal(m, along, last, tokens, metric, unit=0.3, controls=12)
    beside = probes.MeanDifference().fit(np.stack([-across, across]), [0, 1])
    bad = probes.causal(m, beside, last, tokens, metric, unit=0.3, controls=12)
    assert good.attrs["causal"]
    assert not bad.attrs["causal"]
    assert set(good.baseline) == {"none", "random"}


def test_goal_reaches_its_probability_by_the_smallest_move():
    from probes.intervening import goal

    m = interp.load("tiny:llama")
    tokens, y = examples(m)
    site = "resid_post[1]"
    X = probes.features(m, tokens, site)[site]
    p = probes.LinearProbe(C=0.1).fit(X, y)
    with m.intervene(goal(p, site, 0.9)):
        moved = probes.features(m, tokens, site)[site]
    after = p.predict_proba(moved)[:, 1]
    before = p.predict_proba(X)[:, 1]
    np.testing.assert_allclose(after[before < 0.9], 0.9, atol=1e-3)
    np.testing.assert_array_equal(moved[before >= 0.9], X[before >= 0.9])
    step = moved - X
    u = p.direction_
    np.testing.assert_allclose(step, (step @ u)[:, None] * u, atol=1e-5)  # along the normal: no shorter way


def test_bad_input_is_named():
    m = interp.load("tiny:llama")
    tokens, y = examples(m, n=30)
    with pytest.raises(probes.ProbeError, match="29 for 30 texts"):
        probes.by_layer(m, tokens, y[:-1])
    with pytest.raises(probes.ProbeError, match="unknown 'suffled'"):
        probes.by_layer(m, tokens, y, controls=["suffled"])
    with pytest.raises(probes.ProbeError, match="at='first'"):
        probes.features(m, tokens, "resid_post[0]", at="first")
    with pytest.raises(probes.ProbeError, match=r"only 0|only 1|one class"):
        probes.by_layer(m, tokens, np.r_[np.zeros(29), 1])
    parts = probes.Split(np.arange(20), np.arange(20, 25), np.arange(25, 30))
    with pytest.raises(probes.ProbeError, match="groups stand in train"):
        probes.by_layer(m, tokens, y, groups=["t"] * 30, parts=parts)
    with pytest.raises(probes.ProbeError, match="29 entries and y 30"):
        probes.by_layer(m, tokens, y, groups=["t"] * 29)
    with torch.no_grad():
        m.hf.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(probes.ProbeError, match=r"resid_post\[0\]: 30 rows are not finite"):
        probes.by_layer(m, tokens, y)
