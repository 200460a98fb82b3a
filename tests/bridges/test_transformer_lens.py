"""The TransformerLens bridge, on the installed line and on 4.3: the same checks, from `lens_checks.py`."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# read off the source, since importing the checks imports torch and transformers
_SOURCE = ast.parse((Path(__file__).parent / "lens_checks.py").read_text(encoding="utf-8"))
NAMES = [
    node.name.removeprefix("check_")
    for node in _SOURCE.body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.mark.parametrize("name", NAMES)
def test_installed_line(name: str, lens_checks: ModuleType) -> None:
    try:
        lens_checks.CHECKS[name]()
    except lens_checks.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", NAMES)
def test_second_line(name: str, on_second_line: Callable[[str], None]) -> None:
    on_second_line(name)


def test_second_line_is_another_one(second_line_outcomes: dict[str, str]) -> None:
    """The second set of results would mean nothing if both were the same package."""
    assert second_line_outcomes["line"] == "4.3.0"
    assert set(second_line_outcomes) == {"line", *NAMES}
