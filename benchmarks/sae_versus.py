"""Experts against latents at the same number of features per token, on real and on trained small models.

    python benchmarks/sae_versus.py monet-mini
    python benchmarks/sae_versus.py olmoe-mini
    python benchmarks/sae_versus.py smollm2 --l0 8            # a dense model, its MLP in 64 experts

Activations of the train split are captured once (``--acts``, a dataset with both sites, such as data/models/sae-make.py
makes; it resumes), SAEs are trained on the residual stream after the layer and on what its experts (or MLP) add, and
every kind of feature is read from the same passages of the validation split: see `interp.sae.versus.compare` for the
metrics. Where a model has experts of its own their routing is compared, in a dense model groups of neurons
(`experts.split`), by weights and at random, by the size of what they say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import interp
from interp import corpora, experts, sae, store
from interp.sae import versus

LABELS = ["law", "biology", "maths", "fiction", "email", "politics", "manuals", "python"]
#: model -> (layer, latents, k, learning rate)
SIZES = {"monet-mini": (3, 1024, 16, 1e-3), "olmoe-mini": (3, 1024, 16, 1e-3), "smollm2": (15, 2048, 32, 6e-4)}
CONTEXT, GROUPS = 128, 64

Read = Mapping[str, Callable[[Any], torch.Tensor]]


def passages(split: str, each: int, length: int = 400) -> list[tuple[str, str, str]]:
    """(text, label, document), by turns from all documents of a label."""
    rows = []
    for label, texts in corpora.load(split, labels=LABELS, max_bytes=2_000_000).items():
        starts = range(0, max(map(len, texts)), length)
        pieces = [(text[at : at + length], label, f"{label} {i}") for at in starts for i, text in enumerate(texts)]
        rows += [piece for piece in pieces if len(piece[0]) == length][:each]
    return rows


def trained(m: Any, sites: list[str], acts: Path, each: int, epochs: float) -> list[sae.SAE]:
    """An SAE for the stream, the one that comes with the project if there is one, and one for what the layer adds."""
    _, d_sae, k, lr = SIZES[m.name]
    if (acts / "plan.json").is_file():
        ds = store.open(acts, partial=True)
    else:
        texts = [text for text, _, _ in passages("train", each)]
        ds = store.write(m, texts, sites, acts, context=CONTEXT, dtype="float16", documents_per_range=256)
    shipped = [sae.load(f"sae-{m.name}")] if f"sae-{m.name}" in sae.names() else []
    if shipped and shipped[0].metadata["model_hash"] != m.fingerprint:
        raise SystemExit(
            f"sae-{m.name} belongs to other weights: python data/models/sae-make.py sae-{m.name} --work acts"
        )
    runs = [{"site": site, "arch": "topk", "d_sae": d_sae, "k": k, "lr": lr} for site in sites[len(shipped) :]]
    made = sae.train_many(ds, runs, tokens=int(epochs * len(ds[sites[0]])), batch_size=2048)
    for s in made:
        assert s.history is not None
        print(s, s.history.iloc[-1][["fvu", "l0", "dead"]].round(3).to_dict(), flush=True)
    return [*shipped, *made]


def kinds(m: Any, layer: int, saes: list[sae.SAE]) -> list[tuple[Any, list[str], Read]]:
    """(model, sites, kinds of features) that are read in one pass each."""
    stream, out = saes
    rows = torch.randn(stream.d_sae, stream.d_in, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(rows, dim=1)
    k = int(stream.metadata["training"]["k"])
    chance = sae.SAE(rows, stream.b_dec, rows, torch.zeros(len(rows)), "topk", k=k, sites=stream.sites,
                     targets=stream.targets, limit=stream.limit)  # fmt: skip
    sites = [f"resid_post[{layer}]", f"mlp_out[{layer}]"]
    read: dict[str, Any] = {
        "latents, stream": lambda acts: versus.latents(stream, acts),
        "latents, output": lambda acts: versus.latents(out, acts),
        "random directions": lambda acts: versus.latents(chance, acts),
        **{site: lambda acts, site=site: acts[site][acts.mask].float() for site in sites},
    }
    if m.anatomy.having("g1"):
        texts: dict[str, list[str]] = {}
        for text, label, _ in passages("train", 20):
            texts.setdefault(label, []).append(text)
        stats = experts.routing(m, texts, max_tokens=4000)
        used = stats.used.sum(0)[stats.layers[layer]].topk(stream.d_sae).indices.tolist()
        read["experts"] = lambda acts: versus.routing(acts, layer, experts=used)
        return [(m, [*sites, f"g1[{layer}]", f"g2[{layer}]"], read)]
    if m.n_experts:
        read["experts, routing"] = lambda acts: versus.routing(acts, layer)
        read["experts, routing x norm"] = lambda acts: versus.routing(acts, layer, norm=True)
        return [(m, [*sites, f"expert_weight[{layer}]", f"expert_out[{layer}]"], read)]
    read["neurons"] = lambda acts: versus.neurons(acts, f"mlp_hidden[{layer}]")
    passes = [(m, [*sites, f"mlp_hidden[{layer}]"], read)]
    for how in ("weights", "random"):
        name = f"neurons in {GROUPS} groups, " + ("by weights" if how == "weights" else "at random")
        twin = experts.split(m, GROUPS, how, layers=[layer])  # all on: the model itself
        passes.append((twin, [f"expert_weight[{layer}]", f"expert_out[{layer}]"],
                       {name: lambda acts: versus.routing(acts, layer, norm=True)}))  # fmt: skip
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("--acts", type=Path, required=True, help="activations to train on; made if they are not there")
    parser.add_argument("--train", type=int, default=300, help="passages of each label to train on")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--each", type=int, default=40, help="passages of each label to compare on")
    parser.add_argument("--l0", type=int, default=8)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--json")
    a = parser.parse_args()
    m = interp.load(a.model)
    layer = SIZES[a.model][0]
    sites = [f"resid_post[{layer}]", f"mlp_out[{layer}]"]
    saes = trained(m, sites, a.acts, a.train, a.epochs)
    rows = passages("validation", a.each)
    texts = [text for text, _, _ in rows]
    found: dict[str, torch.Tensor] = {}
    for model, where, read in kinds(m, layer, saes):
        more, documents = versus.gather(model, texts, where, read, context=CONTEXT)
        found |= more
    inside = saes[0].inside(found[sites[0]])  # attention sinks are no text
    keep = torch.ones(len(documents), dtype=torch.bool) if inside is None else inside
    aims = {site: found.pop(site)[keep] for site in sites}
    codes = {name: z[keep] for name, z in found.items()}
    table = versus.compare(codes, aims, [label for _, label, _ in rows], documents[keep], l0=a.l0,
                           groups=[document for _, _, document in rows], resamples=a.resamples)  # fmt: skip
    print(json.dumps({k: v for k, v in table.attrs.items() if k != "chosen"}))
    shown = [f"{v:.3f}" if low != low else f"{v:.3f} [{low:.3f}, {high:.3f}]"
             for v, low, high in zip(table.value, table.low, table.high, strict=True)]  # fmt: skip
    wide = table.assign(shown=shown).pivot_table(
        index=["method", "baseline"], columns="metric", values="shown", sort=False, aggfunc="first"
    )
    print(wide.fillna("").to_string())
    if a.json:
        Path(a.json).write_text(table.to_json(orient="records", indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
