"""What is told of a latent, against the dense codes of the same texts; the page; the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp import sae
from interp.cli import main
from interp.sae import edits, latents, page

IDS = torch.randint(0, 100, (10, 8), generator=torch.Generator().manual_seed(0))
SITE = "resid_post[1]"


class Words:
    """A tokenizer that writes token i as a word with markup in it."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"<b>{i}</b> " for i in ids)


@pytest.fixture(scope="module")
def m() -> interp.Model:
    model = interp.load("tiny:llama")
    model.tokenizer = Words()
    return model


@pytest.fixture(scope="module")
def s(m: interp.Model) -> sae.SAE:
    x = m.capture(IDS, SITE)[SITE].flatten(0, 1)
    return sae.train(x, SITE, arch="topk", d_sae=24, k=4, tokens=400, batch_size=40, progress=False, lr=1e-2)


@pytest.fixture(scope="module")
def z(m: interp.Model, s: sae.SAE) -> torch.Tensor:
    return edits.capture(m, s, IDS)[0]


def test_contexts_are_the_largest_of_each_text(m: interp.Model, s: sae.SAE, z: torch.Tensor) -> None:
    busy = int((z > 0).sum((0, 1)).argmax())
    table = latents.contexts(m, s, IDS.tolist(), [busy], top=4, around=2, run=3)
    per_text = z[..., busy].max(1)
    expected = per_text.values.topk(4)
    assert torch.allclose(torch.tensor(table.value.to_numpy()).float(), expected.values, atol=1e-5)
    assert table.text.tolist() == expected.indices.tolist()
    first = table.iloc[0]
    at = int(per_text.indices[first.text])
    assert first.position == at
    assert first.token == f"<b>{int(IDS[first.text, at])}</b> "
    assert first.before == "".join(f"<b>{i}</b> " for i in IDS[first.text, max(0, at - 2) : at].tolist())
    silent = int((z > 0).sum((0, 1)).argmin())
    if not bool((z[..., silent] > 0).any()):
        assert latents.contexts(m, s, IDS.tolist(), [silent]).empty


def test_statistics_are_those_of_the_dense_codes(m: interp.Model, s: sae.SAE, z: torch.Tensor) -> None:
    table = latents.statistics(m, s, IDS.tolist(), run=3, partners=2).set_index("latent")
    on = (z > 0).flatten(0, 1)
    assert torch.allclose(torch.tensor(table.density.to_numpy()), on.double().mean(0))
    assert torch.allclose(torch.tensor(table["max"].to_numpy()).float(), z.amax((0, 1)), atol=1e-5)
    i = int(on.sum(0).argmax())
    both, either = (on & on[:, [i]]).sum(0), (on | on[:, [i]]).sum(0)
    jaccard = both / either.clamp_min(1)
    jaccard[i] = -1
    assert table.loc[i].jaccard == pytest.approx(jaccard.topk(2).values.tolist(), abs=1e-4)


def test_logit_effects_are_the_direct_path(m: interp.Model, s: sae.SAE) -> None:
    """The order is that of the change of the logits, when the direction is added where the final norm reads."""
    table = latents.logit_effects(m, s, [3], top=3)
    h = m.capture(IDS, "resid_post[2]")["resid_post[2]"]
    scale = m.capture(IDS, "ln_final_scale")["ln_final_scale"]
    gain, unembed = m.hf.model.norm.weight, m.hf.get_output_embeddings().weight
    moved = ((h + s.decoder[3]) / scale * gain - h / scale * gain) @ unembed.T  # the divisor held
    change = ((moved - moved.mean(-1, keepdim=True)) * scale)[0, 0]
    best = table[table.sign == "+"]
    assert best.token.tolist() == [f"<b>{int(i)}</b> " for i in change.topk(3).indices]
    assert torch.allclose(torch.tensor(best.value.to_numpy()).float(), change.topk(3).values, atol=1e-4)
    assert (table[table.sign == "-"].value < 0).all()


def test_ablation_effects_are_the_change_of_the_loss(m: interp.Model, s: sae.SAE, z: torch.Tensor) -> None:
    busy = int((z > 0).sum((0, 1)).argmax())
    table = latents.ablation_effects(m, s, IDS.tolist(), [busy], controls=2)

    def loss() -> float:
        return -float(m(IDS)[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).mean())

    before = loss()
    with m.intervene(s.ablate(busy)):
        after = loss()
    row = table[table.baseline == "none"].iloc[0]
    assert row.value == pytest.approx(after - before, abs=1e-5)
    assert row.low <= row.value <= row.high
    assert (table.baseline == "random").sum() == 2


def test_the_page_needs_no_network_and_escapes_text(m: interp.Model, s: sae.SAE, tmp_path: Path) -> None:
    text = page.dashboard(m, s, IDS.tolist(), [0, 1], top=3)
    path = page.save(text, tmp_path / "latents.html")
    assert path.read_text(encoding="utf-8") == text
    assert "http:" not in text
    assert "https:" not in text
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert text.count("<section") == 2
    record = page.neuronpedia(m, s, IDS.tolist(), [1], top=3)[0]
    assert json.dumps(record)
    assert (record["index"], len(record["pos_str"]), len(record["neg_values"])) == ("1", 3, 3)


def test_latents_are_checked(m: interp.Model, s: sae.SAE) -> None:
    with pytest.raises(sae.SAEError, match=r"numbers in 0\.\.23"):
        latents.contexts(m, s, IDS.tolist(), [24])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = interp.load("tiny:llama")
    model.tokenizer = None
    from interp import store

    store.write(model, IDS.repeat(20, 1).tolist(), SITE, tmp_path / "acts", progress=False)
    out = tmp_path / "sae"

    def run(*arguments: str) -> Any:
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--json"])
        assert not stop.value.code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    found = run("sae", "train", str(tmp_path / "acts"), "-s", SITE, "-o", str(out), "--d-sae", "24", "--k", "3",
                "--batch-size", "64", "--arch", "topk")  # fmt: skip
    assert found["last"]["l0"] == pytest.approx(3, abs=0.5)
    assert sae.load(out).d_sae == 24
    (tmp_path / "texts.txt").write_text("one two three\nfour five six\n")
    monkeypatch.setattr(interp.Model, "tokens", _as_ids(interp.Model.tokens))
    table = run("sae", "eval", str(out), "tiny:llama", "--file", str(tmp_path / "texts.txt"))["table"]
    assert {"fvu", "ce_recovered", "l0"} <= {row["metric"] for row in table}
    shown = run("sae", "dash", str(out), "tiny:llama", "--file", str(tmp_path / "texts.txt"), "--latent", "2",
                "--out", str(tmp_path / "page.html"), "--no-effects")  # fmt: skip
    assert shown["latents"] == [2]
    assert (tmp_path / "page.html").stat().st_size == shown["bytes"]


def _as_ids(real: Any) -> Any:
    """The tiny model has no tokenizer: a text becomes the codes of its characters."""

    def tokens(self: Any, x: Any, **how: Any) -> Any:
        if isinstance(x, list) and x and isinstance(x[0], str):
            x = [[ord(c) % 100 for c in text] for text in x]
        return real(self, x, **how)

    return tokens
