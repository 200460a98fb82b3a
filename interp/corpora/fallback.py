"""The fallback tier: labelled text without a network, from Python itself and from grammars.

It is small and plain, and it is not the full tier: good enough to run every test and every command, too narrow to
claim anything about law or languages. Python's own files differ between Python versions, so these texts do too;
the card says which version it was.
"""

from __future__ import annotations

import ast
import datetime
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from interp.corpora import code
from interp.corpora.documents import Document, rank, tidy
from interp.corpora.pairs import pairs
from interp.corpora.split import SPLITS, Limits, split_documents

LIMITS = Limits(train=240_000, share=0.08, floor=16_000, cap=24_000)

GROUPS: dict[str, tuple[str, ...]] = {
    "domain": ("python", "docstrings", "manuals", "arithmetic", "dates", "brackets"),
    "programming": ("python",),
    "toxicity": ("toxic", "neutral"),
}

# fmt: off
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")
# fmt: on
_PAIRS = {"train": 400, "validation": 40, "test": 40}


def fallback_labels() -> tuple[str, ...]:
    """The labels of this tier."""
    return tuple(dict.fromkeys(label for members in GROUPS.values() for label in members))


def fallback_home(label: str) -> str:
    """The group that the column `group` names."""
    return "programming" if label == "python" else next(g for g, m in GROUPS.items() if label in m)


def fallback_rows(chosen: tuple[str, ...]) -> Iterator[tuple[str, str, Document]]:
    """(split, label, document) of the chosen labels."""
    for label, make in _MAKERS.items():
        if label in chosen:
            documents = make()
            for split, document in split_documents(documents, by_paragraph=False, shortest=60, limits=LIMITS):
                yield split, label, document
    for split in SPLITS:
        for versions in pairs(split, _PAIRS[split]):
            for label, document in zip(("toxic", "neutral"), versions, strict=True):
                if label in chosen:
                    yield split, label, document


def _library(low: float, high: float) -> Iterator[tuple[str, str]]:
    """(name, source) of standard library modules whose rank lies in [low, high)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not skipped & set(name.split("/")) and low <= rank(name) < high:
            yield name, path.read_text(encoding="utf-8", errors="replace")


def _python() -> Iterator[Document]:
    for name, text in _library(0.0, 0.2):
        body = tidy(code.without_notices(text, "hash"))
        if code.is_written(body):
            yield Document(f"stdlib:{name}", body[: code.MAX_FILE], name, "stdlib")


def _docstrings() -> Iterator[Document]:
    """The docstrings of modules that are not in `python`, one document per module."""
    for name, text in _library(0.2, 0.4):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        body = tidy("\n\n".join(doc for doc in found if doc))
        if len(body) > 300:
            yield Document(f"docstrings:{name}", body, name, "stdlib")


def _manuals() -> Iterator[Document]:
    """The topics of `help()`."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(f"pydoc:{name}", tidy(text.replace("*", "")), name, "stdlib")


def _grammar(label: str, line: Callable[[random.Random], str], count: int) -> Callable[[], Iterator[Document]]:
    def make() -> Iterator[Document]:
        for number in range(count):
            draw = random.Random(f"{label}/{number}")
            text = "\n".join(line(draw) for _ in range(draw.randint(8, 20)))
            yield Document(f"generated:{label}-{number}", text, f"{label}-{number}", "generated")

    return make


def _sum(draw: random.Random) -> str:
    a, b = draw.randint(0, 99), draw.randint(0, 99)
    sign, value = draw.choice((("+", a + b), ("-", a - b), ("*", a * b)))
    return f"{a} {sign} {b} = {value}"


def _date(draw: random.Random) -> str:
    """Formatted by hand: `strftime` would use the names of the user's locale."""
    day = datetime.date(1900, 1, 1) + datetime.timedelta(days=draw.randrange(70_000))
    return f"{day.isoformat()} was {_DAYS[day.weekday()]}, {day.day} {_MONTHS[day.month - 1]} {day.year}"


def _brackets(draw: random.Random) -> str:
    """A balanced word over three kinds of brackets (Dyck-3)."""
    kinds, stack, word = ("()", "[]", "{}"), "", ""
    for left in range(draw.randrange(10, 50), 0, -1):
        if stack and (len(stack) >= left or draw.random() < 0.5):
            word, stack = word + stack[-1], stack[:-1]
        else:
            kind = draw.choice(kinds)
            word, stack = word + kind[0], stack + kind[1]
    return word + stack[::-1]


_MAKERS: dict[str, Callable[[], Iterator[Document]]] = {
    "python": _python,
    "docstrings": _docstrings,
    "manuals": _manuals,
    "arithmetic": _grammar("arithmetic", _sum, 1800),
    "dates": _grammar("dates", _date, 550),
    "brackets": _grammar("brackets", _brackets, 700),
}
