"""One file for a colleague: the tables, figures, cards and notes of a run on a single offline HTML page.

    report.save_table(table, "run/maths.parquet")       a Table with its settings, which come back with it
    plots.save(figure, "run/damage.html")
    report.write("run")                                 run/run.html; on the command line: interp report run

What is collected, by suffix: tables ``.parquet`` (settings in the file), ``.csv``, ``.jsonl``; figures ``.html``
that `interp.plots.save` wrote, ``.svg`` and ``.png``; cards (``card.json``, ``*.card.json``, and ``README.md`` with a
card's front matter); notes ``.md``, ``.txt``. Beside each table stand the settings that made it and, where it knows one
(``.attrs["remake"]``), the command that makes it again.

Whatever comes from a file is text: it is escaped, or, for images, put into ``<img>``, where it cannot run. The page
forbids itself the network by a content security policy, so it opens the same on a train, and prints.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.calls import Call
from interp.cards import Card, CardError
from interp.report_page import (
    Section,
    assemble,
    card_section,
    image_section,
    note_section,
    plotly_section,
    table_section,
)

if TYPE_CHECKING:
    import pandas as pd

#: Written by `write`, and never collected.
NAME = "run.html"
_IMAGES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


class ReportError(ValueError):
    """A directory from which no report can be made."""


def save_table(table: pd.DataFrame, path: str | os.PathLike[str], remake: str | None = None) -> Path:
    """Writes a Table as one parquet file with its settings inside.

    Args:
        table: any Table; settings that JSON does not know are kept as text.
        path: ``*.parquet``; its directory is made.
        remake: the command or code that makes the Table again, kept as ``.attrs["remake"]``.

    Raises ReportError for another suffix.
    """
    target = Path(path)
    if target.suffix != ".parquet":
        raise ReportError(f"path={str(path)!r}: a Table is kept as .parquet, which holds its settings too")
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = table.copy()
    kept.attrs = {str(key): _plain(value) for key, value in table.attrs.items()}
    if remake is not None:
        kept.attrs["remake"] = remake
    for column in kept.columns:  # a column of lists or objects (axes, sites) is text in the file
        if kept[column].dtype == object and kept[column].map(lambda v: isinstance(v, (list, tuple, dict, set))).any():
            kept[column] = kept[column].map(str)
    partial = target.with_name(f".{target.name}.partial")
    kept.to_parquet(partial)
    os.replace(partial, target)
    return target


def load_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """What `save_table` wrote, settings in ``.attrs``; a ``.csv`` or ``.jsonl`` has none."""
    import pandas as pd

    place = Path(path)
    if place.suffix == ".jsonl":
        return pd.read_json(place, lines=True)
    if place.suffix == ".csv":
        return pd.read_csv(place)
    table = pd.read_parquet(place)
    if isinstance(call := table.attrs.get("call"), dict):
        table.attrs["call"] = Call(call)
    return table


def write(
    dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, title: str | None = None, rows: int = 200
) -> Path:
    """Collects a run's directory into one HTML file.

    Args:
        dir: the run: everything below it is looked at, hidden files and directories aside.
        out: the file; default ``run.html`` in `dir`.
        title: of the page; default the directory's name.
        rows: of each table that are shown; the page says how many more there are.

    Raises ReportError where there is no directory, or nothing in it that a report can show.
    """
    root = Path(dir)
    if not root.is_dir():
        raise ReportError(
            f"dir={str(dir)!r}: no such directory; give the one in which a run left its tables and figures"
        )
    target = Path(out) if out is not None else root / NAME
    sections, passed = collect(root, rows, but=target)
    if not sections:
        raise ReportError(
            f"{root}: nothing to report; it looks for tables (.parquet, .csv, .jsonl), figures (.html of "
            "interp.plots.save, .png, .svg), cards and notes (.md, .txt)"
        )
    page = assemble(title or root.resolve().name, sections, passed)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def collect(root: Path, rows: int = 200, but: Path | None = None) -> tuple[list[Section], list[str]]:
    """The sections of a directory, in the order of paths; and the files that none was made of, each with the reason."""
    sections: list[Section] = []
    passed: list[str] = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = str(path.relative_to(root))
        if any(part.startswith(".") for part in Path(name).parts) or path.name == NAME or (but and path == but):
            continue
        if path.name == "README.md" and path.with_name("card.json").is_file():
            continue  # the same card, for people who look into the directory
        try:
            section = _section(path, name, rows)
        except (ValueError, OSError, ImportError) as error:
            passed.append(f"{name}: {error}")
            continue
        if section is None:
            passed.append(f"{name}: not a table, figure, card or note")
        else:
            sections.append(section)
    return sections, passed


def _section(path: Path, name: str, rows: int) -> Section | None:
    """What a file becomes; None for one that has no place in a report."""
    if path.suffix in (".parquet", ".csv", ".jsonl"):
        return table_section(name, load_table(path), rows)
    if path.suffix in _IMAGES:
        return image_section(name, path.read_bytes(), _IMAGES[path.suffix])
    if path.suffix == ".html":
        return plotly_section(name, path.read_text(encoding="utf-8"))
    if path.name == "card.json" or path.name.endswith(".card.json"):
        return card_section(name, Card.load(path))
    if path.suffix in (".md", ".txt"):
        try:
            return card_section(name, Card.load(path)) if path.name == "README.md" else _note(path, name)
        except CardError:
            return _note(path, name)
    return None


def _note(path: Path, name: str) -> Section:
    return note_section(name, path.read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    """The value if JSON knows it, else its text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value)
