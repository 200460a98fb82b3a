"""DOC-01, Model Cards for Model Reporting (Mitchell et al. 2019): every artefact has a card without empty fields."""

from __future__ import annotations

import json

import pytest

from interp import cards
from interp.cards import FIELDS, NOT_MEASURED, Card, CardError, lint

ANSWERS = {
    "evaluation": [{"group": "law", "value": 0.71, "low": 0.66}, {"group": "code | maths", "value": 0.44, "low": 0.4}],
    "metrics": ["accuracy", "logit difference"],
    "versions": {"interp": "0.1.0", "torch": "2.13.0"},
    "limits": "Fails on:\n# verse\n- long texts",
}


def filled(kind: str) -> Card:
    return Card(kind, f"my {kind}", {key: ANSWERS.get(key, f"answer to {key}") for key in FIELDS[kind]})


@pytest.mark.parametrize("name", ["card.json", "README.md"])
@pytest.mark.parametrize("kind", FIELDS)
def test_every_kind_of_artefact_has_a_card_that_survives_the_disk(kind, name, tmp_path):
    card = filled(kind)
    assert lint(card) == []
    card.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    loaded = Card.load(tmp_path)
    assert (loaded.kind, loaded.name, set(loaded.fields)) == (kind, card.name, set(FIELDS[kind]))
    assert loaded.fields["intended_use"] == card.fields["intended_use"]
    assert loaded.fields["limits"] == card.fields["limits"]
    assert lint(tmp_path) == lint(tmp_path / name) == []
    again = tmp_path / f"again-{name}"
    loaded.save(again)
    assert Card.load(again).fields == loaded.fields


def test_the_card_of_a_single_file_lies_beside_it(tmp_path):
    vector = tmp_path / "refusal.safetensors"
    vector.touch()
    with pytest.raises(CardError, match=r"has no card \(refusal\.card\.json\)"):
        lint(vector)
    filled("vector").save(tmp_path / "refusal.card.json")
    assert lint(vector) == []


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("name", ["card.json", "README.md"])
def test_lint_names_each_field_that_is_empty_and_no_other(kind, name, tmp_path):
    for field in FIELDS[kind]:
        fields = {**filled(kind).fields, field: ""}
        path = Card(kind, "x", fields).save(tmp_path / name)
        found = lint(path)
        assert len(found) == 1
        assert found[0].startswith(f"{field}: empty. {FIELDS[kind][field]}")
        without = {key: value for key, value in fields.items() if key != field}
        assert lint(Card(kind, "x", without)) == found


@pytest.mark.parametrize(
    "blank",
    [
        "",
        "  \n",
        "TODO",
        "tbd.",
        "n/a",
        "-",
        "???",
        "[More Information Needed]",
        "None",
        "<!-- later -->",
        [],
        {},
        [""],
        {"a": ""},
        [{"group": "", "value": None}],
        None,
    ],
)
def test_placeholders_are_empty(blank):
    card = Card("vector", "x", {**filled("vector").fields, "evaluation": blank})
    assert [m.split(":")[0] for m in card.lint()] == ["evaluation"]


@pytest.mark.parametrize(
    "honest",
    [
        NOT_MEASURED,
        {"law": NOT_MEASURED},
        [{"group": "law", "value": NOT_MEASURED}],
        0.5,
        0,
        "None of the groups was harmed.",
        "Not applicable: there are no people in it.",
    ],
)
def test_not_measured_is_an_answer(honest):
    assert Card("vector", "x", {**filled("vector").fields, "evaluation": honest}).lint() == []


def test_the_fields_that_the_paper_asks_for_are_there():
    """Section 4: details, use, factors, metrics, evaluation data, training data, analyses, ethics, caveats."""
    asked = {
        "model",
        "model_hash",
        "site",
        "intended_use",
        "out_of_scope",
        "factors",
        "metrics",
        "evaluation_data",
        "training_data",
        "evaluation",
        "ethics",
        "limits",
        "licence",
    }
    for kind in ("vector", "sae", "probe", "mask", "checkpoint"):
        assert asked <= set(FIELDS[kind])


def test_evaluation_by_group_is_a_table_in_markdown(tmp_path):
    text = filled("sae").save(tmp_path / "README.md").read_text()
    table = ["| group | value | low |", "| --- | --- | --- |", "| law | 0.71 | 0.66 |"]
    assert "\n".join([*table, "| code \\| maths | 0.44 | 0.4 |"]) in text


def test_a_card_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = filled("mask").save(tmp_path / "card.json")
    before = path.read_text()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cards.os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        Card("mask", "other").save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["card.json"]


def test_what_is_no_card_is_refused(tmp_path):
    with pytest.raises(CardError, match="there are cards for dataset, vector"):
        Card("poem", "x")
    with pytest.raises(CardError, match="a vector card has no 'price'"):
        Card("vector", "x", {"price": 3})
    with pytest.raises(CardError, match="has no card"):
        lint(tmp_path)
    with pytest.raises(CardError, match="no card can be read"):
        lint(tmp_path / "card.json")
    for name, text in (
        ("README.md", "# hello"),
        ("README.md", "---\n: [\n---\n# x"),
        ("README.md", "---\na: 1\n---\n"),
        ("card.json", "{"),
        ("card.json", json.dumps({"kind": "poem", "name": "", "fields": {}})),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(CardError):
            lint(tmp_path / name)
