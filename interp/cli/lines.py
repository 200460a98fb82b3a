"""Text files as sequences that are read line by line, however large they are."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload


class Lines(Sequence[Any]):
    """The non-blank lines of a file, each through `parse`; only their positions are in memory (8 bytes a
    line).

    `parse` gets the line and its number (from 1) in the file. Raises OSError when the file cannot be read.
    """

    def __init__(self, path: Path, parse: Callable[[str, int], Any], limit: int | None = None) -> None:
        self._path, self._parse = path, parse
        self._starts, self._numbers = array("q"), array("q")
        start = 0
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if limit is not None and len(self._starts) == limit:
                    break
                if line.strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)
        if not self._starts:
            raise ValueError(f"{path}: no text in it")
        self._handle = path.open("rb")

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> list[Any]: ...
    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        self._handle.seek(self._starts[i])
        try:
            text = self._handle.readline().decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}, line {self._numbers[i]}: not UTF-8 ({error.reason})") from error
        return self._parse(text, self._numbers[i])

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._handle.close()


def texts(path: Path, limit: int | None = None) -> Lines:
    """One text per line."""
    return Lines(path, lambda line, number: line, limit)


def rows(path: Path, limit: int | None = None) -> Lines:
    """One JSON object per line, as dictionaries. ValueError names the line that is none."""

    def parse(line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        return row

    return Lines(path, parse, limit)
