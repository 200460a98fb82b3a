"""The identities of `interp.conformance` on every dense family that can be built small."""

from __future__ import annotations

import pytest

from interp.zoo.families import families

from .families import PARTLY, hold


@pytest.mark.parametrize("name", families("dense"))
def test_every_identity_holds_on(name):
    hold(name)


def test_at_least_45_dense_families_are_whole():
    assert len([n for n in families("dense") if n not in PARTLY]) >= 45
