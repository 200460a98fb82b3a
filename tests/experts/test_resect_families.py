"""Taking experts away in every family: in memory for all, through a checkpoint and plain transformers for each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp import experts
from interp.experts import ExpertError, ExpertSet
from interp.experts import smaller as cutting
from interp.experts.surgery import choice_bias, operated
from interp.zoo.families import families

ALL = [name for name in (*families("moe"), *families("moe-undecorated")) if name != "llama4"]
IDS = torch.arange(3, 19).view(2, 8)

#: Families whose experts cannot be cut out, with a word of the reason.
UNCUT = {
    "deepseek_v4": "token id",
    "jetmoe": "self_attention",  # one number says how many experts the MLP and attention have
    "ernie4_5_vl_moe": "vision_moe",  # and here, how many there are for text and for images
}
#: Families with a bias on shares of a softmax over all experts: it keeps an expert out, but leaves it its share.
SHARES = ("longcat_flash", "zaya", "ernie4_5_moe", "ernie4_5_vl_moe")


def two_per_layer(m: Any) -> ExpertSet:
    """One expert of each half, which is each group where experts form two groups."""
    half = 4
    return ExpertSet(m, {layer: [1, half + 2] for layer in m.anatomy.having("expert_weight")})


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_weights_and_masks_agree(family: str) -> None:
    torch.set_num_threads(1)
    m = interp.load(f"tiny:{family}")
    chosen = two_per_layer(m)
    plain, fingerprint = m(IDS), m.fingerprint
    off, rerouted = experts.ablate(chosen), experts.ablate(chosen, "reroute")
    with m.intervene(off):
        wanted = m(IDS)
    assert (wanted - plain).abs().max() > 1e-3
    with operated(m, off):
        close(m(IDS), wanted)
    assert m.fingerprint == fingerprint
    if family in UNCUT:
        with pytest.raises(ExpertError, match=UNCUT[family]):
            cutting.cut(m, chosen)
    else:
        with m.intervene(rerouted):
            wanted = m(IDS)
        small = cutting.cut(m, chosen)
        close(small(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits, wanted)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in m.hf.parameters())
        if choice_bias(m, next(iter(chosen.ids))) is not None and family not in SHARES:
            with operated(m, rerouted):
                close(m(IDS), wanted)
    assert m.fingerprint == fingerprint
    close(m(IDS), plain)


#: family -> how its checkpoint is made. Routers of every kind: softmax before and after the choice, with and without
#: renormalisation, logit bias, sigmoid with correction bias and groups, sparsemixer, p-norm, per-expert scales, shared
#: experts with and without a gate, identity experts, experts in fused, transposed and flat tensors.
SAVED = {
    "olmoe": "reroute", "mixtral": "reroute", "qwen2_moe": "zero", "gpt_oss": "bias", "granitemoe": "reroute",
    "phimoe": "reroute", "deepseek_v2": "reroute", "deepseek_v3": "bias", "ernie4_5_moe": "reroute",
    "gemma4": "reroute", "dbrx": "reroute", "jetmoe": "zero", "longcat_flash": "reroute", "afmoe": "bias",
}  # fmt: skip
PROGRAM = """
import json, sys, torch, transformers
ids = torch.arange(3, 19).view(2, 8)
out = {}
for family, path in json.loads(sys.argv[1]).items():
    config = json.load(open(f"{path}/config.json"))
    m = getattr(transformers, config["architectures"][0]).from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        out[family] = m(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
assert "interp" not in sys.modules
torch.save(out, sys.argv[2])
"""


@torch.no_grad()
def test_plain_transformers_loads_what_equals_the_masked_model(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    wanted, paths = {}, {}
    for family, way in SAVED.items():
        m = interp.load(f"tiny:{family}")
        change = experts.ablate(two_per_layer(m), "zero" if way == "zero" else "reroute")
        how = "weights" if way == "bias" else "auto"
        path = experts.resect(m, change, tmp_path / family, how=how)
        with m.intervene(change):
            wanted[family] = m(IDS)
        paths[family] = str(path)
        told = json.loads((path / "card.json").read_text())["fields"]["method"]
        done = {"zero": "zeroed", "bias": "a bias", "reroute": "cut out"}[way]
        assert told["switched off by"].startswith(done)
        assert "logits within" in told["parity"]
    target = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(paths), target], check=True, capture_output=True, cwd=tmp_path
    )
    found = torch.load(target, weights_only=True)
    errors = {f: float((found[f] - wanted[f]).abs().max()) / max(1.0, float(wanted[f].abs().max())) for f in SAVED}
    assert max(errors.values()) <= 1e-5, errors


@torch.no_grad()
@pytest.mark.parametrize("mode", ["scale", "swap", "mean"])
def test_other_modes_in_the_weights(mode: str, tmp_path: Path) -> None:
    m = interp.load("tiny:gpt_oss")
    chosen = ExpertSet(m, {0: [1], 2: [6]})
    how = {
        "scale": {"factor": 2.5},
        "swap": {"partners": {0: {1: 3}, 2: {6: 0}}},
        "mean": {"reference": torch.arange(3, 99).view(4, 24)},
    }[mode]
    change = experts.ablate(chosen, mode, **how)  # type: ignore[arg-type]
    with m.intervene(change):
        wanted = m(IDS)
    close(interp.load(experts.resect(m, change, tmp_path / mode))(IDS), wanted)


def test_what_cannot_be_baked_says_why(tmp_path: Path) -> None:
    olmoe, gpt, cat = (interp.load(f"tiny:{name}") for name in ("olmoe", "gpt_oss", "longcat_flash"))
    uneven = ExpertSet(olmoe, {0: [1], 1: [2, 3]})
    cases = [
        (olmoe, experts.ablate(uneven, "renormalise"), "depends on who else was chosen"),
        (olmoe, experts.ablate(ExpertSet(olmoe, {0: [1]}), "force"), "depends on the other experts"),
        (olmoe, experts.ablate(uneven, "reroute"), "no bias that could keep an expert out"),
        (olmoe, experts.ablate(uneven, scope="prompt"), "acts on all tokens alike"),
        (olmoe, experts.ablate(uneven, "mean", reference=IDS.repeat(2, 2)), "no output bias|never chosen"),
        (cat, experts.ablate(ExpertSet(cat, {0: [1]}), "reroute"), "not out of the sum"),
        (cat, ExpertSet(cat, {0: [9]}), "returns its input and has no weights"),
        (gpt, ExpertSet(olmoe, {0: [1]}), "mean nothing in another"),
    ]
    for m, change, why in cases:
        with pytest.raises(ExpertError, match=why):
            experts.resect(m, change, tmp_path / "out")
    with pytest.raises(ExpertError, match="layers lose 0 to 2"):
        experts.resect(olmoe, experts.ablate(uneven, "reroute"), tmp_path / "out", how="smaller")
    with pytest.raises(ExpertError, match="how='smaller' is mode='reroute'"):
        experts.resect(olmoe, uneven, tmp_path / "out", how="smaller")
    many = ExpertSet(gpt, {layer: range(7) for layer in range(3)})
    with pytest.raises(ExpertError, match="fewer left than the 2 that a token visits"):
        experts.resect(gpt, experts.ablate(many, "reroute"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
