"""PRB-04. Kadavath et al. 2022, Language Models (Mostly) Know What They Know (arXiv:2207.05221).

A small model is taught half of a list of facts. P(IK) is fitted on some of the list's entities and scored on others.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import probes
from probes.knowing import answered
from steering.planted import AGAINST, NO, WITH, YES, Planted
from tests.papers.taught import AT, KNOWN, KNOWN_ONES, TOWN, UNKNOWN_ONES, question, sourced, taught

LIST = KNOWN_ONES + UNKNOWN_ONES[:KNOWN]  # the facts: half of them were taught


@pytest.fixture(scope="module")
def found():
    m = taught()
    return m, probes.knows(m, [question(p) for p in LIST], [TOWN[p] for p in LIST])


def test_p_ik_tells_on_held_out_items_what_will_be_answered(found):
    k = found[1]
    n = KNOWN
    print(f"\nanswered: {k.right[:n].mean():.0%} of what was taught, {k.right[n:].mean():.0%} of the rest")
    shown = k.table.pivot_table(index=["node", "baseline"], columns="metric", values="value")
    print(shown[["auroc", "ece", "brier"]].round(3).to_string(), k.table.attrs["best"])
    assert k.right[:n].mean() > 0.8
    assert k.right[n:].mean() < 0.1
    a = k.table.attrs
    assert a["auroc"] > 0.8
    low = k.table[(k.table.node == a["best"]) & (k.table.baseline == "none") & (k.table.metric == "auroc")].low.item()
    assert low > 0.5
    guess = k.table[k.table.baseline == "guess"].value.item()
    print(f"calibration error {a['ece']:.3f}, Brier {a['brier']:.3f} (base rate {guess:.3f})")
    assert a["brier"] < guess
    assert 0 <= a["ece"] <= 1


def test_the_source_in_context_raises_p_ik(found):
    """On facts that were never taught and that P(IK) was not fitted on."""
    m, k = found
    fresh = UNKNOWN_ONES[KNOWN:]
    plain, read = [question(p) for p in fresh], [sourced(p) for p in fresh]
    right = [answered(m, texts, [TOWN[p] for p in fresh]).mean() for texts in (plain, read)]
    rise = k.raised(m, plain, read)
    print(
        f"\nright {right[0]:.0%} -> {right[1]:.0%}; "
        f"P(IK) {k.p(m, plain).mean():.2f} -> {k.p(m, read).mean():.2f}, {rise}"
    )
    assert right[1] > right[0]
    assert rise.low > 0


def test_p_true_is_the_share_of_true_and_follows_what_the_model_holds():
    p = Planted(offset=3.0, answers=True)
    asked = p.texts(0, 20, WITH) + p.texts(0, 20, AGAINST)
    got = probes.p_true(p.m, asked, [YES], [NO], batch_size=7)
    odds = p.m(p.m.tokens(asked))[:, -1].softmax(-1)
    np.testing.assert_allclose(got, odds[:, YES] / (odds[:, YES] + odds[:, NO]), atol=1e-6)
    y = np.repeat([1, 0], 20)
    print("\nAUROC", probes.auroc(y, got), probes.calibration(y, got))
    assert probes.auroc(y, got) > 0.95


def test_answers_of_several_tokens_are_whole():
    m = taught()
    text, ids = question(LIST[0]), m.generate([question(LIST[0])], max_new_tokens=3).new_ids[0].tolist()
    assert answered(m, [text, text, text], [ids, [*ids[:2], AT["dk"]], ids[:1]]).tolist() == [
        True,
        ids[2] == AT["dk"],
        True,
    ]


def test_bad_input():
    m = taught()
    with pytest.raises(probes.ProbeError, match="0 of 8 questions right"):
        probes.knows(m, [question(p) for p in LIST[:8]], ["q"] * 8)
    with pytest.raises(probes.ProbeError, match="answers: 1 for 2 questions"):
        probes.knows(m, ["q e0", "q e1"], ["dk"])
    with pytest.raises(probes.ProbeError, match="begin with the same token"):
        probes.p_true(m, ["q e0", "q e1"], ["dk"], ["dk"])
    assert torch.is_grad_enabled()
