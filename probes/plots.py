"""Figures of probes, each from a Table by one call."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from interp.plots import OKABE_ITO

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def by_layer(table: pd.DataFrame, title: str = "") -> go.Figure:
    """Held-out accuracy against the layer with its interval, beside the controls of `probes.by_layer`."""
    import plotly.graph_objects as go

    figure = go.Figure()
    names = {"none": "probe", "shuffled": "shuffled labels", "random model": "random weights"}
    for i, (baseline, name) in enumerate(names.items()):
        part = table[(table.baseline == baseline) & table.layer.notna()].sort_values("layer")
        if not len(part):
            continue
        layers = part.layer.astype(int)
        figure.add_scatter(
            x=layers, y=part.value, name=name, mode="lines+markers", line_color=OKABE_ITO[i],
            line_dash="solid" if baseline == "none" else "dot",
            error_y={"type": "data", "symmetric": False, "array": part.high - part.value,
                     "arrayminus": part.value - part.low, "thickness": 1} if baseline == "none" else None,
        )  # fmt: skip
    for row in table[table.baseline == "bag of tokens"].to_dict("records"):
        figure.add_hline(y=row["value"], line_dash="dash", line_color="#777777", annotation_text="bag of tokens")
    best, value = table.attrs.get("best", ""), table.attrs.get("best_value", float("nan"))
    found = f"{best} reads it best (chosen on validation): {value:.0%} on unseen examples"
    return figure.update_layout(
        title=html.escape(title or found), template="plotly_white", height=460, font_size=13,
        xaxis_title="layer", yaxis_title=f"held-out {table.attrs.get('metric', 'accuracy')}", yaxis_range=[0, 1.03],
    )  # fmt: skip


def causal(table: pd.DataFrame, title: str = "") -> go.Figure:
    """The metric against the push along the probe's direction, with its interval, beside random directions."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, (baseline, name) in enumerate((("none", "probe's direction"), ("random", "random directions"))):
        part = table[table.baseline == baseline].sort_values("strength")
        if not len(part):
            continue
        color = OKABE_ITO[i]
        for edge, fill in (("high", None), ("low", "tonexty")):
            figure.add_scatter(
                x=part.strength, y=part[edge], mode="lines", line_width=0, line_color=color, showlegend=False,
                fill=fill, opacity=0.25, hoverinfo="skip",
            )  # fmt: skip
        figure.add_scatter(x=part.strength, y=part.value, name=name, mode="lines+markers", line_color=color)
    verdict = "follows" if table.attrs.get("causal") else "does not follow"
    return figure.update_layout(
        title=html.escape(title or f"The output {verdict} the probe's direction"), template="plotly_white", height=460,
        font_size=13, xaxis_title="push (standard deviations of the data along it)",
        yaxis_title=html.escape(str(table.metric.iloc[0])),
    )  # fmt: skip
