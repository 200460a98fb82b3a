"""Experts against latents at the same number of features per token, on real and on trained small models.

    python benchmarks/sae_versus.py monet-mini --acts acts
    python benchmarks/sae_versus.py olmoe-mini --acts acts2
    python benchmarks/sae_versus.py smollm2 --acts acts3 --train 60 --each 14 --grid 4 16 64 256 --remove law python

Activations of the train split are captured once (``--acts``, a dataset with both sites, such as data/models/sae-make.py
makes; it resumes), SAEs are trained on the residual stream after the layer and on what its experts (or MLP) add, one
per expert on what each expert says (`interp.sae.per_expert`), and every kind of feature is read from the same passages
of the validation split. Then, in this order:

* probes, density, mass on the own label, a linear decoder: `interp.sae.versus.compare`;
* how well words tell where a feature fires: `interp.sae.interpretability`;
* a label's best features are taken out on passages of the *test* split, more and more of them, and the damage to that
  label is set against the change of the others at equal damage: `interp.sae.resection`.

Where a model has experts of its own their routing is compared, in a dense model groups of neurons (`experts.split`), by
weights and at random, by the size of what they say; and neurons in all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import interp
from interp import corpora, experts, sae, store
from interp.edits import Edit
from interp.sae import per_expert, versus
from interp.sae.interpretability import interpretability, windows
from interp.sae.resection import resection

LABELS = ["law", "biology", "maths", "fiction", "email", "politics", "manuals", "python"]
#: model -> (layer, latents, k, learning rate)
SIZES = {"monet-mini": (3, 1024, 16, 1e-3), "olmoe-mini": (3, 1024, 16, 1e-3), "smollm2": (15, 2048, 32, 6e-4)}
CONTEXT, GROUPS, COARSE = 128, 64, 16


@dataclass(frozen=True)
class Kind:
    """A kind of feature: how it is read from activations [row, feature], and what switches some of them off."""

    read: Callable[[Any], torch.Tensor]
    off: Callable[[list[int]], Any]


#: (model, sites, kinds by name): what one pass reads.
Pass = tuple[Any, list[str], dict[str, Kind]]


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


def kinds(m: Any, layer: int, saes: list[sae.SAE], each: int) -> list[Pass]:
    """All kinds of features of a layer, by the model that they are read from."""
    stream, out = saes
    rows = torch.randn(stream.d_sae, stream.d_in, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(rows, dim=1)
    k = int(stream.metadata["training"]["k"])
    chance = sae.SAE(rows, stream.b_dec, rows, torch.zeros(len(rows)), "topk", k=k, sites=stream.sites,
                     targets=stream.targets, limit=stream.limit)  # fmt: skip
    found = {
        "latents, stream": Kind(lambda acts: versus.latents(stream, acts), stream.ablate),
        "latents, output": Kind(lambda acts: versus.latents(out, acts), out.ablate),
        "random directions": Kind(lambda acts: versus.latents(chance, acts), chance.ablate),
    }
    sites = [f"resid_post[{layer}]", f"mlp_out[{layer}]"]
    if m.anatomy.having("g1"):
        return [(m, [*sites, *(f"{name}[{layer}]" for name in ("g1", "g2", "z1"))], found | _monet(m, layer, stream))]
    if m.n_experts:
        return [(m, [*sites, f"expert_weight[{layer}]", f"expert_out[{layer}]", f"expert_hidden[{layer}]"],
                 found | _routed(m, layer, stream.d_sae, each))]  # fmt: skip
    return [(m, [*sites, f"mlp_hidden[{layer}]"], found | _neurons(m, layer)), *_twins(m, layer, stream.d_sae, each)]


def _without(m: Any, layer: int, names: Sequence[int] | None = None, kind: str = "auto") -> Callable[[list[int]], Any]:
    """Experts off; feature i is expert names[i]."""
    return lambda ids: experts.ablate(
        experts.ExpertSet(m, {layer: sorted(ids if names is None else [names[i] for i in ids])}, kind=kind)
    )


def _monet(m: Any, layer: int, stream: sae.SAE) -> dict[str, Kind]:
    """The most used of Monet's experts, and the neurons of their parts (axis 1). Its 4,096 experts of 8 neurons are
    never computed one by one, so there is nothing for autoencoders of their own."""
    texts: dict[str, list[str]] = {}
    for text, label, _ in passages("train", 20):
        texts.setdefault(label, []).append(text)
    stats = experts.routing(m, texts, max_tokens=4000)
    used = stats.used.sum(0)[stats.layers[layer]].topk(stream.d_sae).indices.tolist()
    site = f"z1[{layer}]"

    def off(ids: list[int]) -> Edit:
        def silent(h: torch.Tensor, where: Any) -> torch.Tensor:
            flat = h.flatten(2).clone()
            flat[..., ids] = 0.0
            return flat.view_as(h)

        return Edit(site, silent, name="ablate neurons")

    return {
        "experts": Kind(lambda acts: versus.routing(acts, layer, experts=used), _without(m, layer, used)),
        "neurons": Kind(lambda acts: acts[site][acts.mask].float().abs().flatten(1), off),
    }


def _routed(m: Any, layer: int, width: int, each: int) -> dict[str, Kind]:
    site = f"expert_hidden[{layer}]"
    own = learnt(m, layer, width, each)

    def neurons(acts: Any) -> torch.Tensor:
        """Router weight times |neuron|, expert by expert [row, expert * neuron]."""
        h, owner, weight, token = per_expert.rows(acts, site)
        codes = h.new_zeros(int(acts.mask.sum()), m.n_experts, h.shape[1])
        codes[token, owner] = h.abs() * weight[:, None]
        return codes.flatten(1)

    def off(ids: list[int]) -> Edit:
        def silent(h: torch.Tensor, where: Any) -> torch.Tensor:
            keep = torch.ones(m.n_experts * h.shape[-1])
            keep[ids] = 0.0
            return h * keep.view(m.n_experts, -1)[where.inputs[0]]

        return Edit(site, silent, name="ablate neurons")

    return {
        "latents, per expert": Kind(own.tokens, own.ablate),
        "experts, routing": Kind(lambda acts: versus.routing(acts, layer), _without(m, layer)),
        "experts, routing x norm": Kind(lambda acts: versus.routing(acts, layer, norm=True), _without(m, layer)),
        "neurons": Kind(neurons, off),
    }


def learnt(m: Any, layer: int, width: int, each: int) -> per_expert.ExpertSAE:
    """An autoencoder per expert: a quarter of the latents are shared, the others the experts' own."""
    texts = [text for text, _, _ in passages("train", each)]
    own = width * 3 // 4 // m.n_experts
    s = per_expert.train((m, texts), f"expert_out[{layer}]", own=own, shared=width - own * m.n_experts, k=4,
                         context=CONTEXT)  # fmt: skip
    assert s.history is not None
    print(f"per expert: {s.shape}", s.about["rows"], "rows", s.history.iloc[-1].round(3).to_dict(), flush=True)
    return s


