"""Figures: they carry the Table's numbers, name their axes, need no network, and escape foreign text."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from interp import plots


@pytest.fixture
def tables():
    residual = pd.DataFrame(
        [
            {"layer": i, "position": p, "norm": v * (i + 1)}
            for i in range(3)
            for p, v in (("first", 100.0), ("later", 2.0))
        ]
    )
    attention = pd.DataFrame([{"layer": i, "head": h, "entropy": i + h / 2} for i in range(3) for h in range(3)])
    load = pd.DataFrame(
        [{"layer": 0, "label": text, "expert": e, "share": 0.25} for text in ("law", "<b>x</b>") for e in range(4)]
    )
    return residual, attention, load


def test_overview_shows_the_tables(tables):
    figure = plots.overview(*tables, title="a & b")
    traces = {trace.name: trace for trace in figure.data if trace.name}
    assert list(traces["first token of a text"].y) == [100, 200, 300]
    assert list(traces["later tokens"].y) == [2, 4, 6]
    assert list(traces["sharpest head"].y) == [0, 1, 2]
    assert list(traces["most spread head"].y) == [1, 2, 3]
    heat = figure.data[-1]
    assert heat.z.shape == (2, 4)
    assert list(heat.y) == ["0 · &lt;b&gt;x&lt;/b&gt;", "0 · law"]
    assert figure.layout.title.text == "a &amp; b"


def test_every_axis_has_a_title(tables):
    layout = plots.overview(*tables, title="t").to_dict()["layout"]
    axes = {key: axis for key, axis in layout.items() if re.fullmatch(r"[xy]axis\d*", key)}
    assert len(axes) == 6
    assert all(axis["title"]["text"] for axis in axes.values())
    assert "bits" in layout["yaxis2"]["title"]["text"]


def test_saved_figure_is_one_file_that_loads_nothing(tables, tmp_path):
    page = plots.save(plots.overview(*tables, title="</script><script>alert(1)</script>"), tmp_path / "new" / "f.html")
    text = page.read_text(encoding="utf-8")
    assert "Plotly.newPlot" in text
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=", text)
    assert "<script>alert(1)" not in text
