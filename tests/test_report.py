"""The report: everything of a run on one page, escaped, offline, with the way to make it again; alive in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from interp import plots, report
from interp.cards import Card
from interp.report import ReportError
from tests.test_atlas import rendered

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def table() -> pd.DataFrame:
    frame = pd.DataFrame({"label": ["law", HOSTILE], "value": [0.25, -1.5], "low": [0.1, -2.0], "high": [0.4, -1.0],
                          "baseline": ["none", "random"], "multiplier": [1, 1]})  # fmt: skip
    frame.attrs = {"model": HOSTILE, "seed": 3, "controls": {"n": 20}}
    return frame


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a file of every kind, each with hostile text in it."""
    root = tmp_path / "run"
    report.save_table(table(), root / "a" / "effect.parquet", remake=f"interp steer m --out {HOSTILE}")
    table().to_csv(root / "plain.csv", index=False)
    plots.save(plots.dose_response(table(), HOSTILE), root / "figure.html")
    (root / "drawn.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg"><script>{HOSTILE}</script></svg>')
    Card("vector", HOSTILE, {"description": HOSTILE, "metrics": [{"a": HOSTILE}]}).save(root / "v.card.json")
    (root / "notes.md").write_text(f"# Found\n\n{HOSTILE}")
    (root / "foreign.html").write_text("<html><script>document.title='taken'</script></html>")
    (root / "weights.safetensors").write_bytes(b"\0\1")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "secret.csv").write_text("a\n1\n")
    return root


def test_a_table_comes_back_with_its_settings(tmp_path: Path) -> None:
    frame = table()
    frame["axes"] = [("batch", "pos"), ("batch",)]
    path = report.save_table(frame, tmp_path / "new" / "t.parquet", remake="interp x")
    back = report.load_table(path)
    assert back["value"].tolist() == [0.25, -1.5]
    assert back.attrs == {"model": HOSTILE, "seed": 3, "controls": {"n": 20}, "remake": "interp x"}
    assert frame.attrs == table().attrs  # the caller's is untouched
    with pytest.raises(ReportError, match=r"t\.csv.*kept as \.parquet"):
        report.save_table(frame, tmp_path / "t.csv")


def test_everything_is_there_once_and_escaped(run: Path) -> None:
    page = report.write(run, title=HOSTILE).read_text(encoding="utf-8")
    for name in ("a/effect.parquet", "plain.csv", "figure.html", "drawn.svg", "v.card.json", "notes.md"):
        assert f"<h2>{name}</h2>" in page
    assert "foreign.html: a page that interp.plots.save did not write" in page
    assert "weights.safetensors: not a table" in page
    assert "secret" not in page
    assert "interp steer m --out" in page
    assert "&quot;n&quot;: 20" in page
    assert HOSTILE not in page
    assert page.count("Plotly.newPlot(id") == 1
    # one data element, plotly, and the lines that draw
    assert len(re.findall(r"<script[ >]", page.split("<h2>")[-1])) <= len(re.findall(r"</script>", page))
    assert "<script>document.title" not in page


def test_it_forbids_itself_the_network_and_asks_for_none(run: Path) -> None:
    page = report.write(run).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "http" not in policy[1]
    assert not re.search(r"<(?:script|img|link|iframe)[^>]+(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)


def test_a_page_without_figures_carries_no_library(tmp_path: Path) -> None:
    report.save_table(table(), tmp_path / "t.parquet")
    assert len(report.write(tmp_path).read_text(encoding="utf-8")) < 10_000


def test_it_is_not_part_of_itself(run: Path) -> None:
    first = report.write(run).read_text(encoding="utf-8")
    again = report.write(run).read_text(encoding="utf-8")
    assert [s.name for s in report.collect(run)[0]] == sorted(s.name for s in report.collect(run)[0])
    assert first.count("<section") == again.count("<section") == 6


def test_long_tables_say_what_is_left_out(tmp_path: Path) -> None:
    report.save_table(pd.DataFrame({"n": range(30)}), tmp_path / "t.parquet")
    page = report.write(tmp_path, rows=7).read_text(encoding="utf-8")
    assert "23 more rows are in the file" in page
    assert page.count("<tr>") == 1 + 7


def test_a_card_that_is_there_twice_is_shown_once(tmp_path: Path) -> None:
    card = Card("vector", "v", {"description": "a vector"})
    for place in ("v", "other"):
        (tmp_path / place).mkdir()
    for name in ("card.json", "README.md"):
        card.save(tmp_path / "v" / name)
    card.save(tmp_path / "other" / "README.md")
    assert [s.name for s in report.collect(tmp_path)[0]] == ["other/README.md", "v/card.json"]


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no such directory"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="nothing to report"):
        report.write(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no")
    (tmp_path / "t.csv").write_text("a\n1\n")
    assert "broken.parquet: " in report.write(tmp_path).read_text(encoding="utf-8")


def test_the_command(run: Path) -> None:
    import typer

    from interp.cli.report import command

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(run), "--json"])
    assert done.exit_code == 0, done.output
    said: dict[str, Any] = json.loads(done.stdout)
    assert Path(said["page"]).stat().st_size == said["bytes"]
    assert {row["file"] for row in said["shown"]} >= {"a/effect.parquet", "figure.html"}


def test_a_browser_opens_it(run: Path) -> None:
    """Figures are drawn, hostile text is text, nothing of it ran."""
    shown = rendered(report.write(run, title="A run"), "s0")
    assert "<title>A run</title>" in shown
    assert "taken</title>" not in shown
    assert 'class="main-svg"' in shown  # plotly drew
    assert "onerror=alert(1)&gt;" in shown or "onerror=alert(1)>" not in shown.replace("&gt;", "")
    assert not re.search(r"<img[^>]+onerror", shown)


def test_paper_gets_the_first_rows_and_says_so(tmp_path: Path) -> None:
    for name, n in (("short", 40), ("long", 41)):
        report.save_table(pd.DataFrame({"n": range(n)}), tmp_path / f"{name}.parquet")
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert page.count('class="quiet paper"') == 1
    assert "On paper: the first 40 of 41 rows" in page
    assert "tbody tr:nth-child(n+41){display:none}" in page
