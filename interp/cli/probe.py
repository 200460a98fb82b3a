"""`interp probe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from interp.calls import settings
from interp.cli.common import ModelArgument, ModelOption, emit, keep, named_model, records, stderr, stdout


def command(
    argument: ModelArgument = None,
    model: ModelOption = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="A .jsonl file; each row has text, label, perhaps group.")
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Instead of data: sentiment, truth, language, number, ...")
    ] = None,
    site: Annotated[str, typer.Option("--site", help="Probed in every layer: resid_post, z, mlp_out, routing, ...")] = (
        "resid_post"
    ),
    at: Annotated[Literal["last", "mean", "max"], typer.Option(help="Which tokens of a text.")] = "last",
    control: Annotated[
        list[str] | None, typer.Option("--control", help="shuffled, 'random model', 'bag of tokens'. Repeatable.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longer texts are cut, in tokens.")] = 256,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A directory for figure (HTML) and table (parquet).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of split, shuffle and bootstrap.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find where a model knows something, beside controls.

    Fits a probe at every layer on one part of the examples, chooses its penalty on a second and scores it on a third;
    groups (templates, documents) are never cut. With a ready --question it also pushes the model along the probe.

    Example:

    ```
    interp probe --question sentiment --out sentiment
    ```
    """
    import interp
    import probes
    from interp import plots
    from probes import plots as figures

    if (data is None) == (question is None):
        raise ValueError("give either --data FILE.jsonl or --question NAME")
    opened = interp.load(named_model(argument, model, "smollm2"), device=device)
    answer = None
    if question is not None:
        from probes.questions import ask

        answer = ask(opened, question, site=site, at=at, seed=seed)
        table = answer.layers
    else:
        assert data is not None
        texts, labels, groups = _read(data)
        stderr().print(f"· {len(texts)} texts, {len(set(labels))} labels", markup=False, highlight=False)
        controls = control or ["shuffled", "bag of tokens"]
        table = probes.by_layer(
            opened, texts, labels, site, at=at, groups=groups, controls=controls, seed=seed, max_length=max_length
        )
    files: dict[str, str] = {}
    if out is not None:
        files = {
            "table": keep(table, out / "probe.parquet"),
            "figure": str(plots.save(figures.by_layer(table), out / "probe.html")),
        }
        if answer is not None:
            keep(answer.causal, out / "causal.parquet")
            files["causal"] = str(plots.save(figures.causal(answer.causal), out / "causal.html"))
    if as_json:
        causal = None if answer is None else {**settings(answer.causal), "table": records(answer.causal)}
        emit({**settings(table), "table": records(table), "causal": causal, "files": files})
        return
    _print(table, answer, files)


def _print(table: Any, answer: Any, files: dict[str, str]) -> None:
    from rich.table import Table as Grid

    grid = Grid(title=f"{table.attrs['model']}: held-out {table.attrs['metric']}")
    for name in ("node", "baseline", "value", "95 %", "over shuffled"):
        grid.add_column(name, justify="left" if name in ("node", "baseline") else "right")
    for row in table[table.baseline != "shuffled"].to_dict("records"):
        over = "" if row["selectivity"] != row["selectivity"] else f"{row['selectivity']:+.2f}"
        grid.add_row(
            row["node"], row["baseline"], f"{row['value']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}", over
        )
    console = stdout()
    console.print(grid)
    a = table.attrs
    text = answer.text if answer is not None else (
        f"Best on validation: {a['best']}, {a['best_value']:.0%} [{a['best_low']:.0%}, {a['best_high']:.0%}] on test."
    )  # fmt: skip
    console.print(text, markup=False, highlight=False)
    for name, file in files.items():
        console.print(f"{name}: {file}", markup=False, highlight=False)


def _read(path: Path) -> tuple[list[str], list[str], list[str] | None]:
    """Texts, labels and groups of a .jsonl file. ValueError names the line that lacks something."""
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file")
    texts, labels, groups = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or row.get("label") is None:
            raise ValueError(f"{path}, line {number}: expected an object with text and label")
        texts.append(row["text"])
        labels.append(str(row["label"]))
        groups.append(row.get("group"))
    if not texts:
        raise ValueError(f"--data {path}: no example in it")
    if any(g is None for g in groups) and not all(g is None for g in groups):
        raise ValueError(f"--data {path}: some rows have a group and some have none; give it to all or to none")
    return texts, labels, None if groups[0] is None else [str(g) for g in groups]
