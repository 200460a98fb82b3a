"""The identities of `interp.conformance` on every Mixture-of-Experts family that can be built small."""

from __future__ import annotations

import pytest

from interp.zoo.families import FAMILIES, families

from .families import PARTLY, hold


@pytest.mark.parametrize("name", [*families("moe"), *families("moe-undecorated")])
def test_every_identity_holds_on(name):
    hold(name)


def test_at_least_52_decorated_and_3_other_families_are_whole():
    assert len([n for n in families("moe") if n not in PARTLY]) >= 52
    assert len([n for n in families("moe-undecorated") if n not in PARTLY]) >= 3
    assert set(PARTLY) <= set(FAMILIES)
