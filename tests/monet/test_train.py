"""The training loop: it learns, it resumes bit for bit, what it ships can be loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp.monet.train import checkpoint, loop, report
from interp.monet.train.data import Corpus, prepare
from interp.monet.train.loop import CHECKPOINT, LOG, Run, Settings
from interp.monet.train.recipes import RECIPES, parse_overrides

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
OF = {
    "monet-mini": {"moe_experts": 8, "moe_dim": 8, "moe_heads": 2, "moe_topk": 2},
    "olmoe-mini": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "llama-mini": {"intermediate_size": 64},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are quicker without threads, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_corpus(where: Path) -> Path:
    """Two labels with words and an order of their own: counting up, and counting down in another script."""
    random = np.random.default_rng(0)

    def text(label: str) -> str:
        start = int(random.integers(0, 40))
        words = [f"{'item' if label == 'up' else 'пункт'}{(start + k) % 50}" for k in range(60)]
        return " ".join(words if label == "up" else words[::-1])

    for split, documents in (("train", 60), ("validation", 8), ("test", 8)):
        rows = [{"text": text(label), "label": label} for label in ("up", "down") for _ in range(documents)]
        pd.DataFrame(rows).to_parquet(where / f"{split}.parquet")
    return where


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(write_corpus(tmp_path_factory.mktemp("corpus")), 400)


def settings(recipe: str = "monet-mini", steps: int = 12, **more: object) -> Settings:
    overrides = TINY | OF[recipe]
    return Settings(recipe, steps * 4 * 32, overrides, batch=4, context=32, warmup=3, **more)  # type: ignore[arg-type]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_and_resumed_run_is_the_run_that_was_not_stopped(
    recipe: str, optimizer: str, corpus: Corpus, tmp_path: Path
) -> None:
    wanted = settings(recipe, optimizer=optimizer)
    straight = Run(wanted, corpus, tmp_path / "straight")
    assert straight.fit(log_every=1)
    for _ in range(100):
        stopped = Run(wanted, corpus, tmp_path / "stopped")
        if stopped.fit(minutes=0, log_every=1):  # one step a call
            break
    assert stopped.step == straight.step == 12
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(stopped)[name]), name
    logs = [
        [json.loads(line) for line in (tmp_path / which / LOG).read_text().splitlines()]
        for which in ("straight", "stopped")
    ]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_what_was_logged_after_the_checkpoint_is_dropped(corpus: Corpus, tmp_path: Path) -> None:
    run = Run(settings(), corpus, tmp_path)
    run.fit(minutes=0, log_every=1)
    with (tmp_path / LOG).open("a") as log:
        log.write('{"step": 2, "loss": 9.0}\n{"step": 3, "lo')  # killed while writing
    Run(settings(), corpus, tmp_path).fit(minutes=0, log_every=1)
    steps = [json.loads(line)["step"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert steps == [1, 1, 2, 2]  # each with its validation


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns_more_than_how_frequent_tokens_are(recipe: str, corpus: Corpus, tmp_path: Path) -> None:
    ids = np.concatenate([corpus.stream("validation", label) for label in corpus.labels])
    share = np.bincount(ids, minlength=corpus.vocabulary) / len(ids)
    entropy = float(-(share[share > 0] * np.log(share[share > 0])).sum())
    run = Run(settings(recipe, 60, lr=1e-2), corpus, tmp_path)
    before = np.mean([*run.validate().values()])
    run.fit()
    after = np.mean([*run.validate().values()])
    assert before > entropy > after, (before, entropy, after)


def test_a_longer_run_goes_on_from_where_the_shorter_began_to_decay(corpus: Corpus, tmp_path: Path) -> None:
    Run(settings(steps=12), corpus, tmp_path / "a").fit()
    longer = Run(settings(steps=24), corpus, tmp_path / "a")
    assert longer.step == 9  # the last quarter of 12 is unlearned
    longer.fit()
    straight = Run(settings(steps=24), corpus, tmp_path / "b")
    straight.fit()
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(longer)[name]), name


def test_another_run_in_the_directory_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    Run(settings(), corpus, tmp_path).fit(minutes=0)
    with pytest.raises(ValueError, match=r"holds a run with lr=0\.003, not 0\.01"):
        Run(settings(lr=1e-2), corpus, tmp_path)


def test_a_damaged_checkpoint_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    Run(settings(), corpus, tmp_path).fit(minutes=0)
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a training checkpoint"):
        Run(settings(), corpus, tmp_path)


def test_a_failed_write_leaves_the_checkpoint_before(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(settings(), corpus, tmp_path)
    run.fit(minutes=0)
    before = (tmp_path / CHECKPOINT).read_bytes()
    run.train_step()

    def no_space(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    with pytest.raises(OSError, match="No space"):
        run.save()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob(".*tmp"))
    assert checkpoint.read_state(tmp_path / CHECKPOINT)["step"] == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_shipped_loads_and_is_what_the_card_measured(recipe: str, corpus: Corpus, tmp_path: Path) -> None:
    Run(settings(recipe), corpus, tmp_path / "run").fit()
    table = report.ship(tmp_path / "run", corpus, tmp_path / recipe, limit=512)
    model = interp.load(str(tmp_path / recipe))
    assert model.tokenizer("item1").input_ids == corpus.tokenizer()("item1").input_ids
    rows = loop.windows(corpus.stream("test", "up"), 32, 512)
    loss = float(loop.token_losses(model.hf, rows).mean())
    assert table.set_index("label").loc["up", "loss"] == pytest.approx(loss, abs=1e-6)
    text = (tmp_path / recipe / "README.md").read_text()
    assert f"| {loss:.3f} |" in text
    assert corpus.fingerprint in text
    trained = report.open_run(tmp_path / "run", corpus).model.state_dict()
    for name, tensor in model.hf.state_dict().items():
        if "norm1.running" in name or "norm2.running" in name:
            assert torch.equal(tensor, trained[name]), name  # not rounded
        elif tensor.is_floating_point():
            assert torch.equal(tensor, trained[name].to(torch.bfloat16).to(tensor)), name


def test_a_run_may_begin_with_shipped_weights(corpus: Corpus, tmp_path: Path) -> None:
    first = Run(settings(), corpus, tmp_path / "first", device="cpu")
    first.fit()
    shipped = report.export(tmp_path / "first", corpus, tmp_path / "shipped")
    assert shipped.hf.generation_config.use_cache, "generation would compute every prompt again for each new token"
    second = Run(settings(start=str(tmp_path / "shipped"), seed=1), corpus, tmp_path / "second", device="cpu")
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, shipped.hf.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"--start .*: not a checkpoint of this recipe"):
        Run(settings("llama-mini", start=str(tmp_path / "shipped")), corpus, tmp_path / "third", device="cpu")


def test_overrides_are_checked(corpus: Corpus) -> None:
    assert parse_overrides(["a=3", "b=x", "c=1e-3"]) == {"a": 3, "b": "x", "c": 1e-3}
    with pytest.raises(ValueError, match="expected key=value"):
        parse_overrides(["a"])
    with pytest.raises(ValueError, match=r"--set moe_expert: monet-mini can override .*moe_experts"):
        RECIPES["monet-mini"].model(400, {}, moe_expert=3)
