"""A griffe extension: examples in docstrings (``>>>``) become code blocks, wherever they stand."""

from __future__ import annotations

import re
from typing import Any

import griffe

# a prompt, and the lines that follow it up to the next blank one
_EXAMPLE = re.compile(r"^(?P<indent>[ \t]*)>>> .*(?:\n(?P=indent)\S.*)*(?:\n(?P=indent)[ \t]+\S.*)*", re.M)


class Doctests(griffe.Extension):
    """Puts a fence around every doctest that is not inside one, or in a section of examples (which griffe knows)."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that griffe has read."""
        if obj.docstring is not None and not re.search(r"^\s*(Examples?:|```)", obj.docstring.value, re.M):
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(found: re.Match[str]) -> str:
    indent = found["indent"]
    return f"{indent}```pycon\n{found[0]}\n{indent}```"
