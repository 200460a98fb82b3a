"""The atlas: complete, escaped, of bearable size, and alive in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import interp
from interp import atlas, experts
from interp.experts import ExpertError
from interp.experts.kept import Examples
from tests.experts.conftest import TEXTS, build

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def moe() -> interp.Model:
    return build("routed")


@pytest.fixture(scope="module")
def stats(moe: interp.Model) -> experts.RoutingStats:
    return experts.routing(moe, TEXTS, norms=True, together=True, examples=3)


def data_of(page: str) -> dict[str, Any]:
    """What the page holds, as a browser would find it: the text of its data element."""

    class Finder(HTMLParser):
        inside, text, tags = False, "", 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.inside = tag == "script" and dict(attrs).get("id") == "data"
            self.tags += 1

        def handle_data(self, data: str) -> None:
            if self.inside:
                self.text += data

    finder = Finder()
    finder.feed(page)
    return {**json.loads(finder.text), "tags": finder.tags}


def test_the_page_holds_what_was_measured(moe: interp.Model, stats: experts.RoutingStats) -> None:
    effects = experts.attribute(moe, TEXTS)
    held = data_of(atlas.build(moe, stats, effects=effects))
    maps = {m["name"]: m["values"] for m in held["maps"]}
    assert set(maps) == {"weight", "lift", "used", "contribution", "effect"}
    assert maps["weight"][1][2][3] == pytest.approx(float(stats.probability[1, 2, 3]), rel=1e-3)
    row = effects[(effects["label"] == "bio") & (effects["layer"] == 0) & (effects["expert"] == 5)].iloc[0]
    assert maps["effect"][2][0][5] == pytest.approx(row["value"], rel=1e-3)
    shown = experts.examples(stats, moe, [(1, 2)])
    assert [e[2] for e in held["examples"]["1:2"]] == shown["token"].tolist()
    pairs = experts.coactivation(stats, top=None)
    best = pairs[(pairs["layer"] == 0) & (pairs["expert"] == 0)].nlargest(1, "value").iloc[0]
    assert held["companions"]["0:0"][0][1] == pytest.approx(best["value"], abs=1e-3)


def test_hostile_text_stays_text(moe: interp.Model, stats: experts.RoutingStats) -> None:
    plain = atlas.build(moe, stats)
    labelled = replace(stats, labels=[HOSTILE, *stats.labels[1:]])
    page = atlas.build(moe, labelled, title=HOSTILE)
    held = data_of(page)
    assert held["labels"][0] == held["title"] == HOSTILE
    assert held["tags"] == data_of(plain)["tags"]  # no element more
    assert "innerHTML" not in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)  # nothing is loaded


def large() -> experts.RoutingStats:
    """Statistics of 64 layers x 256 experts on six labels, with five examples each."""
    stats = experts.routing(build("routed"), TEXTS, examples=2)
    n, layers, size = 6, 64, 256
    mass = torch.rand(n, layers, size, dtype=torch.float64)
    shape = (layers, size, 5)
    shown = Examples(torch.rand(shape), torch.randint(0, 20, (*shape, 17)).int(), torch.zeros(shape).int(),
                     torch.zeros(shape).int())  # fmt: skip
    return replace(
        stats, labels=[f"label {i}" for i in range(n)], layers={i: i for i in range(layers)}, size=size, mass=mass,
        used=mass, tokens=torch.full((n,), 1e4, dtype=torch.float64), examples=shown, n_layers=layers,
    )  # fmt: skip


def test_64_layers_of_256_experts_fit(moe: interp.Model) -> None:
    page = atlas.build(moe, large())
    assert len(page) < 20e6
    assert len(data_of(page)["examples"]) == 64 * 256


def chromium() -> str:
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None:
        pytest.skip("no Chromium is installed here")
    return found


def rendered(path: Path, fragment: str) -> str:
    """The page's elements after its script has run."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"{path.as_uri()}#{fragment}"], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        pytest.skip(f"Chromium does not run here: {done.stderr[-200:]}")
    return done.stdout


def test_a_browser_opens_a_card(moe: interp.Model, stats: experts.RoutingStats, tmp_path: Path) -> None:
    labelled = replace(stats, labels=[HOSTILE, *stats.labels[1:]])
    page = rendered(atlas.write(tmp_path / "atlas.html", moe, labelled), "1:2")
    assert "<h2>Layer 1, expert 2</h2>" in page
    token = experts.examples(stats, moe, [(1, 2)])["token"].iloc[0]
    assert f"<mark>{token}</mark>" in page
    assert "<title>Experts of" in page  # not "taken"
    assert "<img" not in page
    assert not list(tmp_path.glob(".*"))


def test_a_browser_opens_the_large_one(moe: interp.Model, tmp_path: Path) -> None:
    page = rendered(atlas.write(tmp_path / "large.html", moe, large()), "63:255")
    assert "<h2>Layer 63, expert 255</h2>" in page


def test_what_is_no_atlas_is_told(moe: interp.Model, stats: experts.RoutingStats) -> None:
    monet = build("monet")
    with pytest.raises(ExpertError, match="too many for a page"):
        atlas.build(monet, experts.routing(monet, TEXTS))
    other = experts.attribute(build("neurons"), TEXTS, kind="neurons")
    with pytest.raises(ExpertError, match="of another model"):
        atlas.build(moe, stats, effects=other)


def test_the_command_writes_it(tmp_path: Path) -> None:
    from interp.cli import app

    rows = [{"text": "3 14 15 92 65 35 " * 5, "label": "a"}, {"text": "27 18 28 18 28 45 " * 5, "label": "b"}] * 3
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = build("routed").tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["experts", "tiny:olmoe", "--data", str(tmp_path / "data.jsonl"), "--tokenizer",
                 str(tmp_path / "tokenizer"), "--html", str(tmp_path / "atlas.html"),
                 "--out", str(tmp_path / "s.safetensors"), "--effects", "attribute", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    found = json.loads(done.stdout)
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    assert data_of((tmp_path / "atlas.html").read_text())["labels"] == ["a", "b"]
    assert experts.RoutingStats.load(found["files"]["statistics"]).labels == ["a", "b"]
    (tmp_path / "bad.jsonl").write_text('{"text": "no label"}')
    with pytest.raises(ValueError, match="row 1: expected fields 'text'"):
        CliRunner().invoke(
            app, ["experts", "tiny:olmoe", "--data", str(tmp_path / "bad.jsonl")], catch_exceptions=False
        )
