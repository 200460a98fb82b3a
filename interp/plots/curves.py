"""Curves and distributions, each beside what it must be set against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.plots import found
from interp.plots.style import BASELINES, DASHES, OKABE_ITO, SYMBOLS, escaped, faint, finish, needs, sides

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def dose_response(
    table: pd.DataFrame, title: str, x: str | None = None, unit: str = "nats", metric: str | None = None,
    label: str | None = None,
) -> go.Figure:  # fmt: skip
    """The effect over the dose, with bands: what was measured, and its controls.

    Args:
        table: columns `x`, baseline, value, low, high: of `steering.evaluate` (multiplier) or `experts.dose` (size).
        title: what the figure shows; escaped here.
        x: the dose's column; default multiplier, size or strength, whichever is there.
        unit: of the values.
        metric: the rows of one metric; default those of the first.
        label: the rows of one label, default all (a table of `experts.dose` has several).
    """
    import plotly.graph_objects as go

    dose = x or next((name for name in ("multiplier", "size", "strength") if name in table), "multiplier")
    needs(table, (dose, "baseline", "value", "low", "high"), "dose_response", "steering.evaluate or experts.dose")
    part = _one(table, metric)
    if label is not None:
        part = part[part["label"] == label]
    figure = go.Figure()
    for number, name in enumerate(_controls_first(part)):
        rows = part[part["baseline"] == name].groupby(dose, as_index=False)[["value", "low", "high"]].mean()
        line(figure, rows[dose].tolist(), rows, name, number)
    zero = bool((part[dose] < 0).any())
    name, kind = (f"{dose} (units switched off, log scale)", "log") if dose == "size" else (escaped(dose), "linear")
    figure.update_xaxes(title_text=name, tickvals=sorted(set(part[dose])), type=kind, zeroline=zero)
    figure.update_yaxes(title_text=f"effect ({escaped(unit)})", zeroline=True)
    return finish(figure, title)


def layer_curve(
    table: pd.DataFrame, title: str, unit: str = "accuracy on held-out examples", metric: str | None = None
) -> go.Figure:  # fmt: skip
    """A score over layers with its band, beside its controls; what has no layer (a bag of tokens) is a level line.

    Args:
        table: columns layer, baseline, value, low, high: of `probes.by_layer`.
        title: what the figure shows; escaped here.
        unit: of the values.
        metric: the rows of one metric; default those of the first.
    """
    import plotly.graph_objects as go

    needs(table, ("layer", "baseline", "value", "low", "high"), "layer_curve", "probes.by_layer")
    part = _one(table, metric)
    layers = [float(layer) for layer in part["layer"].dropna()]
    figure = go.Figure()
    for number, name in enumerate(_controls_first(part)):
        rows = part[part["baseline"] == name]
        level = rows["layer"].isna().all()
        rows = rows.head(1) if level else rows.dropna(subset="layer").sort_values("layer")
        if level:
            rows = rows.loc[rows.index.repeat(2)]
        where = [min(layers, default=0), max(layers, default=1)] if level else rows["layer"].astype(float).tolist()
        line(figure, where, rows, name, number, markers=not level)
    figure.update_xaxes(title_text="layer", zeroline=False)
    figure.update_yaxes(title_text=escaped(unit), zeroline=False)
    return finish(figure, title)


def sae_frontier(table: pd.DataFrame, title: str = "", metric: str | None = None) -> go.Figure:
    """What SAEs give back, or leave unexplained, over latents per token: a point per SAE with its interval.

    Args:
        table: columns name, metric, value, low, high: of `sae.pareto`. The line joins the SAEs that no other beats in
            both.
        title: what the figure shows; escaped here. By default it names the best SAE, and the smallest.
        metric: the vertical axis. By default "ce_recovered" where the table has it (upper left is better), which takes
            a model, and else "fvu" (lower left is better).
    """
    import numpy as np
    import plotly.graph_objects as go

    needs(table, ("name", "metric", "value"), "sae_frontier", "sae.pareto")
    wide = table.pivot_table(index="name", columns="metric", values="value")
    metric = metric or ("ce_recovered" if "ce_recovered" in wide else "fvu")
    made = "sae.pareto" if metric == "fvu" else "sae.pareto with a model and texts"
    needs(wide, ("l0", metric), "sae_frontier", made)
    wide = wide.sort_values("l0")
    bounds = table[table["metric"] == metric].set_index("name") if "low" in table else None
    gain = -wide[metric] if metric in found.LESS_IS_BETTER else wide[metric]
    front = wide[gain > gain.cummax().shift(fill_value=-float("inf"))]
    error = None
    if bounds is not None and bounds["low"].notna().all():
        ordered = bounds.loc[wide.index]
        error = {"type": "data", "symmetric": False, "array": ordered["high"] - ordered["value"],
                 "arrayminus": ordered["value"] - ordered["low"]}  # fmt: skip
    figure = go.Figure()
    dashed = {"color": OKABE_ITO[0], "dash": "dash"}
    figure.add_trace(go.Scatter(x=front["l0"], y=front[metric], mode="lines", line=dashed,
                                name="no other SAE is better in both", hoverinfo="skip"))  # fmt: skip
    log = bool((wide["l0"] > 0).all())  # a constant has none
    beside = ("top right", "bottom left") if metric in found.LESS_IS_BETTER else ("bottom right", "top left")
    figure.add_trace(
        go.Scatter(
            x=wide["l0"], y=wide[metric], mode="markers+text", name="SAEs", hovertext=[escaped(n) for n in wide.index],
            # names where they have room: of the best, if there are many
            text=[escaped(n) if len(wide) <= 6 or n in front.index else "" for n in wide.index],
            textposition=sides(np.log(wide["l0"]) if log else wide["l0"], *beside),
            error_y=error, marker={"size": 10, "color": OKABE_ITO[1]}, cliponaxis=False,
            hovertemplate="%{hovertext}: L0 %{x:.1f}, %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    names = {
        "ce_recovered": "loss recovered (share)",
        "explained_variance": "variance explained (share)",
        "fvu": "variance unexplained (FVU, share)",
    }
    figure.update_xaxes(title_text="latents per token (L0)")
    if log:
        ticks = [2**i for i in range(24) if wide["l0"].min() / 2 < 2**i < wide["l0"].max() * 2]
        figure.update_xaxes(title_text="latents per token (L0, log scale)", type="log", tickvals=ticks)
    figure.update_yaxes(title_text=names.get(metric, escaped(metric)))
    return finish(figure, title or found.saes(table, metric))


def distributions(
    table: pd.DataFrame, title: str, value: str = "value", by: str = "label", unit: str = "", bins: int = 60
) -> go.Figure:  # fmt: skip
    """How activations are distributed: one outline per group, each adding up to 1.

    Args:
        table: one row per activation: columns `value` and `by`.
        title: what the figure shows; escaped here.
        value: the column whose values are counted.
        by: the groups that are set side by side.
        unit: of the values.
        bins: of equal width over all groups.
    """
    import numpy as np
    import plotly.graph_objects as go

    needs(table, (value, by), "distributions", "activations, one a row")
    edges = np.histogram_bin_edges(table[value].to_numpy(dtype=float), bins=bins)
    step = edges[1] - edges[0]
    middles = np.concatenate([[edges[0]], edges[1:], [edges[-1] + step]]) - step / 2
    figure = go.Figure()
    for number, (name, part) in enumerate(table.groupby(by, sort=False)):
        counts, _ = np.histogram(part[value].to_numpy(dtype=float), bins=edges)
        counts = np.pad(counts, 1)  # the outline begins and ends on the ground
        colour = OKABE_ITO[number % len(OKABE_ITO)]
        figure.add_trace(
            go.Scatter(
                x=middles, y=counts / max(1, counts.sum()), mode="lines", fill="tozeroy",
                line={"shape": "hvh", "color": colour, "dash": DASHES[number % len(DASHES)]},
                fillcolor=faint(colour, 0.12), name=f"{escaped(name)} ({len(part):,})",
                hovertemplate="%{x:.3g}: %{y:.1%}<extra></extra>",
            )
        )  # fmt: skip
    named = unit if unit and value == "value" else f"{value} ({unit})" if unit else value
    figure.update_xaxes(title_text=escaped(named))
    figure.update_yaxes(title_text="share of the group's rows", tickformat=".0%", rangemode="tozero")
    return finish(figure, title)


def line(figure: Any, x: list[Any], rows: pd.DataFrame, name: str, number: int, markers: bool = True) -> None:
    """A curve with its band; `rows` has value, low, high at `x`."""
    import plotly.graph_objects as go

    colour = OKABE_ITO[(number + 3) % len(OKABE_ITO)]
    shown, colour, dash = BASELINES.get(name, (name, colour, DASHES[number % len(DASHES)]))
    known = rows[["low", "high"]].notna().all(axis=1).all()
    if known:
        band = [*rows["high"], *reversed(rows["low"].tolist())]
        filled = {"fill": "toself", "fillcolor": faint(colour), "mode": "lines", "line": {"width": 0}}
        figure.add_trace(
            go.Scatter(x=[*x, *reversed(x)], y=band, hoverinfo="skip", showlegend=False, legendgroup=name, **filled)
        )
    figure.add_trace(
        go.Scatter(
            x=x, y=rows["value"], name=escaped(shown) + (" (band: 95 %)" if known else ""), legendgroup=name,
            mode="lines+markers" if markers else "lines", customdata=rows[["low", "high"]],
            marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
            line={"color": colour, "dash": dash, "width": 3 if name == "none" else 2},
            hovertemplate="%{x}: %{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>",
        )
    )  # fmt: skip


def _one(table: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    if "metric" not in table:
        return table
    return table[table["metric"] == (metric if metric is not None else table["metric"].iloc[0])]


def _controls_first(table: pd.DataFrame) -> list[str]:
    """Baselines with what was measured last, so that its line lies on top."""
    names = [str(name) for name in dict.fromkeys(table["baseline"])]
    return sorted(names, key=lambda name: (name == "none", name != "random"))
