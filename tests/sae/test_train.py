"""Training: planted dictionaries are found, a killed run is the unbroken one, and bad input is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp import sae, store
from interp.sae import checkpoint as checkpoints
from interp.sae import sources
from interp.sae.settings import NEEDS_K, Settings, complete
from interp.sae.trainer import Trainer
from tests.sae.conftest import Planted

QUIET: dict[str, Any] = {"progress": False, "batch_size": 256}


def fvu(s: Any, x: torch.Tensor) -> float:
    return float((x - s(x)).square().sum() / (x - x.mean(0)).square().sum())


ARCHS = {
    "topk": {"lr": 1e-2},
    "batchtopk": {"lr": 1e-2},
    "matryoshka": {"lr": 1e-2},
    "mp": {"lr": 1e-2},
    "standard": {"lr": 1e-2, "sparsity": 0.5},
    "panneal": {"lr": 1e-2, "sparsity": 0.5},
    "gated": {"lr": 1e-2, "sparsity": 0.5},
    "jumprelu": {"lr": 1e-2, "k": 3, "bandwidth": 0.3, "threshold": 0.1, "sparsity": 5.0},
}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_explains_planted_data(arch: str, data: Planted) -> None:
    options = {"k": 3 if arch in NEEDS_K else None, "dead_after": 5000, **ARCHS[arch]}
    s = sae.train(data.x, arch=arch, d_sae=32, tokens=40_000, **options, **QUIET)
    assert fvu(s, data.x) < 0.2
    assert float((s.encode(data.x) > 0).float().sum(1).mean()) < 12
    assert torch.allclose(s.reconstruct(data.x), s(data.x), atol=1e-4)
    support, values = s.codes(data.x)
    assert torch.allclose(support.scatter(values), s.encode(data.x), atol=1e-4)
    history = s.history
    assert history is not None
    assert history.fvu.iloc[-1] < history.fvu.iloc[0]
    assert history.attrs["training"]["arch"] == arch


def test_batchtopk_finds_the_planted_directions(data: Planted) -> None:
    s = sae.train(data.x, arch="batchtopk", d_sae=32, k=2.2, tokens=60_000, lr=1e-2, dead_after=5000, **QUIET)
    found = (s.decoder @ data.directions.T / s.decoder.norm(dim=1, keepdim=True)).amax(0)
    assert float((found > 0.9).float().mean()) > 0.75
    assert s.arch == "jumprelu"
    assert fvu(s, data.x) < 0.1


def test_scaling_is_in_the_weights(data: Planted) -> None:
    """In other units: the same SAE, whose reconstruction is in those units."""
    options = {"arch": "topk", "d_sae": 32, "k": 3, "tokens": 10_000, "lr": 1e-2, **QUIET}
    a, b = sae.train(data.x, **options), sae.train(100 * data.x, **options)
    assert torch.allclose(100 * a(data.x), b(100 * data.x), atol=0.05)


def test_several_in_one_pass_are_those_trained_alone(data: Planted) -> None:
    given = {"resid_post[0]": data.x, "resid_post[1]": data.x.flip(1)}
    first, second = "resid_post[0]", "resid_post[1]"
    runs = [
        {"site": first, "arch": "topk", "d_sae": 32, "k": 3},
        {"site": second, "arch": "batchtopk", "d_sae": 24, "k": 2},
        {"site": [first, second], "arch": "topk", "d_sae": 24, "k": 2},
        {"site": first, "target": second, "arch": "topk", "d_sae": 32, "k": 3, "skip": True},
    ]
    together = sae.train_many(given, runs, tokens=4000, **QUIET)
    for run, s in zip(runs, together, strict=True):
        alone = sae.train(given, tokens=4000, **run, **QUIET)
        assert all(torch.equal(v, alone.tensors()[n]) for n, v in s.tensors().items())
    assert [s.shape for s in together] == ["autoencoder", "autoencoder", "crosscoder", "transcoder"]
    x, y = data.x, data.x.flip(1)
    assert together[2](torch.cat([x, y], 1)).shape == (len(x), 32)
    skip = together[3]
    assert skip.skip is not None
    error = (y - skip(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert float(error) < 0.9


def test_outliers_are_left_out_and_counted(data: Planted) -> None:
    x = data.x.clone()
    x[::64] *= 1000
    s = sae.train(x, arch="topk", d_sae=32, k=3, tokens=len(x), lr=1e-2, **QUIET)
    assert s.metadata["outlier_tokens"] == 64
    clean = sae.train(data.x, arch="topk", d_sae=32, k=3, tokens=len(x), lr=1e-2, **QUIET)
    assert clean.metadata["outlier_tokens"] == 0
    assert fvu(s, data.x) < 1.5 * fvu(clean, data.x)
    assert clean.limit == float("inf")
    assert (s.encode(x) > 0).any(1).sum() > 0.9 * 63 / 64 * len(x)
    assert not s.encode(x)[::64].any()  # it never saw such tokens, so it says nothing about them
    support, values = s.codes(x)
    assert torch.allclose(support.scatter(values), s.encode(x), atol=1e-5)


def test_a_killed_run_ends_as_an_unbroken_one(data: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = interp.load("tiny:llama")
    texts = torch.randint(0, 100, (40, 12), generator=torch.Generator().manual_seed(0)).tolist()
    live = {"context": 12, "run": 4, "buffer": 128}
    ds = store.write(model, texts, "resid_post[1]", tmp_path / "acts", progress=False)
    cases = {
        "tensor": (data.x, {"site": "resid_post[0]", "batch_size": 256}),
        "store": (ds, {"site": "resid_post[1]", "batch_size": 64}),
        "live": ((model, texts), {"site": "resid_post[1]", "batch_size": 32, "live": live}),
    }
    real = Trainer.step
    for name, (source, options) in cases.items():
        runs = [{"arch": "batchtopk", "d_sae": 20, "k": 3, "dead_after": 100, "site": options["site"]},
                {"arch": "panneal", "d_sae": 16, "site": options["site"], "p_start_at": 0.0}]  # fmt: skip
        how = {k: v for k, v in options.items() if k != "site"}
        how |= {"tokens": 20 * int(how["batch_size"]), "progress": False, "checkpoint_every": 4, "log_every": 3}
        whole = sae.train_many(source, runs, **how)
        calls = 0

        def dying(self: Trainer, *args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 25:  # the thirteenth step, one after a checkpoint
                raise KeyboardInterrupt
            return real(self, *args, **more)

        monkeypatch.setattr(Trainer, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            sae.train_many(source, runs, checkpoint=tmp_path / name, **how)
        monkeypatch.setattr(Trainer, "step", real)
        resumed = sae.train_many(source, runs, checkpoint=tmp_path / name, **how)
        for a, b in zip(whole, resumed, strict=True):
            assert all(torch.equal(v, b.tensors()[n]) for n, v in a.tensors().items()), name
            assert a.history is not None
            assert a.history.equals(b.history), name
            assert a.metadata == b.metadata


def test_resuming_with_other_settings_shows_the_difference(data: Planted, tmp_path: Path) -> None:
    options: dict[str, Any] = {"arch": "topk", "d_sae": 32, "k": 3, "tokens": 1024, "checkpoint": tmp_path, **QUIET}
    first = sae.train(data.x, **options)
    again = sae.train(data.x, **options)  # it was complete: nothing left to do
    assert torch.equal(first.decoder, again.decoder)
    with pytest.raises(sae.SAEError, match=r"other settings \(k: 3 there, 4 here\)"):
        sae.train(data.x, **{**options, "k": 4})
    with pytest.raises(sae.SAEError, match="other activations"):
        sae.train(data.x + 1, **options)
    with pytest.raises(sae.SAEError, match="trains 1 SAEs there, 2 here"):
        sae.train_many(data.x, [{"d_sae": 32, "k": 3}] * 2, tokens=1024, checkpoint=tmp_path, **QUIET)
    checkpoints.path_of(tmp_path).write_bytes(b"nonsense")
    with pytest.raises(sae.SAEError, match="no checkpoint"):
        sae.train(data.x, **options)


def test_choosing_in_bfloat16_hardly_changes_the_loss(data: Planted) -> None:
    options = {"arch": "batchtopk", "d_sae": 32, "k": 2.2, "tokens": 20_000, "lr": 1e-2, **QUIET}
    full, half = sae.train(data.x, **options), sae.train(data.x, encode="bfloat16", **options)
    assert fvu(half, data.x) < 1.1 * fvu(full, data.x)
    assert not torch.equal(full.decoder, half.decoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 33}, r"k=33: expected between 1 and d_sae=32"),
        ({"k": None}, "needs k"),
        ({"arch": "topk", "k": 2.5}, "whole number"),
        ({"arch": "vanilla"}, "arch='vanilla': expected one of"),
        ({"sparsness": 3.0}, "sparsness=3.0: no such setting"),
        ({"d_sae": 0}, "d_sae=0"),
        ({"encode": "int8"}, "encode='int8'"),
        ({"batch_size": 5000}, "only 4096 tokens"),
        ({"site": "resid_pots[3]"}, "resid_post"),
        ({"site": "resid_post[0]", "target": "resid_post[9]"}, "one tensor for 2 sites"),
        ({"target": "resid_post[9]"}, "say what to read"),
        ({"skip": True}, "belongs to a transcoder"),
        ({"arch": "matryoshka", "widths": [8, 4, 32]}, "rising numbers"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str, data: Planted) -> None:
    with pytest.raises(ValueError, match=message):
        sae.train(data.x, **{"d_sae": 32, "k": 3, **QUIET, **options})


def test_bad_data_is_refused(data: Planted, tmp_path: Path) -> None:
    x = data.x.clone()
    x[3000, 2] = torch.nan
    with pytest.raises(sae.SAEError, match=r"1 of \d+ tokens at activations hold NaN"):
        sae.train(x, d_sae=32, k=3, tokens=4096, **QUIET)
    with pytest.raises(sae.SAEError, match="floating point"):
        sae.train(data.x.long(), d_sae=32, k=3, **QUIET)
    with pytest.raises(sae.SAEError, match="expected a tensor"):
        sae.train(3, "resid_post[0]", d_sae=32, k=3, **QUIET)
    with pytest.raises(sae.SAEError, match=r"'resid_post\[4\]' is not in the source"):
        sae.train({"resid_post[0]": data.x}, site="resid_post[4]", d_sae=32, k=3, **QUIET)
    m = interp.load("tiny:llama")
    ids = torch.randint(0, 100, (4, 8)).tolist()
    with torch.no_grad():
        m.hf.get_input_embeddings().weight[ids[2][3]] = torch.nan
    with pytest.warns(UserWarning, match="NaN or infinity"):
        ds = store.write(m, ids, "resid_post[1]", tmp_path, progress=False)
    with pytest.raises(sae.SAEError, match=r"resid_post\[1\]: \d+ of 32 tokens in .* hold NaN"):
        sae.train(ds, "resid_post[1]", d_sae=32, k=3, batch_size=8, progress=False)
    with pytest.raises(sae.SAEError, match="equally many rows"):
        sources.tensors({"a": data.x, "b": data.x[1:]}, 0)
    with pytest.raises(sae.SAEError, match="say on how many tokens"):
        sae.train((interp.load("tiny:llama"), [[1, 2, 3]]), site="resid_post[1]", d_sae=32, k=3, **QUIET)


def test_few_tokens_are_warned_of(data: Planted) -> None:
    with pytest.warns(UserWarning, match="fewer than ten each"):
        sae.train(data.x, d_sae=512, k=3, tokens=512, **QUIET)


def test_all_dead_stops_with_advice(data: Planted) -> None:
    with pytest.raises(sae.SAEError, match=r"all 32 latents are dead\. Lower sparsity"):
        sae.train(data.x, arch="standard", d_sae=32, sparsity=1e6, lr=0.1, tokens=30_000, dead_after=512, log_every=1,
                  sparsity_warmup=0.0, **QUIET)  # fmt: skip


def test_dead_latents_are_revived(data: Planted) -> None:
    """AuxK lowers the number of the dead, from the same start."""
    counts = []
    for aux in (0.0, 1.0):
        s = complete(
            Settings("topk", 16, 16, 64, k=2, lr=5e-2, batch_size=256, tokens=40_000, dead_after=2000, aux=aux)
        )
        trainer = Trainer(s, ("x",), ("x",), {"x": data.x})
        with torch.no_grad():
            trainer.weights["b_enc"][:32] = -5.0
        for i in range(150):
            trainer.step({"x": data.x[(i % 16) * 256 : (i % 16 + 1) * 256]})
        counts.append(trainer.dead)
    assert counts[0] >= 32
    assert counts[1] < counts[0] - 8


def test_the_threshold_of_a_short_batchtopk_training_keeps_its_k_on_other_data() -> None:
    """Values shrink while it learns; a threshold that remembered the first batches kept 2.6 of 4 here."""
    g = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(48, 24, generator=g), dim=1)
    codes = torch.zeros(14_800, 48)
    live = torch.rand(codes.shape, generator=g).topk(4, 1).indices
    codes.scatter_(1, live, 1 + torch.rand(live.shape, generator=g))
    x = codes @ atoms
    s = sae.train(x[:12_800], arch="batchtopk", d_sae=64, k=4, batch_size=128, lr=1e-3, progress=False)
    assert float((s.encode(x[12_800:]) > 0).float().sum(1).mean()) == pytest.approx(4, rel=0.1)
