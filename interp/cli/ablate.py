"""`interp ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from interp.cli.common import ModelArgument, ModelOption, emit, keep, named_model, records, stderr, stdout

if TYPE_CHECKING:
    import pandas as pd

Rule = Literal["skew", "lift", "correlation", "top", "most"]
Kind = Literal["auto", "monet", "routed", "neurons"]


def command(
    remove: Annotated[list[str], typer.Option("--remove", "-r", help="The label to cut out. Repeatable.")],
    argument: ModelArgument = None,
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the checkpoint and report go.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A .jsonl file of your own texts; default: the project's corpora.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Where a .jsonl row keeps its text.")] = "text",
    label_field: Annotated[str, typer.Option(help="Where a .jsonl row keeps its label.")] = "label",
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="Labels to set it against and to watch; default: all others.")
    ] = None,
    rule: Annotated[Rule, typer.Option(help="How experts are chosen; see `interp.experts.select`.")] = "skew",
    ratio: Annotated[float, typer.Option(help="skew: times the second-highest label; lift: times their mean.")] = 2.0,
    threshold: Annotated[float, typer.Option(help="correlation: smallest Pearson r.")] = 0.1,
    share: Annotated[float, typer.Option(help="top, most: part of each layer's experts.")] = 0.01,
    kind: Annotated[Kind, typer.Option(help="What is switched off; neurons for a dense model.")] = "auto",
    mode: Annotated[Literal["zero"], typer.Option(help="zero: their contribution is taken out.")] = "zero",
    controls: Annotated[int, typer.Option(min=0, help="Random sets, matched on layer and frequency.")] = 20,
    select_tokens: Annotated[int, typer.Option(min=100, help="Per label, to choose on.")] = 10_000,
    score_tokens: Annotated[int, typer.Option(min=100, help="Per label, to score on.")] = 4_000,
    report: Annotated[bool, typer.Option(help="Write the HTML heat map and the table (parquet) too.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Allow a rule that takes every expert of a layer.")] = False,
    seed: Annotated[int, typer.Option(help="Of controls and bootstrap.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Cut a domain, a language or toxicity out of a model, and prove what that did.

    Chooses the experts that carry the label on one split, switches them off, and prints the change of loss on every
    label of another split, beside random experts of the same layers and frequency. With --out it writes the checkpoint,
    its card, and an HTML heat map.

    Example:

    ```
    interp ablate monet-mini --remove law --out monet-without-law
    ```
    """
    import interp
    from interp import experts

    def tell(message: str) -> None:
        stderr().print(f"· {message}", markup=False, highlight=False)  # asked for each time: a bar may stand below it

    name = named_model(argument, model)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not empty; choose a new directory")
    choosing, scoring = _splits(data, text_field, label_field, remove, keep)
    opened = interp.load(name, device=device)
    tell(f"measuring {len(choosing)} labels on the selection split")
    stats = experts.routing(opened, choosing, kind=kind, max_tokens=select_tokens)
    settings: dict[str, Any] = {
        "skew": {"ratio": ratio},
        "lift": {"ratio": ratio},
        "correlation": {"threshold": threshold},
        "top": {"share": share},
        "most": {"share": share},
    }[rule]
    chosen = None
    for label in remove:
        found = experts.select(stats, label, rule, force=force, **settings)
        chosen = found if chosen is None else chosen | found
    assert chosen is not None
    tell(f"{chosen!r}; scoring on the other split, with {controls} random controls")
    table = experts.evaluate(
        opened, chosen, scoring, controls=controls, stats=stats, max_tokens=score_tokens, scored=remove, seed=seed
    )
    table.insert(0, "removed", " + ".join(remove))
    files = _write(opened, chosen, table, out, report, tell) if out is not None else {}
    if as_json:
        emit({
            "model": opened.name, "removed": remove, "rule": rule, "settings": settings, "mode": mode,
            "units": len(chosen), "share": chosen.share, "table": records(table), "files": files,
        })  # fmt: skip
    else:
        _show(table, chosen, remove, files)


