"""An interruption goes on, and what was done by then is put by."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

import interp
from interp import experts, interrupted, sae
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
    stop, original = stop_at(3), experts.dose.__globals__["evaluate"]
    monkeypatch.setitem(experts.dose.__globals__, "evaluate", lambda *a, **k: stop() or original(*a, **k))
    with pytest.raises(KeyboardInterrupt):
        experts.dose(m, stats, "law", TEXTS, sizes=(1, 2, 3), controls=0)
    assert list(interp.unfinished()["size"].unique()) == [1, 2]


def test_a_training_gives_the_autoencoder_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"arch": "topk", "d_sae": 16, "k": 2, "batch_size": 64, "progress": False}
    stop, original = stop_at(4), sae.train.__globals__["Trainer"].step
    monkeypatch.setattr(sae.train.__globals__["Trainer"], "step", lambda *a, **k: stop() or original(*a, **k))
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