def _neurons(m: Any, layer: int) -> dict[str, Kind]:
    site = f"mlp_hidden[{layer}]"
    return {"neurons": Kind(lambda acts: versus.neurons(acts, site), _without(m, layer, kind="neurons"))}


def _twins(m: Any, layer: int, width: int, each: int) -> list[Pass]:
    """A dense model's neurons in groups, as experts that are all on: the model itself."""
    passes: list[Pass] = []
    for how in ("weights", "random"):
        name = f"neurons in {GROUPS} groups, " + ("by weights" if how == "weights" else "at random")
        twin = experts.split(m, GROUPS, how, layers=[layer])
        kind = Kind(lambda acts: versus.routing(acts, layer, norm=True), _without(twin, layer))
        passes.append((twin, [f"expert_weight[{layer}]", f"expert_out[{layer}]"], {name: kind}))
    coarse = experts.split(m, COARSE, "weights", layers=[layer])
    own = learnt(coarse, layer, width, each)
    passes.append((coarse, [f"expert_weight[{layer}]", f"expert_out[{layer}]"],
                   {f"latents, per group of {COARSE}": Kind(own.tokens, own.ablate)}))  # fmt: skip
    return passes


def wide(table: Any, columns: str = "metric") -> str:
    shown = [f"{v:.3f}" if low != low else f"{v:.3f} [{low:.3f}, {high:.3f}]"
             for v, low, high in zip(table.value, table.low, table.high, strict=True)]  # fmt: skip
    table = table.assign(shown=shown)
    found = table.pivot_table(
        index=["method", "baseline"], columns=columns, values="shown", sort=False, aggfunc="first"
    )
    return str(found.fillna("").to_string())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("--acts", type=Path, required=True, help="activations to train on; made if they are not there")
    parser.add_argument("--train", type=int, default=300, help="passages of each label to train on")
    parser.add_argument("--own", type=int, default=100, help="the same for the autoencoders of experts")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--each", type=int, default=40, help="passages of each label to compare on")
    parser.add_argument("--l0", type=int, default=8)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--sample", type=int, default=32, help="features of each kind that are explained")
    parser.add_argument("--test", type=int, default=12, help="passages of each label from which features are taken out")
    parser.add_argument("--grid", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--remove", nargs="*", default=["law", "biology", "fiction", "python"])
    parser.add_argument("--damage", type=float, nargs="*", default=[0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--json", help="a file for all tables")
    a = parser.parse_args()
    m = interp.load(a.model)
    layer = SIZES[a.model][0]
    sites = [f"resid_post[{layer}]", f"mlp_out[{layer}]"]
    saes = trained(m, sites, a.acts, a.train, a.epochs)
    rows = passages("validation", a.each)
    texts, labels, groups = ([row[i] for row in rows] for i in range(3))
    found: dict[str, torch.Tensor] = {}
    every: dict[str, Kind] = {}
    models: dict[str, Any] = {}
    for model, where, here in kinds(m, layer, saes, a.own):
        read = {name: kind.read for name, kind in here.items()}
        if model is m:
            read |= {site: lambda acts, site=site: acts[site][acts.mask].float() for site in sites}
        else:
            models |= dict.fromkeys(here, model)
        more, documents = versus.gather(model, texts, where, read, context=CONTEXT)
        found |= more
        every |= here
    inside = saes[0].inside(found[sites[0]])  # attention sinks are no text
    keep = torch.ones(len(documents), dtype=torch.bool) if inside is None else inside
    near = [window for window, kept in zip(windows(m, texts, context=CONTEXT), keep.tolist(), strict=True) if kept]
    documents = documents[keep]
    aims = {site: found.pop(site)[keep] for site in sites}
    codes = {name: z[keep] for name, z in found.items()}
    how = {"l0": a.l0, "groups": groups, "resamples": a.resamples}
    table = versus.compare(codes, aims, labels, documents, named=max(a.grid), **how)
    print(json.dumps({k: v for k, v in table.attrs.items() if k != "chosen"}))
    print(wide(table), flush=True)
    words = interpretability(codes, near, documents, sample=a.sample, **how)
    print(json.dumps({k: v for k, v in words.attrs.items() if k != "said"}))
    print(wide(words))
    for name, said in words.attrs["said"].items():
        print(f"{name}:", "; ".join(f"{text} ({score:.2f})" for _, text, score in said[:4]))
    held: dict[str, list[str]] = {}
    for text, label, _ in passages("test", a.test):
        held.setdefault(label, []).append(text)
    alive = {name: (z > 0).any(0).nonzero().squeeze(1).tolist() for name, z in codes.items()}
    done = resection(m, {name: kind.off for name, kind in every.items()}, table.attrs["chosen"], held, sizes=a.grid,
                     removed=a.remove, alive=alive, models=models, first=layer, context=CONTEXT)  # fmt: skip
    curve, equal = done.curve(), [done.at_damage(damage) for damage in a.damage]
    print(json.dumps(done.about))
    print(curve.round(4).to_string())
    for part in equal:
        print(part.round(4).to_string())
    if a.json:
        tables = {"compare": table, "words": words, "curve": curve} | {f"at {t.damage[0]}": t for t in equal}
        text = {name: json.loads(t.to_json(orient="records")) for name, t in tables.items()}
        Path(a.json).write_text(json.dumps(text, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
