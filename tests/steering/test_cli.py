"""`interp steer`: pairs in; vector, report and generations out; a conversation to try multipliers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import interp
import steering
from interp.cli import main
from tests.steering.words import PAIRS, worded

Run = Any


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer and chat template, as a directory."""
    m, path = worded(chat=True), tmp_path_factory.mktemp("models") / "tiny"
    m.hf.generation_config.eos_token_id = None
    m.hf.save_pretrained(path)
    m.tokenizer.save_pretrained(path)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": p, "positive": a, "negative": b} for p, a, b in PAIRS]
    return write(tmp_path_factory.mktemp("data") / "mood.jsonl", rows)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["steer", *[str(word) for word in words]])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_it_writes_vector_report_table_and_generations(run, model, pairs, tmp_path):
    out = tmp_path / "mood"
    how = ("--controls", "2", "--multipliers", "-1,1", "--max-new-tokens", "3", "--layer", "1")
    code, said, err = run("-m", model, "-p", pairs, "-o", out, *how)
    assert code == 0, err
    m = interp.load(str(model))
    v = steering.load(out / "vector", m)
    assert v.method == "caa"
    assert v.sites == ["resid_post[1]"]
    assert v.record["pairs"] == 3
    assert v.record["chat"]
    table = pd.read_parquet(out / "table.parquet")
    assert {"on target", "neutral text", "generations"} <= set(table.section)
    assert "Steering report" in (out / "report.html").read_text()
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert {row["multiplier"] for row in lines} == {-1.0, 0.0, 1.0}
    assert "propensity" in said
    assert "random vectors" in said
    assert "fitting on 3 pairs" in err


def test_json_is_one_document(run, model, pairs):
    code, out, err = run(
        "-m", model, "-p", pairs, "--controls", 2, "--multipliers", "1", "--max-new-tokens", 2, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["fitted_on"] + found["scored_on"] == 6
    assert found["files"] == {}
    assert any(row["metric"] == "propensity" and row["baseline"] == "random" for row in found["table"])


def test_a_saved_vector_is_scored_on_all_pairs(run, model, pairs, tmp_path):
    m = interp.load(str(model))
    steering.caa(m, PAIRS, layer=2).save(tmp_path / "v")
    code, out, err = run("-m", model, "-p", pairs, "--vector", tmp_path / "v", "--controls", 1, "--multipliers", "1",
                         "--max-new-tokens", 2, "--json", "--no-template")  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert (found["fitted_on"], found["scored_on"], found["chat_template"]) == (0, 6, False)


def test_a_conversation_at_several_strengths(run, model, tmp_path, monkeypatch):
    m = interp.load(str(model))
    v = steering.caa(m, PAIRS, layer=1)
    v.save(tmp_path / "v")
    monkeypatch.setattr("sys.stdin", io.StringIO("How was the film ?\n/-2\n/x\nrain\n\n"))
    code, out, err = run("-m", model, "--vector", tmp_path / "v", "--chat", "--max-new-tokens", 3)
    assert code == 0, err
    from steering.pairs import chat_text

    tokens = m.tokens(chat_text(m, "How was the film ?"), special=False)
    with m.intervene(v):
        wanted = m.generate(tokens, max_new_tokens=3).text.strip()
    assert f"+1: {wanted}" in out
    assert "-2: " in out
    assert "+0: " in out
    assert "expected a number" in out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "positive": "b"}], "no text in 'negative'"),
        ([{"prompt": "a", "positive": "b", "negative": " "}], "no text in 'negative'"),
        ([{"prompt": "one", "positive": "b", "negative": "c"}] * 5, "at least four"),
        ([{"prompt": f"{i}", "positive": "b", "negative": "b"} for i in range(5)], "both sides are equal"),
    ],
)
def test_bad_pairs(run, model, tmp_path, rows, message):
    code, _, err = run("-m", model, "-p", write(tmp_path / "bad.jsonl", rows))
    assert code == 1
    assert message in err


def test_bad_settings(run, model, pairs, tmp_path):
    assert "expected numbers" in run("-m", model, "-p", pairs, "--multipliers", "1,x")[2]
    assert "--pairs" in run("-m", model)[2]
    assert "layers 0..2" in run("-m", model, "-p", pairs, "--layer", 99)[2]
    (tmp_path / "x").write_text("x")
    assert "not empty" in run("-m", model, "-p", pairs, "--out", tmp_path)[2]
    assert "without --pairs" in run("-m", model, "--vector", tmp_path / "v")[2]


def test_our_own_pairs():
    from steering.examples import example_pairs

    pairs = example_pairs("mood")
    assert len(pairs) == len({prompt for prompt, _, _ in pairs}) == 24
    from steering.pairs import check

    assert check(pairs) == pairs


def test_an_unknown_set_of_pairs(run, model):
    code, _, err = run("-m", model, "-p", "moods")
    assert code == 1
    assert "there are mood" in err
