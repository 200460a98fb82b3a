"""The tour: a real model and a Mixture of Experts, read, tabulated, exported and drawn.

It is also the shortest complete use of the library: load, capture, reduce to tables, write a dataset, draw.
Each function is a few lines that you may copy into a notebook.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.demo_texts import PARAGRAPHS

if TYPE_CHECKING:
    import pandas as pd

    from interp.activations import Activations
    from interp.model import Model
    from interp.store import ActivationDataset

#: What is exported: enough to train a probe or a sparse autoencoder on, small enough for a tour.
DENSE_SITES = ["resid_post[14]"]
MOE_SITES = ["resid_post[*]", "expert_ids[*]", "expert_weight[*]", "expert_hidden[*]"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Tour:
    """What the demo found: its tables, the datasets and figures it wrote, and how long it took in seconds.

    `resection` is as from `experts.remove_each`, or None where the trained model or its texts are not to be had.
    """

    models: list[dict[str, Any]]
    residual: pd.DataFrame
    attention: pd.DataFrame
    load: pd.DataFrame
    datasets: list[ActivationDataset]
    resection: pd.DataFrame | None
    figures: list[Path]
    seconds: float


def run(out: Path, say: Say = lambda message: None) -> Tour:
    """Do the whole tour, writing under `out`. `say` is told what happens next.

    Raises LoadError when SmolLM2 cannot be had, StoreError when `out` holds something else.
    """
    import interp
    from interp import plots, store

    start = time.perf_counter()
    texts = [text for paragraphs in PARAGRAPHS.values() for text in paragraphs]
    labels = [label for label, paragraphs in PARAGRAPHS.items() for _ in paragraphs]

    say("loading SmolLM2-135M-Instruct")
    dense = interp.load("smollm2")
    say("reading its residual stream and attention")
    acts = dense.capture(texts, ["resid_post[*]", "pattern[*]"])
    residual, attention = stream_norms(acts), attention_entropy(acts)

    moe = mixture(dense)
    say(f"reading the experts of {moe.name}")
    load = expert_load(moe, texts, labels)
    for table, model in ((residual, dense), (attention, dense), (load, moe)):
        table.attrs.update(model=model.name, fingerprint=model.fingerprint, texts=f"{len(texts)} paragraphs of interp")

    say("exporting both as activation datasets")
    datasets = []
    for model, sites in ((dense, DENSE_SITES), (moe, MOE_SITES)):
        directory = out / model.name.replace(":", "-")
        datasets.append(store.write(model, texts, sites, directory, labels=labels, progress=False))

    say("drawing")
    norm = residual.groupby("position")["norm"].max()
    title = (
        f"{dense.name}: a text's first token grows {norm['first'] / norm['later']:.0f} times as long as any other; "
        f"{moe.name}: one expert takes up to {load['share'].max():.0%} of a layer's slots"
    )
    figures = [plots.save(plots.overview(residual, attention, load, title), out / "overview.html")]
    removed = resection(say)
    if removed is not None:
        figures.append(plots.save(plots.domain_matrix(removed), out / "resection.html"))
    models = [{"name": m.name, **m.card, "fingerprint": m.fingerprint} for m in (dense, moe)]
    return Tour(models, residual, attention, load, datasets, removed, figures, time.perf_counter() - start)


#: Milder than Monet's own ratio of 2, which finds next to nothing for some domains in a model this young.
RESECTION: dict[str, Any] = {"rule": "skew", "ratio": 1.5}


def resection(say: Say = lambda message: None) -> pd.DataFrame | None:
    """Cuts each domain out of monet-mini in turn: the Table of `experts.remove_each`, on few tokens to be quick.

    None where the model does not come with this installation or its texts cannot be had; `say` is told why.
    """
    import interp
    from interp import corpora, experts
    from interp.zoo.load import names

    if "monet-mini" not in names():
        say("skipping resection: monet-mini comes with the repository, and this installation is without it")
        return None
    model = interp.load("monet-mini")
    try:
        texts = {split: corpora.load(split, group="domain") for split in ("train", "test")}
    except corpora.CorpusError as error:
        say(f"skipping resection: {error}")
        return None
    say(f"measuring which of monet-mini's experts work on {', '.join(texts['train'])}")
    stats = experts.routing(model, texts["train"], max_tokens=5_000)
    return experts.remove_each(model, stats, texts["test"], max_tokens=1_000, controls=20, say=say, **RESECTION)


def mixture(dense: Model) -> Model:
    """A Mixture of Experts that reads the same tokens: our trained one if it is here, else a random tiny
    OLMoE."""
    import interp
    from interp.zoo.load import names

    if "olmoe-mini" in names():
        return interp.load("olmoe-mini")
    return interp.load("tiny:olmoe", dense.tokenizer, vocab_size=dense.d_vocab, max_position_embeddings=512)


def stream_norms(acts: Activations) -> pd.DataFrame:
    """Mean length of the residual stream after each layer: columns layer, position ("first" or "later"), norm.

    The first token is kept apart because models park attention on it and grow it a hundredfold ("massive
    activations", Sun et al. 2024, arXiv 2402.17762): one mean over both would describe neither.
    """
    import pandas as pd

    first = acts.tokens.position == 0
    groups = {"first": first & acts.mask, "later": ~first & acts.mask}  # [batch, pos]
    rows = []
    for site in acts.sites:
        if site.name == "resid_post":
            length = acts[site].float().norm(dim=-1)  # [batch, pos]
            for name, chosen in groups.items():
                rows.append({"layer": site.layer, "position": name, "norm": float(length[chosen].mean())})
    return pd.DataFrame(rows)


def attention_entropy(acts: Activations) -> pd.DataFrame:
    """How spread each head's attention is, and how much of it rests on the first token.

    Columns layer, head, entropy (bits: -sum over keys of p log2 p, averaged over real queries but the first, which has
    nowhere else to look), first (share of attention on the text's first token, averaged over the same queries).
    """
    import pandas as pd

    asking = acts.mask & (acts.tokens.position > 0)  # [batch, query]
    rows = []
    for site in acts.sites:
        if site.name == "pattern":
            p = acts[site].float().movedim(1, -1)[asking]  # [token, key, head]; texts are padded on the right
            entropy = -(p * p.clamp_min(1e-12).log2()).sum(1).mean(0)  # [head]
            first = p[:, 0].mean(0)  # [head]
            for head, (bits, share) in enumerate(zip(entropy.tolist(), first.tolist(), strict=True)):
                rows.append({"layer": site.layer, "head": head, "entropy": bits, "first": share})
    return pd.DataFrame(rows)


def expert_load(model: Model, texts: list[str], labels: list[str]) -> pd.DataFrame:
    """How often each expert is chosen for each kind of text: columns layer, label, expert, tokens, share.

    `tokens` counts real tokens that visit the expert; `share` is its part of all visits of that label in that
    layer, 1 / n_experts where the router plays no favourites.
    """
    import pandas as pd

    acts = model.capture(texts, "expert_weight[*]")
    rows = []
    for layer in sorted({site.layer for site in acts.sites if site.layer is not None}):
        chosen = acts.experts(layer)
        for label in dict.fromkeys(labels):
            of_label = torch.tensor([own == label for own in labels])[:, None] & acts.mask  # [batch, pos]
            visits = torch.bincount(chosen.ids[of_label].flatten(), minlength=model.n_experts)
            rows += [
                {"layer": layer, "label": label, "expert": e, "tokens": n, "share": n / int(visits.sum())}
                for e, n in enumerate(visits.tolist())
            ]
    return pd.DataFrame(rows)
