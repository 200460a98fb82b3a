"""`interp patch`: the three ways to give pairs, what is printed and written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from interp.cli import main
from tests.patching.wordy import wordy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny, path = wordy(), tmp_path_factory.mktemp("models") / "tiny-words"
    tiny.hf.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


ONE = ("--clean", "the doctor went to the store", "--corrupt", "the teacher went to the store", "--answer", "park",
       "--wrong", "beach")  # fmt: skip


def test_prompts_in_table_and_figure_out(run: Any, model: Path, tmp_path: Path) -> None:
    code, said, err = run(
        "patch", "--model", model, *ONE, "--nodes", "resid_post[*]", "--nodes", "z[*]", "--out", tmp_path / "out"
    )
    assert code == 0, err
    assert "resid_post[2]" in said
    assert "corrupt |" in err  # the alignment is shown
    assert "1 pair(s): too few" in err
    table = pd.read_parquet(tmp_path / "out" / "patch.parquet")
    assert len(table) == 6 * 3 + 6 * 3 * 4
    page = (tmp_path / "out" / "patch.html").read_text(encoding="utf-8")
    assert page.count("Plotly.newPlot") == 1


def test_json_is_one_document(run: Any, model: Path) -> None:
    code, said, err = run("patch", "--model", model, *ONE, "--nodes", "mlp_out[*]", "--top", 4, "--json")
    assert code == 0, err
    document = json.loads(said)
    assert document["nodes"] == 18
    assert len(document["table"]) == 4
    assert set(document["baseline"]) == {"clean", "corrupt"}
    sizes = [abs(row["value"]) for row in document["table"]]
    assert sizes == sorted(sizes, reverse=True)
    assert document["table"][0]["token"]


def test_a_task_estimated_and_certified(run: Any, model: Path) -> None:
    code, said, err = run("patch", "--model", model, "--task", "pronoun", "-n", 2, "--nodes", "z[*]", "--method", "atp",
                          "--certify", 0.5, "--passes", 60, "--json")  # fmt: skip
    assert code == 0, err
    certificate = json.loads(said)["certificate"]
    assert certificate["cost"]["verify"] + certificate["cost"]["sample"] <= 60
    assert "0.5" in certificate["statement"]


def test_pairs_from_a_file(run: Any, model: Path, tmp_path: Path) -> None:
    texts = {"clean": "the doctor went to the store", "answer": "park", "wrong": "beach"}
    rows = [{**texts, "corrupt": f"the {job} went to the store"} for job in ("teacher", "cook")]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said, err = run("patch", "--model", model, "--pairs", path, "--nodes", "resid_post[*]@-1", "--json")
    assert code == 0, err
    document = json.loads(said)
    assert (document["pairs"], document["task"], document["nodes"]) == (2, "mine", 3)
    path.write_text(json.dumps({"clean": "the store"}) + "\n")
    code, _, err = run("patch", "--model", model, "--pairs", path)
    assert code == 1
    assert "row 1: no text in 'corrupt'" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 1, "give the prompts in one way"),
        (("--task", "arithmetic"), 1, "expected one of ioi"),
        (("--task", "ioi", "--clean", "x"), 1, "in one way"),
        (("--clean", "the store"), 1, "--clean needs"),
        (
            ("--clean", "the store", "--corrupt", "the very good store", "--answer", "park", "--wrong", "beach"),
            1,
            "Aligned",
        ),
        ((*ONE, "--nodes", "q[9]"), 1, "layers 0..2"),
        ((*ONE, "--certify", "0.5"), 1, "nothing to certify"),
        ((*ONE, "--method", "acdc"), 2, "acdc"),
    ],
)
def test_bad_input_is_told_in_one_sentence(run: Any, model: Path, words: tuple, code: int, message: str) -> None:
    got, _, err = run("patch", "--model", model, *words)
    assert got == code
    assert message in err
    assert "Traceback" not in err


def test_help_shows_an_example(run: Any) -> None:
    code, said, _ = run("patch", "--help")
    assert code == 0
    assert "interp patch --task ioi" in said


def test_figures_escape_what_comes_from_outside() -> None:
    from interp import plots

    table = pd.DataFrame({
        "node": ["z[0, head=0]", "z[1, head=0]"], "site": "z", "layer": [0, 1], "head": [0, 0], "position": [0, 1],
        "value": [0.5, -1.0], "metric": "<b>m</b>",
    }).astype({"head": "Int64", "position": "Int64"})  # fmt: skip
    page = plots.heat_maps(table, "<script>x</script>", ["<i>", "b"]).to_json()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "<b>m" not in page
    edges = pd.DataFrame(
        [("embed", "q[0, head=1]", 1.0), ("z[0, head=1]", "mlp_in[0]", -0.5), ("mlp_out[0]", "logits", 0.2)],
        columns=["writer", "reader", "value"],
    )
    drawn = plots.circuit(edges, "<u>")
    assert "<u>" not in drawn.to_json()
    units = [trace for trace in drawn.data if trace.mode == "markers+text"]
    assert [list(trace.text) for trace in units] == [["embed", "0.1", "mlp 0", "logits"]]
    named = [trace.name for trace in drawn.data if trace.name]  # the legend; every other line is an edge
    assert named == ["raises the metric", "lowers it"]
    assert sum(trace.mode == "lines" for trace in drawn.data) == len(edges) + len(named)


def test_one_position_has_no_panel_beside_its_heads() -> None:
    from interp import plots

    table = pd.DataFrame({
        "node": ["z[0, head=0]", "z[1, head=1]"], "site": "z", "layer": [0, 1], "head": [0, 1], "position": [5, 5],
        "value": [0.5, -1.0], "metric": "m",
    }).astype({"head": "Int64", "position": "Int64"})  # fmt: skip
    assert len(plots.heat_maps(table, "one").data) == 1
    assert len(plots.heat_maps(table.assign(position=[4, 5]), "two").data) == 2
    assert len(plots.heat_maps(table.assign(head=pd.NA), "streams").data) == 1
