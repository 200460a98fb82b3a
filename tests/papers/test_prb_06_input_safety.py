"""PRB-06. Chrabaszcz et al. 2025, Maybe I Should Not Answer That, but... (arXiv:2502.16174).

Planted: prompts whose last token carries a direction are the unsafe ones, and nothing else tells them apart. The layers
of one model add nothing, so its every layer holds the label; a router of a random MoE model makes "bit for bit" hard.
"""

from __future__ import annotations

import pytest
import torch

import interp
import probes
from interp import edits
from tests.papers.planted_streams import streams, unit_vectors

KINDS, UNSAFE = 80, unit_vectors(1)[0]


@pytest.fixture(scope="module")
def planted():
    """Token i < 80 is benign, token 80 + i the same with the direction; prompts of three to five tokens."""
    g = torch.Generator().manual_seed(0)
    noise = 0.25 * torch.randn(KINDS, 32, generator=g)
    m = streams(torch.cat([noise - UNSAFE, noise + UNSAFE]))

    def prompts(offset: int, kinds: range) -> list[list[int]]:
        return [[*torch.randint(2 * KINDS, (2 + i % 3,), generator=g).tolist(), offset + i] for i in kinds]

    return m, prompts


def test_the_label_is_found_in_every_layer_with_its_error_rates(planted):
    m, prompts = planted
    g = probes.guard(m, prompts(KINDS, range(60)), prompts(0, range(60)))
    table = g.detector.table
    print("\n", table.pivot_table(index=["node", "baseline"], columns="metric", values="value").round(3).to_string())
    real = table[(table.metric == "auroc") & (table.baseline == "none")]
    assert len(real) == m.n_layers
    assert (real.value > 0.99).all()
    shuffled = table[(table.metric == "auroc") & (table.baseline == "shuffled")]
    assert ((shuffled.low < 0.5) & (shuffled.high > 0.5)).all()
    fresh = g.rate(m, prompts(0, range(60, KINDS)))
    print("false positives on benign prompts never seen:", fresh)
    assert fresh.low <= 0.05  # what was asked for; the threshold is the largest of twelve
    assert g.rate(m, prompts(KINDS, range(60, KINDS))).value >= 0.9


@pytest.mark.parametrize("family", ["planted", "tiny:olmoe"])
def test_unflagged_prompts_are_untouched_bit_for_bit(planted, family):
    if family == "planted":
        m, prompts = planted
    else:
        m, prompts = interp.load(family), planted[1]
        prompts = lambda offset, kinds: [[9, 10 + i % 7, 5 if offset else 20 + i] for i in kinds]  # noqa: E731
    g = probes.guard(m, prompts(KINDS, range(60)), prompts(0, range(60)))
    mixed = prompts(KINDS, range(60, 66)) + prompts(0, range(60, 70)) + prompts(KINDS, range(70, 74))
    flagged = g.flags(m, mixed)
    assert 0 < int(flagged.sum()) < len(mixed)
    tokens = m.tokens(mixed)
    safe = edits.add("resid_post[0]", torch.ones(m.d_model))
    plain, guarded = m(tokens), g.logits(m, tokens, safe)
    real = tokens.mask
    assert torch.equal(guarded[~flagged], plain[~flagged])
    assert all(not torch.equal(guarded[i][real[i]], plain[i][real[i]]) for i in flagged.nonzero()[:, 0].tolist())
    texts = g.generate(m, mixed, "no", max_new_tokens=3)
    unguarded = m.generate(tokens, max_new_tokens=3).texts
    assert [t for t, f in zip(texts, flagged, strict=True) if not f] == [
        t for t, f in zip(unguarded, flagged, strict=True) if not f
    ]
    assert [t for t, f in zip(texts, flagged, strict=True) if f] == ["no"] * int(flagged.sum())
    benign = [row for row, f in zip(mixed, flagged, strict=True) if not f]
    assert torch.equal(g.logits(m, benign, safe), m(m.tokens(benign)))


def test_bad_input(planted):
    m, prompts = planted
    with pytest.raises(probes.ProbeError, match="0 benign prompts"):
        probes.guard(m, prompts(0, range(4)), [])
    with pytest.raises(probes.ProbeError, match="labels: 2 for 3 texts"):
        probes.detector(m, prompts(0, range(3)), [True, False])
    with pytest.raises(probes.ProbeError, match="neither True nor False"):
        probes.detector(m, prompts(0, range(3)), [0, 1, 2])
    with pytest.raises(probes.ProbeError, match="give the edits"):
        probes.Guard(None).logits(m, prompts(0, range(2)))
