"""Routing statistics equal sums written out token by token, add up over workers, and survive being saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import experts
from interp.experts import ExpertError


def literal(model: Any, text: str, router: int) -> Tensor:
    """Weight of every unit at every token of one text, by definition: [token, unit]."""
    kind = experts.units_of(model, "auto" if "llama" not in model.name else "neurons").kind
    if kind == "monet":
        out = model.hf(**{"input_ids": model.tokens(text).ids}, output_router_probs=True)
        g1, g2 = [pair for pair in out.router_probs if pair is not None][router]
        return torch.einsum("bthi,bthj->btij", g1, g2)[0].flatten(1)
    if kind == "routed":
        acts = model.capture(text, f"expert_weight[{router}]").experts(router)
        dense = torch.zeros(acts.ids.shape[1], model.n_experts)
        for t in range(len(dense)):
            for slot in range(acts.ids.shape[2]):
                dense[t, acts.ids[0, t, slot]] += acts.weights[0, t, slot]
        return dense
    return model.capture(text, f"mlp_hidden[{router}]")[f"mlp_hidden[{router}]"][0].abs()


def test_sums_equal_the_literal_ones(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(model, texts, kind=kind, batch_tokens=200)
    for at, documents in enumerate(texts.values()):
        for router in range(stats.mass.shape[1]):
            with torch.no_grad():
                weights = [literal(model, text, router).double() for text in documents]
            torch.testing.assert_close(stats.mass[at, router], sum(w.sum(0) for w in weights), rtol=1e-5, atol=1e-6)
            means = torch.stack([w.mean(0) for w in weights])
            torch.testing.assert_close(stats.doc_sum[at, router], means.sum(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(stats.doc_square[at, router], means.square().sum(0), rtol=1e-5, atol=1e-6)
        assert stats.tokens[at] == sum(len(text) for text in documents)
        assert stats.documents[at] == len(documents)


def test_documents_longer_than_a_batch_or_the_context_are_summed_whole(monet: Any) -> None:
    text = "the court shall decide " * 20  # 460 tokens
    stats = experts.routing(monet, {"a": [text, "a party "], "b": ["def f(x) "]}, context=64, batch_tokens=128)
    cut = [text[i : i + 64] for i in range(0, len(text), 64)]
    weights = torch.cat([literal(monet, piece, 0).double() for piece in cut]).detach()
    own = stats.doc_sum[0, 0] - experts.routing(monet, {"a": ["a party "]}).doc_sum[0, 0]
    torch.testing.assert_close(own, weights.mean(0), rtol=1e-5, atol=1e-7)


def test_routing_weights_of_monet_add_up_to_its_heads(monet: Any, texts: dict[str, list[str]]) -> None:
    stats = experts.routing(monet, texts)
    torch.testing.assert_close(
        stats.probability.sum(-1), torch.full((3, 2), 2.0, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


def test_workers_add_up(model: Any, kind: str, texts: dict[str, list[str]]) -> None:
    """In float64: the last digits of a float32 model depend on the shape of the batch."""
    hf = copy.deepcopy(model.hf).double()
    if kind == "auto" and "monet" not in model.name:
        hf.set_experts_implementation("eager")  # grouped products know no float64
    model = interp.Model(hf, model.tokenizer, model.name)
    whole = experts.routing(model, texts, kind=kind)
    first = experts.routing(model, {label: t[:1] for label, t in texts.items()}, kind=kind)
    rest = experts.routing(model, {label: texts[label][1:] for label in ("bio", "law", "code")}, kind=kind)
    both = (first + rest).only(whole.labels)
    for name in ("tokens", "documents", "used"):
        assert torch.equal(getattr(both, name), getattr(whole, name)), name
    for name in ("mass", "doc_sum", "doc_square"):
        torch.testing.assert_close(getattr(both, name), getattr(whole, name))


def test_saved_statistics_come_back(model: Any, kind: str, texts: dict[str, list[str]], tmp_path: Path) -> None:
    stats = experts.routing(model, texts, kind=kind)
    again = experts.RoutingStats.load(stats.save(tmp_path / "stats.safetensors"))
    assert again.labels == stats.labels
    assert again.layers == stats.layers
    torch.testing.assert_close(again.mass, stats.mass, rtol=0, atol=0)
    frame = again.frame(["law"])
    assert len(frame) == len(stats.layers) * stats.size
    assert frame["mass"].sum() == pytest.approx(
        sum(float(stats.probability[0, r].sum()) for r in stats.layers.values())
    )


def test_statistics_show_what_they_are_of(monet: Any, texts: dict[str, list[str]]) -> None:
    shown = repr(experts.routing(monet, texts, positions=True))
    assert shown.startswith("RoutingStats(monet, ")
    assert all(f"{label} " in shown for label in texts)
    assert "position" in shown
    assert len(shown) < 300


def test_bad_input_is_told(monet: Any) -> None:
    with pytest.raises(ExpertError, match="no label given"):
        experts.routing(monet, {})
    with pytest.raises(ExpertError, match="texts\\['b'\\]: no text"):
        experts.routing(monet, {"a": ["the court"], "b": [" "]})
    with pytest.raises(ExpertError, match="a single text"):
        experts.routing(monet, {"a": "the court"})  # type: ignore[dict-item]
    with pytest.raises(ExpertError, match="expected auto, monet"):
        experts.routing(monet, {"a": ["the court"]}, kind="heads")


def test_a_dense_model_points_to_neurons() -> None:
    from tests.experts.conftest import build

    with pytest.raises(ExpertError, match=r"dense: it has no experts.*kind='neurons'"):
        experts.routing(build("neurons"), {"a": ["the court"]})
