"""Heat maps: experts by layer and label, routing over a text, and a text with its tokens coloured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp.plots.style import DIVERGING, escaped, finish, needs, token

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def expert_heat(
    table: pd.DataFrame, title: str, value: str = "value", unit: str = "", labels: Sequence[str] | None = None
) -> go.Figure:  # fmt: skip
    """Layer x expert, a panel per label, all on one colour scale.

    Args:
        table: columns layer, expert, label and `value`: of `experts.attribute`, `experts.sweep`, or of
            `RoutingStats.frame` (``value="mass"``).
        title: what the figure shows; escaped here.
        value: the column that is coloured. A column with a sign is white at 0.
        unit: of that column, for the colour bar.
        labels: which labels, in which order; default all.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    needs(table, ("layer", "expert", "label", value), "expert_heat", "experts.attribute or RoutingStats.frame")
    chosen = list(dict.fromkeys(table["label"])) if labels is None else list(labels)
    layers = sorted(table["layer"].unique())
    height = (30 + 18 * len(layers)) * len(chosen) + 40 * (len(chosen) - 1)  # of the panels and the names between them
    figure = make_subplots(
        rows=len(chosen), cols=1, shared_xaxes=True, subplot_titles=[escaped(label) for label in chosen],
        vertical_spacing=40 / height,
    )  # fmt: skip
    signed, top = _scale(table.loc[table["label"].isin(chosen), value])
    for row, label in enumerate(chosen, 1):
        part = table[table["label"] == label]
        grid = part.pivot_table(index="layer", columns="expert", values=value, aggfunc="mean").reindex(layers)
        heat = go.Heatmap(
            z=grid.to_numpy(dtype=float), x=grid.columns.tolist(), y=[str(layer) for layer in grid.index],
            showscale=row == 1, hovertemplate="layer %{y}, expert %{x}: %{z:.4g}<extra></extra>",
            **_colours(signed, top, unit or value),
        )  # fmt: skip
        figure.add_trace(heat, row=row, col=1)
        figure.update_yaxes(title_text="layer", autorange="reversed", type="category", row=row, col=1)
    figure.update_xaxes(title_text="expert", row=len(chosen), col=1)
    return finish(figure, title, 170 + height, top=90)


def routing(table: pd.DataFrame, title: str, tokens: Sequence[str] | None = None, most: int = 40) -> go.Figure:
    """Which experts each token of a text goes to, and with which weight: expert x position.

    Args:
        table: columns position, expert, weight: of ``acts.experts(layer).frame()``, one row of a batch.
        title: what the figure shows; escaped here.
        tokens: the text of each position; escaped here.
        most: the experts with the largest total weight that are drawn.
    """
    import plotly.graph_objects as go

    needs(table, ("position", "expert", "weight"), "routing", "acts.experts(layer).frame()")
    total = table.groupby("expert")["weight"].sum().sort_values(ascending=False)
    shown = sorted(total.index[:most])
    grid = table.pivot_table(index="expert", columns="position", values="weight", aggfunc="sum").reindex(shown)
    left = f", the {most} heaviest of {len(total)} experts" if len(total) > most else ""
    names = [f"{p} {token(tokens[int(p)])}" if tokens is not None and int(p) < len(tokens) else str(p)
             for p in grid.columns]  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(dtype=float), x=names, y=[str(e) for e in grid.index], xgap=1, ygap=1,
            hovertemplate="%{x}<br>expert %{y}: weight %{z:.3f}<extra></extra>",
            **_colours(False, float(table["weight"].max()), "routing<br>weight"),
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="token", tickangle=-60)
    figure.update_yaxes(title_text="expert", type="category", dtick=1)
    figure.update_layout(margin_b=130)
    return finish(figure, title + left, 220 + 15 * len(shown))


def token_highlight(
    table: pd.DataFrame, title: str, value: str = "value", unit: str = "", per_line: int | None = None
) -> go.Figure:  # fmt: skip
    """A text with each token on a ground that is darker for larger values.

    Args:
        table: columns token (text) and `value`, in reading order; with a column text (or batch), one block per text.
        title: what the figure shows; escaped here.
        value: the column that is coloured. A column with a sign is white at 0.
        unit: of that column, for the colour bar.
        per_line: tokens in a line; default as many as stand side by side in a notebook.
    """
    import plotly.graph_objects as go

    needs(table, ("token", value), "token_highlight", "a text's tokens with a number each")
    group = next((name for name in ("text", "batch") if name in table), None)
    if per_line is None:  # letters of 8 pixels in 820
        per_line = max(4, min(14, 820 // (8 * max(len(str(t)) for t in table["token"]) + 8)))
    blocks = [table] if group is None else [part for _, part in table.groupby(group, sort=False)]
    z: list[list[float | None]] = []
    words: list[list[str]] = []
    for block in blocks:
        for start in range(0, len(block), per_line):
            line = block.iloc[start : start + per_line]
            blank = per_line - len(line)
            z.append([*line[value].astype(float), *[None] * blank])
            words.append([*map(token, line["token"]), *[""] * blank])
    signed, top = _scale(table[value])
    colours = _colours(signed, top, unit or value, light=True)
    # lies below the text, as long for one line as for ten
    colours["colorbar"] = {
        "title": {"text": escaped(unit or value), "side": "right"}, "orientation": "h", "thickness": 10, "nticks": 5,
        "len": 0.4, "x": 0.0, "xanchor": "left", "y": 0.0, "yanchor": "top", "ypad": 14,
    }  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=z, text=words, texttemplate="%{text}", textfont={"size": 13, "family": "ui-monospace, monospace"}, ygap=5,
            hovertemplate="%{text}: %{z:.4g}<extra></extra>", **colours,
        )
    )  # fmt: skip
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed")
    figure.update_layout(margin={"l": 20, "b": 70}, plot_bgcolor="#FFFFFF")
    return finish(figure, title, 150 + 34 * len(z))


def _scale(values: Any) -> tuple[bool, float]:
    """Whether a column has a sign, and the value at which its colour is full."""
    return bool((values < 0).any()), float(values.abs().max()) or 1.0


def _colours(signed: bool, top: float, name: str, light: bool = False) -> dict[str, Any]:
    """Colour arguments of a heat map. `light` leaves black text readable on every colour."""
    bar = {"title": {"text": name if "<br>" in name else escaped(name)}, "thickness": 12}
    if signed:
        return {"colorscale": DIVERGING, "zmin": -top, "zmax": top, "colorbar": bar}
    scale: Any = [[0.0, "#FFFFFF"], [1.0, "#E69F00"]] if light else "Cividis"
    return {"colorscale": scale, "zmin": 0.0, "zmax": top, "colorbar": bar}
