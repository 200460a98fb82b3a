"""The commands that cut things out: `interp ablate` and `interp study`, on tiny models and texts of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import interp
from interp.cli import main
from tests.experts.conftest import TEXTS, build

Run = Any


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Monet with its tokenizer, as a directory."""
    tiny, path = build("monet"), tmp_path_factory.mktemp("models") / "tiny-monet"
    tiny.hf.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as .jsonl, each with variations so that there are some to choose on and some to score on."""
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    rows = [
        {"text": text + text[:n] + " ", "label": label}
        for label, texts in TEXTS.items()
        for text in texts
        for n in (3, 7, 9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def ablate(run: Run, model: Path, data: Path, *more: Any) -> tuple[int, str, str]:
    how = ("--rule", "top", "--share", "0.1", "--controls", "2")
    return run("ablate", "--model", model, "--data", data, "--remove", "law", *how, *more)


def test_ablate_writes_a_checkpoint_its_card_a_table_and_a_figure(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said, err = ablate(run, model, data, "--out", out, "--json")
    assert code == 0, err
    document = json.loads(said)
    assert document["units"] == 4 * 6  # a tenth of 64, in each of 4 layers
    table = pd.read_parquet(out / "table.parquet")
    assert len(document["table"]) == len(table) == 3 * 3 + 3  # three metrics of three labels; random sets on law only
    assert set(table["label"]) == set(TEXTS)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("Plotly.newPlot") == 1
    saved = interp.load(out)
    assert len(saved.hf.expert_mask) == document["units"]
    assert "experts.json" in {p.name for p in out.iterdir()}


def test_ablate_prints_a_line_per_label(run: Run, model: Path, data: Path) -> None:
    code, said, err = ablate(run, model, data)
    assert code == 0, err
    assert all(label in said for label in TEXTS)
    assert "24 experts of tiny-monet" in err


def test_several_labels_and_a_choice_of_what_to_keep(run: Run, model: Path, data: Path) -> None:
    code, said, err = ablate(run, model, data, "--remove", "code", "--keep", "bio", "--json")
    assert code == 0, err
    assert json.loads(said)["removed"] == ["law", "code"]
    code, said, err = ablate(run, model, data, "--keep", "bio", "--json")
    assert {row["label"] for row in json.loads(said)["table"]} == {"law", "bio"}


def test_labels_are_escaped_in_the_figure(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    evil = tmp_path / "evil.jsonl"
    evil.write_text(data.read_text().replace('"bio"', '"<script>alert(1)</script>"'))
    code, _, err = ablate(run, model, evil, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remove": "physics"}, "--remove physics: there is no text with this label; there are law, code, bio"),
        ({"keep": "physics"}, "--keep physics: there is no text with this label"),
        ({"rule": "skew", "ratio": "1e9"}, "no unit of tiny-monet meets rule 'skew'"),
        ({"rule": "correlation", "threshold": "-3"}, "takes every unit of layer 0"),
        ({"row": {"label": "law"}}, "row 28 labelled 'law': no text in 'text' (--text-field)"),
        ({"row": {"text": "the court"}}, "row 28: no label in 'label' (--label-field)"),
        ({"row": {"text": "the cell", "label": "few"}}, "label 'few': 1 different texts; at least four"),
    ],
)
def test_bad_input_says_what_to_change(
    run: Run, model: Path, data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    how = {"remove": "law", "rule": "top", "share": "0.1", "controls": "0", "out": tmp_path / "out"} | change
    mine = tmp_path / "mine.jsonl"
    mine.write_text(data.read_text() + (json.dumps(how.pop("row")) + "\n" if "row" in how else ""))
    words = [word for key, value in how.items() for word in (f"--{key}", value)]
    code, said, err = run("ablate", "--model", model, "--data", mine, *words)
    assert code == 1
    assert message in err
    assert said == ""
    assert not (tmp_path / "out").exists()


def test_one_label_only_and_a_full_directory(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text("".join(line + "\n" for line in data.read_text().splitlines() if '"law"' in line))
    code, _, err = ablate(run, model, one)
    assert code == 1
    assert "only the label 'law' is there" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    code, _, err = ablate(run, model, data, "--out", tmp_path / "full")
    assert code == 1
    assert "exists and is not empty" in err


def test_study_prints_and_writes(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp import corpora

    monkeypatch.setattr(corpora, "load", lambda split, **how: TEXTS)
    code, said, err = run("study", model, "--controls", "2", "--out", tmp_path / "study", "--json")
    assert code == 0, err
    document = json.loads(said)
    assert [row["removed"] for row in document["summary"]] == [*TEXTS, "mean"]
    assert {p.name for p in (tmp_path / "study").iterdir()} >= {"matrix.html", "frontier.html", "best.parquet"}
    code, said, err = run("study", model, "--controls", "1")
    assert code == 0, err
    assert "the paper's: skew 2.0" in said
