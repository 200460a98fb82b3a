"""Figures of patching: where in the model, where in the text, and a circuit as a graph. They read only Tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp.plots import found
from interp.plots.style import DIVERGING, OKABE_ITO, escaped, finish

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


#: What a metric is measured in, where its name does not say it.
UNITS = {"logit_diff": "logit_diff<br>(logits)", "log_prob": "log_prob<br>(nats)", "kl": "kl<br>(nats)"}


def heat_maps(table: pd.DataFrame, title: str = "", tokens: Sequence[str] | None = None) -> go.Figure:
    """Effects as heat maps: layer x position, and for heads layer x head.

    A cell that stands for several nodes (a head at all positions, a position with all heads) shows the largest by size;
    sums would count joint effects twice.

    Args:
        table: of `patching.patch` or `attribute`, one kind of site or several (one row of panels each).
        title: of the figure; escaped here. By default it names the strongest node and its share of the difference.
        tokens: text of each position, for the axis; escaped here.
    """
    from plotly.subplots import make_subplots

    sites = list(dict.fromkeys(table["site"]))
    panels = [(site, axis) for site in sites for axis in _axes(table[table["site"] == site])]
    columns = max(1, max(sum(s == site for s, _ in panels) for site in sites)) if panels else 1
    figure = make_subplots(
        rows=len(sites), cols=columns, horizontal_spacing=0.12, vertical_spacing=0.34 / max(len(sites), 2),
        subplot_titles=[escaped(f"{s}: layer x {a}") if a else "" for s, a in _grid(panels, sites, columns)],
    )  # fmt: skip
    reach = float(table["value"].abs().max()) or 1.0
    for row, site in enumerate(sites, 1):
        part = table[table["site"] == site]
        for column, axis in enumerate(_axes(part), 1):
            figure.add_trace(_heat(part, axis, reach, tokens, first=row == column == 1), row=row, col=column)
            figure.update_yaxes(title_text="layer", autorange="reversed", row=row, col=column)
            figure.update_xaxes(title_text=axis, row=row, col=column)
            if axis == "position" and tokens is not None:
                figure.update_xaxes(tickangle=-60, tickfont_size=10, row=row, col=column)
    figure.update_layout(margin_b=110)
    return finish(figure, title or found.patching(table, tokens), 110 + 430 * len(sites), top=100)


def _axes(part: pd.DataFrame) -> list[str]:
    """The horizontal axes that make sense for one kind of site."""
    kinds = [axis for axis in ("head", "expert", "neuron") if axis in part.columns and part[axis].notna().any()]
    several = part["position"].nunique() > (1 if kinds else 0)  # one position beside its heads tells nothing new
    return kinds[:1] + (["position"] if several else [])


def _grid(panels: list[tuple[str, str]], sites: list[str], columns: int) -> list[tuple[str, str]]:
    """Panel names row by row, with gaps."""
    out: list[tuple[str, str]] = []
    for site in sites:
        own = [p for p in panels if p[0] == site]
        out += own + [(site, "")] * (columns - len(own))
    return out


def _heat(part: pd.DataFrame, axis: str, reach: float, tokens: Sequence[str] | None, first: bool) -> Any:
    import plotly.graph_objects as go

    known = part[part[axis].notna()].assign(size=part["value"].abs())
    best = known.loc[known.groupby(["layer", axis])["size"].idxmax()]
    grid = best.pivot(index="layer", columns=axis, values="value").sort_index()
    names = best.pivot(index="layer", columns=axis, values="node").sort_index()
    labels = [str(c) for c in grid.columns]
    if axis == "position" and tokens is not None:
        labels = [
            f"{c} {escaped(repr(tokens[int(c)])[1:-1])}" if int(c) < len(tokens) else str(c) for c in grid.columns
        ]
    metric = str(part["metric"].iloc[0])
    return go.Heatmap(
        z=grid.to_numpy(dtype=float), x=labels, y=[str(i) for i in grid.index], colorscale=DIVERGING, zmin=-reach,
        zmax=reach, customdata=names.map(lambda n: escaped(n)).to_numpy(), showscale=first,
        colorbar={"title": {"text": UNITS.get(metric, escaped(metric))}, "thickness": 12},
        hovertemplate="%{customdata}<br>" + axis + " %{x}<br>%{z:+.3f}<extra></extra>",
    )  # fmt: skip


def circuit(edges: pd.DataFrame, title: str, most: int = 150) -> go.Figure:
    """A circuit as a graph: layers from below, a line per edge, thicker where the score is larger.

    Args:
        edges: columns writer, reader and value (`Circuit.frame`, or rows of `attribute_edges`).
        title: of the figure; escaped here.
        most: draw the largest so many edges, and say in the title if there are more.
    """
    import plotly.graph_objects as go

    drawn = edges.assign(size=edges["value"].abs()).sort_values("size", ascending=False).head(most)
    places = _places(drawn)
    figure = go.Figure()
    largest = float(drawn["size"].max()) or 1.0
    for writer, reader, value in zip(drawn["writer"], drawn["reader"], drawn["value"].astype(float), strict=True):
        (x0, y0), (x1, y1) = places[_unit(writer)], places[_unit(reader)]
        figure.add_trace(
            go.Scatter(
                x=[x0, (x0 + x1) / 2, x1], y=[y0, (y0 + y1) / 2, y1], mode="lines", hoverinfo="text",
                text=escaped(f"{writer} -> {reader}: {value:+.3f}"), showlegend=False, opacity=0.6,
                line={"color": OKABE_ITO[1] if value > 0 else OKABE_ITO[0], "width": 0.5 + 4.5 * abs(value) / largest},
            )
        )  # fmt: skip
    units = list(places)
    figure.add_trace(
        go.Scatter(
            x=[places[u][0] for u in units], y=[places[u][1] for u in units], mode="markers+text", showlegend=False,
            text=[escaped(_short(u)) for u in units], textposition="middle right", textfont={"size": 10},
            marker={"size": 9, "color": "#333333"}, hoverinfo="text",
        )
    )  # fmt: skip
    for colour, name in ((OKABE_ITO[1], "raises the metric"), (OKABE_ITO[0], "lowers it")):
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line={"color": colour, "width": 4}, name=name))
    more = f", the {most} largest of {len(edges)} edges" if len(edges) > most else f", {len(edges)} edges"
    figure.update_xaxes(visible=False, range=[-0.08, 1.15])
    layers = _layers(units)
    figure.update_yaxes(
        title_text="layer (MLPs above heads)", showgrid=False, zeroline=False, tickmode="array",
        tickvals=[2 * i + 0.5 for i in layers], ticktext=[str(i) for i in layers],
    )  # fmt: skip
    figure.update_layout(legend_y=-0.04)
    return finish(figure, title + more, max(480, 46 * (2 + len({y for _, y in places.values()}))))


def _unit(name: str) -> str:
    """A writer's or reader's node: the queries, keys and values of a head are the head."""
    kind, _, inside = name.partition("[")
    return {"q": "z", "k": "z", "v": "z", "mlp_in": "mlp_out", "attn_in": "attn_out"}.get(kind, kind) + (
        f"[{inside}" if inside else ""
    )


def _short(unit: str) -> str:
    kind, _, inside = unit.rstrip("]").partition("[")
    layer, _, head = inside.partition(", head=")
    return f"{layer}.{head}" if head else {"mlp_out": f"mlp {layer}", "attn_out": f"attn {layer}"}.get(kind, kind)


def _layers(units: Sequence[str]) -> list[int]:
    return sorted({int(u.partition("[")[2].rstrip("]").partition(",")[0]) for u in units if "[" in u})


def _places(edges: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """x (spread within a row) and y (twice the layer, + 1 for MLPs) of every node."""
    rows: dict[float, list[str]] = {}
    units = dict.fromkeys(_unit(name) for pair in zip(edges["writer"], edges["reader"], strict=True) for name in pair)
    top = max(_layers(list(units)), default=0)
    for unit in units:
        kind, _, inside = unit.rstrip("]").partition("[")
        layer = {"embed": -1.0, "logits": 2.0 * top + 2}.get(kind)
        y = layer if layer is not None else 2.0 * int(inside.partition(",")[0]) + (kind == "mlp_out")
        rows.setdefault(y, []).append(unit)
    out = {}
    for y, row in rows.items():
        row.sort(key=lambda u: int(u.rpartition("=")[2].rstrip("]")) if "head=" in u else 0)
        for i, unit in enumerate(row):  # heads side by side, MLPs in a column of their own
            out[unit] = (1.0 if unit.startswith("mlp") else 0.9 * (i + 0.5) / len(row), y)
    return out
