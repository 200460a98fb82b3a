"""Edges: exact ones against a literal implementation, EAP as the derivative of exact ones, EAP-IG as its average."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import interp
from interp import edits
from interp.patching import wiring
from interp.patching.edges import Setting, attribute_edges
from interp.patching.graph import Graph, GraphError, mask_of
from interp.patching.paths import path_patch
from interp.patching.task import PatchError

CLEAN, CORRUPT = (
    torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]),
    torch.tensor([[5, 20, 7, 8, 9], [11, 12, 30, 14, 31]]),
)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


@pytest.fixture(scope="module")
def m() -> interp.Model:
    return interp.load("tiny:llama", dtype=torch.float64, num_hidden_layers=2)


@pytest.fixture(scope="module")
def graph(m: interp.Model) -> Graph:
    return Graph(m)


@pytest.fixture(scope="module")
def exact(m: interp.Model, graph: Graph):
    return attribute_edges(m, CLEAN, CORRUPT, metric, "exact", graph=graph)


def test_the_graph_has_every_edge_once(graph: Graph) -> None:
    """2 layers, 4 heads, 2 key-value heads: counted by hand."""
    assert len(graph.writers) == 1 + 2 * (4 + 1)
    assert len(graph.readers) == 2 * (4 + 2 + 2 + 1) + 1
    # layer 0: attention reads 1 writer, its MLP 5; layer 1: attention 6, its MLP 10; the logits 11
    assert int(graph.real.sum()) == 8 * 1 + 5 + 8 * 6 + 10 + 11


def test_output_maps_are_the_projections_weights(m: interp.Model, graph: Graph) -> None:
    for layer in range(2):
        weight = m.hf.model.layers[layer].self_attn.o_proj.weight  # [d_model, head * d_head]
        expected = weight.T.unflatten(0, (4, -1))
        assert torch.allclose(graph.output[layer], expected, atol=1e-12)


def test_exact_edges_equal_a_literal_implementation(m: interp.Model, graph: Graph, exact) -> None:
    """Each edge by hand, with sites: add the writer's change to the stream, keep what the one reader made of it."""
    with torch.no_grad():
        base, source = (m.capture(t, [*graph.sites, "resid_post[*]"]) for t in (CLEAN, CORRUPT))
        change = dict(zip([w.name for w in graph.writers], graph.written(source) - graph.written(base), strict=True))
        plain = metric(m(CLEAN))
        for row in exact.itertuples():
            step, layer = change[row.writer], row.reader_layer
            if row.reader == "logits":
                with m.intervene(edits.add("resid_post[1]", step)):
                    literal = metric(m(CLEAN))
            elif row.reader.startswith("mlp_in"):
                with m.intervene(edits.add(f"resid_mid[{layer}]", step)):
                    made = m.capture(CLEAN, f"mlp_out[{layer}]")[f"mlp_out[{layer}]"]
                with m.intervene(edits.replace(f"mlp_out[{layer}]", made)):
                    literal = metric(m(CLEAN))
            else:
                with m.intervene(edits.add(f"resid_pre[{layer}]", step)):
                    made = m.capture(CLEAN, row.reader)[row.reader]
                with m.intervene(edits.replace(row.reader, made)):
                    literal = metric(m(CLEAN))
            assert row.value == pytest.approx(float((literal - plain).mean()), abs=1e-10), (row.writer, row.reader)
    assert exact["score"].max() > 1e-3


def slopes(setting: Setting, masks: Tensor, at: Tensor, embeds: Tensor | None, e: float) -> Tensor:
    """d/dx of the metric when patched edges carry x times the change, by central difference [edge, pair]."""
    ends = [
        torch.stack([
            metric(x)
            for x in wiring.run(setting.graph, setting.task.base.tokens, at + d * setting.change, masks, embeds)
        ])
        for d in (e, -e)
    ]  # fmt: skip
    return (ends[0] - ends[1]) / (2 * e)


