"""The command line: examples run, JSON is one document, failures are one sentence and an exit code."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interp.cli import ablate, app, capture, demo, doctor, experts, main, patch, probe, report, steer, study
from interp.cli.lines import rows, texts

COMMANDS = {
    module.__name__.rpartition(".")[2]: module.command
    for module in (ablate, capture, demo, doctor, experts, patch, probe, report, steer, study)
}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """run("capture", ...) -> (exit code, standard output, standard error), in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


@pytest.fixture(scope="session")
def little(tmp_path_factory) -> str:
    """A checkpoint of a tiny Mixture of Experts, and token ids to run through it."""
    from interp.zoo.tiny import tiny

    path = tmp_path_factory.mktemp("cli") / "little-moe"
    tiny("olmoe").save_pretrained(path)
    return str(path)


@pytest.fixture
def ids(tmp_path) -> str:
    path = tmp_path / "ids.jsonl"
    documents = [{"input_ids": [5 + i, 6, 7, 8 + i], "kind": "even" if i % 2 == 0 else "odd"} for i in range(6)]
    path.write_text("\n".join(json.dumps(row) for row in documents) + "\n\n")
    return str(path)


def example(name: str) -> str:
    """The example in a command's help, as one line."""
    block = re.search(r"```\n(.*?)```", COMMANDS[name].__doc__, re.DOTALL)
    assert block, f"{name} has no example"
    return one_line(block[1])


def one_line(text: str) -> str:
    return " ".join(re.sub(r"\\\s*\n", " ", text).split())


# help and usage


def test_every_command_is_listed_and_known_here(run):
    registered = {command.name for command in app.registered_commands}
    assert registered == set(COMMANDS)
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in registered)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_example_and_json(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "--json" in out
    assert example(name).startswith(f"interp {name}")
    assert example(name) in one_line(out)


def test_version(run):
    import interp

    assert run("--version") == (0, f"interp {interp.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["capture"],
        ["capture", "smollm2"],
        ["capture", "smollm2", "--out", "x"],
        ["capture", "smollm2", "--out", "x", "--text", "a", "--file", "b"],
        ["capture", "smollm2", "--out", "x", "--text", "a", "--label-field", "kind"],
        ["capture", "smollm2", "--out", "x", "--text", "a", "--dtype", "int4"],
        ["capture", "smollm2", "--out", "x", "--text", "a", "--context", "0"],
        ["capture", "smollm2", "--out", "x", "--file", "a", "--limit", "0"],
        ["demo", "--fast"],
    ],
)
def test_wrong_command_lines_exit_with_2(run, arguments, tmp_path):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err
    assert not (tmp_path / "x").exists()


# capture


def test_capture_writes_a_dataset(run, little, ids):
    from interp import store

    code, out, err = run(
        "capture", little, "--dataset", ids, "--sites", "resid_post[*], router_logits[1]", "--out", "acts"
    )
    assert code == 0, err
    assert out.startswith("24 tokens at 4 sites")
    dataset = store.open("acts")
    assert dataset.n_rows == 24
    assert set(dataset.sites) == {"resid_post[0]", "resid_post[1]", "resid_post[2]", "router_logits[1]"}


def test_capture_stores_what_the_library_captures(run, little, ids):
    import interp
    from interp import store

    assert run("capture", little, "--dataset", ids, "--dtype", "float32", "--out", "acts")[0] == 0
    tokens = torch.tensor([row["input_ids"] for row in rows(Path(ids))])
    acts = interp.load(little).capture(tokens, "resid_post[1]")
    assert torch.allclose(store.open("acts")["resid_post[1]"][:], acts["resid_post[1]"].flatten(0, 1), atol=1e-5)


def test_capture_json_is_one_document(run, little, ids):
    code, out, _ = run("capture", little, "--dataset", ids, "--out", "acts", "--json", "--label-field", "kind")
    assert code == 0
    document = json.loads(out)
    assert document["model"]["name"] == "little-moe"
    assert document["model"]["card"]["dtype"] == "float32"
    assert document["tokens"] == 24
    assert document["complete"] is True
    assert document["sites"] == ["resid_post[0]", "resid_post[1]", "resid_post[2]"]


def test_capture_again_is_the_same_dataset(run, little, ids):
    first = json.loads(run("capture", little, "--dataset", ids, "--out", "acts", "--json")[1])
    again = json.loads(run("capture", little, "--dataset", ids, "--out", "acts", "--json")[1])
    assert first["content_sha256"] == again["content_sha256"]


