"""A resected checkpoint equals the masked model, says so in its card, and is whole or not there at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp import experts
from interp.cards import lint
from interp.experts import ExpertError, ExpertSet


@torch.no_grad()
def test_the_checkpoint_is_the_masked_model(model: Any, kind: str, texts: dict[str, list[str]], tmp_path: Path) -> None:
    stats = experts.routing(model, texts, kind=kind)
    chosen = experts.select(stats, "law", "top", count=3)
    table = experts.evaluate(model, chosen, texts, controls=0)
    ids = model.tokens(texts["law"][0][:30]).ids
    before, fingerprint = model(ids), model.fingerprint
    path = experts.resect(model, chosen, tmp_path / "new" / "without-law", evaluation=table)
    with experts.switched_off(model, chosen):
        wanted = model(ids)
    saved = interp.load(path)
    torch.testing.assert_close(saved(ids), wanted, rtol=1e-5, atol=1e-5)
    assert saved.tokenizer("the court")["input_ids"] == model.tokenizer("the court")["input_ids"]
    assert lint(path) == []
    assert "law" in (path / "README.md").read_text()
    assert torch.equal(model(ids), before)
    assert model.fingerprint == fingerprint
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["without-law"]


@torch.no_grad()
def test_routed_and_dense_checkpoints_need_nothing_of_ours(texts: dict[str, list[str]], tmp_path: Path) -> None:
    import subprocess
    import sys

    from tests.experts.conftest import build

    model = build("routed")
    chosen = ExpertSet(model, {0: [1, 2], 1: [0]})
    path = experts.resect(model, chosen, tmp_path / "out")
    program = (
        "import sys, torch, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "out = m(input_ids=torch.arange(8)[None]).logits\n"
        "assert 'interp' not in sys.modules\n"
        "torch.save(out, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", program, path, tmp_path / "logits.pt"], check=True, capture_output=True)
    with experts.switched_off(model, chosen):
        wanted = model(torch.arange(8)[None])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_behind(monet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ExpertSet(monet, {0: [1]})
    with pytest.raises(ExpertError, match="the set is empty"):
        experts.resect(monet, ExpertSet(monet, {}), tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ExpertError, match="exists and is not empty"):
        experts.resect(monet, chosen, tmp_path / "full")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(monet.tokenizer, "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        experts.resect(monet, chosen, tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    assert not monet.hf.expert_mask
