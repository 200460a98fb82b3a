"""From a run to a shipped model: weights in bfloat16, what they can do, and the card that says so.

Every figure is of the shipped weights (rounded to bfloat16, loaded again from disk) on the test split. The 5-gram was
counted on exactly the training tokens that the model had read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.monet.train.data import Corpus, Sampler, windows
from interp.monet.train.loop import CHECKPOINT, LOG, RUN, Run, Settings
from interp.monet.train.ngram import KneserNey
from interp.monet.train.recipes import RECIPES

if TYPE_CHECKING:
    import pandas as pd

#: Lines of the training log that are shipped.
CURVE = 200


def export(run_dir: Path, corpus: Corpus, to: Path) -> Any:
    """Writes the model of a run's checkpoint as a Hugging Face directory with its tokenizer.

    Parameters are rounded to bfloat16; buffers (the routing statistics of Monet) keep their precision. Returns the
    model as it is read back by `interp.load`, in float32.
    """
    import interp

    run = open_run(run_dir, corpus)
    model = run.model.cpu().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.use_cache = model.generation_config.use_cache = True  # both were off in training
    model.config.dtype = torch.bfloat16
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    to.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(to)
    corpus.tokenizer().save_pretrained(to)
    _thin(run_dir / LOG, to / LOG)
    return interp.load(str(to))


def open_run(run_dir: Path, corpus: Corpus) -> Run:
    """The run in a directory, at its checkpoint. Raises ValueError if there is none."""
    if not (run_dir / CHECKPOINT).is_file():
        raise ValueError(f"{run_dir}: no {CHECKPOINT}; train first, or give the directory that was --out")
    about = json.loads((run_dir / RUN).read_text(encoding="utf-8"))
    settings = about["settings"] | {"betas": tuple(about["settings"]["betas"])}
    return Run(Settings(**settings), corpus, run_dir, device="cpu")


@dataclass(frozen=True)
class Score:
    """What a model does on one label's test text: summed over `tokens` predicted tokens, which are `bytes` of text."""

    tokens: int
    bytes: int
    nats: float
    right: int


def score(model: Any, corpus: Corpus, rows: Any, batch: int = 16) -> Score:
    """Loss and next-token accuracy of windows of ids [window, pos]."""
    sizes, nats, right = corpus.token_bytes(), 0.0, 0
    for part in torch.as_tensor(rows).split(batch):
        with torch.no_grad():
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.mT, part[:, 1:], reduction="sum")
        nats, right = nats + float(losses), right + int((logits.argmax(-1) == part[:, 1:]).sum())
    predicted = np.asarray(rows)[:, 1:]
    return Score(predicted.size, int(sizes[predicted].sum()), nats, right)


def table(model: Any, corpus: Corpus, settings: Settings, steps: int, limit: int) -> pd.DataFrame:
    """One row per label: the model and the 5-gram on at most `limit` tokens of its test text.

    Columns: label, tokens, loss (nats per token), bits_per_byte, accuracy (of the next token), ngram_loss (nats per
    token of the 5-gram, which sees the same history within the same windows), gain (ngram_loss - loss). The last row,
    label "mean", averages over labels.
    """
    import pandas as pd

    sampler = Sampler(corpus, settings.context, settings.batch, seed=settings.seed, power=settings.power)
    baseline = KneserNey(sampler.seen(steps), corpus.vocabulary)
    rows = []
    for label in corpus.spans["test"]:
        text = windows(corpus.stream("test", label), settings.context, limit)
        found = score(model, corpus, text)
        ngram = -np.mean([baseline.log_probs(row)[1:] for row in text])
        rows.append(
            {
                "label": label,
                "tokens": found.tokens,
                "loss": found.nats / found.tokens,
                "bits_per_byte": found.nats / math.log(2) / found.bytes,
                "accuracy": found.right / found.tokens,
                "ngram_loss": float(ngram),
            }
        )
    frame = pd.DataFrame(rows)
    mean = frame.drop(columns=["label", "tokens"]).mean().to_dict()
    frame.loc[len(frame)] = {"label": "mean", "tokens": int(frame["tokens"].sum()), **mean}
    frame["gain"] = frame["ngram_loss"] - frame["loss"]
    return frame


