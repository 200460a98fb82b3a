"""Models whose right answers are known by construction (`steering.planted`)."""

from __future__ import annotations

import pytest

from steering.planted import Planted


@pytest.fixture
def planted() -> Planted:
    return Planted()


@pytest.fixture
def planted_offset() -> Planted:
    """The same with a large offset that all tokens share."""
    return Planted(offset=30.0)


@pytest.fixture
def refusing() -> Planted:
    """Answers token 5 where the last token has the direction, and token 6 elsewhere."""
    return Planted(offset=3.0, answers=True)
