"""Dealing a dense MLP's neurons into experts of equal size.

    weights        neurons with like input vectors together: balanced k-means                MoEfication, section 3.2
    coactivation   neurons that are active on the same tokens together: a graph, cut up      MoEfication, section 3.2
    random         at random: what a clever partition has to beat

Balanced means that every expert gets as many neurons. MoEfication (arXiv 2110.01786) balances k-means by the Hungarian
method, which is cubic in the neurons; here neurons and centres are matched as in deferred acceptance (each neuron asks
its nearest centre, a full centre keeps the nearest that ask, the rest ask on), which costs little and gives sums of
distances a few per cent larger. Graphs are cut by the leading eigenvectors of the normalised co-activation matrix and
balanced k-means in them, in the place of METIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.ffn import Ffn, read
from interp.experts.units import ExpertError

HOWS = ("weights", "coactivation", "random")


@dataclass(frozen=True, eq=False)
class Partition:
    """Which neurons make which expert.

    Attributes:
        how: one of `HOWS`.
        groups: layer -> neurons of each expert [expert, neurons of one].
    """

    how: str
    groups: Mapping[int, Tensor]

    @property
    def n(self) -> int:
        return len(next(iter(self.groups.values())))


@torch.no_grad()
def partition(
    model: Any,
    n: int,
    how: str = "weights",
    *,
    texts: Labelled | Corpus | None = None,
    layers: list[int] | None = None,
    max_tokens: int | None = 20_000,
    seed: int = 0,
) -> Partition:
    """Deals the neurons of each layer into `n` experts of equal size.

    Args:
        model: a dense model.
        n: experts per layer; must divide the neurons of each.
        how: "weights", "coactivation" or "random".
        texts: label -> documents, for "coactivation".
        layers: which, default all with a dense MLP.
        max_tokens: of each label.
        seed: of first centres and of random dealing.

    Raises ExpertError where `n` does not divide a layer's neurons, for an unknown `how`, or where texts are missing.
    """
    if how not in HOWS:
        raise ExpertError(f"how={how!r}: expected one of {', '.join(HOWS)}")
    layers = layers if layers is not None else model.anatomy.having("mlp_hidden")
    if not layers:
        raise ExpertError(f"{model.name} has no dense MLP to split; m.map() says why")
    ffns = {layer: read(model, layer) for layer in layers}
    for layer, ffn in ffns.items():
        if n < 1 or ffn.down.shape[1] % n:
            raise ExpertError(f"n={n}: layer {layer} has {ffn.down.shape[1]} neurons, which {n} experts cannot share")
    generator = torch.Generator().manual_seed(seed)
    if how == "random":
        return Partition(how, {la: _dealt(f.down.shape[1], n, generator) for la, f in ffns.items()})
    if how == "weights":
        return Partition(how, {la: balanced_kmeans(_unit(_input(f)), n, generator) for la, f in ffns.items()})
    if texts is None:
        raise ExpertError("how='coactivation' looks at activations; pass texts={label: [text, ...]}")
    together = coactivations(model, corpus(model, texts, max_tokens), layers)
    return Partition(how, {la: balanced_kmeans(embedding(c, n), n, generator) for la, c in together.items()})


def _input(ffn: Ffn) -> Tensor:
    """The vectors that decide whether a neuron is active [neuron, d_model]."""
    return (ffn.up if ffn.gate is None else ffn.gate).float().cpu()


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _dealt(neurons: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(neurons, generator=generator).view(n, -1).sort(-1).values


def balanced_kmeans(points: Tensor, n: int, generator: torch.Generator, steps: int = 20) -> Tensor:
    """Points [point, d] in `n` clusters of equal size: their points [cluster, points / n], sorted."""
    centres = _spread(points, n, generator)
    owner = torch.full((len(points),), -1)
    for _ in range(steps):
        new = matched(torch.cdist(points, centres), len(points) // n)
        if torch.equal(new, owner):
            break
        owner = new
        centres = torch.zeros_like(centres).index_add_(0, owner, points) / (len(points) // n)
    return torch.stack([(owner == c).nonzero()[:, 0] for c in range(n)])


def _spread(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """First centres: each next one drawn with chances as the squared distance from those before (k-means++)."""
    centres = [points[torch.randint(len(points), (1,), generator=generator)]]
    while len(centres) < n:
        away = torch.cdist(points, torch.cat(centres)).amin(1).square() + 1e-12
        centres.append(points[torch.multinomial(away, 1, generator=generator)])
    return torch.cat(centres)


def matched(cost: Tensor, size: int) -> Tensor:
    """A cluster for each point so that each gets `size`: deferred acceptance on cost [point, cluster] -> [point].

    Stable: no point and cluster would both rather have each other.
    """
    points, n = cost.shape
    wish = cost.argsort(dim=1, stable=True)  # clusters of each point, nearest first
    asked = torch.zeros(points, dtype=torch.long)
    while True:
        owner = wish.gather(1, asked[:, None])[:, 0]
        price = cost.gather(1, owner[:, None])[:, 0]
        order = price.argsort(stable=True)
        order = order[owner[order].argsort(stable=True)]  # by cluster, nearest first
        counts = torch.bincount(owner, minlength=n)
        rank = torch.arange(points) - (counts.cumsum(0) - counts)[owner[order]]
        refused = order[rank >= size]
        if not len(refused):
            return owner
        asked[refused] += 1


def coactivations(model: Any, data: Corpus, layers: list[int], batch_tokens: int = 2048) -> dict[int, Tensor]:
    """layer -> how strongly two neurons are active together, sum over tokens of |h_i| |h_j| [neuron, neuron]."""
    sums: dict[int, Tensor] = {}
    for batch in data.batches(model, batch_tokens):
        acts = model.capture(batch.tokens, [f"mlp_hidden[{layer}]" for layer in layers], check=False)
        for layer in layers:
            h = acts[f"mlp_hidden[{layer}]"][acts.mask].abs().float()
            product = (h.T @ h).cpu()
            sums[layer] = sums[layer] + product if layer in sums else product
    return sums


def embedding(together: Tensor, n: int) -> Tensor:
    """Neurons as points whose nearness is co-activation [neuron, n]: leading eigenvectors, rows of length 1.

    Co-activation is first set in relation to how active both are (their cosine), as otherwise the few busiest neurons
    would be near to all.
    """
    size = together.diagonal().clamp_min(1e-20).sqrt()
    cosine = (together / size[:, None] / size[None, :]).fill_diagonal_(0.0)
    degree = cosine.sum(1).clamp_min(1e-20).rsqrt()
    vectors = torch.linalg.eigh((cosine * degree[:, None] * degree[None, :]).double()).eigenvectors
    return _unit(vectors[:, -n:].float())
