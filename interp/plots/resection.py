"""Figures of resection experiments: who loses what when a label's experts are switched off. They read only Tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.plots import found
from interp.plots.style import DIVERGING, OKABE_ITO, escaped, finish, log_ticks

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def domain_matrix(table: pd.DataFrame, title: str = "", metric: str = "loss") -> go.Figure:
    """Removed label x label heat map of the change of `metric`, and beside it each removed label against its controls.

    Args:
        table: from `experts.remove_each`, or `experts.evaluate` with a column `removed`.
        title: of the figure; escaped here. By default it says what the labels lose, by random experts
            too.
        metric: loss (nats), perplexity or accuracy.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    own = table[(table["metric"] == metric) & (table["baseline"] == "none")]
    rows = list(dict.fromkeys(own["removed"]))
    labels = list(dict.fromkeys(own["label"]))
    columns = [*(row for row in rows if row in labels), *(label for label in labels if label not in rows)]
    grid = own.pivot(index="removed", columns="label", values="value").loc[rows, columns]
    low = own.pivot(index="removed", columns="label", values="low").loc[rows, columns]
    high = own.pivot(index="removed", columns="label", values="high").loc[rows, columns]
    names = {label: escaped(label) for label in (*rows, *columns)}
    unit = {"loss": "loss (nats)"}.get(metric, metric)
    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.68, 0.32], horizontal_spacing=0.04, shared_yaxes=True,
        subplot_titles=(f"Change of {metric} on each kind of text", "Beside random experts"),
    )  # fmt: skip
    reach = float(grid.abs().max().max()) or 1.0
    figure.add_trace(
        go.Heatmap(
            z=grid.to_numpy(), x=[names[c] for c in columns], y=[names[r] for r in rows],
            # white is no change; orange is harm, blue is gain, as far from white as the largest change
            colorscale=DIVERGING, zmin=-reach, zmax=reach,
            text=grid.map(lambda v: "0" if abs(v) < 0.005 else f"{v:+.2f}").to_numpy(), texttemplate="%{text}",
            textfont={"size": 10}, customdata=[
                [f"{a:+.3f} to {b:+.3f}" for a, b in zip(x, y, strict=True)]
                for x, y in zip(low.to_numpy(), high.to_numpy(), strict=True)
            ],
            hovertemplate="without %{y}: %{x} changes by %{z:+.3f} (95 %: %{customdata})<extra></extra>",
            colorbar={"title": {"text": "nats" if metric == "loss" else metric}, "thickness": 12},
        ),
        row=1, col=1,
    )  # fmt: skip
    here = table[(table["metric"] == metric) & (table["removed"] == table["label"])]
    styles = (("none", "its experts", OKABE_ITO[1], "circle"), ("random", "random experts", OKABE_ITO[6], "x"))
    for baseline, name, colour, symbol in styles:
        part = here[here["baseline"] == baseline]
        error = {
            "type": "data", "symmetric": False, "array": part["high"] - part["value"],
            "arrayminus": part["value"] - part["low"],
        }  # fmt: skip
        marker = {"color": colour, "symbol": symbol, "size": 9}
        labels = [names[label] for label in part["removed"]]
        dots = go.Scatter(x=part["value"], y=labels, error_x=error, mode="markers", name=name, marker=marker)
        figure.add_trace(dots, row=1, col=2)
    figure.update_xaxes(title_text="text", tickangle=-45, row=1, col=1)
    figure.update_yaxes(title_text="experts removed", autorange="reversed", row=1, col=1)
    figure.update_xaxes(title_text=f"change of {unit}", zeroline=True, row=1, col=2)
    # the rows of both panels are the same; their names stand once
    figure.update_layout(legend={"x": 1.0, "xanchor": "right", "yref": "container", "y": 0.02, "yanchor": "bottom"},
                         margin={"b": 130, "l": 110})  # fmt: skip
    return finish(figure, title or found.removal(table, metric), max(420, 230 + 30 * len(rows)), top=100)


def frontiers(table: pd.DataFrame, title: str = "", damage: float | None = None) -> go.Figure:
    """Damage against spill of each method, one line per method; upper left is better.

    Args:
        table: from `experts.frontier`, several of them one below the other.
        title: of the figure; escaped here. By default it says how deep the deepest cut goes, and at what cost.
        damage: draws the level at which methods are compared.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    symbols = ("circle", "square", "diamond", "x", "triangle-up")
    for number, (method, part) in enumerate(table.groupby("method", sort=False)):
        curve = part[(part["spill"] > 0)].sort_values("spill")
        style = {"color": OKABE_ITO[number % len(OKABE_ITO)]}
        figure.add_trace(
            go.Scatter(
                x=curve["spill"], y=curve["damage"], mode="lines+markers", name=escaped(method), line=style,
                marker={**style, "symbol": symbols[number % len(symbols)], "size": 8},
                customdata=curve[["selectivity", "share_of_all"]],
                hovertemplate="spill %{x:.3f}, damage %{y:.3f}, selectivity %{customdata[0]:.1f}, "
                "%{customdata[1]:.2%} of all units<extra></extra>",
            )
        )  # fmt: skip
    if damage is not None:
        figure.add_hline(y=damage, line_dash="dot", annotation_text=f"{damage:g} nats")
    figure.update_xaxes(title_text="spill: mean |change| of the other labels (nats, log scale)", type="log",
                        **log_ticks(table["spill"]))  # fmt: skip
    figure.update_yaxes(title_text="damage (nats)")
    figure.update_layout(showlegend=True)
    return finish(figure, title or found.frontier(table), 480)