def _splits(
    data: Path | None, text_field: str, label_field: str, remove: list[str], keep: list[str] | None
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(texts to choose on, texts to score on) by label."""
    if data is not None:
        found = _own(data, text_field, label_field)
        splits = _halves(found)
    else:
        from interp import corpora

        labels = [*remove, *keep] if keep else list(dict.fromkeys([*corpora.labels("domain"), *remove]))
        splits = corpora.load("train", labels), corpora.load("test", labels)
    known = list(splits[0])
    for label in remove:
        if label not in known:
            raise ValueError(f"--remove {label}: there is no text with this label; there are {', '.join(known)}")
    wanted = [*remove, *keep] if keep else known
    if missing := [label for label in wanted if label not in known]:
        raise ValueError(f"--keep {missing[0]}: there is no text with this label; there are {', '.join(known)}")
    if len(wanted) < 2:
        raise ValueError(
            f"only the label {wanted[0]!r} is there; experts are chosen by contrast with at least one other"
        )
    return tuple({label: split[label] for label in wanted} for split in splits)  # type: ignore[return-value]


def _own(path: Path, text_field: str, label_field: str) -> dict[str, list[str]]:
    """label -> texts of a user's .jsonl file."""
    from interp.cli import lines

    found: dict[str, list[str]] = {}
    for number, row in enumerate(lines.rows(path), start=1):
        text, label = row.get(text_field), row.get(label_field)
        if not isinstance(text, str) or not text.strip():
            name = f" labelled {label!r}" if label is not None else ""
            raise ValueError(f"{path}, row {number}{name}: no text in {text_field!r} (--text-field)")
        if label is None:
            raise ValueError(f"{path}, row {number}: no label in {label_field!r} (--label-field)")
        found.setdefault(str(label), []).append(text)
    return found


def _halves(found: dict[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Each label's texts in two halves by a hash of the text, so that equal texts never stand in both."""
    import hashlib

    halves: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for label, texts in found.items():
        order = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
        if len(order) < 4:
            raise ValueError(
                f"label {label!r}: {len(order)} different texts; at least four are needed, two to choose experts on "
                "and two to score on"
            )
        halves[0][label], halves[1][label] = order[: len(order) // 2], order[len(order) // 2 :]
    return halves


def _write(model: Any, chosen: Any, table: pd.DataFrame, out: Path, report: bool, tell: Any) -> dict[str, str]:
    from interp import experts, plots

    tell(f"writing the checkpoint to {out}")
    own = table[table["baseline"] == "none"]
    files = {"checkpoint": str(experts.resect(model, chosen, out, evaluation=own))}
    if report:
        files["figure"] = str(plots.save(plots.domain_matrix(table), out / "report.html"))
        files["table"] = keep(table, out / "table.parquet")
    return files


def _show(table: pd.DataFrame, chosen: Any, remove: list[str], files: dict[str, str]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    shown = Table(title=f"{escape(chosen.name)} without {escape(' + '.join(remove))}: {len(chosen):,} of its units off "
                  f"({chosen.share:.2%})", title_justify="left", box=box.SIMPLE_HEAD)  # fmt: skip
    for column in ("label", "loss", "change", "95 %", "random", "accuracy"):
        shown.add_column(column, justify="left" if column == "label" else "right", no_wrap=True)
    for label in dict.fromkeys(table["label"]):
        here = table[table["label"] == label].set_index(["metric", "baseline"])
        loss, acc = here.loc[("loss", "none")], here.loc[("accuracy", "none")]
        random = "" if ("loss", "random") not in here.index else f"{here.loc[('loss', 'random'), 'value']:+.3f}"
        shown.add_row(
            escape(str(label)), f"{loss['before']:.2f} → {loss['after']:.2f}", f"{loss['value']:+.3f}",
            f"{loss['low']:+.2f}..{loss['high']:+.2f}", random, f"{acc['before']:.0%} → {acc['after']:.0%}",
            style="bold" if label in remove else "",
        )  # fmt: skip
    console.print(shown)
    console.print(
        "loss: nats per token on held-out text; random: its mean change without as many random experts", highlight=False
    )
    for name, path in files.items():
        console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)
