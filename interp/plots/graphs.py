"""Graphs: which experts work together. (Circuits are drawn in `interp.plots.patching`.)"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from interp.plots.style import OKABE_ITO, PlotError, finish, needs

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def coactivation(table: pd.DataFrame, title: str, layer: int | None = None, most: int = 40) -> go.Figure:
    """The experts of one layer on a ring, a line per pair that is used by the same tokens: thicker for a larger share,
    orange where the pair meets more often than two independent experts would, blue where less.

    Args:
        table: columns layer, expert, other, value, lift: of `experts.coactivation`.
        title: what the figure shows; escaped here.
        layer: which layer; default the table's first.
        most: pairs that are drawn, by value; the title says if there are more.
    """
    import plotly.graph_objects as go

    needs(table, ("layer", "expert", "other", "value", "lift"), "coactivation", "experts.coactivation")
    chosen = int(table["layer"].iloc[0]) if layer is None else layer
    here = table[table["layer"] == chosen].sort_values("value", ascending=False)
    if not len(here):
        raise PlotError(f"layer={chosen}: the table has layers {sorted(set(table['layer']))}")
    drawn = here.head(most)
    experts = sorted({*drawn["expert"], *drawn["other"]})
    at = {e: (math.cos(2 * math.pi * i / len(experts)), math.sin(2 * math.pi * i / len(experts)))
          for i, e in enumerate(experts)}  # fmt: skip
    figure = go.Figure()
    top = float(drawn["value"].max()) or 1.0
    for row in drawn.to_dict("records"):
        (x0, y0), (x1, y1) = at[row["expert"]], at[row["other"]]
        figure.add_trace(
            go.Scatter(
                # bowed towards the middle, so that lines of neighbours do not lie on the ring
                x=[x0, 0.35 * (x0 + x1), x1], y=[y0, 0.35 * (y0 + y1), y1], mode="lines", opacity=0.7, hoverinfo="text",
                text=f"{row['expert']} with {row['other']}: {row['value']:.1%} of its tokens, lift {row['lift']:.2f}",
                line={"shape": "spline", "width": 0.5 + 5 * row["value"] / top,
                      "color": OKABE_ITO[1] if row["lift"] >= 1 else OKABE_ITO[0]},
                showlegend=False,
            )
        )  # fmt: skip
    for colour, name in (
        (OKABE_ITO[1], "together more than by chance"),
        (OKABE_ITO[0], "together less than by chance"),
    ):
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line={"color": colour, "width": 4}, name=name))
    figure.add_trace(
        go.Scatter(
            x=[1.1 * at[e][0] for e in experts], y=[1.1 * at[e][1] for e in experts], mode="text", showlegend=False,
            text=[str(e) for e in experts], hoverinfo="skip", cliponaxis=False,
        )
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-1.3, 1.3])
    figure.update_yaxes(visible=False, range=[-1.3, 1.3], scaleanchor="x")
    more = f", the {most} largest of {len(here)} pairs" if len(here) > most else ""
    figure.update_layout(legend_y=-0.05)
    return finish(figure, f"{title} (layer {chosen}{more})", 560)
