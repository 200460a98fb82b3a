"""PRB-07. Clymer et al. 2023, Generalization Analogies (GENIES; arXiv:2311.07723).

Planted: a token carries what makes the label and, twice as strong, what merely goes along with it on the source and
against it on the shift. One head of layer 1 reads the one, another head the other; the stream holds both.
"""

from __future__ import annotations

import pytest
import torch

import probes
from tests.papers.planted_streams import streams, unit_vectors

N = 100
CAUSE, HABIT, CODE = unit_vectors(3)


@pytest.fixture(scope="module")
def planted():
    """Token 4 i + 2 label + habit. Every text is one token, which attends to itself: z is what the head reads of it."""
    g = torch.Generator().manual_seed(0)
    noise = 0.2 * torch.randn(N, 32, generator=g)
    signs = [(y, h) for y in (-1, 1) for h in (-1, 1)]
    table = torch.stack([noise[i] + y * CAUSE + 2 * h * HABIT for i in range(N) for y, h in signs])
    m = streams(table, num_key_value_heads=4)
    d = m.d_head
    with torch.no_grad():
        v = m.hf.model.layers[1].self_attn.v_proj.weight
        v.zero_()
        v[0], v[d] = CAUSE, HABIT  # heads 0 and 1, first channel of each
    y = torch.randint(0, 2, (N,), generator=g)
    i = torch.arange(N)
    source = (4 * i + 2 * y + y)[:, None]
    shifted = (4 * i + 2 * y + (1 - y))[:, None]
    return m, (m.tokens(source), y.tolist()), (m.tokens(shifted), y.tolist())


def test_the_spurious_feature_collapses_and_the_invariant_one_holds(planted):
    m, source, target = planted
    table = probes.shift(m, source, target, ["z[1, head=0]", "z[1, head=1]", "resid_post[1]"])
    print("\n" + table.attrs["text"])
    print({k: round(v, 2) for k, v in table.attrs["elasticity"].items()})
    value = table.set_index(["node", "method", "baseline", "scored"]).value
    for method in ("LinearProbe", "MeanDifference"):
        cause, habit, both = "z[1, head=0]", "z[1, head=1]", "resid_post[1]"
        for node in (cause, habit, both):  # the source alone cannot tell them apart
            assert value[node, method, "none", "source"] > 0.95
            assert value[node, method, "ceiling", "shift"] > 0.95
            assert value[node, method, "shuffled", "source"] < 0.85
        assert value[cause, method, "none", "shift"] > 0.95
        assert value[habit, method, "none", "shift"] < 0.05
        assert value[both, method, "none", "shift"] < 0.05  # the stronger habit wins
        assert table.attrs["elasticity"][cause, method] > 0.9
        assert table.attrs["elasticity"][habit, method] < -0.9


def test_the_report_names_both_numbers(planted):
    m, source, target = planted
    table = probes.shift(m, source, target, "z[1, head=1]")
    lines = table.attrs["text"].splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "100% [100%, 100%] on unseen source" in line
        assert "0% [0%, 0%] on the shift" in line
    with pytest.raises(probes.ProbeError, match=r"target: its classes are \[0\]"):
        probes.shift(m, source, (target[0], [0] * N), "z[1, head=1]")
    with pytest.raises(probes.ProbeError, match="shift: 2 labels for 100 texts"):
        probes.shift(m, source, (target[0], [0, 1]), "z[1, head=1]")
