"""`interp experts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from interp.cli.common import emit, records, stderr, stdout

Effects = Literal["none", "attribute", "sweep"]
Kind = Literal["auto", "routed", "neurons"]


def command(
    model: Annotated[str, typer.Argument(help="A zoo name, a hub id, a directory, or tiny:FAMILY.")],
    data: Annotated[
        str,
        typer.Option("--data", "-d", help="A .jsonl or .parquet file, or a group of the project's corpora (domain)."),
    ] = "domain",
    text_field: Annotated[str, typer.Option(help="Where a row keeps its text.")] = "text",
    label_field: Annotated[str, typer.Option(help="Where a row keeps its label.")] = "label",
    html: Annotated[Path | None, typer.Option("--html", help="Write the atlas, one offline page.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the statistics (.safetensors).")] = None,
    kind: Annotated[Kind, typer.Option(help="Which units; neurons for a dense model.")] = "auto",
    split: Annotated[int | None, typer.Option(min=2, help="First deal a dense model's MLPs into experts.")] = None,
    effects: Annotated[Effects, typer.Option(help="What switching off each one does: estimated or measured.")] = "none",
    examples: Annotated[int, typer.Option(min=0, help="Strongest tokens shown of each expert.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=20, help="Per label.")] = 5_000,
    effect_tokens: Annotated[int, typer.Option(min=20, help="Per label, for effects.")] = 500,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer from elsewhere: a directory or hub id.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure what every expert does on labelled text, and show it as an atlas.

    Prints, per layer, how evenly the experts are used and how much they tell of a text's label (bits, beside chance).

    Example:

    ```
    interp experts smollm2 --split 16 --data domain --max-tokens 500 --html atlas.html
    ```
    """
    import interp
    from interp import atlas
    from interp import experts as tools

    texts = _texts(data, text_field, label_field)
    opened = interp.load(model, tokenizer, device=device)
    if split is not None:
        opened = tools.split(opened, split)
    stderr().print(str(opened), markup=False, highlight=False, soft_wrap=True)
    detail = kind != "neurons"
    stats = tools.routing(
        opened, texts, kind=kind, norms=True, together=detail, examples=examples, max_tokens=max_tokens,
        documents=200 if detail else 0,
    )  # fmt: skip
    table = None
    if effects != "none":
        measure = tools.attribute if effects == "attribute" else tools.sweep
        extra: dict[str, Any] = {"kind": kind} if effects == "attribute" else {}
        table = measure(opened, texts, max_tokens=effect_tokens, **extra)
    files = {}
    if out is not None:
        files["statistics"] = str(stats.save(out))
    if html is not None:
        files["atlas"] = str(atlas.write(html, opened, stats, effects=table))
    balance = tools.load(stats, ["all"])
    if len(stats.labels) > 1:
        told = tools.specialisation(stats, shuffles=100 if detail else 0).set_index("layer")
        balance = balance.join(told, on="layer")
    if as_json:
        emit({"model": opened.name, "labels": stats.labels, "tokens": stats.tokens.tolist(), "files": files,
              "layers": records(balance)})  # fmt: skip
        return
    _show(opened.name, balance)
    for name, path in files.items():
        stdout().print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)


def _texts(data: str, text_field: str, label_field: str) -> dict[str, list[str]]:
    """label -> texts, of a file or of a group of the project's corpora. ValueError names what is wrong."""
    from interp import corpora

    path = Path(data)
    if path.suffix not in (".jsonl", ".parquet"):
        return {label: list(texts) for label, texts in corpora.load("validation", group=data).items()}
    if path.suffix == ".parquet":
        import pandas as pd

        rows: Any = pd.read_parquet(path).to_dict("records")
    else:
        from interp.cli import lines

        rows = lines.rows(path)
    out: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(text_field), str) or label_field not in row:
            raise ValueError(f"{path}, row {number}: expected fields {text_field!r} (text) and {label_field!r}")
        out.setdefault(str(row[label_field]), []).append(row[text_field])
    return out


def _show(name: str, balance: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(name), title_justify="left")
    columns = {"layer": "layer", "entropy": "evenness", "max_over_mean": "busiest", "dead": "unused", "kept": "bits",
               "chance": "by chance", "p": "p"}  # fmt: skip
    present = {k: v for k, v in columns.items() if k in balance}
    for title in present.values():
        shown.add_column(title, justify="right")
    for _, row in balance.iterrows():
        shown.add_row(*(f"{int(row[k])}" if k in ("layer", "dead") else f"{row[k]:.3f}" for k in present))
    stdout().print(shown)
