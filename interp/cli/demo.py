"""`interp demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli.common import emit, keep, records, stderr, stdout, summary

if TYPE_CHECKING:
    import pandas as pd

    from interp.demo import Tour

RESECTION_LEGEND = (
    "damage: rise of the loss on the removed domain, nats per token; others: mean change on the other domains; ratio: "
    "of the two; random: damage by random experts of the same layers and frequency"
)


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where datasets, tables and figures go.")] = Path("demo_out"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Tour: read a real model and a Mixture of Experts, export, draw; cut domains out of a Monet. Two minutes.

    Loads SmolLM2-135M (fetched once) and a Mixture of Experts, reads residual stream, attention and experts
    on twelve paragraphs that come with the package, writes two activation datasets, tables and HTML figures. Then it
    switches off the experts of each domain of monet-mini in turn and shows what every domain loses, beside random
    experts.

    Example:

    ```
    interp demo --out demo_out
    ```
    """
    from interp.demo import run

    tour = run(out, lambda message: stderr().print(f"· {message}", highlight=False))
    for name in ("residual", "attention", "load", "resection"):
        if (table := getattr(tour, name)) is not None:
            keep(table, out / f"{name}.parquet")
    if as_json:
        emit(_document(tour))
    else:
        _show(tour)


def _document(tour: Tour) -> dict[str, Any]:
    return {
        "models": tour.models,
        "residual": records(tour.residual),
        "attention": records(tour.attention),
        "load": records(tour.load),
        "datasets": [summary(dataset) for dataset in tour.datasets],
        "resection": None if tour.resection is None else records(tour.resection),
        "figures": [str(path) for path in tour.figures],
        "seconds": round(tour.seconds, 2),
    }


def _show(tour: Tour) -> None:
    from rich.markup import escape

    console = stdout()
    dense, moe = tour.models
    for model in tour.models:
        console.print(f"[bold]{escape(model['name'])}[/]: {escape(str(model.get('weights', 'trained')))}")
    console.print(_layers(tour.residual, tour.attention, dense["name"]))
    console.print(_experts(tour.load, moe["name"]))
    if moe.get("weights") == "random":
        console.print("Its weights are random: this shows the mechanics, and no expert that learned a subject.\n")
    for dataset in tour.datasets:
        about = summary(dataset)
        kept = f"{about['tokens']} tokens x {len(about['sites'])} sites, {about['bytes'] / 2**20:.1f} MiB"
        console.print(f"dataset: {about['directory']} ({kept})", highlight=False, soft_wrap=True)
    if tour.resection is not None:
        from interp import experts
        from interp.cli.study import show

        show(experts.summary(tour.resection), "monet-mini: each domain's experts switched off in turn, held-out text")
        console.print(RESECTION_LEGEND, highlight=False)
    for path in tour.figures:
        console.print(f"figure: {path}", highlight=False, soft_wrap=True)
    console.print(f"{tour.seconds:.0f} s", highlight=False)


def _layers(residual: pd.DataFrame, attention: pd.DataFrame, name: str) -> Any:
    """Every third layer of the dense model, and the last."""
    from rich.table import Table

    table = Table(title=f"{name}: residual stream and attention", title_justify="left")
    columns = (
        "layer",
        "|resid_post| first token",
        "later tokens",
        "attention entropy, bits",
        "attention on first token",
    )
    for column in columns:
        table.add_column(column, justify="right")
    norm = residual.pivot_table(index="layer", columns="position", values="norm")
    heads = attention.groupby("layer")[["entropy", "first"]].mean()
    for layer in norm.index:
        if layer % 3 == 0 or layer == norm.index[-1]:
            first, later = norm.loc[layer, ["first", "later"]]
            entropy, sink = heads.loc[layer]
            table.add_row(str(layer), f"{first:,.1f}", f"{later:,.1f}", f"{entropy:.2f}", f"{sink:.0%}")
    return table


def _experts(load: pd.DataFrame, name: str) -> Any:
    """Visits per expert in each layer, and which kind of text is most over its even share there."""
    from rich.table import Table

    table = Table(title=f"{name}: tokens per expert", title_justify="left")
    for column in ("layer", "expert", "tokens", "share of the layer", "most from", "its share there"):
        table.add_column(column, justify="right")
    for layer, part in load.groupby("layer"):
        tokens = part.groupby("expert")["tokens"].sum().sort_values(ascending=False)
        for expert in tokens.index[:3]:
            own = part[part["expert"] == expert].sort_values("share").iloc[-1]
            table.add_row(
                str(layer), str(expert), str(tokens[expert]), f"{tokens[expert] / tokens.sum():.0%}",
                str(own["label"]), f"{own['share']:.0%}",
            )  # fmt: skip
    return table
