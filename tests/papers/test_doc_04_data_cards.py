"""DOC-04, Data Cards (Pushkarna et al. 2022): an exported dataset says where it comes from and what it is for."""

from __future__ import annotations

import re

import pytest
import torch

from interp import Model, store
from interp.cards import Card, lint
from interp.zoo.tiny import tiny

SOURCES = {
    "sources": "Two hundred random token sequences, drawn by this test.",
    "licence": "cc0-1.0",
    "collection": "Drawn uniformly from the vocabulary.",
    "sensitive": "No: the tokens are random.",
    "intended_use": "Testing the software that wrote it.",
    "out_of_scope": "Any statement about language.",
}


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    model = Model(tiny("olmoe"), name="tiny-olmoe")
    ids = torch.randint(0, 101, (20, 9))
    return store.write(
        model,
        ids,
        ["resid_post[0]", "expert_hidden[1]"],
        tmp_path_factory.mktemp("card"),
        labels=["a", "b"] * 10,
        context=16,
        sources=SOURCES,
        progress=False,
    )


def test_the_sample_export_has_a_full_card(ds):
    assert lint(ds.path) == []
    card = Card.load(ds.path)
    for field, answer in SOURCES.items():
        assert card.fields[field] == answer
    assert card.kind == "dataset"
    assert card.front["license"] == "cc0-1.0", "as the Hugging Face hub reads it"


def test_what_the_writer_knows_is_filled_in_and_true(ds):
    fields = Card.load(ds.path).fields
    assert fields["model_hash"] == ds.plan.model
    assert "resid_post[0] (TransformerLens: blocks.0.hook_resid_post), bfloat16 ['row', 32]" in fields["site"]
    assert "expert_hidden[1] (TransformerLens: has no name for it)" in fields["site"]
    assert "windows of at most 16 tokens" in fields["transforms"]
    assert "rounded to bfloat16" in fields["transforms"]
    numbers = dict(re.findall(r"\*\*(\w+)\*\*: ([\d,]+)", fields["composition"]))
    assert int(numbers["rows"].replace(",", "")) == len(ds) == 180
    assert int(numbers["documents"]) == 20
    rows = ds["resid_post[0]"][:].double()
    shown = re.search(r"\| resid_post\[0\] \| 180 \| 0 \| ([\d.]+) \|", fields["evaluation"])
    assert shown
    assert float(shown[1]) == pytest.approx(float(rows.square().mean().sqrt()), rel=1e-4)
    assert ds.content_sha256 in fields["maintenance"]


@pytest.mark.parametrize("heading", ["Sources", "Licence", "Collection", "Transforms", "Intended use", "Limits"])
@pytest.mark.parametrize("strip", ["body", "section"])
def test_a_stripped_card_fails(ds, tmp_path, heading, strip):
    text = (ds.path / "README.md").read_text()
    keep = r"\1\n" if strip == "body" else ""
    stripped = re.sub(rf"(?ms)^(## {heading}\n).*?(?=^## |\Z)", keep, text)
    assert stripped != text
    (tmp_path / "README.md").write_text(stripped)
    assert [m.split(":")[0] for m in lint(tmp_path)] == [heading.lower().replace(" ", "_")]


def test_what_only_the_author_knows_is_not_made_up(tmp_path):
    model = Model(tiny("llama"), name="tiny-llama")
    ds = store.write(model, torch.randint(0, 101, (4, 5)), ["resid_post[0]"], tmp_path / "ds", progress=False)
    missing = {m.split(":")[0] for m in lint(ds.path)}
    assert missing == set(SOURCES), "sources, licence, ... stay empty, everything else is known"
    short = store.write(
        model,
        torch.randint(0, 101, (4, 5)),
        ["resid_post[0]"],
        tmp_path / "short",
        progress=False,
        sources="random tokens",
    )
    assert Card.load(short.path).fields["sources"] == "random tokens"


def test_text_of_a_field_cannot_forge_another(tmp_path):
    forged = {**SOURCES, "sources": "web\n## Licence\ncc0", "licence": ""}
    ds = store.write(
        Model(tiny("llama")),
        torch.randint(0, 101, (2, 5)),
        ["resid_post[0]"],
        tmp_path / "ds",
        progress=False,
        sources=forged,
    )
    assert [m.split(":")[0] for m in lint(ds.path)] == ["licence"]
    assert Card.load(ds.path).fields["sources"] == "web\n## Licence\ncc0"
