"""`interp report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from interp.cli.common import emit, stdout


def command(
    dir: Annotated[Path, typer.Argument(help="The directory in which a run left its tables, figures and cards.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default run.html in DIR.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; default the directory's name.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows shown of each table.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Collect tables, figures, cards and notes of a run into one HTML file that needs no network.

    Example, after `interp demo`, which writes there:

    ```
    interp report demo_out
    ```
    """
    from interp import report

    page = report.write(dir, out, title=title, rows=rows)
    sections, passed = report.collect(dir, rows, but=page)
    if as_json:
        shown = [{"file": section.name, "kind": section.kind} for section in sections]
        emit({"page": str(page), "bytes": page.stat().st_size, "shown": shown, "not_shown": passed})
        return
    for section in sections:
        stdout().print(f"{section.kind:<20} {section.name}", markup=False, highlight=False, soft_wrap=True)
    stdout().print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
