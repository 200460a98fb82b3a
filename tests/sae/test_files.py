"""SAELens's directory both ways, for every architecture both have: the same codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from interp import sae
from interp.cards import Card
from interp.sae import files

D, M = 16, 24


def made(arch: str, *, sites: tuple[str, ...] = ("resid_post[1]",), targets: tuple[str, ...] | None = None,
         d_out: int = D, skip: bool = False, **more: Any) -> sae.SAE:  # fmt: skip
    """An SAE with random weights, none of them special."""
    g = torch.Generator().manual_seed(3)

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    decoder = r(M, d_out)
    if arch == "mp":
        decoder = torch.nn.functional.normalize(decoder, dim=1)
    extra: dict[str, Any] = {"threshold": r(M).abs()} if arch == "jumprelu" else {}
    if arch == "gated":
        extra |= {"r_mag": 0.1 * r(M), "b_mag": 0.1 * r(M)}
    if skip:
        extra["skip"] = r(d_out, D)
    k = 5 if arch in ("topk", "mp") else None
    targets = sites if targets is None else targets
    encoder = decoder if arch == "mp" else r(M, D)
    b_enc = torch.zeros(M) if arch == "mp" else 0.3 * r(M)
    return sae.SAE(decoder, r(d_out), encoder, b_enc, arch, k=k, sites=sites, targets=targets,
                   centred=targets == sites, metadata={"model_name": "tiny-llama"}, **extra, **more)  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    **{arch: {"arch": arch} for arch in sae.ARCHITECTURES},
    "standard, layer_norm": {"arch": "standard", "normalize": "layer_norm"},
    "transcoder": {"arch": "standard", "targets": ("mlp_out[1]",), "d_out": 7},
    "skip transcoder": {"arch": "standard", "targets": ("mlp_out[1]",), "skip": True},
    "jumprelu transcoder": {"arch": "jumprelu", "targets": ("mlp_out[1]",), "d_out": 7},
}


@pytest.mark.parametrize("case", CASES)
def test_sae_lens_computes_what_we_do(case: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    ours = made(**CASES[case])
    files.save(ours, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    x = 2 * torch.randn(50, D) + 0.5
    z = ours.encode(x)
    assert 0 < int((z > 0).sum()) < z.numel()
    assert torch.allclose(z, theirs.encode(x), atol=1e-5)
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    back = files.from_sae_lens(theirs)
    assert torch.allclose(back.encode(x), z, atol=1e-5)
    assert back.arch == ours.arch


EXTRA: dict[str, dict[str, Any]] = {
    "topk transcoder": {"arch": "topk", "targets": ("mlp_out[1]",), "d_out": 7},
    "crosscoder": {"arch": "standard", "sites": ("resid_post[0]", "resid_post[1]"), "centred": False},
}


@pytest.mark.parametrize("case", [*CASES, *EXTRA])
def test_there_and_back(case: str, tmp_path: Path) -> None:
    given = {**CASES, **EXTRA}[case]
    centred = given.get("centred")
    ours = made(**{k: v for k, v in given.items() if k != "centred"})
    if centred is False:
        from dataclasses import replace

        ours = replace(ours, centred=False)
    again = sae.load(ours.save(tmp_path))
    x = torch.randn(3, 5, D)
    assert torch.equal(again.encode(x), ours.encode(x))
    assert torch.equal(again(x), ours(x))
    assert (again.sites, again.targets, again.shape, again.k) == (ours.sites, ours.targets, ours.shape, ours.k)
    assert again.metadata["model_name"] == "tiny-llama"
    again.save(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "cfg.json").read_text()) == json.loads((tmp_path / "cfg.json").read_text())


def test_what_sae_lens_trains_is_read(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    trained = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=M, k=4))
    with torch.no_grad():
        trained.W_enc.normal_()
        trained.topk_threshold.fill_(0.4)
    trained.save_inference_model(tmp_path)
    x = torch.randn(40, D)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    assert torch.allclose(sae.load(tmp_path).encode(x), theirs.encode(x), atol=1e-5)


def test_rescaling_by_decoder_norms_is_folded(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    config = sae_lens.TopKSAEConfig(d_in=D, d_sae=M, k=4, rescale_acts_by_decoder_norm=True)
    theirs = sae_lens.TopKSAE(config)
    theirs.save_model(tmp_path)
    x = torch.randn(40, D)
    ours = sae.load(tmp_path)
    assert torch.allclose(ours.encode(x), theirs.encode(x), atol=1e-5)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_a_trained_sae_has_a_card(tmp_path: Path) -> None:
    s = sae.train(torch.randn(600, D), "mlp_out[2]", d_sae=M, k=3, batch_size=100, progress=False, arch="topk")
    s.save(tmp_path)
    card = Card.load(tmp_path)
    assert card.fields["method"]["trained as"] == "topk"
    assert card.fields["site"] == "mlp_out[2]"
    missing = {line.partition(":")[0] for line in card.lint()}
    assert "intended_use" in missing  # only its author knows
    assert "method" not in missing


def test_what_is_no_sae_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(sae.SAEError, match=r"no cfg\.json"):
        sae.load(tmp_path)
    made("standard").save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "architecture": "temporal"}))
    with pytest.raises(sae.SAEError, match="'temporal' is not supported"):
        sae.load(tmp_path)
    with pytest.raises(sae.SAEError, match="this SAE takes d_in=16"):
        made("standard").encode(torch.randn(3, 15))
    with pytest.raises(sae.SAEError, match=r"threshold: expected \[24\]"):
        sae.SAE(*(getattr(made("standard"), n) for n in ("decoder", "b_dec", "encoder", "b_enc")), arch="jumprelu")


def test_the_limit_of_its_training_stays_with_it(tmp_path: Path) -> None:
    ours = sae.SAE(torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D), limit=3.5)
    assert sae.load(ours.save(tmp_path / "a")).limit == 3.5
    assert sae.load(made("standard").save(tmp_path / "b")).limit == float("inf")


def test_what_is_no_directory_is_a_name() -> None:
    with pytest.raises(sae.SAEError, match="gone is no SAE directory"):
        sae.load("gone")
