"""Figures of steering. They read only Tables, and text of models or users is escaped before it enters one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.plots.style import DIVERGING, OKABE_ITO, escaped, finish
from steering.evaluate import finding

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

#: baseline -> (what it is called, colour, dash); others follow in order
STYLES = {
    "none": ("the vector (band: 95 % over items)", OKABE_ITO[0], "solid"),
    "random": ("random vectors (band: the middle 95 % of them)", "#666666", "dot"),
    "prompt": ("a prompt that asks for it", OKABE_ITO[1], "dash"),
    "shuffled": ("labels shuffled", OKABE_ITO[2], "dashdot"),
}


def dose_response(table: pd.DataFrame, title: str = "", unit: str = "nats per token") -> go.Figure:
    """Propensity over multipliers with bands: the vector, and everything it must be set against.

    Args:
        table: from `steering.evaluate`.
        title: of the figure; escaped here. By default it says how far the vector steers, and whether random ones do.
        unit: of the value axis.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, name in enumerate(_controls_first(table)):
        _line(figure, table[table["baseline"] == name], name, number)
    figure.update_xaxes(title_text="multiplier", tickvals=sorted(set(table["multiplier"])), zeroline=False)
    figure.update_yaxes(title_text=f"log P(with) - log P(without)<br>{escaped(unit)}")
    return _finish(figure, title or finding(table), 520)


def overview(table: pd.DataFrame, title: str = "") -> go.Figure:
    """Three panels of a report's table: on target with bands, damage to neutral text, and off-target behaviours."""
    from plotly.subplots import make_subplots

    own = table[table["section"] == "on target"]
    damage = table[(table["section"] == "neutral text") & (table["metric"] == "kl") & table["position"].isna()]
    other = table[(table["section"] == "off target") & (table["metric"] == "propensity")]
    panels = ["On target", "Damage to neutral text", *(["Other behaviours"] if len(other) else [])]
    figure = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.12, subplot_titles=panels)
    dose = own[own["metric"] == "propensity"]
    for number, name in enumerate(_controls_first(dose)):
        _line(figure, dose[dose["baseline"] == name], name, number, col=1)
    for number, name in enumerate(_controls_first(damage)):
        _line(figure, damage[damage["baseline"] == name], name, number, col=2, legend=False)
    for number, (label, part) in enumerate(other[other["baseline"] == "none"].groupby("label", sort=False)):
        _line(figure, part, str(label), number + 4, col=3)
    ticks = sorted(set(dose["multiplier"]))
    for col, text in (
        (1, "propensity (nats per token)"),
        (2, "KL (nats per token)"),
        (3, "propensity (nats per token)"),
    )[: len(panels)]:
        figure.update_xaxes(title_text="multiplier", tickvals=ticks, zeroline=False, row=1, col=col)
        figure.update_yaxes(title_text=text, row=1, col=col)
    return _finish(figure, title or finding(dose), 500)


def layers(table: pd.DataFrame, title: str = "") -> go.Figure:
    """Layer x multiplier map of the change of propensity from the unsteered model; from `steering.sweep`."""
    import plotly.graph_objects as go

    grid = table.pivot(index="multiplier", columns="layer", values="value").sort_index(ascending=False)
    if 0.0 in grid.index:
        grid = grid.sub(grid.loc[0.0], axis=1).drop(index=0.0)
    reach = float(grid.abs().max().max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(), x=[str(x) for x in grid.columns], y=[f"{k:+g}" for k in grid.index],
            colorscale=DIVERGING, zmin=-reach, zmax=reach,
            colorbar={"title": {"text": "change<br>(nats per<br>token)"}},
            hovertemplate="layer %{x}, multiplier %{y}: %{z:+.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="multiplier")
    changes = grid.melt(ignore_index=False).reset_index()
    top = changes.iloc[int(changes["value"].abs().argmax())]
    where = f"layer {top['layer']:.0f} at {top['multiplier']:+g}"
    found = f"{where} changes the propensity most, by {top['value']:+.2f} nats per token"
    return _finish(figure, title or found, 420)


def _controls_first(table: pd.DataFrame) -> list[str]:
    """Baselines with the vector last, so that its line lies on top."""
    names = [str(name) for name in dict.fromkeys(table["baseline"])]
    return sorted(names, key=lambda name: (name == "none", name != "random"))


def _line(figure: Any, part: pd.DataFrame, name: str, number: int, col: int | None = None, legend: bool = True) -> None:
    import plotly.graph_objects as go

    label, colour, dash = _style(name, number)
    part = part.sort_values("multiplier")
    x = part["multiplier"].tolist()
    place = {} if col is None else {"row": 1, "col": col}
    band = go.Scatter(
        x=[*x, *reversed(x)], y=[*part["high"], *reversed(part["low"].tolist())], fill="toself",
        fillcolor=_faint(colour), mode="lines", line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=name,
    )  # fmt: skip
    line = go.Scatter(
        x=x, y=part["value"], name=escaped(label), legendgroup=name, showlegend=legend, mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 3 if name == "none" else 2},
        customdata=part[["low", "high"]],
        hovertemplate="%{x:+g}: %{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>",
    )  # fmt: skip
    figure.add_trace(band, **place)
    figure.add_trace(line, **place)


def _style(name: str, number: int) -> tuple[str, str, str]:
    """What a baseline is called, its colour and dash: random ones of any kind alike, none like the vector."""
    if name not in STYLES and name.startswith("random"):
        return (f"{name} (band: the middle 95 % of them)", *STYLES["random"][1:])
    rest = OKABE_ITO[3:]
    return STYLES.get(name, (name, rest[number % len(rest)], "solid"))


def _faint(colour: str) -> str:
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},0.15)"


def _finish(figure: go.Figure, title: str, height: int) -> go.Figure:
    figure.update_layout(legend_y=-0.24, margin={"b": 110, "l": 90})
    return finish(figure, title, height, top=90)
