"""Top examples, experts per token and the detection score, on models whose experts are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp import experts
from interp.experts import ExpertError, ExpertSet, describe
from tests.experts.test_stats import literal


@torch.no_grad()
def test_top_examples_are_the_largest_weights(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(model, texts, kind=kind)
    chosen = experts.select(stats, "law", "top", count=2)
    found = describe.top_examples(model, texts, chosen, k=3)
    layer, unit = next(iter(chosen.ids)), int(next(iter(chosen.ids.values()))[0])
    router = stats.layers[layer]
    weights = torch.cat([literal(model, t, router)[:, unit] for documents in texts.values() for t in documents])
    mine = found[(found["layer"] == layer) & (found["expert"] == unit)]
    torch.testing.assert_close(
        torch.tensor(mine["weight"].to_numpy()), weights.topk(len(mine)).values.double(), rtol=1e-5, atol=1e-6
    )
    line = mine.iloc[0]
    text = next(
        t
        for t in texts[line["label"]]
        if (line["before"] + line["token"] + line["after"]).replace(" ", "") in t.replace(" ", "")
    )
    assert line["token"].strip() in text or line["token"] == " "


@torch.no_grad()
def test_experts_per_token_counts_weights_above_the_threshold(monet: Any) -> None:
    table = describe.experts_per_token(monet, "the court", threshold=0.01)
    for router in (0, 1):
        counts = (literal(monet, "the court", router) > 0.01).sum(1).tolist()
        assert table[table["router"] == router]["experts"].tolist() == counts
    assert "".join(table[table["router"] == 0]["token"]).replace(" ", "") == "thecourt"


class OnLetters:
    """Units that are on at known letters, in place of a model's own: unit u is on where the token is in sets[u]."""

    kind, layers = "routed", {0: 0}

    def __init__(self, sets: list[list[int]], extra: int) -> None:
        self.sets, self.size = [torch.tensor(s) for s in sets], len(sets) + extra

    def weigh(self, model: Any, tokens: Any) -> Any:
        seen = tokens.ids[tokens.mask]
        columns = [torch.isin(seen, s) for s in self.sets]
        columns += [(seen * 7 + u) % 3 == 0 for u in range(self.size - len(columns))]
        dense = torch.stack(columns, 1).double()

        class Here:
            def of(self, units: torch.Tensor) -> torch.Tensor:
                return dense[:, units]

        yield 0, Here()


def test_detection_tells_a_true_description_from_a_wrong_one(
    monet: Any, texts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = dict(monet.tokenizer.get_vocab())
    units = OnLetters([[letter["t"], letter["c"]], [letter["e"]]], extra=20)
    chosen = ExpertSet(monet, {0: [0, 1]})
    monkeypatch.setattr(ExpertSet, "check", lambda self, model: units)
    scores = describe.detection(monet, texts, {k: v[:2] for k, v in texts.items()}, chosen, top=3)
    assert scores["f1"].tolist() == [1.0, 1.0]
    assert (scores["random_f1"] < 0.9).all()
    assert "'t'" in scores["description"][0]


def test_neurons_and_empty_sets_are_refused(monet: Any, texts: dict[str, list[str]]) -> None:
    from tests.experts.conftest import build

    dense = build("neurons")
    with pytest.raises(ExpertError, match="on or off"):
        describe.detection(dense, texts, texts, ExpertSet(dense, {0: [1]}, "neurons"))
    with pytest.raises(ExpertError, match="the set is empty"):
        describe.top_examples(monet, texts, ExpertSet(monet, {}))
