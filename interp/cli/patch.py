"""`interp patch`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from interp.cli.common import ModelArgument, ModelOption, emit, named_model, records, remake, stderr, stdout

if TYPE_CHECKING:
    import pandas as pd

    from interp.patching import Certificate, Pairs

Method = Literal["exact", "atp", "atp+qk", "atp+graddrop", "atp*", "ig", "secant", "secant+qk"]
Metric = Literal["logit_diff", "probability", "log_prob"]
#: Columns of the printed table.
SHOWN = ("node", "position", "token", "value", "low", "high")


def command(
    argument: ModelArgument = None,
    model: ModelOption = None,
    clean: Annotated[str | None, typer.Option("--clean", "-c", help="The prompt that shows the behaviour.")] = None,
    corrupt: Annotated[
        str | None, typer.Option("--corrupt", "-k", help="Its twin that does not, token by token.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", "-a", help="One token that continues the clean prompt.")
    ] = None,
    wrong: Annotated[
        str | None, typer.Option("--wrong", "-w", help="One token that continues the corrupt one.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="A .jsonl file; each row has clean, corrupt, answer, wrong.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Pairs made here: ioi, capital_swap, greater_than, successor, ...")
    ] = None,
    n: Annotated[int, typer.Option("--number", "-n", min=1, help="How many pairs a task makes.")] = 8,
    nodes: Annotated[
        list[str] | None, typer.Option("--nodes", help="Site patterns, e.g. z[*] or mlp_out[*]@-1. Repeatable.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="exact: a patched run per node; else estimates from gradients.")
    ] = "exact",
    direction: Annotated[
        Literal["denoise", "noise"], typer.Option(help="denoise: what suffices; noise: what is needed.")
    ] = "denoise",
    metric: Annotated[Metric, typer.Option(help="What effects are measured in.")] = "logit_diff",
    threshold: Annotated[
        float | None, typer.Option("--certify", help="Verify, and bound what is left, at this effect (not for exact).")
    ] = None,
    passes: Annotated[int | None, typer.Option(min=1, help="Patched forward passes that --certify may spend.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A directory for figure (HTML) and table (parquet).")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many nodes to print.")] = 15,
    seed: Annotated[int, typer.Option(help="Of the task's pairs and of the certificate.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find which heads, neurons, positions and experts carry a behaviour.

    Runs a clean and a corrupt prompt, carries one activation at a time from one run into the other, and prints what
    that does to the metric. With --out it writes heat maps and the whole table.

    Example:

    ```
    interp patch --task ioi -n 4 --nodes "resid_post[*]" --out ioi
    ```
    """
    import interp
    from interp import patching
    from interp.patching import guardrails

    say = stderr()
    opened = interp.load(named_model(argument, model, "smollm2"), device=device)
    made = _pairs(opened, clean, corrupt, answer, wrong, pairs, task, n, seed)
    measure = made.metric(metric)
    warned = guardrails.cautions(opened, made, measure, warn=False)
    for sentence in [*made.notes, *warned]:
        say.print(f"· {sentence}", markup=False, highlight=False)
    if not as_json:
        say.print(made.show(0), markup=False, highlight=False, soft_wrap=True)
    patterns = nodes or ["z[*]"]
    if method == "exact":
        if threshold is not None:
            raise ValueError("--certify: exact patching leaves nothing to certify; choose another --method")
        table = patching.patch(opened, made, None, measure, patterns, direction)
    else:
        table = patching.attribute(opened, made, None, measure, patterns, method, direction=direction)
    certificate = None
    if threshold is not None:
        certificate = patching.certify(
            opened, made, None, measure, table, threshold=threshold, budget=passes, seed=seed
        )
    table["token"] = _tokens(table, made)
    files = _write(table, made, out) if out is not None else {}
    best = table.loc[table["value"].abs().sort_values(ascending=False, kind="stable").index].head(top)
    if as_json:
        emit({
            "model": opened.name, "pairs": len(made), "task": made.name, "corruption": made.corruption,
            "metric": metric, "method": method, "direction": direction, "baseline": table.attrs["baseline"],
            "cautions": warned, "nodes": len(table), "table": records(best[[c for c in SHOWN if c in best.columns]]),
            "certificate": _certificate(certificate), "files": files,
        })  # fmt: skip
    else:
        _show(best, table, made, certificate, files)


