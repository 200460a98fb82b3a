"""PAT-03. How to use and interpret activation patching (Heimersheim & Nanda 2024, arXiv 2404.15255).

On planted AND- and OR-gates, noising and denoising return the two known, different node sets; every result carries
direction, metric, site, position and baseline values, or export refuses.
"""

from __future__ import annotations

import pytest

from interp.patching import patch
from interp.patching.guardrails import both, export
from tests.patching.planted import CLEAN, CORRUPT, gap, gate

HEADS = {("z[0, head=0]", 3), ("z[0, head=1]", 3)}


@pytest.mark.parametrize(("kind", "finds", "misses"), [("and", "noise", "denoise"), ("or", "denoise", "noise")])
def test_each_gate_shows_its_heads_in_one_direction_only(kind: str, finds: str, misses: str) -> None:
    m = gate(kind)
    found = {}
    for direction in (finds, misses):
        table = patch(m, CLEAN, CORRUPT, gap, "z[0]", direction)  # type: ignore[arg-type]
        large = table[table["value"].abs() > 0.5]
        found[direction] = set(zip(large["node"], large["position"], strict=True))
    assert found == {finds: HEADS, misses: set()}
    side = both(m, CLEAN, CORRUPT, gap, "z[0]")
    named = side[side["reading"] == ("needed only" if kind == "and" else "sufficient only")]
    assert set(zip(named["node"], named["position"], strict=True)) == HEADS
    print(kind, side[side["reading"] != ""][["node", "position", "denoise", "noise", "reading"]].to_string(index=False))


@pytest.mark.parametrize("lost", ["direction", "metric", "node", "position", "baseline"])
def test_a_result_that_lost_what_explains_it_is_not_exported(tmp_path, lost: str) -> None:
    table = patch(gate("and"), CLEAN, CORRUPT, gap, "z[0]", "noise")
    assert export(table, tmp_path / "whole.csv").exists()
    attrs = {k: v for k, v in table.attrs.items() if k != lost}
    bare = table.drop(columns=[lost], errors="ignore")
    bare.attrs = attrs
    with pytest.raises(ValueError, match=lost):
        export(bare, tmp_path / "bare.csv")
    assert not (tmp_path / "bare.csv").exists()