def test_limit_takes_the_first(run, little, ids):
    out = run("capture", little, "--dataset", ids, "--limit", "2", "--out", "acts", "--json")[1]
    assert json.loads(out)["tokens"] == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smolm2", "--text", "a"], "did you mean smollm2?"),
        (["./nowhere", "--text", "a"], "no such file or directory"),
        (["MOE", "--text", "a"], "no tokenizer"),
        (["MOE", "--dataset", "IDS", "--sites", "resid_post[9]"], "layers 0..2"),
        (["MOE", "--dataset", "IDS", "--sites", "residual[1]"], "residual"),
        (["MOE", "--dataset", "IDS", "--model-dtype", "int3"], "dtype='int3'"),
        (["MOE", "--dataset", "nothing.jsonl"], "nothing.jsonl"),
        (["MOE", "--file", "nothing.txt"], "nothing.txt"),
    ],
)
def test_user_errors_exit_with_1_and_plain_words(run, little, ids, arguments, words):
    arguments = [{"MOE": little, "IDS": ids}.get(argument, argument) for argument in arguments]
    code, out, err = run("capture", *arguments, "--out", "acts")
    assert (code, out) == (1, "")
    assert "interp: error: " in err
    assert words in err
    assert "Traceback" not in err


def test_directory_of_other_files_is_refused_and_left_alone(run, little, ids, tmp_path):
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "thesis.txt").write_text("precious")
    code, _, err = run("capture", little, "--dataset", ids, "--out", "acts")
    assert code == 1
    assert "acts" in err
    assert [p.name for p in (tmp_path / "acts").iterdir()] == ["thesis.txt"]


def test_traceback_on_request(run, monkeypatch):
    monkeypatch.setenv("INTERP_TRACEBACK", "1")
    code, _, err = run("capture", "./nowhere", "--text", "a", "--out", "acts")
    assert code == 1
    assert "Traceback" in err


def test_a_bug_of_ours_is_not_dressed_up_as_a_users_error(run, monkeypatch, little, ids):
    from interp import store

    def broken(*args, **kw):
        raise RuntimeError("a bug")

    monkeypatch.setattr(store, "write", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["capture", little, "--dataset", ids, "--out", "acts"])