def _pairs(
    model: Any, clean: str | None, corrupt: str | None, answer: str | None, wrong: str | None, file: Path | None,
    task: str | None, n: int, seed: int,
) -> Pairs:  # fmt: skip
    """The pairs from one of the three ways to give them."""
    from interp.patching import builders
    from interp.patching import pairs as making

    ways = [way for way, given in (("--clean", clean), ("--pairs", file), ("--task", task)) if given is not None]
    if len(ways) != 1:
        raise ValueError(f"give the prompts in one way: --clean and --corrupt, --pairs or --task; got {ways or 'none'}")
    if task is not None:
        if task not in builders.BUILDERS:
            raise ValueError(f"--task {task}: expected one of {', '.join(builders.BUILDERS)}")
        return builders.BUILDERS[task](model, n, seed)
    if file is not None:
        return _read(model, file)
    if corrupt is None or answer is None or wrong is None:
        raise ValueError("--clean needs --corrupt, --answer and --wrong beside it")
    return making.of(model, clean, corrupt, answer, wrong, name="prompt")


def _read(model: Any, path: Path) -> Pairs:
    from interp.cli import lines
    from interp.patching import pairs as making

    fields = ("clean", "corrupt", "answer", "wrong")
    rows = list(lines.rows(path))
    for number, row in enumerate(rows, start=1):
        for name in fields:
            if not isinstance(row.get(name), str):
                raise ValueError(f"{path}, row {number}: no text in {name!r}; each row needs {', '.join(fields)}")
    given = {name: [row[name] for row in rows] for name in fields}
    return making.of(model, given["clean"], given["corrupt"], given["answer"], given["wrong"], name=path.stem)


def _tokens(table: pd.DataFrame, made: Pairs) -> list[str]:
    """The clean text at each node's position, where all pairs have the same; else of the first pair, with ~."""
    columns = list(zip(*made.pieces[0], strict=False))

    def text(position: Any) -> str:
        if str(position) == "<NA>" or int(position) >= len(columns):
            return ""
        here = columns[int(position)]
        return here[0] if len(set(here)) == 1 else f"~{here[0]}"

    return [text(p) for p in table["position"]]


def _write(table: pd.DataFrame, made: Pairs, out: Path) -> dict[str, str]:
    from interp import plots
    from interp.patching import guardrails

    figure = plots.heat_maps(table, tokens=made.pieces[0][0])
    table.attrs["remake"] = remake()
    return {
        "figure": str(plots.save(figure, out / "patch.html")),
        "table": str(guardrails.export(table, out / "patch.parquet")),
    }


def _certificate(certificate: Certificate | None) -> dict[str, Any] | None:
    if certificate is None:
        return None
    return {
        "holds": certificate.holds, "bound": certificate.bound, "threshold": certificate.threshold,
        "confidence": certificate.confidence, "cost": certificate.cost, "statement": certificate.statement,
    }  # fmt: skip


def _show(
    best: pd.DataFrame, table: pd.DataFrame, made: Pairs, certificate: Certificate | None, files: dict[str, str]
) -> None:
    from rich.markup import escape
    from rich.table import Table

    attrs, console = table.attrs, stdout()
    base = attrs["baseline"]
    ends = f"{attrs['metric']} {base['clean']:+.3f} clean, {base['corrupt']:+.3f} corrupt"
    how = f"{attrs['method']}, {attrs['direction']}, {len(table):,} nodes"
    shown = Table(title=f"{escape(made.name)}: {ends}; {how}", title_justify="left")
    for column in ("node", "position", "token", "effect", "95 % interval"):
        shown.add_column(column, justify="left" if column in ("node", "token") else "right")
    for row in best.to_dict("records"):
        low, high = row.get("low"), row.get("high")
        interval = f"{low:+.3f} to {high:+.3f}" if low is not None and low == low else ""
        place = "all" if str(row["position"]) == "<NA>" else str(row["position"])
        shown.add_row(
            escape(str(row["node"])), place, escape(repr(row["token"])[1:-1]), f"{row['value']:+.3f}", interval
        )
    console.print(shown)
    if certificate is not None:
        console.print(certificate.statement, markup=False, highlight=False)
    for name, path in files.items():
        console.print(f"{name}: {path}", markup=False, highlight=False, soft_wrap=True)
