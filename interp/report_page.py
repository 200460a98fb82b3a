"""The report's page: sections of escaped HTML, one style, one script library at most, no network.

A figure that `interp.plots.save` wrote is a whole page of five megabytes, most of it plotly. Its data and layout are
read back out of it as JSON, so that a report of ten figures carries the library once.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from interp import calls
from interp.version import __version__

if TYPE_CHECKING:
    import pandas as pd

    from interp.cards import Card


#: Rows of a table that are printed; the screen shows more.
ON_PAPER = 40


@dataclass(frozen=True)
class Section:
    """One file of the run: what it is called, what kind it is, its HTML, and a plotly figure if it is one."""

    name: str
    kind: str
    body: str
    figure: Mapping[str, Any] | None = None


def escaped(value: Any) -> str:
    """Text for HTML; numbers short."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return html.escape(str(value))


def table_section(name: str, table: pd.DataFrame, rows: int) -> Section:
    """A table's first rows, the command that remakes it, and its settings, folded up."""
    shown = table.head(rows)
    head = "".join(f"<th>{escaped(column)}</th>" for column in shown.columns)
    lines = []
    for row in shown.itertuples(index=False):
        cells = (f'<td class="{"n" if isinstance(v, int | float) else "t"}">{escaped(v)}</td>' for v in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    more = f"<p class=quiet>{len(table) - rows:,} more rows are in the file.</p>" if len(table) > rows else ""
    if len(shown) > ON_PAPER:
        more += f'<p class="quiet paper">On paper: the first {ON_PAPER} of {len(table):,} rows.</p>'
    attrs = calls.about(table)
    remake = attrs.pop("remake", None)
    command = f"<p class=made>Made by</p><pre class=remake>{escaped(remake)}</pre>" if remake else ""
    settings = definitions(attrs, "Settings") if attrs else "<p class=quiet>It carries no settings.</p>"
    body = f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    return Section(name, f"table, {len(table):,} rows", f"{command}{body}{more}{settings}")


def definitions(values: Mapping[str, Any], title: str) -> str:
    """Names and values as a folded table; nested values as JSON."""

    def text(value: Any) -> str:
        return escaped(
            value if isinstance(value, str | int | float) else json.dumps(value, default=str, ensure_ascii=False)
        )

    rows = "".join(f"<tr><th>{escaped(key)}</th><td>{text(value)}</td></tr>" for key, value in values.items())
    return f"<details><summary>{title}</summary><table class=about>{rows}</table></details>"


def image_section(name: str, data: bytes, kind: str) -> Section:
    """An image inside the page. In <img> an SVG cannot run scripts or load anything."""
    source = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Section(name, "figure", f'<img src="{source}" alt="{escaped(name)}">')


def note_section(name: str, text: str) -> Section:
    """A note as it was written."""
    return Section(name, "note", f"<pre class=note>{escaped(text)}</pre>")


def card_section(name: str, card: Card) -> Section:
    """A card's fields, empty ones left out and counted."""
    filled = {key: value for key, value in card.fields.items() if value not in ("", None, [], {})}
    rows = "".join(
        f"<tr><th>{escaped(key.replace('_', ' '))}</th><td>{_value(value)}</td></tr>" for key, value in filled.items()
    )
    empty = len(card.lint())
    missing = f"<p class=quiet>{empty} fields of this card are empty.</p>" if empty else ""
    return Section(name, f"card of a {escaped(card.kind)}",
                   f"<p><b>{escaped(card.name)}</b></p><table class=about>{rows}</table>{missing}")  # fmt: skip


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "<br>".join(f"{escaped(k)}: {escaped(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(isinstance(v, Mapping) and v.keys() == value[0].keys() for v in value):  # a table's rows
            head = "".join(f"<th>{escaped(k)}</th>" for k in value[0])
            rows = "".join(f"<tr>{''.join(f'<td>{escaped(c)}</td>' for c in v.values())}</tr>" for v in value)
            return f"<table><tr>{head}</tr>{rows}</table>"
        return "<br>".join(escaped(v) for v in value)
    return escaped(value)


def plotly_section(name: str, page: str) -> Section:
    """The figure of a page that plotly wrote. ValueError where there is none: a page of others is not taken in."""
    called = re.search(r'Plotly\.newPlot\(\s*"[^"]*"\s*,\s*', page)
    if called is None:
        raise ValueError("a page that interp.plots.save did not write; link to it instead")
    reader = json.JSONDecoder()
    data, end = reader.raw_decode(page, called.end())
    comma = re.compile(r"\s*,\s*").match(page, end)
    if comma is None:
        raise ValueError("its figure cannot be read")
    layout, _ = reader.raw_decode(page, comma.end())
    return Section(name, "figure", "", {"data": data, "layout": layout})


def inside_script(document: Any) -> str:
    """JSON that may stand inside a script element: nothing in it ends the element, or begins another."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def assemble(title: str, sections: Sequence[Section], passed: Sequence[str]) -> str:
    """The whole page."""
    figures, parts, menu = [], [], []
    for number, section in enumerate(sections):
        body = section.body
        if section.figure is not None:
            body = f'<div class=figure id="figure{number}"></div>'
            figures.append((f"figure{number}", section.figure))
        menu.append(
            f'<li><a href="#s{number}">{escaped(section.name)}</a> <span class=quiet>{section.kind}</span></li>'
        )
        parts.append(
            f'<section id="s{number}"><h2>{escaped(section.name)}</h2><p class=quiet>{section.kind}</p>{body}</section>'
        )
    left = "".join(f"<li>{escaped(line)}</li>" for line in passed)
    tail = f"<details><summary>{len(passed)} files are not shown</summary><ul>{left}</ul></details>" if passed else ""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return _PAGE.format(
        title=escaped(title), style=_STYLE, menu="".join(menu), body="".join(parts), tail=tail,
        script=f"<script>{_OPEN}</script>{_figures(figures)}", about=f"interp {__version__}, {when}",
    )  # fmt: skip


def _figures(figures: Sequence[tuple[str, Any]]) -> str:
    """plotly once, the figures' data as JSON, and the lines that draw them; nothing where there is no figure."""
    if not figures:
        return ""
    from plotly.offline import get_plotlyjs

    return (
        f'<script type="application/json" id="figures">{inside_script(figures)}</script>'
        f"<script>{get_plotlyjs()}</script><script>{_DRAW}</script>"
    )


# on paper nothing can be unfolded
_OPEN = 'addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => { d.open = true; }));'

_DRAW = """
const drawn = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of drawn) {
  const layout = {...figure.layout, autosize: true, width: undefined};
  Plotly.newPlot(id, figure.data, layout, {displaylogo: false, responsive: true});
}
addEventListener("beforeprint", () => drawn.forEach(([id]) => Plotly.relayout(id, {width: 680})));
addEventListener("afterprint", () => drawn.forEach(([id]) => Plotly.relayout(id, {width: null, autosize: true})));
"""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:1.5rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{margin-bottom:.2rem}h2{font-size:1.1rem;border-top:2px solid #0072B2;margin:2.5rem 0 0;padding-top:.6rem}
.quiet{color:#5a5a5a;margin:.2rem 0}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:.5rem 0}
th,td{padding:.15rem .7rem .15rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #ddd}
td.n{text-align:right;font-variant-numeric:tabular-nums}pre{white-space:pre-wrap;background:#f4f4f4;padding:.6rem}
img{max-width:100%}.about td{overflow-wrap:anywhere}ul{padding-left:1.2rem}
.paper{display:none}
@media print{body{max-width:none;margin:0;font-size:11px}table{font-size:9.5px}h2,.figure,img,tr{break-inside:avoid}
h2,h2+p,.made,.remake{break-after:avoid}.wide{overflow:visible}a{color:inherit;text-decoration:none}.paper{display:block}
.modebar{display:none!important}.wide tbody tr:nth-child(n+@ROWS@){display:none}h2{margin-top:1.5rem}
@page{margin:15mm}}
""".replace("@ROWS@", str(ON_PAPER + 1))

# No connect-src, no remote script, image or font: the page could not reach the network if it wanted to.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; font-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1><p class=quiet>{about}</p>
<nav><ul>{menu}</ul></nav>
{body}
{tail}
{script}
</body></html>
"""  # noqa: E501
