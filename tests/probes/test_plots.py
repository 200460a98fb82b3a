"""Figures of probes: they carry the Table's numbers, say what was found, and name axes and units."""

from __future__ import annotations

import pandas as pd
import pytest

from interp.plots import PlotError
from probes import plots


@pytest.fixture
def sweep() -> pd.DataFrame:
    rows = [
        (0, "none", 0.6),
        (1, "none", 0.9),
        (0, "shuffled", 0.5),
        (1, "shuffled", 0.4),
        (pd.NA, "bag of tokens", 0.55),
    ]
    table = pd.DataFrame([
        {"node": f"resid_post[{layer}]", "layer": layer, "baseline": kind, "metric": "accuracy", "value": v,
         "low": v - 0.1, "high": min(1, v + 0.1)} for layer, kind, v in rows
    ]).astype({"layer": "Int64"})  # fmt: skip
    table.attrs = {"best": "resid_post[1]", "best_value": 0.9, "metric": "accuracy"}
    return table


def test_accuracy_by_layer_stands_beside_its_controls(sweep):
    figure = plots.by_layer(sweep)
    lines = [list(trace.y) for trace in figure.data if trace.showlegend is not False]
    assert [0.6, 0.9] in lines
    assert [0.5, 0.4] in lines
    assert [0.55, 0.55] in lines  # the bag of tokens has no layer
    assert figure.layout.title.text == (
        "resid_post[1] reads it best: 90% of unseen examples (shuffled 40%, bag of tokens 55%)"
    )
    part = plots.by_layer(sweep[(sweep.layer == 0) & (sweep.baseline == "none")])  # the best node of all is not drawn
    assert part.layout.title.text == "resid_post[0] reads it best: 60% of unseen examples"
    assert figure.layout.xaxis.title.text == "layer"
    assert "accuracy" in figure.layout.yaxis.title.text


@pytest.mark.parametrize(("verdict", "said"), [(True, "follows"), (False, "does not follow")])
def test_the_push_says_if_the_output_follows(verdict, said):
    table = pd.DataFrame([
        {"node": "resid_post[3]", "strength": k, "baseline": b, "metric": "log odds", "value": v, "low": v - 1,
         "high": v + 1} for b, s in (("none", 1.0), ("random", 0.1)) for k, v in ((-1.0, -s), (1.0, s))
    ])  # fmt: skip
    table.attrs = {"causal": verdict}
    figure = plots.causal(table)
    assert f"output {said} the probe" in figure.layout.title.text
    assert "standard deviations" in figure.layout.xaxis.title.text
    assert "nats" in figure.layout.yaxis.title.text


def test_concepts_are_filled_only_where_they_pass_the_level_of_all_layers():
    rows = []
    for layer, p in ((2, 0.001), (5, 0.03), (9, 0.6)):  # .03 is below .05, but not below .05 / 3
        for baseline, value in (("none", 0.9), ("random", 0.5)):
            rows.append({"node": f"resid_post[{layer}]", "baseline": baseline, "metric": "tcav", "value": value,
                         "low": value - 0.05, "high": value + 0.05, "p_value": p})  # fmt: skip
    figure = plots.concepts(pd.DataFrame(rows))
    drawn = {trace.name: list(trace.x) for trace in figure.data}
    assert drawn["concept, significant"] == [2]
    assert drawn["concept, not significant"] == [5, 9]
    assert "1 of 3 layers" in figure.layout.title.text
    assert figure.data[-1].marker.symbol.endswith("-open")
    with pytest.raises(PlotError, match="no column 'p_value'"):
        plots.concepts(pd.DataFrame(rows).drop(columns="p_value"))


def test_titles_are_escaped(sweep):
    assert "<b>" not in plots.by_layer(sweep, "<b>x</b>").layout.title.text
