"""ACT-01. Sun et al. 2024, Massive Activations in Large Language Models (arXiv:2402.17762)."""

from __future__ import annotations

import pytest
import torch

import interp
import probes


@pytest.fixture(scope="module")
def planted():
    """A tiny Llama whose first layer writes 10,000 times the median into dimension 5 at token 7, and nowhere else."""
    m = interp.load("tiny:llama")
    ids = torch.randint(10, m.d_vocab, (3, 8), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 7
    embed = m.hf.get_input_embeddings().weight
    with torch.no_grad():
        median = m.capture(ids, "resid_post[*]")["resid_post[1]"].abs().median()
        embed[7, 5] = 1e4 * median
    return m, ids


def test_the_planted_value_is_reported_and_nothing_else(planted):
    m, ids = planted
    found = probes.massive(m, ids, floor=0)
    print("\n", found.head(3).to_string())
    assert set(found.dimension) == {5}
    assert set(found.position) == {0}
    assert set(found.token) == {7}
    assert set(found.layer) == set(range(m.n_layers))
    assert found.ratio.max() > 1e3
    assert len(probes.massive(m, ids[:, 1:], floor=0)) == 0


def test_zero_and_mean_give_two_changes_of_loss(planted):
    m, ids = planted
    found = probes.massive(m, ids, floor=0)
    effect = probes.massive_effect(m, ids, found).set_index("baseline").value
    print("\n", effect.to_string())
    # The planted value is the same in every row, so its mean is itself: a pure bias.
    assert abs(effect["mean"] - effect["none"]) < 1e-4
    assert abs(effect["zero"] - effect["none"]) > 10 * abs(effect["mean"] - effect["none"])


def test_attention_to_its_token_is_the_patterns(planted):
    m, ids = planted
    found = probes.massive(m, ids, floor=0)
    table = probes.massive_attention(m, ids, found)
    print("\n", table.to_string())
    pattern = m.capture(ids, "pattern[1]")["pattern[1]"]
    assert table[table.layer == 1].value.item() == pytest.approx(float(pattern[:, :, 1:, 0].mean()), abs=1e-6)
    assert table.uniform[0] == pytest.approx(sum(1 / q for q in range(2, 9)) / 7, abs=1e-6)


def test_nothing_found_is_an_error_where_something_is_needed(planted):
    m, ids = planted
    none = probes.massive(m, ids[:, 1:], floor=0)
    with pytest.raises(probes.ProbeError, match="no massive activation"):
        probes.massive_effect(m, ids, none)
