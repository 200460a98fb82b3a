"""Fetch and build the labelled corpus; a thin script over `interp.corpora`.

python data/corpora/build.py --out corpus
python data/corpora/build.py --tier fallback
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from interp import corpora
from interp.corpora.split import SPLITS


def main(
    out: Annotated[Path | None, typer.Option(help="Directory to write to; default: the cache.")] = None,
    tier: Annotated[str, typer.Option(help="auto, full (fetches 210 MB) or fallback (no network).")] = "auto",
    label: Annotated[list[str] | None, typer.Option(help="Only this label; may be given several times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card instead of a table.")] = False,
) -> None:
    """Fetch and build the labelled corpus: train.parquet, validation.parquet, test.parquet and corpus.json.

    Example: python data/corpora/build.py --tier full --out corpus --label law --label biology
    """
    errors = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        try:
            path = corpora.build(
                out,
                label or None,
                tier,  # type: ignore[arg-type]  # build() says which tiers there are
                progress=lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
            )
        except corpora.CorpusError as error:
            bar.stop()
            errors.print(f"[red]error:[/red] {error}", highlight=False)
            raise typer.Exit(1) from None
    card = json.loads((path / "corpus.json").read_text(encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(card, ensure_ascii=False))
        return
    table = Table(
        "label", "group", *(f"{split} kB" for split in SPLITS), "documents", title=f"{card['tier']} tier: {path}"
    )
    for name, counts in card["labels"].items():
        sizes = [f"{counts[split]['bytes'] / 1000:,.0f}" for split in SPLITS]
        table.add_row(name, counts["group"], *sizes, f"{sum(counts[split]['documents'] for split in SPLITS):,}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
