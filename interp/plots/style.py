"""How figures look: one plotly template, one palette, one way to save.

The template is registered with plotly under the name ``interp`` when the first figure is made, and every figure of ours
names it; plotly's default is never touched, so figures of other packages look as they did.

Colours are those of Okabe and Ito, told apart with every common form of colour blindness, and lines differ in dash or
marker too. Amounts are cividis; what has a sign is blue below 0, white at 0, orange above.
"""

from __future__ import annotations

import html
import math
import os
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
#: Blue: below 0; white: 0; orange: above.
DIVERGING = [[0.0, OKABE_ITO[0]], [0.5, "#FFFFFF"], [1.0, OKABE_ITO[1]]]
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "x", "triangle-up", "cross")
#: Letters of a title that a line of 900 pixels, the width of a notebook, has room for.
LINE = 95
#: The name under which the template is registered with plotly.
TEMPLATE = "interp"

#: baseline -> (what it is called, colour, dash); baselines without a line here follow in the palette's order
BASELINES = {
    "none": ("measured", OKABE_ITO[0], "solid"),
    "random": ("random controls", "#666666", "dot"),
    "shuffled": ("labels shuffled", OKABE_ITO[2], "dashdot"),
    "bag of tokens": ("bag of tokens", OKABE_ITO[1], "dash"),
    "random model": ("random weights", OKABE_ITO[3], "longdash"),
    "prompt": ("a prompt that asks for it", OKABE_ITO[1], "dash"),
    "neurons": ("neurons of the dense model", OKABE_ITO[2], "dash"),
}


class PlotError(ValueError):
    """A Table without the columns that a figure draws, or a picture that cannot be made here."""


def template() -> str:
    """The template's name, registered with plotly if it is not yet; nothing is set as default."""
    import plotly.graph_objects as go
    import plotly.io as pio

    if TEMPLATE not in pio.templates:
        made = go.layout.Template(pio.templates["plotly_white"])
        made.layout.update(
            font={"family": "system-ui, sans-serif", "size": 13, "color": "#1a1a1a"},
            colorway=list(OKABE_ITO), title={"x": 0.01, "xanchor": "left", "font": {"size": 16}},
            margin={"t": 80, "b": 80, "l": 80, "r": 30}, hoverlabel={"align": "left"},
            legend={"orientation": "h", "y": -0.22, "x": 0.0},
            colorscale={"sequential": "Cividis", "diverging": DIVERGING},
        )  # fmt: skip
        pio.templates[TEMPLATE] = made
    return TEMPLATE


def finish(figure: go.Figure, title: str, height: int = 460, top: int = 80) -> go.Figure:
    """Title (escaped, in as many lines as it needs), template, height and the margin above: the last line of every
    figure."""
    lines = textwrap.wrap(title, LINE)
    more = 22 * max(0, len(lines) - 1)
    figure.update_layout(title_text="<br>".join(map(escaped, lines)), template=template(), height=height + more,
                         margin_t=top + more)  # fmt: skip
    return figure


def escaped(text: Any) -> str:
    """Text for plotly, which reads some HTML in titles, ticks and hover texts, but few entities by their names."""
    return html.escape(str(text)).replace("&quot;", "&#34;")


def token(text: Any) -> str:
    """A token as one shows it: a blank as a low line, a line break as an arrow; escaped."""
    return escaped(str(text).replace("\n", "↵").replace(" ", "\u2423"))


def log_ticks(values: Iterable[float]) -> dict[str, Any]:
    """Ticks of a log axis at 1, 2 and 5 of each decade (1 where there are many), each written out."""
    known = [float(v) for v in values if v > 0]
    if not known:
        return {}
    low, high = math.log10(min(known)), math.log10(max(known))
    steps = (1, 2, 5) if high - low < 3 else (1,)
    at = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in steps]
    return {"tickvals": at, "ticktext": [f"{v:,g}" for v in at]}


def sides(x: Iterable[float], left: str, right: str) -> list[str]:
    """Where names stand beside points, so that none leaves the figure: `left` for points of the left half."""
    at = list(x)
    middle = (min(at) + max(at)) / 2
    return [left if v <= middle else right for v in at]


def faint(colour: str, alpha: float = 0.15) -> str:
    """A hex colour as a band's fill."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def needs(table: pd.DataFrame, columns: Iterable[str], figure: str, source: str) -> None:
    """PlotError where a Table lacks columns that a figure draws, or has no rows."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise PlotError(
            f"{figure}: the table has no column {missing[0]!r} (it has {', '.join(map(str, table.columns))}); "
            f"it draws the table of {source}"
        )
    if not len(table):
        raise PlotError(f"{figure}: the table is empty, so there is nothing to draw")


def save(figure: go.Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure: ``.html``, one file with everything inside (about 5 MB) that opens without a network; ``.json``,
    its data; ``.png``, a picture, for which a Chromium or Chrome must be installed (or kaleido). Raises PlotError where
    none is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(picture(figure))
    elif path.suffix == ".json":
        path.write_text(figure.to_json(), encoding="utf-8")
    else:
        config = {"displaylogo": False, "responsive": True}
        figure.write_html(path, include_plotlyjs=True, full_html=True, config=config)
    return path


def picture(figure: go.Figure, width: int = 1000) -> bytes:
    """The figure as PNG, drawn by a headless browser: the static form, for papers and for pages without scripts."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        try:
            return bytes(figure.to_image("png", width=width))
        except Exception as error:  # kaleido is absent, or has no browser either
            raise PlotError("a .png needs Chromium or Chrome on the path, or kaleido; save as .html instead") from error
    height = int(figure.layout.height or 450)
    with tempfile.TemporaryDirectory() as place:
        page, shot = Path(place) / "figure.html", Path(place) / "figure.png"
        figure.write_html(page, include_plotlyjs=True, config={"staticPlot": True, "responsive": True})
        command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000",
                   f"--window-size={width},{height + 16}", f"--screenshot={shot}", page.as_uri()]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium refuses root otherwise; the page is our own
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if not shot.is_file():
            raise PlotError(f"{browser} made no picture: {done.stderr[-200:]}")
        return shot.read_bytes()
