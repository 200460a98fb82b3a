"""Circuits: what is kept, what they do, the measures of Wang et al. and of MIB by hand, files."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from torch import Tensor

import interp
from interp.patching import circuits
from interp.patching.circuits import MIB_SHARES, Bench, Circuit
from interp.patching.edges import attribute_edges
from interp.patching.graph import Graph, GraphError

CLEAN, CORRUPT = (
    torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]),
    torch.tensor([[5, 20, 7, 8, 9], [11, 12, 30, 14, 31]]),
)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


@pytest.fixture(scope="module")
def bench() -> Bench:
    m = interp.load("tiny:llama", dtype=torch.float64, num_hidden_layers=2)
    return Bench(m, CLEAN, CORRUPT, metric)


@pytest.fixture(scope="module")
def table(bench: Bench) -> pd.DataFrame:
    return attribute_edges(bench.graph.m, CLEAN, CORRUPT, metric, "exact", graph=bench.graph)


def test_the_whole_model_is_faithful_and_the_empty_circuit_is_not(bench: Bench) -> None:
    every = Circuit(
        tuple((w.name, r.name) for w in bench.graph.writers for r in bench.graph.readers if w.stage < r.stage)
    )
    f = bench.faithfulness([every, Circuit(())])
    assert f.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert len(every) == int(bench.real.sum())


def test_faithfulness_is_its_definition(bench: Bench, table: pd.DataFrame) -> None:
    m, circuit = bench.graph.m, circuits.top(table, 30)
    clean, corrupt = metric(m(CLEAN)).mean(), metric(m(CORRUPT)).mean()
    kept = bench.metric([circuit]).mean()
    assert float(bench.faithfulness([circuit])) == pytest.approx(float((kept - corrupt) / (clean - corrupt)), abs=1e-9)


def test_top_ranks_by_absolute_or_by_signed_score(table: pd.DataFrame) -> None:
    size = circuits.top(table, 10)
    assert [abs(s) for s in size.scores] == sorted((abs(v) for v in table["value"]), reverse=True)[:10]
    signed = circuits.top(table, 10, absolute=False)  # noising what the behaviour needs lowers the metric
    assert list(signed.scores) == sorted(table["value"])[:10]
    assert size.about["absolute"] is True
    assert signed.about["absolute"] is False
    assert len(circuits.top(table, share=0.5)) == round(len(table) / 2)


def test_pruning_changes_no_run(bench: Bench) -> None:
    for seed in range(5):
        (mask,) = bench.random(30, 1, seed)
        names = [(bench.graph.writers[w].name, bench.graph.readers[r].name) for w, r in mask.nonzero().tolist()]
        whole = Circuit(tuple(names))
        small = whole.pruned(bench.graph)
        assert len(small) < len(whole)
        assert float(bench.faithfulness([whole])) == pytest.approx(float(bench.faithfulness([small])), abs=1e-6)


def test_pruning_keeps_paths_through_shared_keys(bench: Bench) -> None:
    """Key-value head 0 serves query heads 0 and 1, head 1 serves 2 and 3."""
    path = (("embed", "k[0, head=1]"), ("z[0, head=3]", "logits"))
    assert Circuit(path).pruned(bench.graph).edges == path
    assert len(Circuit((("embed", "k[0, head=1]"), ("z[0, head=1]", "logits"))).pruned(bench.graph)) == 0


def test_cpr_and_cmd_by_hand() -> None:
    """Three trapezoids: widths .1, .4, .5; heights (0+.5)/2, (.5+1.2)/2, (1.2+1)/2, and of |1 - f| (1+.5)/2 ..."""
    shares, f = [0.0, 0.1, 0.5, 1.0], [0.0, 0.5, 1.2, 1.0]
    assert circuits.cpr(shares, f) == pytest.approx(0.1 * 0.25 + 0.4 * 0.85 + 0.5 * 1.1)
    assert circuits.cmd(shares, f) == pytest.approx(0.1 * 0.75 + 0.4 * 0.35 + 0.5 * 0.1)
    perfect = [1.0] * len(MIB_SHARES)
    assert circuits.cpr(MIB_SHARES, perfect) == pytest.approx(0.999)  # nothing below .1 %, as in MIB
    assert circuits.cmd(MIB_SHARES, perfect) == 0
    with pytest.raises(ValueError, match="rising shares"):
        circuits.cpr([0.5, 0.1], [1, 1])


def test_a_curve_on_a_model(bench: Bench, table: pd.DataFrame) -> None:
    frame = circuits.curve(bench, table, (0.05, 0.2, 0.5, 1.0), absolute=False)
    assert frame["value"].iloc[-1] == pytest.approx(1.0, abs=1e-6)
    assert frame.attrs["cpr"] == circuits.cpr(frame["share"], frame["value"])
    assert frame.attrs["absolute"] is False
    assert frame["edges"].tolist() == [round(s * len(table)) for s in (0.05, 0.2, 0.5, 1.0)]


def test_chosen_edges_beat_random_ones(bench: Bench, table: pd.DataFrame) -> None:
    frame = circuits.evaluate(bench, {"top half": circuits.top(table, share=0.5)}, controls=8).set_index("baseline")
    assert abs(1 - frame.loc["none", "value"]) < abs(1 - frame.loc["random", "value"])
    assert frame.loc["none", "low"] <= frame.loc["none", "value"] <= frame.loc["none", "high"]


def test_completeness_and_minimality_are_their_definitions(bench: Bench, table: pd.DataFrame) -> None:
    circuit = circuits.top(table, 20)
    complete = circuits.completeness(bench, circuit, samples=3)
    own, real = bench.mask(circuit), bench.real
    first = complete.iloc[0]  # K = the whole circuit
    assert first["removed"] == 20
    assert first["circuit"] == pytest.approx(0.0, abs=1e-6)
    assert first["model"] == pytest.approx(float(bench.faithfulness([real & ~own])), abs=1e-9)
    assert complete["value"].to_numpy() == pytest.approx((complete["circuit"] - complete["model"]).abs().to_numpy())
    minimal = circuits.minimality(bench, circuit)
    whole = float(bench.faithfulness([circuit]))
    for row in minimal.iloc[:4].itertuples():
        less = float(bench.faithfulness([circuit.without([(row.writer, row.reader)])]))
        assert row.value == pytest.approx(abs(whole - less), abs=1e-9)
    more = circuits.minimality(bench, circuit, samples=2)
    assert (more["value"] >= minimal["value"] - 1e-12).all()


def test_a_circuit_survives_its_file(tmp_path, table: pd.DataFrame) -> None:
    circuit = circuits.top(table, 12)
    path = circuit.save(tmp_path / "deep" / "circuit.json")
    again = Circuit.load(path)
    assert again == circuit
    assert again.about == json.loads(json.dumps(circuit.about))
    row = json.loads(path.read_text())["edges"][0]
    assert set(row) == {"writer", "reader", "score", "mib"}
    (tmp_path / "bad.json").write_text('{"format": "else"}')
    for name, message in (("bad.json", "'else'"),):
        with pytest.raises(GraphError, match=message):
            Circuit.load(tmp_path / name)
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(GraphError, match="no circuit file"):
        Circuit.load(tmp_path / "text.json")


def test_overlap_is_intersection_over_union() -> None:
    a, b = Circuit((("embed", "logits"), ("mlp_out[0]", "logits"))), Circuit((("embed", "logits"),))
    assert a.overlap(b) == 0.5
    assert a.overlap(a) == 1.0
    assert a.without(b.edges).edges == (("mlp_out[0]", "logits"),)


def test_bad_input(bench: Bench, table: pd.DataFrame) -> None:
    with pytest.raises(GraphError, match="give n="):
        circuits.top(table)
    with pytest.raises(GraphError, match="9999 edges"):
        circuits.top(table, 9999)
    with pytest.raises(GraphError, match="stands in it twice"):
        Circuit((("embed", "logits"), ("embed", "logits")))
    with pytest.raises(GraphError, match="no such edge"):
        bench.faithfulness([Circuit((("embed", "q[9, head=0]"),))])


def test_blocks_make_a_graph_of_their_own() -> None:
    m = interp.load("tiny:gemma2")
    bench = Bench(m, CLEAN, CORRUPT, metric, "block")
    assert {w.mib for w in bench.graph.writers} == {"input", "a0", "a1", "a2", "m0", "m1", "m2"}
    every = bench.faithfulness([bench.real, torch.zeros_like(bench.real)])
    assert every.tolist() == pytest.approx([1.0, 0.0], abs=1e-3)
    assert isinstance(bench.graph, Graph)
