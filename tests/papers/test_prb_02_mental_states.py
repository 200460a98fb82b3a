"""PRB-02. Bortoletto et al. 2024, Benchmarking Mental State Representations in Language Models (arXiv:2406.17513).

Stories are told in two wordings; the last token carries what the reader knows (self), what somebody in the story
believes (other), and what is peculiar to the story. The planted model answers egocentrically: it says that the other
believes what is so, and its trace of the other's belief is too weak to change that.
"""

from __future__ import annotations

import pytest
import torch

import probes
from interp import edits
from interp.metrics import Metric, last_logits
from tests.papers.planted_streams import streams, unit_vectors

STORIES, LAW, FALSE = 60, 1, 0  # answers: token 1 "as it is", token 0 "otherwise"
SELF, OTHER, WORDING, ASK = unit_vectors(4)


@pytest.fixture(scope="module")
def planted():
    """Token 2 + 8 i + 4 variant + 2 self + other ends story i. Its stream says all of that."""
    g = torch.Generator().manual_seed(1)
    noise = 0.15 * torch.randn(STORIES, 32, generator=g)
    rows = [torch.zeros(2, 32)]
    for i in range(STORIES):
        for variant in (0, 1):
            for mine in (-1, 1):
                for other in (-1, 1):
                    rows.append((noise[i] + ASK + mine * SELF + other * OTHER + 2 * variant * WORDING)[None])
    table = torch.cat(rows)
    readout = torch.zeros(len(table), 32)
    readout[LAW] = 3 * ASK + OTHER  # 3 > 1: whatever the other believes, the answer is "as it is"
    readout[FALSE] = -OTHER
    m = streams(table, readout)
    mine = torch.randint(0, 2, (STORIES,), generator=g)
    theirs = torch.randint(0, 2, (STORIES,), generator=g)

    def told(variant: int) -> torch.Tensor:
        last = 2 + 8 * torch.arange(STORIES) + 4 * variant + 2 * mine + theirs
        first = torch.randint(2, len(table), (STORIES, 2), generator=torch.Generator().manual_seed(variant))
        return m.tokens(torch.cat([first, last[:, None]], 1))

    return m, {"plain": told(0), "misleading": told(1)}, {"self": mine.tolist(), "other": theirs.tolist()}


def test_both_beliefs_are_found_in_every_wording_and_shuffled_labels_are_not(planted):
    m, wordings, labels = planted
    table = probes.by_variant(m, wordings, labels, controls=["shuffled"])
    print("\n", table[["variant", "label", "node", "baseline", "value", "low", "high", "selectivity"]].to_string())
    real, shuffled = table[table.baseline == "none"], table[table.baseline == "shuffled"]
    assert len(real) == 2 * 2 * m.n_layers
    assert (real.value == 1).all()
    assert (shuffled.low <= 0.5).all()  # at chance: the interval of a coin covers it
    assert abs(shuffled.value.mean() - 0.5) < 0.15
    assert (real.selectivity > 0.25).all()
    carried = probes.transfer(m, wordings, labels["other"], "resid_post[1]")
    print(carried.to_string())
    assert (carried.value > 0.9).all()


def test_mean_difference_edit_improves_the_belief_task_beyond_random_vectors(planted):
    """No probe is trained: the edit is the difference of means of false and true beliefs, its size chosen on half."""
    m, wordings, labels = planted
    tokens, believes = wordings["plain"], torch.tensor(labels["other"])
    fit, held = torch.arange(STORIES // 2), torch.arange(STORIES // 2, STORIES)
    part = {name: type(tokens)(tokens.ids[i], tokens.mask[i]) for name, i in (("fit", fit), ("held", held))}

    def right(name, i):
        def score(logits, tokens):
            last = last_logits(logits, tokens)
            return ((last[:, LAW] > last[:, FALSE]) == believes[i].bool()).float()

        return Metric(score, f"accuracy on {name}")

    site = "resid_post[1]"
    v = probes.MeanDifference().fit(probes.features(m, part["fit"], site)[site], -believes[fit]).coef_[0]
    sizes = [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]

    def push(k):
        return edits.add(site, torch.from_numpy(k * v))

    def gain(k):
        table = probes.effect(m, push(k), part["fit"], right("fit", fit), probes.random_adds(site, k * v, 1))
        return table.value[0]

    k = max(sizes, key=gain)
    table = probes.effect(m, push(k), part["held"], right("held out", held), probes.random_adds(site, k * v, 20))
    print(f"\nsize {k}\n", table.to_string())
    assert table.before[0] == pytest.approx(believes[held].float().mean().item())  # always "as it is"
    assert table.value[0] + table.before[0] > 0.95
    assert table.attrs["beats"]
    assert table.low[2] > 0


def test_bad_input(planted):
    m, wordings, _ = planted
    with pytest.raises(probes.ProbeError, match="label 'other' has 3 entries and variant 'plain' 60"):
        probes.by_variant(m, wordings, {"other": [0, 1, 0]})
    with pytest.raises(probes.ProbeError, match="no controls"):
        probes.effect(m, [], wordings["plain"], lambda logits: logits[:, -1, 0], [])