# GPT-2 computes its norms in the dtype of the model, Llama in float32 whatever that is, which limits differences
@pytest.mark.parametrize(("family", "e", "tolerance"), [("gpt2", 1e-4, 1e-7), ("llama", 1e-2, 1e-2)])
@pytest.mark.parametrize("points", [[0.0], [0.25, 0.75]], ids=["eap", "eap-ig"])
def test_scores_are_derivatives_of_exact_effects(family: str, e: float, tolerance: float, points: list[float]) -> None:
    """EAP: the slope of every edge's exact effect at the base run. EAP-IG: its mean over midpoints."""
    m = interp.load(f"tiny:{family}", dtype=torch.float64, num_hidden_layers=2)
    graph = Graph(m)
    method = "eap" if len(points) == 1 else "eap-ig"
    table = attribute_edges(m, CLEAN, CORRUPT, metric, method, steps=len(points), graph=graph)  # type: ignore[arg-type]
    setting = Setting.of(graph, CLEAN, CORRUPT, metric, "noise")
    masks = torch.stack([mask_of(graph, [(r.writer, r.reader)]) for r in table.itertuples()])
    with torch.no_grad():
        a, b = (m.capture(t, "resid_pre[0]")["resid_pre[0]"] for t in (CLEAN, CORRUPT))
    found = []
    for point in points:
        with torch.no_grad(), m.intervene(edits.replace("resid_pre[0]", a + point * (b - a))):
            here = graph.written(m.capture(CLEAN, graph.sites))
        embeds = m.capture(CLEAN, "embed")["embed"] + point * (b - a)
        found.append(slopes(setting, masks, here, embeds, e))
    slope = sum(found) / len(points)  # type: ignore[arg-type]
    size = float(slope.abs().max())
    assert table["value"].to_numpy() == pytest.approx(slope.mean(1).numpy(), abs=tolerance * size)
    assert table["score"].to_numpy() == pytest.approx(slope.abs().mean(1).numpy(), abs=tolerance * size)
    assert size > 1e-2


@pytest.mark.parametrize(
    ("family", "level"),
    [*product(["llama", "gpt2", "qwen3", "olmoe"], ["head", "block"]), ("gemma2", "block"), ("gemma3", "block")],
)
def test_all_edges_patched_is_the_source_run_and_none_the_base(family: str, level: str) -> None:
    m = interp.load(f"tiny:{family}")
    graph = Graph(m, level)  # type: ignore[arg-type]
    setting = Setting.of(graph, CLEAN, CORRUPT, metric, "noise")
    tokens = setting.task.base.tokens
    masks = torch.stack([torch.zeros_like(graph.real), graph.real])
    none, every = wiring.run(graph, tokens, setting.source, masks)
    assert torch.allclose(none, m(CLEAN), atol=1e-4)
    assert torch.allclose(every, m(CORRUPT), atol=1e-3)
    assert not torch.allclose(none, every, atol=1e-2)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_path_patching_with_the_rest_frozen_is_the_edge(m: interp.Model, graph: Graph, direction: str) -> None:
    table = attribute_edges(m, CLEAN, CORRUPT, metric, "exact", graph=graph, direction=direction)  # type: ignore[arg-type]
    for receiver in ("q[1, head=2]", "k[1, head=1]", "v[1, head=0]", "logits"):
        where = "resid_post[1]" if receiver == "logits" else receiver
        senders = ["resid_pre[0]", "z[0, head=*]", "mlp_out[0]"]
        paths = path_patch(m, CLEAN, CORRUPT, metric, senders, where, direction=direction)  # type: ignore[arg-type]
        for row in paths.itertuples():
            writer = "embed" if row.sender == "resid_pre[0]" else row.sender
            edge = table[(table["writer"] == writer) & (table["reader"] == receiver)]
            assert row.value == pytest.approx(float(edge["value"].iloc[0]), abs=1e-9), (row.sender, receiver)


def test_a_mask_of_unknown_edges_is_refused(graph: Graph) -> None:
    with pytest.raises(GraphError, match="no such edge"):
        mask_of(graph, [("mlp_out[1]", "q[0, head=0]")])
    with pytest.raises(GraphError, match="no such edge"):
        mask_of(graph, [("z[7, head=0]", "logits")])


@pytest.mark.parametrize(
    ("family", "message"),
    [("gpt_neox", "parallel"), ("gemma2", "level='block'"), ("mamba", "resid_mid"), ("olmo2", "ln1_scale")],
)
def test_families_without_such_a_graph_are_refused_with_the_reason(family: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        Graph(interp.load(f"tiny:{family}"))


def test_bad_input(m: interp.Model, graph: Graph) -> None:
    with pytest.raises(PatchError, match="method='acdc'"):
        attribute_edges(m, CLEAN, CORRUPT, metric, "acdc", graph=graph)  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="steps=0"):
        attribute_edges(m, CLEAN, CORRUPT, metric, steps=0, graph=graph)
    with pytest.raises(PatchError, match="no gradient"):
        attribute_edges(m, CLEAN, CORRUPT, lambda x: (x[:, -1, 3] > x[:, -1, 4]).double() + x[:, -1, 3].detach(), "eap",
                        graph=graph)  # fmt: skip
    with pytest.raises(GraphError, match="level='neuron'"):
        Graph(m, "neuron")  # type: ignore[arg-type]