def test_as_a_process_of_its_own(tmp_path):
    """Streams and exit code as a shell sees them."""
    command = [sys.executable, "-m", "interp", "capture", "./no", "-t", "a", "-o", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("interp: error: ./no: no such file or directory")


# texts


def test_lines_are_read_where_they_are(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("erste\n\n  zweite \r\ndritte ü", encoding="utf-8")
    lines = texts(path)
    assert list(lines) == ["erste", "zweite", "dritte ü"]
    assert lines[-1] == "dritte ü"
    assert lines[1:] == ["zweite", "dritte ü"]
    assert list(texts(path, limit=1)) == ["erste"]
    with pytest.raises(IndexError):
        lines[3]


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n[1]\n{"text": \n\xff\n')
    documents = rows(path)
    assert documents[0] == {"text": "a"}
    with pytest.raises(ValueError, match=r"t\.jsonl, line 3: expected a JSON object, found list"):
        documents[1]
    with pytest.raises(ValueError, match="line 4: not valid JSON"):
        documents[2]
    with pytest.raises(ValueError, match="line 5: not UTF-8"):
        documents[3]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="no text in it"):
        rows(path)


# doctor


def test_doctor_json_is_the_report(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    assert set(json.loads(out)) >= {"interp", "packages", "devices", "memory", "cache", "hub", "problems"}


def test_doctor_prints(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "transformers" in out
    assert "What will not work here" in out or "Everything works here" in out


def test_doctor_example_checks_the_families_it_names(run):
    code, out, _ = run(*shlex.split(example("doctor"))[1:], "--json")
    document = json.loads(out)
    assert [row["family"] for row in document["families"]] == ["olmoe", "llama"]
    assert code == (0 if document["whole"] == document["total"] else 1)


def test_doctor_knows_no_such_family(run):
    code, _, err = run("doctor", "--family", "lama")
    assert code == 1
    assert "--family lama: no such family; there are" in err


def test_doctor_fails_when_a_family_does(run, monkeypatch):
    import pandas as pd

    from interp import conformance

    def failing(names):
        return pd.DataFrame([{"family": names[0], "whole": False, "failed": "logits", "logit_error": float("nan")}])

    monkeypatch.setattr(conformance, "table", failing)
    code, out, _ = run("doctor", "--family", "llama", "--json")
    assert code == 1
    assert json.loads(out)["families"][0]["logit_error"] is None  # JSON has no NaN


# the real model


@pytest.mark.smollm2
def test_capture_example_runs(run, smollm2):
    from interp import store

    code, out, err = run(*shlex.split(example("capture"))[1:])
    assert code == 0, err
    assert out.startswith("7 tokens at 30 sites")
    assert store.open("acts").n_rows == 7


@pytest.mark.smollm2
def test_demo_example_runs(run, smollm2, tmp_path, monkeypatch):
    from interp import corpora, store
    from interp.zoo.load import names

    # the demo's own texts are fetched from packages; what is made from Python itself shows the same mechanics
    small = corpora.build(tmp_path / "corpus", tier="fallback")
    load, labels = corpora.load, ("python", "docstrings", "maths")
    monkeypatch.setattr(
        corpora, "load", lambda split, **how: {k: v for k, v in load(split, path=small, **how).items() if k in labels}
    )

    code, out, err = run(*shlex.split(example("demo"))[1:], "--json")
    assert code == 0, err
    tour = json.loads(out)
    assert {model["name"] for model in tour["models"]} >= {"smollm2"}
    layers = {row["layer"] for row in tour["residual"]}
    assert layers == set(range(smollm2.n_layers))
    assert len(tour["attention"]) == smollm2.n_layers * smollm2.n_heads
    assert all(0 <= row["first"] <= 1 and row["entropy"] >= 0 for row in tour["attention"])
    for label in {row["label"] for row in tour["load"]}:
        shares = [row["share"] for row in tour["load"] if row["label"] == label and row["layer"] == 0]
        assert sum(shares) == pytest.approx(1)
    for dataset in tour["datasets"]:
        assert store.open(dataset["directory"]).n_rows == dataset["tokens"]
    for figure in tour["figures"]:
        assert (tmp_path / figure).read_text(encoding="utf-8").count("Plotly.newPlot") == 1
    if "monet-mini" in names():
        removed = {row["removed"] for row in tour["resection"]}
        assert removed == {row["label"] for row in tour["resection"]} >= {"python", "docstrings"}
        assert len(tour["figures"]) == 2


# what a command leaves


WORDS = {"law": ["court", "judge", "appeal"], "code": ["def", "return", "import"]}


@pytest.fixture
def mine(tmp_path) -> dict[str, str]:
    """Files of one's own: labelled texts to probe, pairs to steer by."""
    labelled = [
        {"text": f"{word} {i}", "label": label, "group": f"{word}{i}"}
        for label, words in WORDS.items() for word in words for i in range(4)
    ]  # fmt: skip
    pairs = [{"prompt": f"The {w} says", "positive": " yes, gladly", "negative": " no, never"} for w in WORDS["law"]]
    pairs += [{"prompt": f"A {w} says", "positive": " yes, gladly", "negative": " no, never"} for w in WORDS["law"]]
    files = {}
    for name, content in (("labelled", labelled), ("pairs", pairs)):
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("\n".join(json.dumps(row) for row in content))
    return files


@pytest.mark.parametrize(
    ("words", "tables"),
    [
        (["probe", "monet-mini", "--data", "labelled", "--out", "run"], ["probe"]),
        (["steer", "monet-mini", "--pairs", "pairs", "--controls", "1", "--multipliers", "1", "--max-new-tokens", "2",
          "--out", "run"], ["table"]),
        (["patch", "--clean", "A cat", "--corrupt", "A dog", "-a", " a", "-w", " b", "--model", "monet-mini", "--nodes",
          "resid_post[*]@-1", "--out", "run"], ["patch"]),
    ],
    ids=["probe", "steer", "patch"],
)  # fmt: skip
def test_a_table_is_kept_with_its_settings_and_its_command(run, mine, monkeypatch, words, tables):
    """What `interp report` shows beside each table: what it was made with, and the line to type again."""
    from interp import report

    words = [mine.get(word, word) for word in words]
    monkeypatch.setattr(sys, "argv", ["interp", *words])
    code, out, err = run(*words)
    assert code == 0, err
    for name in tables:
        kept = report.load_table(Path("run") / f"{name}.parquet")
        assert kept.attrs["model"] == "monet-mini"
        assert kept.attrs["remake"] == shlex.join(["interp", *words])
    page = report.write("run").read_text(encoding="utf-8")
    assert "It carries no settings" not in page.replace("generations.jsonl", "", 1).split("generations.jsonl")[0]
    if words[0] == "steer":  # its table stands whole in 80 columns
        rows = [line for line in out.splitlines() if line.lstrip().startswith(("+", "multiplier"))]
        assert rows
        assert all(len(line.rstrip()) <= 80 for line in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["steer", "a", "--model", "b", "--pairs", "mood"], "given twice"),
        (["steer", "--pairs", "mood"], "give a model"),
    ],
)
def test_one_model_is_named_once(run, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in err
