"""The overview of a model: residual norms, attention entropy, expert load. It reads only Tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.plots.style import OKABE_ITO, escaped, finish, log_ticks

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def overview(residual: pd.DataFrame, attention: pd.DataFrame, load: pd.DataFrame, title: str) -> go.Figure:
    """Three panels: how large the residual stream is, how spread attention is, which experts do the work.

    Args:
        residual: columns layer, position ("first" or "later"), norm.
        attention: columns layer, head, entropy (bits).
        load: columns layer, label, expert, share (of that label's tokens and slots in that layer, 0..1).
        title: of the figure; escaped here.
    """
    from plotly.subplots import make_subplots

    lines = 14 * len(load.groupby(["layer", "label"]))  # the height of the lower panel
    figure = make_subplots(
        rows=2, cols=2, specs=[[{}, {}], [{"colspan": 2}, None]], row_heights=[280, max(140, lines)],
        horizontal_spacing=0.12, vertical_spacing=110 / (390 + max(140, lines)),
        subplot_titles=("Residual stream", "Attention", "Experts, by kind of text"),
    )  # fmt: skip
    _residual_panel(figure, residual)
    _attention_panel(figure, attention)
    _load_panel(figure, load)
    figure.update_layout(legend={"yref": "container", "y": 0.01, "yanchor": "bottom"}, margin_b=120)
    return finish(figure, title, 600 + max(140, lines), top=90)


def _residual_panel(figure: go.Figure, residual: pd.DataFrame) -> None:
    import plotly.graph_objects as go

    dashes = {"first": "dash", "later": "solid"}
    for colour, (position, part) in zip(OKABE_ITO, residual.groupby("position", sort=True), strict=False):
        line = {"color": colour, "dash": dashes.get(str(position), "solid")}
        name = f"{escaped(position)} tokens" if position != "first" else "first token of a text"
        figure.add_trace(go.Scatter(x=part["layer"], y=part["norm"], name=name, line=line), row=1, col=1)
    figure.update_xaxes(title_text="layer", row=1, col=1)
    figure.update_yaxes(title_text="mean length of resid_post (log scale)", type="log", row=1, col=1,
                        **log_ticks(residual["norm"]))  # fmt: skip


def _attention_panel(figure: go.Figure, attention: pd.DataFrame) -> None:
    import plotly.graph_objects as go

    by_layer = attention.groupby("layer")["entropy"].agg(["min", "mean", "max"])
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("max", "most spread head", {"color": OKABE_ITO[2], "width": 1}),
        ("min", "sharpest head", {"color": OKABE_ITO[2], "width": 1, "dash": "dot"}),
        ("mean", "mean over heads", {"color": OKABE_ITO[2], "width": 3}),
    ]
    for column, name, line in rows:
        fill = {"fill": "tonexty", "fillcolor": "rgba(0,158,115,0.15)"} if column == "min" else {}
        trace = go.Scatter(x=by_layer.index, y=by_layer[column], name=name, line=line, **fill)
        figure.add_trace(trace, row=1, col=2)
    figure.update_xaxes(title_text="layer", row=1, col=2)
    figure.update_yaxes(title_text="entropy of the pattern (bits)", rangemode="tozero", row=1, col=2)


def _load_panel(figure: go.Figure, load: pd.DataFrame) -> None:
    """One row per (layer, label), one column per expert: rows of one layer that differ are specialisation."""
    import plotly.graph_objects as go

    table = load.pivot_table(index=["layer", "label"], columns="expert", values="share", sort=True)
    figure.add_trace(
        go.Heatmap(
            z=table.to_numpy(),
            x=[str(expert) for expert in table.columns],
            y=[f"{layer} · {escaped(label)}" for layer, label in table.index],
            colorscale="Cividis",
            zmin=0,
            colorbar={
                "title": {"text": "share of<br>slots"},
                "tickformat": ".0%",
                "thickness": 12,
                "len": 0.5,
                "y": 0.0,
                "yanchor": "bottom",
            },
            hovertemplate="layer · text %{y}<br>expert %{x}<br>%{z:.1%} of the slots<extra></extra>",
        ),
        row=2,
        col=1,
    )
    figure.update_xaxes(title_text="expert", row=2, col=1)
    figure.update_yaxes(title_text="layer · text", autorange="reversed", dtick=1, tickfont_size=10, row=2, col=1)
