"""Figures: they carry the Table's numbers, name their axes, need no network, and escape foreign text."""

from __future__ import annotations

import re
from typing import Any

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


HOSTILE = "<b>x</b>"


def pairs() -> pd.DataFrame:
    rows = [(1, i, j, 0.5 / (1 + abs(i - j)), 0.5 + i * j) for i in range(4) for j in range(4) if i != j]
    return pd.DataFrame(rows, columns=["layer", "expert", "other", "value", "lift"])


def curve(x: str) -> pd.DataFrame:
    rows = [(k, b, s * k, s * k - 0.2, s * k + 0.2) for b, s in (("random", 0.1), ("none", 1.0)) for k in (0, 1, 2)]
    return pd.DataFrame(rows, columns=[x, "baseline", "value", "low", "high"])


def saes() -> pd.DataFrame:
    points = {"small": (8.0, 0.7), HOSTILE: (16.0, 0.6), "large": (32.0, 0.9)}
    rows = [
        (n, m, v, v - 0.05, v + 0.05) for n, p in points.items() for m, v in zip(("l0", "ce_recovered"), p, strict=True)
    ]
    return pd.DataFrame(rows, columns=["name", "metric", "value", "low", "high"])


def every() -> dict[str, Any]:
    """Each figure of `plots` on a small table with hostile text in it."""
    effects = pd.DataFrame(
        [(i, e, t, (-1) ** e * (i + e)) for i in range(2) for e in range(5) for t in ("law", HOSTILE)],
        columns=["layer", "expert", "label", "value"],
    )
    routed = pd.DataFrame([(p, s, (p + s) % 6, 0.5) for p in range(5) for s in range(2)],
                          columns=["position", "slot", "expert", "weight"])  # fmt: skip
    words = pd.DataFrame({"token": ["The", " law", HOSTILE, "\n"] * 5, "value": [0.0, 1.0, 2.0, 0.5] * 5})
    contexts = pd.DataFrame(
        {"value": [3.0, 2.0], "before": ["in the ", HOSTILE], "token": [" law", "b"], "after": ["", "c"]}
    )
    writes = pd.DataFrame({"token": [HOSTILE, "b", "c"], "value": [1.0, -1.0, 0.5]})
    spread = pd.DataFrame({"value": [0.0, 1.0, 1.0, 2.0], "label": ["law", "law", HOSTILE, HOSTILE]})
    layers = pd.concat([curve("layer"), pd.DataFrame([(None, "bag of tokens", 0.6, 0.5, 0.7)],
                        columns=["layer", "baseline", "value", "low", "high"])])  # fmt: skip
    return {
        "expert_heat": plots.expert_heat(effects, HOSTILE, unit="nats"),
        "routing": plots.routing(routed, HOSTILE, tokens=["The", HOSTILE, " a", "b", "c"]),
        "token_highlight": plots.token_highlight(words, HOSTILE),
        "dose_response": plots.dose_response(curve("multiplier"), HOSTILE),
        "layer_curve": plots.layer_curve(layers, HOSTILE),
        "sae_frontier": plots.sae_frontier(saes(), HOSTILE),
        "feature_card": plots.feature_card(contexts, HOSTILE, writes, values=[1.0, 2.0, 3.0]),
        "coactivation": plots.coactivation(pairs(), HOSTILE),
        "distributions": plots.distributions(spread, HOSTILE, unit="nats"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["expert_heat", "routing", "token_highlight", "dose_response", "layer_curve",
                                  "sae_frontier", "feature_card", "coactivation", "distributions"])  # fmt: skip
def test_a_figure_escapes_names_its_axes_and_sets_nothing(name: str) -> None:
    import plotly.io as pio

    default = pio.templates.default
    figure = every()[name]
    assert pio.templates.default == default  # registered, not set
    layout = figure.to_dict()["layout"]
    assert HOSTILE not in str(figure.to_dict()).replace("<b>" + plots.style.token(" law") + "</b>", "")
    assert layout["title"]["text"].startswith("&lt;b&gt;x")
    assert layout["height"] <= 900
    for key, axis in layout.items():
        if re.fullmatch(r"[xy]axis\d*", key) and axis.get("visible", True) and "matches" not in axis:
            assert axis.get("title", {}).get("text") or name == "feature_card", (name, key)


def test_the_figures_show_the_tables() -> None:
    made = every()
    heat = made["expert_heat"].data
    assert heat[0].z.tolist() == [[0, -1, 2, -3, 4], [1, -2, 3, -4, 5]]
    assert (heat[0].zmin, heat[0].zmax) == (-5, 5)
    assert made["routing"].data[0].z[0][0] == 0.5
    lines = {t.name: t for t in made["dose_response"].data if t.name}
    assert list(lines["measured (band: 95 %)"].y) == [0, 1, 2]
    front = made["sae_frontier"].data[0]
    assert list(front.x) == [8, 32]  # the middle one is beaten by the small one
    level = next(t for t in made["layer_curve"].data if t.name and t.name.startswith("bag"))
    assert list(level.y) == [0.6, 0.6]
    assert sum(made["distributions"].data[0].y) == pytest.approx(1)
    ring = made["coactivation"].data
    assert sum(t.line.color == plots.OKABE_ITO[0] for t in ring if t.mode == "lines" and t.text) == sum(
        pairs()["lift"] < 1
    )
    words = made["token_highlight"].data[0]
    assert words.text[0][:2] == ("The", "␣law") or list(words.text[0][:2]) == ["The", "␣law"]
    assert sum(len([c for c in row if c]) for row in words.text) == 20


def test_a_table_of_another_kind_is_refused() -> None:
    with pytest.raises(plots.PlotError, match=r"dose_response: the table has no column 'multiplier' .*experts\.dose"):
        plots.dose_response(pairs(), "t")
    with pytest.raises(plots.PlotError, match="empty"):
        plots.token_highlight(pd.DataFrame({"token": [], "value": []}), "t")
    with pytest.raises(plots.PlotError, match=r"layer=9: the table has layers \[1\]"):
        plots.coactivation(pairs(), "t", layer=9)


def test_a_picture_of_a_figure(tmp_path) -> None:
    import shutil

    if not any(shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome")):
        pytest.skip("no Chromium is installed here")
    path = plots.save(plots.dose_response(curve("multiplier"), "t"), tmp_path / "f.png")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 1000  # its width


def test_a_long_title_stands_in_lines_above_the_figure() -> None:
    words = [f"word{i}" for i in range(30)]
    short, long = (plots.dose_response(curve("multiplier"), " ".join(w)) for w in (words[:3], words))
    lines = long.layout.title.text.split("<br>")
    assert " ".join(lines) == " ".join(words)
    assert max(map(len, lines)) <= plots.style.LINE
    assert long.layout.margin.t - short.layout.margin.t == 22 * (len(lines) - 1) == long.layout.height - 460


def test_outlines_count_every_value_and_end_on_the_ground() -> None:
    """The largest value, at the last edge, belongs to the last bin, and the outline comes down behind it."""
    table = pd.DataFrame({"value": [0.0, 1.0, 4.0, 4.0], "label": ["a"] * 4})
    trace = plots.distributions(table, "t", bins=4).data[0]
    assert list(trace.y) == [0, 0.25, 0.25, 0, 0.5, 0]
    assert list(trace.x) == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]


def test_ticks_of_a_log_axis_are_written_out() -> None:
    assert plots.style.log_ticks([0.02, 0.3])["ticktext"] == [
        "0.01",
        "0.02",
        "0.05",
        "0.1",
        "0.2",
        "0.5",
        "1",
        "2",
        "5",
    ]
    assert plots.style.log_ticks([1, 1e5])["ticktext"] == ["1", "10", "100", "1,000", "10,000", "100,000"]
    assert plots.style.log_ticks([0.0, -1.0]) == {}


def test_a_frontier_of_what_is_unexplained_joins_the_lowest() -> None:
    table = saes().replace({"metric": {"ce_recovered": "fvu"}})
    figure = plots.sae_frontier(table)
    wide = table.pivot_table(index="name", columns="metric", values="value").sort_values("l0")
    lowest = [x for x, y in zip(wide.l0, wide.fvu, strict=True) if y <= wide.fvu[wide.l0 <= x].min()]
    assert list(figure.data[0].x) == lowest
    assert f"leaves {wide.fvu.min():.0%} of the variance unexplained" in titled(figure)


def removal_table(own: float, other: float, random: float) -> pd.DataFrame:
    rows = [
        {"removed": gone, "label": label, "metric": "loss", "baseline": "none", "units": 3,
         "value": own if gone == label else other, "low": own - 0.1, "high": own + 0.1}
        for gone in ("law", "code") for label in ("law", "code")
    ]  # fmt: skip
    rows += [{"removed": gone, "label": gone, "metric": "loss", "baseline": "random", "units": 3, "value": random / 2,
              "low": 0.0, "high": random} for gone in ("law", "code")]  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs["model"] = "m<1>"
    return table


def titled(figure: Any) -> str:
    return str(figure.layout.title.text).replace("<br>", " ").replace("&#x27;", "'")


def test_titles_say_what_removal_found() -> None:
    shown = titled(plots.domain_matrix(removal_table(0.5, 0.02, 0.1)))
    assert shown == (
        "m&lt;1&gt;: each label's loss, without its experts, changes by +0.50 nats, that of other text by 0.020; "
        "beyond random experts for 2 of 2"
    )
    assert "beyond random experts for 0 of 2" in titled(plots.domain_matrix(removal_table(0.5, 0.02, 0.6)))
    one = removal_table(0.5, 0.02, 0.1).query("removed == 'law'")
    assert "without the experts of law, its loss changes by +0.50" in titled(plots.domain_matrix(one))
    assert "more than by random experts" in titled(plots.domain_matrix(one))
    both = one.assign(removed="law + code")
    assert "changes by +0.26" in titled(plots.domain_matrix(both))  # the mean of 0.5 and 0.02
    assert titled(plots.domain_matrix(one, "mine")) == "mine"


def test_titles_say_how_deep_a_frontier_goes() -> None:
    rows = [{"method": "routed, skew", "ratio": r, "share_of_all": 0.1, "damage": d, "spill": s, "selectivity": d / s}
            for r, d, s in ((1.5, 0.8, 0.2), (4.0, 0.2, 0.01))]  # fmt: skip
    assert titled(plots.frontiers(pd.DataFrame(rows))) == (
        "the deepest cut costs its own text 0.80 nats and other text 0.20; the most selective one 0.20 against 0.010"
    )


@pytest.mark.parametrize(("direction", "value", "said"), [
    ("denoise", 1.5, "z[2, head=1] at token 1 'cat' gives back 1.50 logits, 75% of the runs' difference"),
    ("noise", -1.5, "z[2, head=1] at token 1 'cat' takes away 1.50 logits, 75% of the runs' difference"),
    ("denoise", -1.5, "z[2, head=1] at token 1 'cat' moves -1.50 logits, 75% of the runs' difference"),
])  # fmt: skip
def test_titles_name_the_strongest_node(direction: str, value: float, said: str) -> None:
    table = pd.DataFrame({
        "node": ["z[0, head=0]", "z[1, head=1]", "z[2, head=1]"], "site": "z", "layer": [0, 1, 2], "head": [0, 1, 1],
        "position": 1, "value": [0.1, value * 0.6, value], "metric": "logit_diff", "method": "exact",
        "direction": direction,
    })  # fmt: skip
    table.attrs["baseline"] = {"clean": 1.0, "corrupt": -1.0}
    shown = titled(plots.heat_maps(table, tokens=["the", " cat"]))
    assert said in shown
    assert shown.endswith("1 other comes to half of it")
    assert titled(plots.heat_maps(table.assign(method="atp*"))).endswith("(estimated by atp*)")


def test_titles_say_what_a_feature_and_the_saes_do() -> None:
    contexts = pd.DataFrame({"value": [3.0, 2.0, 1.0], "before": "x", "token": [" to", " to", "for"], "after": "y"})
    writes = pd.DataFrame({"token": [" sick", " license"], "value": [-4.0, 4.1]})
    shown = titled(plots.feature_card(contexts, writes=writes, name="Latent 9"))
    assert (
        shown
        == "Latent 9 fires on 'to' in 2 of its 3 strongest contexts, and makes 'license' likelier most (+4.1 logits)"
    )
    points = (("a", 8.0, 0.8), ("b", 32.0, 0.9))
    rows = [{"name": n, "metric": k, "value": v, "low": v, "high": v} for n, l0, ce in points
            for k, v in (("l0", l0), ("ce_recovered", ce))]  # fmt: skip
    shown = titled(plots.sae_frontier(pd.DataFrame(rows)))
    assert shown == "b gives back 90% of the loss with 32 latents a token, a 80% with 8"


def test_titles_say_where_a_stream_carries_it() -> None:
    effect = {(0, 1): 2.0, (1, 1): 1.5, (2, 1): 0.1, (0, 3): 0.0, (1, 3): 0.2, (2, 3): 1.9}
    table = pd.DataFrame([{"node": f"resid_post[{layer}]", "site": "resid_post", "layer": layer, "position": p,
                           "value": v, "metric": "logit_diff", "method": "exact", "direction": "denoise"}
                          for (layer, p), v in effect.items()])  # fmt: skip
    assert titled(plots.heat_maps(table, tokens=["The", " cat", " sat", " on"])) == (
        "resid_post gives back most at token 1 'cat' in layers 0 to 1, then token 3 'on' in layer 2"
    )


def test_quotes_are_written_as_plotly_reads_them() -> None:
    """plotly shows ``&quot;`` as it stands: it knows few entities by their names, and all by number."""
    from interp.plots.style import escaped

    assert escaped("say \"hi\" <b> & 'x'") == "say &#34;hi&#34; &lt;b&gt; &amp; &#x27;x&#x27;"
