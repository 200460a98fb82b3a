"""Makes the sparse autoencoders of this folder, or makes them again:

    python data/models/sae-make.py sae-monet-mini --work acts
    python data/models/sae-make.py sae-olmoe-mini --work acts
    python data/models/sae-make.py sae-llama-mini --work acts
    python data/models/sae-make.py sae-smollm2 --work acts

Text of every domain's train split in equal parts is written as activations to ``--work``, an SAE is trained on them,
rounded to bfloat16 and saved here under its name; what is rounded is what is evaluated, on passages of the test split.
Both steps go on where they stopped when they are called again; a model that was trained anew needs a fresh ``--work``.
`interp.sae.load` opens the result by its name. ``--texts 48 --out try`` makes a small one elsewhere, to try it out.
"""

# ruff: noqa: T201   a script's output

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import interp
from interp import corpora, sae, store
from interp.cards import Card
from interp.sae import files

HERE = Path(__file__).resolve().parent
CONTEXT, HELD_OUT = 128, 5
LENGTH = 480  # letters of a passage; a few more tokens than CONTEXT, so that windows are full


@dataclass(frozen=True)
class Recipe:
    """One SAE: whose it is, where, and how it is trained."""

    model: str
    site: str
    texts: int  # passages to train on, of all labels by turns
    epochs: float
    settings: dict[str, Any]


RECIPES = {
    "sae-monet-mini": Recipe("monet-mini", "resid_post[3]", 1280, 3, {"d_sae": 1024, "k": 16, "lr": 1e-3}),
    "sae-olmoe-mini": Recipe("olmoe-mini", "resid_post[3]", 1280, 3, {"d_sae": 1024, "k": 16, "lr": 1e-3}),
    "sae-llama-mini": Recipe("llama-mini", "resid_post[3]", 1280, 3, {"d_sae": 1024, "k": 16, "lr": 1e-3}),
    "sae-smollm2": Recipe("smollm2", "resid_post[15]", 896, 4, {"d_sae": 2048, "k": 32, "lr": 6e-4}),
}


def passages(split: str, each: int) -> dict[str, list[str]]:
    """label -> passages of LENGTH letters, by turns from all documents of the label, at most `each`."""
    found = {}
    for label, texts in corpora.load(split, group="domain", max_bytes=2_000_000).items():
        starts = range(0, max(map(len, texts)), LENGTH)
        pieces = [text[at : at + LENGTH] for at in starts for text in texts]
        found[label] = [piece for piece in pieces if len(piece) == LENGTH][:each]
    return found


def make(name: str, recipe: Recipe, work: Path, out: Path = HERE) -> Path:
    m = interp.load(recipe.model)
    texts = [text for of in zip(*passages("train", recipe.texts).values(), strict=False) for text in of][: recipe.texts]
    began = time.perf_counter()
    other = recipe.site.replace("resid_post", "mlp_out")  # for benchmarks/sae_versus.py
    ds = store.write(m, texts, [recipe.site, other], work / name / "acts", context=CONTEXT, dtype="float16",
                     batch_size=16, documents_per_range=128, sources="interp.corpora, train split")  # fmt: skip
    print(f"{name}: {len(ds)} tokens captured in {time.perf_counter() - began:.0f} s")
    return learn(name, recipe, m, ds, work, out)


def learn(name: str, recipe: Recipe, m: Any, ds: store.ActivationDataset, work: Path, out: Path) -> Path:
    began, rows = time.perf_counter(), len(ds[recipe.site])
    s = sae.train(ds, recipe.site, arch="batchtopk", tokens=int(recipe.epochs * rows), batch_size=2048, log_every=20,
                  checkpoint=work / name / "checkpoint", checkpoint_every=100, **recipe.settings)  # fmt: skip
    print(f"{name}: trained in {time.perf_counter() - began:.0f} s")
    s.metadata.update(model_name=m.name, model_hash=m.fingerprint, context_size=CONTEXT,  # type: ignore[attr-defined]
                      distinct_tokens=rows)  # fmt: skip
    s.metadata.pop("source", None)  # type: ignore[attr-defined]
    path = s.to(torch.bfloat16).save(out / name)
    describe(path, m, s)
    return path


def describe(path: Path, m: Any, trained: Any) -> None:
    """The card: what the saved (rounded) SAE does on passages of documents that nothing was trained on."""
    s = sae.load(path)
    texts = [text for of in passages("test", HELD_OUT).values() for text in of]
    table = sae.evaluate(s, m, texts, context=CONTEXT)
    shown = table[~table.metric.isin(["gamma", "kl", "explained_variance", "density"])]
    rows = [
        {"metric": metric, "value": round(value, 4), "95 %": "" if low != low else f"{low:.4f} to {high:.4f}"}
        for metric, value, low, high in shown[["metric", "value", "low", "high"]].itertuples(index=False)
    ]
    at = table.set_index("metric").value
    print(at.round(4).to_dict())
    dead, outliers, tokens = int(at["dead"]), float(at.get("outliers", 0.0)), table.attrs["tokens"]
    about = s.metadata
    final = trained.history.iloc[-1]
    sinks = (
        f"Attention sinks ({outliers:.1%} of tokens, those with a norm above {s.limit:.0f}) were left out: no latent "
        "fires on them, and evaluation leaves them as they are. SAELens knows no limit: it computes latents there. "
    )
    fields = dict(files.card(trained).fields)
    fields |= {
        "description": f"A sparse autoencoder with {s.d_sae} latents of {m.name}'s {s.sites[0]}; "
        f'`interp.sae.load("{path.name}")`.',
        "training_data": f"{about['distinct_tokens']} tokens of nine domains in equal parts (interp.corpora, train "
        f"split, windows of {CONTEXT} tokens), each read {about['tokens_seen'] / about['distinct_tokens']:.1f} times.",
        "metrics": "Fraction of variance unexplained, latents per token, and the share of the loss that comes back "
        "when the model reads the reconstruction (1: all; 0: as if the site were zero); 95 % intervals over passages. "
        "Of the saved weights (bfloat16).",
        "evaluation_data": f"{HELD_OUT} passages of each domain's test split, {tokens} tokens; documents that neither "
        "the SAE nor (for the minis) the model was trained on.",
        "evaluation": rows,
        "intended_use": "Learning and testing: examples, notebooks, comparisons of features.",
        "out_of_scope": "Claims about what the model 'thinks'; safety decisions.",
        "factors": "Domains of text; languages other than English and code were not in the training.",
        "ethics": "None known beyond the model's own; latents have no verified names.",
        "limits": f"Few tokens: {about['tokens_seen']} seen, {about['distinct_tokens']} of them distinct, where "
        f"published SAEs see billions. {dead} of {s.d_sae} latents do not fire on the evaluation passages, "
        f"{int(final['dead'])} were dead at the end of the training. Last training batch: fvu {final['fvu']:.3f}; "
        "held-out text is explained worse than what it was trained on. "
        f"{sinks if outliers else ''}Another seed finds other latents.",
        "licence": "Apache-2.0",
    }  # fmt: skip
    card = Card("sae", f"{path.name}: {m.name}, {s.sites[0]}", fields)
    for problem in card.lint():
        print(problem)
    card.save(path / "card.json")
    card.save(path / "README.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--work", type=Path, required=True, help="where activations and checkpoints go")
    parser.add_argument("--texts", type=int, help="passages to train on, in place of the recipe's")
    parser.add_argument("--out", type=Path, default=HERE, help="where the result goes")
    given = parser.parse_args()
    recipe = RECIPES[given.name]
    print(make(given.name, replace(recipe, texts=given.texts or recipe.texts), given.work, given.out))
