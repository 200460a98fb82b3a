"""An interruption goes on, and what was done by then is put by."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import interp
import probes
import steering
from interp import experts, interrupted, patching, sae
from steering import continuation
from tests.experts.conftest import TEXTS, build


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupted, "_kept", [])


def stop_at(number: int) -> Any:
    """A function that is called again and again, and interrupts the `number`-th time."""
    calls: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt

    return call


def test_labels_that_were_removed_stay(capsys: pytest.CaptureFixture[str]) -> None:
    m = build("routed")
    stats = experts.routing(m, TEXTS)
    how: dict[str, Any] = {"rule": "top", "count": 2, "controls": 1}
    whole = experts.remove_each(m, stats, TEXTS, **how)
    with pytest.raises(KeyboardInterrupt):
        experts.remove_each(m, stats, TEXTS, say=stop_at(3), **how)
    so_far = interp.unfinished()
    assert so_far.attrs["unfinished"]
    assert "unfinished" not in whole.attrs
    labels = list(dict.fromkeys(whole["removed"]))
    expected = whole[whole["removed"].isin(labels[:2])].reset_index(drop=True)
    pd.testing.assert_frame_equal(so_far, expected, check_like=True)
    assert "interp.unfinished()" in capsys.readouterr().err


def test_sizes_that_were_tried_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    m = build("routed")
    stats = experts.routing(m, TEXTS, norms=True)
    interrupting(monkeypatch, inspect.unwrap(experts.dose).__globals__, "evaluate", 3)
    with pytest.raises(KeyboardInterrupt):
        experts.dose(m, stats, "law", TEXTS, sizes=(1, 2, 3), controls=0)
    assert list(interp.unfinished()["size"].unique()) == [1, 2]


def test_a_training_gives_the_autoencoder_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"arch": "topk", "d_sae": 16, "k": 2, "batch_size": 64, "progress": False}
    interrupting(monkeypatch, inspect.unwrap(sae.train).__globals__["Trainer"], "step", 4)
    with pytest.raises(KeyboardInterrupt):
        sae.train(x, **how)
    (made,) = interp.unfinished()
    assert made.metadata["tokens_seen"] == 3 * 64
    assert made(x).shape == x.shape


def test_nothing_to_keep() -> None:
    with pytest.raises(LookupError, match="no call was interrupted"):
        interp.unfinished()
    with pytest.raises(KeyboardInterrupt), interrupted.salvaged("x", lambda: None):
        raise KeyboardInterrupt
    with pytest.raises(LookupError):
        interp.unfinished()


def interrupting(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, number: int) -> None:
    """Makes ``holder.name`` (or the entry of a dict) interrupt when it is called the `number`-th time."""
    stop = stop_at(number)
    original = holder[name] if isinstance(holder, dict) else getattr(holder, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        stop()
        return original(*args, **kwargs)

    if isinstance(holder, dict):
        monkeypatch.setitem(holder, name, call)
    else:
        monkeypatch.setattr(holder, name, call)


IDS = torch.randint(3, 100, (4, 6), generator=torch.Generator().manual_seed(0))
OTHER = IDS.clone()
OTHER[:, 1] = (IDS[:, 1] + 7) % 90 + 3


def gap(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def so_far() -> pd.DataFrame:
    table = interp.unfinished()
    assert table.attrs["unfinished"]
    assert table.attrs["fingerprint"]
    return table


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(left.reset_index(drop=True), right.reset_index(drop=True), check_like=True)


def test_nodes_that_were_patched_stay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    m = interp.load("tiny:llama")
    how: dict[str, Any] = {"nodes": "resid_post[*]"}
    whole = patching.patch(m, IDS, OTHER, gap, **how)
    interrupting(monkeypatch, patching.Patcher, "_run", 3)
    with pytest.raises(KeyboardInterrupt):
        patching.patch(m, IDS, OTHER, gap, **how)
    part = so_far()
    assert 0 < len(part) < len(whole)
    same(part, whole.merge(part[["node", "position"]], how="right"))
    assert capsys.readouterr().err.count("patching.patch was interrupted") == 1


def test_pairs_that_gave_estimates_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    m = interp.load("tiny:llama")
    whole = patching.attribute(m, IDS[:1], OTHER[:1], gap, "z[*]", method="atp")
    home = inspect.unwrap(patching.attribute).__globals__["Attribution"]
    interrupting(monkeypatch, home, "_some", 2)  # the first pair is run by itself
    with pytest.raises(KeyboardInterrupt):
        patching.attribute(m, IDS, OTHER, gap, "z[*]", method="atp")
    assert so_far().attrs["pairs"] == 1
    same(so_far().drop(columns=["low", "high"]), whole.drop(columns=["low", "high"]))


def test_nodes_that_were_verified_stay_and_are_no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    m = interp.load("tiny:llama")
    table = patching.attribute(m, IDS, OTHER, gap, "resid_post[*]", method="atp")
    exact = patching.patch(m, IDS, OTHER, gap, "resid_post[*]").set_index(["node", "position"])["value"]
    interrupting(monkeypatch, patching.Patcher, "_run", 4)
    with pytest.raises(KeyboardInterrupt):
        patching.certify(m, IDS, OTHER, gap, table, threshold=1e-3, budget=200)
    part = so_far()
    assert 0 < len(part) < len(table)
    found = part.set_index(["node", "position"])["value"]
    assert found.to_numpy() == pytest.approx(exact.loc[found.index].to_numpy(), abs=1e-6)


@pytest.mark.parametrize("call", ["sweep", "attribute"])
def test_texts_that_were_swept_stay(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m = build("routed")
    function = getattr(experts, call)
    home = inspect.unwrap(function).__globals__
    holder, name = (home["Plain"], "run") if call == "sweep" else (home, "_routed")
    data = experts.corpus(m, TEXTS)
    first = next(iter(data.batches(m, 100)))
    interrupting(monkeypatch, holder, name, 2)
    with pytest.raises(KeyboardInterrupt):
        function(m, data, batch_tokens=100)
    part, alone = so_far(), data.first(len(first.label))
    monkeypatch.undo()
    assert part.attrs["tokens"] == alone.n_tokens < data.n_tokens
    expected = function(m, alone, batch_tokens=100)
    same(part, expected[expected["label"].isin(alone.present)])


def test_probes_that_were_fitted_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    m = interp.load("tiny:llama")
    tokens = IDS.repeat(15, 1)
    labels = [i % 2 for i in range(60)]
    whole = probes.by_layer(m, tokens, labels)
    interrupting(monkeypatch, inspect.unwrap(probes.survey).__globals__["_Study"], "row", 3)
    with pytest.raises(KeyboardInterrupt):
        probes.by_layer(m, tokens, labels)
    part = so_far()
    assert list(part["layer"]) == [0, 1]
    same(part.drop(columns="selectivity"), whole.drop(columns="selectivity").iloc[:2])
    assert part.attrs["best"] in set(part["node"])


@pytest.mark.parametrize("call", ["evaluate", "sweep"])
def test_items_that_were_scored_stay(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m = build("neurons")
    pairs = [("the court ", "shall decide", "x = f(x)"), ("a gene of ", "the cell", "the licence"),
             ("notice of the ", "court", "range")]  # fmt: skip
    v = steering.caa(m, pairs, layer=1)
    how: dict[str, Any] = {"controls": 2} if call == "evaluate" else {}
    function = getattr(steering, call)
    interrupting(monkeypatch, continuation, "_Batch", 4)  # two per batch at the start, then one
    with pytest.raises(KeyboardInterrupt):
        function(m, v, pairs, [-1, 0, 1], batch_tokens=20, **how)
    part = so_far()
    monkeypatch.undo()
    own = part[part["baseline"] == "none"] if call == "evaluate" else part
    n = int(own["n"].iloc[0])
    assert 0 < n < len(pairs)
    everyone = [function(m, v, [pairs[i] for i in some], [-1, 0, 1], batch_tokens=20, **how)
                for some in itertools.combinations(range(3), n)]  # fmt: skip
    assert any(np.allclose(part["value"], t["value"], atol=1e-4) for t in everyone)


def test_behaviours_that_were_compared_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    m = build("neurons")
    pairs = [("the court ", "shall decide", "x = f(x)"), ("a gene of ", "the cell", "the licence")]
    methods = {name: {"caa": steering.caa(m, pairs, layer=1)} for name in ("first", "second")}
    asked = dict.fromkeys(methods, pairs)
    interrupting(monkeypatch, inspect.unwrap(steering.compare).__globals__, "budgets", 2)
    with pytest.raises(KeyboardInterrupt):
        steering.compare(m, methods, asked, ["the cell membrane carries ions"], controls=0)
    assert list(so_far()["label"]) == ["first"]
