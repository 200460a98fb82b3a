"""The autoencoders that come with the project: they open by name, belong to their model, and keep their card's word."""

from __future__ import annotations

import pytest

import interp
from interp import sae
from interp.cards import Card
from interp.zoo.load import names as models
from interp.zoo.load import trained_dir

TEXTS = [
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software.",
    "She was not at all afraid of being refused, and walked on through the wood to the house.",
    "def area(width, height):\n    return width * height\n",
    "The command prints the names of all files in the current directory.",
]

pytestmark = pytest.mark.skipif(not sae.names(), reason="data/models is not part of this installation")


@pytest.mark.parametrize("name", sae.names())
def test_its_card_is_filled_in(name: str) -> None:
    card = Card.load(trained_dir() / name)
    assert card.lint() == []
    assert {"fvu", "l0", "ce_recovered", "dead"} <= {row["metric"] for row in card.fields["evaluation"]}
    assert sum(file.stat().st_size for file in (trained_dir() / name).iterdir()) < 8_000_000


@pytest.mark.parametrize("model", ["monet-mini", "olmoe-mini", "llama-mini"])
def test_the_small_one_explains_its_model(model: str) -> None:
    name = f"sae-{model}"
    if model not in models() or name not in sae.names():
        pytest.skip(f"{model} or its SAE is not part of this installation")
    s, m = sae.load(name), interp.load(model)
    again = f"remake it: python data/models/sae-make.py {name} --work acts"
    assert s.metadata["model_hash"] == m.fingerprint, f"it belongs to an earlier {model}; {again}"
    at = sae.evaluate(s, m, TEXTS, resamples=0).set_index("metric").value
    promised = {row["metric"]: float(row["value"]) for row in Card.load(trained_dir() / name).fields["evaluation"]}
    assert at["fvu"] < promised["fvu"] + 0.15
    assert at["l0"] == pytest.approx(promised["l0"], rel=0.4)
    assert at["ce_recovered"] > promised["ce_recovered"] - 0.15
    m.attach(s)
    codes = m.capture(TEXTS[0], f"sae[{s.site}]")[f"sae[{s.site}]"]
    assert codes.shape[-1] == s.d_sae
    m.detach()


@pytest.mark.smollm2
def test_the_one_of_smollm2_belongs_to_it() -> None:
    if "sae-smollm2" not in sae.names():
        pytest.skip("sae-smollm2 is not part of this installation")
    s, m = sae.load("sae-smollm2"), interp.load("smollm2")
    assert s.metadata["model_hash"] == m.fingerprint
    x = m.capture(TEXTS, s.sites[0])
    at = sae.evaluate(s, acts=x[s.sites[0]][x.mask], resamples=0).set_index("metric").value
    assert at["fvu"] < 0.8
    assert at["outliers"] == pytest.approx(len(TEXTS) / int(x.mask.sum()))  # each text's first token is a sink
