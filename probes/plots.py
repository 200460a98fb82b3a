"""Figures of probes, each from a Table by one call; they look as all of `interp.plots` do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def by_layer(table: pd.DataFrame, title: str = "") -> go.Figure:
    """Held-out accuracy against the layer with its interval, beside the controls of `probes.by_layer`.

    By default the title says where it is read best (by validation, where the table knows it), how well, and what the
    controls reach.
    """
    from interp.plots import layer_curve

    a = table.attrs
    own = table[table["baseline"] == "none"].set_index("node")
    by = "validation" if "validation" in own else "value"
    best: Any = a["best"] if a.get("best") in own.index else own[by].idxmax()
    found = f"{best} reads it best: {own.loc[best, 'value']:.0%} of unseen examples"
    controls = [(kind, part) for kind, part in table.groupby("baseline", sort=False) if kind != "none"]
    beside = [f"{kind} {(part[part['node'] == best] if best in set(part['node']) else part)['value'].iloc[0]:.0%}"
              for kind, part in controls]  # fmt: skip
    found += f" ({', '.join(beside)})" if beside else ""
    unit = "balanced accuracy" if a.get("metric") == "balanced" else "accuracy"
    figure = layer_curve(table, title or found, unit=f"{unit} on held-out examples")
    return figure.update_yaxes(range=[0, 1.03], tickformat=".0%")


def causal(table: pd.DataFrame, title: str = "") -> go.Figure:
    """The metric against the push along the probe's direction, with its interval, beside random directions."""
    from interp.plots import dose_response

    verdict = "follows" if table.attrs.get("causal") else "does not follow"
    where = str(table.node.iloc[0])
    figure = dose_response(table, title or f"The output {verdict} the probe's direction at {where}", x="strength")
    figure.update_xaxes(title_text="push along the direction (standard deviations of the data)")
    return figure.update_yaxes(title_text="log odds of the words (nats)")


def concepts(table: pd.DataFrame, level: float = 0.05, title: str = "") -> go.Figure:
    """TCAV over layers: the concept's score beside the range of random concepts; filled where it is significant.

    Args:
        table: the frames of `probes.tcav` at several sites, one below the other.
        level: chance of a false alarm at any of the sites: each is tested at level / sites (Bonferroni).
        title: what the figure shows; by default at how many sites the concept matters.
    """
    import plotly.graph_objects as go

    from interp.plots.style import BASELINES, OKABE_ITO, finish, needs
    from interp.sites import Site

    needs(table, ("node", "baseline", "value", "low", "high", "p_value"), "concepts", "probes.tcav")
    table = table.assign(layer=table.node.map(lambda node: Site.parse(node).layer)).sort_values("layer")
    mine, random = table[table.baseline == "none"], table[table.baseline == "random"]
    real = (mine.p_value < level / len(mine)).tolist()
    figure = go.Figure()
    grey = BASELINES["random"][1]
    figure.add_scatter(
        x=random.layer, y=random.value, mode="markers", name="random concepts, 95 %",
        marker={"color": grey, "symbol": "line-ew-open", "size": 11},
        error_y={"type": "data", "symmetric": False, "array": random.high - random.value,
                 "arrayminus": random.value - random.low, "thickness": 7, "width": 0, "color": "rgba(102,102,102,0.3)"},
    )  # fmt: skip
    for wanted, name, symbol in (
        (True, "concept, significant", "circle"),
        (False, "concept, not significant", "circle-open"),
    ):
        rows = mine[[is_real == wanted for is_real in real]]
        if len(rows):
            figure.add_scatter(
                x=rows.layer, y=rows.value, mode="markers", name=name, customdata=rows.p_value,
                marker={"color": OKABE_ITO[0], "symbol": symbol, "size": 11, "line": {"width": 2}},
                hovertemplate="layer %{x}: %{y:.2f}, p = %{customdata:.2g}<extra></extra>",
            )  # fmt: skip
    figure.add_hline(y=0.5, line={"color": "#999999", "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text="layer", zeroline=False, tickvals=mine.layer.tolist())
    figure.update_yaxes(title_text="TCAV score (share of inputs)", range=[-0.05, 1.05], zeroline=False)
    found = f"The output is sensitive to the concept at {sum(real)} of {len(real)} layers (p < {level:g} / {len(real)})"
    return finish(figure, title or found)
