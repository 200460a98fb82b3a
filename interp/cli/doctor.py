"""`interp doctor`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from interp.cli.common import emit, records, stderr, stdout


def command(
    families: Annotated[
        bool,
        typer.Option("--families", help="Check every model family instead, on tiny random models (minutes)."),
    ] = False,
    family: Annotated[
        list[str] | None, typer.Option("--family", help="Check this family only, such as olmoe. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show versions, devices, cached models, and what will not work here and why.

    With --families: build a tiny random model of each transformers family and check that captured activations
    add up, that edits do what they say, and that everything is restored. Exits with 1 when a family fails.

    Example:

    ```
    interp doctor --family olmoe --family llama
    ```
    """
    if families or family:
        _families(family or None, as_json)
        return
    from interp.doctor import report, show

    found = report()
    if as_json:
        emit(found)
    else:
        show(found, stdout())


def _families(names: list[str] | None, as_json: bool) -> None:
    """The conformance table, family by family, so that a bar can show how far it is."""
    import pandas as pd
    from rich.progress import track
    from rich.table import Table

    from interp.conformance import table
    from interp.zoo.families import FAMILIES

    if unknown := [name for name in names or [] if name not in FAMILIES]:
        raise ValueError(f"--family {unknown[0]}: no such family; there are {', '.join(sorted(FAMILIES))}")
    todo = track(names or list(FAMILIES), description="families", console=stderr(), transient=True)
    frame = pd.concat([table([name]) for name in todo], ignore_index=True)
    rows = records(frame)
    whole = sum(bool(row["whole"]) for row in rows)
    if as_json:
        emit({"families": rows, "whole": whole, "total": len(rows)})
    else:
        shown = Table(title=f"{whole} of {len(rows)} families whole", title_justify="left")
        for column in frame.columns:
            shown.add_column(str(column), overflow="fold")
        for row in rows:
            shown.add_row(*(_cell(row[column]) for column in frame.columns))
        stdout().print(shown)
    if whole < len(rows):
        raise typer.Exit(1)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, bool):
        return "[green]yes[/]" if value else "[red]no[/]"
    return f"{value:.1e}" if isinstance(value, float) else escape("" if value is None else str(value))
