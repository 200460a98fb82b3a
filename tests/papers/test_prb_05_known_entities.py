"""PRB-05. Ferrando et al. 2024, Do I Know This Entity? (arXiv:2411.14257).

On a small model taught some pairs of names, and to say "dk" for all others: an SAE on the entity's last token, its best
latent on entities that it was not chosen by, what clamping it does to the logit of "dk", and to attention further up.
"""

from __future__ import annotations

import pytest
import torch

import interp
import probes
from interp import sae
from interp.metrics import Metric, last_logits
from probes.entities import activity
from tests.papers.taught import AT, KNOWN_ONES, UNKNOWN_ONES, one_thread, question, taught

SITE = "resid_post[1]"


def asked(some):
    return [question(e) for e in some]


@pytest.fixture(scope="module")
@one_thread()
def latents():
    m = taught()
    texts = asked(KNOWN_ONES + UNKNOWN_ONES)
    x = m.capture(texts, SITE)[SITE][:, -1]
    s = sae.train({SITE: x}, SITE, arch="topk", d_sae=32, k=3, tokens=15_000, batch_size=100, lr=3e-3, progress=False)
    table = probes.awareness(m, s, asked(KNOWN_ONES), asked(UNKNOWN_ONES[:60]), top=3)
    print("\n", table.round(2).drop(columns=["site", "metric"]).to_string())
    return m, s, table


def dk(m: interp.Model) -> Metric:
    """Logit of "dk" less the mean over the towns."""

    def fn(logits, tokens):
        last = last_logits(logits, tokens)
        return last[:, AT["dk"]] - last[:, AT["t0"] : AT["t11"] + 1].mean(1)

    return Metric(fn, "logit of dk")


def test_the_best_latent_separates_entities_it_was_not_chosen_by(latents):
    table = latents[2]
    real = table[table.baseline == "none"]
    best = real.loc[real.separation.abs().idxmax()]
    print(f"\nbest: {best.node}, for {best.kind} entities, AUROC {best.value:.2f} [{best.low:.2f}, {best.high:.2f}]")
    assert best.value > 0.8
    assert best.low > 0.5
    shuffled = table[table.baseline == "shuffled"]
    assert best.value > shuffled.value.max()


@pytest.mark.parametrize("kind", ["known", "unknown"])
def test_clamping_it_moves_the_dont_know_logit_beyond_other_latents(latents, kind):
    """On entities of the other kind, where it is silent: one for known ones takes "dk" away, the other brings it."""
    m, s, table = latents
    best = int(table[(table.baseline == "none") & (table.kind == kind)].unit.iloc[0])
    own, other = (KNOWN_ONES, UNKNOWN_ONES[60:]) if kind == "known" else (UNKNOWN_ONES[60:], KNOWN_ONES)
    here, there = (activity(m, s, asked(some))[f"sae[{SITE}]"] for some in (own, other))
    value = 2 * float(here[here[:, best] > 0, best].mean())
    alive = ((here > 0).any(0) & (there > 0).any(0)).nonzero()[0].tolist()
    controls = [s.clamp(i, value) for i in alive if i not in set(table[table.baseline == "none"].unit)]
    got = probes.effect(m, s.clamp(best, value), asked(other), dk(m), controls)
    print(
        f"\nlatent {best} ({kind}) clamped to {value:.1f}, {len(controls)} control latents\n", got.round(3).to_string()
    )
    assert len(controls) >= 3
    assert got.attrs["beats"]
    assert got.attrs["direction"] == (-1 if kind == "known" else 1)
    looks = probes.attention_change(m, s.clamp(best, value), asked(other), controls)
    print(looks[looks.layer == 2].round(3).to_string())
    assert (looks[looks.layer <= 1].value == 0).all()  # below the latent nothing moves
    assert (looks[looks.layer == 2].value != 0).any()


def test_experts_are_units_too():
    """Planted: the router of a random MoE model sends a known token to an expert of its own."""
    m = interp.load("tiny:olmoe")
    g = torch.Generator().manual_seed(0)
    rows = [[*torch.randint(6, 40, (2,), generator=g).tolist(), 5 if i % 2 else 50 + i] for i in range(40)]
    router = m.hf.model.layers[1].mlp.gate.weight
    ids = torch.tensor(rows)
    with torch.no_grad():
        x = m.hf.model.layers[1].post_attention_layernorm(m.capture(ids, "resid_mid[1]")["resid_mid[1]"][:, -1])
        router[3] = 100 * torch.linalg.lstsq(x, torch.tensor([-1.0, 1.0] * 20)[:, None]).solution[:, 0]
    table = probes.awareness(m, "routing[*]", rows[1::2], rows[::2])
    best = table[(table.baseline == "none") & (table.kind == "known")].iloc[0]
    print("\n", table.round(2).head(4).to_string())
    assert (best.site, best.unit) == ("routing[1]", 3)
    assert best.separation > 0.8
    assert best.value > 0.9


def test_bad_input(latents):
    m, s, _ = latents
    with pytest.raises(probes.ProbeError, match="1 known and 4 unknown"):
        probes.awareness(m, s, ["q"], ["q"] * 4)
    with pytest.raises(probes.ProbeError, match="keys"):
        probes.attention_change(m, [], ["q home"], [[]], keys=torch.ones(1, 5, dtype=torch.bool))
