"""The feature card: one latent, expert or neuron at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp.plots import found
from interp.plots.style import OKABE_ITO, escaped, finish, needs, token

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


_PANELS = {"writes": "what it makes likelier and less likely", "values": "how strongly it fires"}


def feature_card(
    contexts: pd.DataFrame, title: str = "", writes: pd.DataFrame | None = None, values: Sequence[float] | None = None,
    most: int = 8, around: int = 40, name: str = "",
) -> go.Figure:  # fmt: skip
    """Where a feature fires most, how strongly it fires, and which tokens it makes likelier.

    Args:
        contexts: of one feature: columns value (or weight), before, token, after: of `interp.sae.latents.contexts`, or
            `experts.examples`.
        title: what the figure shows; escaped here. By default it says on which token the feature fires, and
            what it makes likelier.
        writes: columns token, value: of `interp.sae.latents.logit_effects` for the same feature; or None.
        values: its activations where it fires; or None.
        most: contexts that are listed.
        around: letters shown on either side of the token.
        name: the feature's, for the default title.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    amount = "value" if "value" in contexts else "weight"
    needs(contexts, (amount, "before", "token", "after"), "feature_card", "sae.latents.contexts or experts.examples")
    small = [panel for panel, given in (("writes", writes), ("values", values)) if given is not None]
    figure = make_subplots(
        rows=1 + bool(small), cols=max(1, len(small)),
        specs=[[{"colspan": max(1, len(small))}, *[None] * (max(1, len(small)) - 1)],
               *([[{} for _ in small]] if small else [])],
        row_heights=[0.56, 0.44] if small else [1.0], vertical_spacing=0.14, horizontal_spacing=0.14,
        subplot_titles=[f"the strongest contexts, and the {amount} at the bold token", *(_PANELS[s] for s in small)],
    )  # fmt: skip
    top = contexts.nlargest(most, amount)
    _contexts(figure, top, amount, around)
    for column, panel in enumerate(small, 1):
        if panel == "writes":
            assert writes is not None
            _writes(figure, writes, column)
        else:
            assert values is not None
            figure.add_trace(go.Histogram(x=list(values), nbinsx=30, showlegend=False, marker={"color": OKABE_ITO[0]}),
                             row=2, col=column)  # fmt: skip
            figure.update_xaxes(title_text=amount, row=2, col=column)
            figure.update_yaxes(title_text="tokens", row=2, col=column)
    height = 200 + 28 * len(top) + (260 if small else 0)
    return finish(figure, title or found.feature(top, writes, name), height)


def _contexts(figure: Any, top: pd.DataFrame, amount: str, around: int) -> None:
    """One line per context with the token in one column, as a concordance has it; a bar on the left for its value."""
    import plotly.graph_objects as go

    full, rows = float(top[amount].max()) or 1.0, list(range(len(top)))
    bars = go.Bar(
        x=top[amount], y=rows, orientation="h", showlegend=False, marker={"color": OKABE_ITO[4]},
        text=[f"{v:.3g}" for v in top[amount]], textposition="inside", insidetextanchor="start", hoverinfo="skip",
        textfont={"color": "#000000"},
    )  # fmt: skip
    figure.add_trace(bars, row=1, col=1)
    before = [_line(str(text)[-around:]) for text in top["before"]]
    after = [f"<b>{token(t)}</b>{_line(str(a)[:around])}" for t, a in zip(top["token"], top["after"], strict=True)]
    # the bars take an eighth of the width; the token begins right of the middle
    for side, texts in (("middle left", before), ("middle right", after)):
        words = go.Scatter(
            x=[4.6 * full] * len(rows), y=rows, mode="text", text=texts, textposition=side, showlegend=False,
            textfont={"size": 12, "family": "ui-monospace, monospace"}, hoverinfo="skip", cliponaxis=False,
        )  # fmt: skip
        figure.add_trace(words, row=1, col=1)
    figure.update_xaxes(visible=False, range=[0, 8 * full], row=1, col=1)
    figure.update_yaxes(visible=False, autorange="reversed", row=1, col=1)


def _writes(figure: Any, writes: pd.DataFrame, column: int) -> None:
    import plotly.graph_objects as go

    needs(writes, ("token", "value"), "feature_card", "sae.latents.logit_effects")
    ordered = writes.sort_values("value")
    both = ordered if len(ordered) <= 12 else ordered.iloc[[*range(6), *range(len(ordered) - 6, len(ordered))]]
    colours = [OKABE_ITO[1] if v > 0 else OKABE_ITO[0] for v in both["value"]]
    figure.add_trace(
        go.Bar(x=both["value"], y=list(range(len(both))), orientation="h", showlegend=False, marker={"color": colours},
               hovertemplate="%{x:+.3f}<extra></extra>"),
        row=2, col=column,
    )  # fmt: skip
    figure.update_xaxes(title_text="change of the logit (direct path)", zeroline=True, row=2, col=column)
    figure.update_yaxes(tickvals=list(range(len(both))), ticktext=[token(t) for t in both["token"]],
                        tickfont_size=11, row=2, col=column)  # fmt: skip


def _line(text: str) -> str:
    """Text in one line, escaped."""
    return escaped(text.replace("\n", "↵"))