def ship(run_dir: Path, corpus: Corpus, to: Path, *, limit: int = 65_536) -> pd.DataFrame:
    """Exports a run, measures what was exported and writes its card; returns the table of `table`."""
    model = export(run_dir, corpus, to)
    run = open_run(run_dir, corpus)
    result = table(model.hf, corpus, run.settings, run.step, limit)
    (to / "README.md").write_text(card(run, run_dir, model.hf, result), encoding="utf-8")
    result.to_json(to / "scores.json", orient="records", indent=1)
    about = {"source": "trained by interp.monet.train", "weights": "trained", "license": "Apache-2.0"}
    (to / "source.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return result


def card(run: Run, run_dir: Path, model: Any, result: pd.DataFrame) -> str:
    """The model card, Markdown."""
    about = json.loads((run_dir / RUN).read_text(encoding="utf-8"))
    settings, name = run.settings, run.settings.recipe
    parameters = sum(p.numel() for p in model.parameters())
    command = f"python -m interp.monet.train {name} --data CORPUS --out RUN --tokens {settings.tokens} "
    command += f"--batch {settings.batch} --lr {settings.lr:g} --optimizer {settings.optimizer} --seed {settings.seed}"
    command += "".join(f" --set {key}={value}" for key, value in settings.overrides.items())
    facts = {
        "parameters": f"{parameters:,} (embeddings tied)",
        "training tokens read": f"{run.tokens_seen:,} in {run.step:,} of {settings.steps:,} steps",
        "training time": f"{run.seconds:,.0f} s",
        "machine": about["device"],
        "seed": str(settings.seed),
        "vocabulary, context": f"{run.corpus.vocabulary:,} tokens (byte-level BPE), {settings.context}",
        "corpus": f"sha256 {run.corpus.fingerprint}",
    }
    lines = [f"# {name}", "", f"{RECIPES[name].summary}. Trained from nothing by `interp`, for research on experts:",
             "small enough to take apart on a laptop, too small to be of use as a writer.", "",
             f'    m = interp.load("{name}")', "", "| | |", "| --- | --- |"]  # fmt: skip
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    lines += ["", "Command:", "", f"    {command}", "", "## Test text", "",
              "Loss in nats per token; the 5-gram is an interpolated modified Kneser-Ney model of the same training "
              "tokens and the same windows of context.", "",
              "| label | tokens | loss | bits per byte | next token right | 5-gram loss | gain |",
              "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in result.to_dict("records"):
        label = str(row["label"]).replace("|", "\\|")
        lines.append(
            f"| {label} | {row['tokens']:,} | {row['loss']:.3f} | {row['bits_per_byte']:.3f} | "
            f"{row['accuracy']:.1%} | {row['ngram_loss']:.3f} | {row['gain']:+.3f} |"
        )
    lines += ["", "## Curve", "", f"`{LOG}` has the loss over the run; some points:", "",
              "| tokens | loss | learning rate |", "| ---: | ---: | ---: |"]  # fmt: skip
    points = [entry for entry in _entries(run_dir / LOG) if "loss" in entry]
    for index in np.unique(np.linspace(0, len(points) - 1, min(12, len(points))).astype(int)):
        point = points[index]
        lines.append(f"| {point['tokens']:,} | {point['loss']:.3f} | {point['lr']:.2e} |")
    return "\n".join(lines) + "\n"


def _entries(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _thin(log: Path, to: Path) -> None:
    """Every n-th line of the log, so that about `CURVE` remain; every validation stays."""
    entries = _entries(log)
    every = max(1, len(entries) // CURVE)
    kept = [e for number, e in enumerate(entries) if number % every == 0 or "validation" in e]
    to.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
