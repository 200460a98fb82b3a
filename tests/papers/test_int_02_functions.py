"""INT-02, Schwettmann et al. 2023 (arXiv:2309.03886, FIND): marks of known interpretations of known functions."""

from __future__ import annotations

import random
from typing import Any

import pytest

from interp.sae import find

FUNCTIONS = find.functions(24)


def test_all_kinds_are_there_and_seeded() -> None:
    assert {f.kind for f in FUNCTIONS} == {"numeric", "string"}
    assert any(f.noise for f in FUNCTIONS)
    assert any(", then " in f.what for f in FUNCTIONS)
    assert sum(f.inside is not None for f in FUNCTIONS) >= 4
    again = find.functions(24)
    assert [f.what for f in again] == [f.what for f in FUNCTIONS]
    assert all(a(x) == b(x) for a, b in zip(FUNCTIONS, again, strict=True) for x in a.inputs(5))
    assert [f.what for f in find.functions(24, seed=1)] != [f.what for f in FUNCTIONS]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.what)
def test_the_oracle_is_right_and_chance_is_not(function: find.Function) -> None:
    assert find.mark(function, function.exact) == 1
    draw = random.Random(0)

    def chance(x: Any) -> Any:
        if function.kind == "numeric":
            return draw.uniform(-1000, 1000)
        return "".join(draw.choices("abcxyz", k=len(x)))

    assert find.mark(function, chance) < 0.05


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f.inside is not None], ids=lambda f: f.what)
def test_missing_the_corrupted_region_costs_exactly_it(function: find.Function) -> None:
    assert function.inside is not None
    inputs = function.inputs()
    there = sum(map(function.inside, inputs))
    assert 0 < there < len(inputs)
    assert find.mark(function, function.clean) == pytest.approx(1 - there / len(inputs))


def test_an_interpretation_that_fails_is_wrong_there() -> None:
    function = FUNCTIONS[0]

    def broken(x: float) -> float:
        if x > 0:
            raise ZeroDivisionError
        return float(function.exact(x))

    share = sum(x <= 0 for x in function.inputs()) / 200
    assert find.mark(function, broken) == pytest.approx(share)
