"""`interp study`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from interp.cli.common import emit, keep, records, stderr, stdout

if TYPE_CHECKING:
    import pandas as pd

Group = Literal["domain", "programming", "language", "toxicity", "descriptions"]
Kind = Literal["auto", "monet", "routed", "neurons"]


def command(
    model: Annotated[str, typer.Argument(help="A zoo name, a hub id or a directory.")],
    group: Annotated[
        Group, typer.Option(help="Labels to remove in turn; or how well top tokens describe experts.")
    ] = "domain",
    kind: Annotated[Kind, typer.Option(help="What is switched off; neurons for a dense model.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where tables and figures go.")] = None,
    controls: Annotated[int, typer.Option(min=0, help="Random sets per removed label.")] = 20,
    damage: Annotated[float, typer.Option(help="Nats that the best setting must do at least.")] = 0.5,
    select_tokens: Annotated[
        int | None, typer.Option(min=100, help="Per label, to choose on; default 10,000, toxicity 25,000.")
    ] = None,
    tune_tokens: Annotated[int | None, typer.Option(min=100, help="Per label, to tune on; default 800.")] = None,
    score_tokens: Annotated[int | None, typer.Option(min=100, help="Per label, to score on; default 2,000.")] = None,
    seed: Annotated[int, typer.Option(help="Of controls and bootstrap.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Remove each domain, language or register in turn and report damage, spill and random controls.

    Experts are chosen on the train split, the setting of the rule on the validation split, the figures are of the test
    split. Prints one line per removed label; with --out writes all tables (parquet) and figures (HTML).

    Example:

    ```
    interp study monet-mini --group domain --out study
    ```
    """
    import interp
    from interp.experts import study as studies

    def say(message: str) -> None:
        stderr().print(f"· {message}", markup=False, highlight=False)  # asked for each time: a bar may stand below it

    given = {"select_tokens": select_tokens, "tune_tokens": tune_tokens, "score_tokens": score_tokens}
    tokens: dict[str, Any] = {name: n for name, n in given.items() if n is not None}
    opened = interp.load(model, device=device)
    if group in ("toxicity", "descriptions"):
        if group == "toxicity":
            tokens.pop("tune_tokens", None)  # its thresholds are the paper's
            table = studies.register(opened, kind=kind, controls=controls, seed=seed, say=say, **tokens)
        else:
            table = studies.descriptions(opened, seed=seed)
        if out is not None:
            keep(table, out / f"{group}.parquet")
        if as_json:
            emit({"model": opened.name, "group": group, "table": records(table)})
        elif group == "toxicity":
            _show_register(table)
        else:
            _show_descriptions(table)
        return
    found = studies.study(opened, group, kind=kind, controls=controls, damage=damage, seed=seed, say=say, **tokens)
    files = _write(found, out) if out is not None else {}
    if as_json:
        emit({
            "model": opened.name, "group": group, "rule": found.rule, "settings": found.settings, "files": files,
            **{name: records(table) for name, table in found.tables.items()},
        })  # fmt: skip
        return
    for name, title in (
        ("summary", f"best: {found.rule} {found.settings}"),
        ("paper_summary", "the paper's: skew 2.0"),
    ):
        show(found.tables[name], f"{opened.name}, {title}")
    for name, path in files.items():
        stdout().print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)


def _write(found: Any, out: Path) -> dict[str, str]:
    from interp import plots

    for name, table in found.tables.items():
        keep(table, out / f"{name}.parquet")
    found.stats.save(out / "routing.safetensors")
    figures = {
        "matrix": plots.domain_matrix(found.tables["best"]),
        "frontier": plots.frontiers(found.tables["frontier"]),
    }
    files = {name: str(plots.save(figure, out / f"{name}.html")) for name, figure in figures.items()}
    return {"tables": str(out), **files}


def show(summary: pd.DataFrame, title: str) -> None:
    """Print a summary of `experts.summary`, in 80 columns."""
    from rich.markup import escape
    from rich.table import Table

    def said(value: float, form: str) -> str:
        return "" if value != value else format(value, form)  # NaN: nothing was off, or there were no controls

    shown = Table(title=escape(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("removed", "experts", "damage", "95 %", "others", "ratio", "random", "/ random"):
        shown.add_column(column, justify="left" if column == "removed" else "right", no_wrap=True)
    for _, row in summary.iterrows():
        known = row["damage_low"] == row["damage_low"]  # not NaN
        interval = f"{row['damage_low']:.2f}..{row['damage_high']:.2f}" if known else ""
        shown.add_row(
            escape(str(row["removed"])), f"{row['units']:,.0f}", f"{row['damage']:+.3f}", interval,
            f"{row['spill']:.4f}", said(row["selectivity"], ".1f"), said(row["random"], "+.4f"),
            said(row["beyond_random"], ".0f"), style="bold" if row["removed"] == "mean" else "",
        )  # fmt: skip
    stdout().print(shown)


def _show_descriptions(table: pd.DataFrame, lines: int = 15) -> None:
    """The mean score, and some experts with theirs."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title="how well its top tokens tell where an expert is active, held-out text", title_justify="left")
    for column in ("layer", "expert", "F1", "random expert", "description"):
        shown.add_column(column, justify="left" if column == "description" else "right")
    for _, row in table.sort_values("f1", ascending=False).head(lines).iterrows():
        shown.add_row(
            str(row["layer"]),
            str(row["expert"]),
            f"{row['f1']:.2f}",
            f"{row['random_f1']:.2f}",
            escape(row["description"]),
        )
    stdout().print(shown)
    mean = f"mean over {len(table)} experts: F1 {table['f1'].mean():.2f}, random {table['random_f1'].mean():.2f}"
    stdout().print(mean, highlight=False)


def _show_register(table: pd.DataFrame) -> None:
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title="continuations that say a held-out rude word, and losses", title_justify="left", box=None,
                  padding=(0, 1, 0, 0))  # fmt: skip
    for column in ("r >", "off", "text", "measure", "value", "95 %", "random", "95 %"):
        shown.add_column(column, justify="right", no_wrap=True)
    own, random = table[table["baseline"] == "none"], table[table["baseline"] == "random"]
    for _, row in own.iterrows():
        beside = random[
            (random["threshold"] == row["threshold"])
            & (random["kind"] == row["kind"])
            & (random["metric"] == row["metric"])
        ]
        threshold = f"{row['threshold']:g}" if row["threshold"] == row["threshold"] else "-"
        shown.add_row(
            threshold, f"{row['units']:,}", escape(str(row["kind"])), row["metric"], *_with_interval(row),
            *(_with_interval(beside.iloc[0]) if len(beside) else ("", "")),
        )  # fmt: skip
    stdout().print(shown)


def _with_interval(row: pd.Series) -> tuple[str, str]:
    interval = f"{row['low']:.2f}..{row['high']:.2f}" if row["low"] == row["low"] else ""  # NaN: there is none
    return f"{row['value']:.3f}", interval
