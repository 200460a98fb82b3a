"""Ready questions: their examples are sound, and SmolLM2 answers one of them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import interp
import probes
from interp.cli import main
from probes.questions import QUESTIONS, ask, prefers


@pytest.mark.parametrize("name", QUESTIONS)
def test_examples_are_balanced_and_their_groups_can_be_split(name):
    q = QUESTIONS[name]()
    assert len(q.texts) == len(q.labels) == len(q.groups) >= 24
    assert 0.4 < q.labels.mean() < 0.6
    assert len(set(q.texts)) == len(q.texts)
    probes.split(q.labels, q.groups)
    assert len(q.prompts) >= 6
    assert not set(q.one) & set(q.zero)


@pytest.mark.smollm2
def test_a_question_is_answered_with_its_controls():
    m = interp.load("smollm2")
    question = QUESTIONS["number"]()
    answer = ask(m, dataclasses.replace(question, prompts=question.prompts[:4]), controls=5)
    real = answer.layers[answer.layers.baseline == "none"]
    assert len(real) == m.n_layers
    assert answer.layers.attrs["best_value"] > 0.9
    assert set(answer.layers.baseline) == {"none", "shuffled", "bag of tokens"}
    assert "unseen groups" in answer.text


@pytest.mark.smollm2
def test_words_that_begin_alike_are_refused():
    with pytest.raises(probes.ProbeError, match="share the first token"):
        prefers(interp.load("smollm2"), (" Le",), (" Le chat",))


def test_unknown_question():
    with pytest.raises(probes.ProbeError, match="'sentimnt': expected one of sentiment"):
        ask(None, "sentimnt")


def test_command_probes_texts_of_ones_own(tmp_path, capsys):
    rng = np.random.default_rng(0)
    words = {"code": ["def", "return", "import", "self"], "law": ["court", "judge", "statute", "appeal"]}
    rows = [
        {"text": " ".join(rng.choice(words[y], 6)), "label": y, "group": f"{y}{i % 8}"}
        for i in range(40)
        for y in words
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows))
    main_or_exit(["probe", "--model", "monet-mini", "--data", str(file), "--out", str(tmp_path / "out"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["best_value"] > 0.8
    assert document["grouped"] is True
    page = (tmp_path / "out" / "probe.html").read_text()
    assert "bag of tokens" in page


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no example"), ("{", "line 1: not JSON"), ('{"text": "a"}', "text and label"),
     ('{"text": "a", "label": 1, "group": 2}\n{"text": "b", "label": 0}', "give it to all or to none")],
)  # fmt: skip
def test_command_tells_what_is_wrong_with_a_file(tmp_path, capsys, text, said):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["probe", "--model", "monet-mini", "--data", str(file)])
    assert end.value.code == 1
    assert said in " ".join(capsys.readouterr().err.split())


def main_or_exit(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
