"""Experts against latents: which features of a layer mean one thing, at the same number per token.

    codes = {
        "sae":      versus.latents(s, acts),                  SAE latents of the residual stream, or of the MoE's output
        "routing":  versus.routing(acts, 3),                  router weights of the chosen experts
        "routing x norm": versus.routing(acts, 3, norm=True), times the size of what the expert says
        "neurons":  versus.neurons(acts, "mlp_hidden[3]"),    a dense MLP's neurons
    }
    table = versus.compare(codes, x, labels, documents, l0=8)

Monet (arXiv:2412.04139) claims monosemantic experts without the reconstruction that an SAE pays for. That can be
measured only on like terms: each kind of feature gives codes [row, feature] of the same tokens, is cut to its `l0`
largest per token (in units of each feature's own spread), and gets the same probes, linear decoder and
controls. Features are chosen on one half of the documents and scored on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.factored import FactoredExperts
from interp.sae.autoencoder import SAE
from interp.sae.dark import halves

if TYPE_CHECKING:
    import pandas as pd

    from interp.activations import Activations

_RIDGE = 1e-3


# -- codes of one kind of feature ------------------------------------------------------------------------------
@torch.no_grad()
def latents(s: SAE, acts: Activations) -> Tensor:
    """An SAE's latents at the real tokens [row, d_sae]."""
    return s.encode(s.read(acts)[acts.mask].float())


def routing(acts: Activations, layer: int, *, norm: bool = False, experts: Sequence[int] | None = None) -> Tensor:
    """Weights of experts at the real tokens, 0 where they were not chosen [row, expert]; with `norm` times |output|.

    Needs ``expert_weight[layer]`` captured, for norms ``expert_out[layer]``; on Monet ``g1[layer]`` and ``g2[layer]``.

    Args:
        acts: what was captured.
        layer: the layer.
        norm: times the size of what each chosen expert puts out; not on Monet, whose outputs are never one by one.
        experts: these only, in this order. Monet has n^2 per layer, too many for columns, so there they must be named;
            `FactoredExperts.top` tells which weigh most.
    """
    found = acts.experts(layer)
    if isinstance(found, FactoredExperts):
        if experts is None or norm:
            raise SAEError(
                f"layer {layer} has {found.n_experts} experts of two factors: give experts=..., without norm"
            )
        return found.weights(experts)[acts.mask].float()
    ids, weights = found.ids[acts.mask], found.weights[acts.mask].float()
    if norm:
        if found.out is None:
            raise SAEError(f"norm=True: capture 'expert_out[{layer}]' too")
        weights = weights * found.out[acts.mask].float().norm(dim=-1)
    codes = weights.new_zeros(len(ids), found.n_experts).scatter_add(1, ids.clamp_min(0), weights * (ids >= 0))
    return codes if experts is None else codes[:, list(experts)]


def neurons(acts: Activations, site: str) -> Tensor:
    """Sizes of neurons at the real tokens [row, neuron]."""
    return acts[site][acts.mask].float().abs()


# -- the comparison --------------------------------------------------------------------------------------------
def compare(
    codes: Mapping[str, Tensor],
    x: Tensor,
    labels: Sequence[Any],
    documents: Tensor,
    *,
    l0: int | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """The Table: method, baseline (none | permuted | random), metric, value, low, high.

    Metrics, on the half of the documents that chose nothing:

    ``l0`` features per token; ``density`` median share of tokens at which a living feature fires; ``auroc``: for each
    label the one feature that tells its documents best from the others (chosen on the first half), mean over labels;
    ``selectivity``: the share of that feature's mass that lies on its label, labels weighted alike; ``fvu``: of `x`
    by a ridge regression on the codes (fitted on the first half).

    Baselines: ``permuted`` gives every token another token's codes, which keeps densities and norms and breaks their
    meaning; ``random`` takes for each label a random living feature. Intervals: 95 % bootstrap over documents.

    Args:
        codes: for each kind of feature its codes [row, feature], none negative.
        x: what is to be reconstructed [row, d].
        labels: label of each document.
        documents: number of each row's document [row], into `labels`.
        l0: features per token for all kinds; by default the smallest mean among them.
        resamples: of the bootstrap.
        seed: of split, permutation and choice.
    """
    import pandas as pd

    for name, z in codes.items():
        if len(z) != len(x) or len(documents) != len(x):
            raise SAEError(f"codes[{name!r}]: {len(z)} rows, x has {len(x)}, documents {len(documents)}; one per token")
        if bool((z < 0).any()):
            raise SAEError(f"codes[{name!r}] are negative somewhere; a feature's size is wanted")
    kinds = sorted(set(labels), key=str)
    if len(kinds) < 2:
        raise SAEError(f"labels={kinds}: at least two are needed to tell apart")
    truth = torch.tensor([kinds.index(label) for label in labels])
    k = l0 or max(1, int(min(float((z > 0).float().sum(1).mean()) for z in codes.values())))
    fit, score = halves(len(x), seed, documents)
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    rows: list[dict[str, Any]] = []
    for name, z in codes.items():
        cut = _cut(z, k, fit)
        for baseline, used in (("none", cut), ("permuted", cut[mixed]), ("random", cut)):
            found = _score(used, x, truth, documents, fit, score, len(kinds), baseline, resamples, seed)
            rows += [{"method": name, "baseline": baseline, "metric": metric, "value": v, "low": low, "high": high}
                     for metric, (v, low, high) in found.items()]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs.update({"l0": k, "labels": kinds, "seed": seed, "tokens": len(x), "documents": len(labels)})
    return frame


def _cut(z: Tensor, k: int, fit: Tensor) -> Tensor:
    """Codes with the k largest of each token left, in units of each feature's root mean square where it fires."""
    size = z[fit].double()
    unit = (size.square().sum(0) / (size > 0).sum(0).clamp_min(1)).sqrt().clamp_min(1e-12).float()
    scaled = z / unit
    if k >= z.shape[1]:
        return scaled
    top = scaled.topk(k, dim=1)
    return torch.zeros_like(scaled).scatter(1, top.indices, top.values)


def _pooled(z: Tensor, documents: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean code of each document [document, feature], the documents' numbers)."""
    names, inverse = documents[rows].unique(return_inverse=True)
    total = torch.zeros(len(names), z.shape[1]).index_add_(0, inverse, z[rows])
    return total / torch.bincount(inverse).clamp_min(1)[:, None], names


def _auroc(values: Tensor, positive: Tensor) -> Tensor:
    """Chance that a positive is above a negative, ties half, per column [feature]."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(values.numpy(), axis=0))
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return torch.full((values.shape[1],), float("nan"), dtype=torch.float64)
    return (ranks[positive].sum(0) - n * (n + 1) / 2) / (n * m)


def _score(z: Tensor, x: Tensor, truth: Tensor, documents: Tensor, fit: Tensor, score: Tensor, n_labels: int,
           baseline: str, resamples: int, seed: int) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    nan = float("nan")
    fires = (z[score] > 0).double()
    share = fires.mean(0)
    out = {"l0": (float(fires.sum(1).mean()), nan, nan),
           "density": (float(share[share > 0].median()) if bool((share > 0).any()) else 0.0, nan, nan)}  # fmt: skip
    first, known = _pooled(z, documents, fit)
    second, held = _pooled(z, documents, score)
    draw = torch.Generator().manual_seed(seed)
    alive = (first.sum(0) > 0).nonzero().squeeze(1)
    chosen = []
    for label in range(n_labels):
        if baseline == "random":
            chosen.append(int(alive[int(torch.randint(len(alive), (1,), generator=draw))]))
        else:
            chosen.append(int(_auroc(first, truth[known] == label).nan_to_num(0.0).argmax()))
    picked, kind = second[:, chosen], truth[held]

    def measured(rows: Tensor) -> tuple[float, float]:
        aurocs, shares = [], []
        for label in range(n_labels):
            positive = kind[rows] == label
            aurocs.append(_auroc(picked[rows][:, [label]], positive)[0])
            means = torch.stack([picked[rows][kind[rows] == other, label].mean() for other in range(n_labels)])
            shares.append(means[label] / means.nansum().clamp_min(1e-12))
        return float(torch.stack(aurocs).nanmean()), float(torch.stack(shares).nanmean())

    point = measured(torch.arange(len(held)))
    spread = torch.tensor([measured(torch.randint(len(held), (len(held),), generator=draw)) for _ in range(resamples)])
    for i, metric in enumerate(("auroc", "selectivity")):
        low, high = spread[:, i].nanquantile(torch.tensor([0.025, 0.975])).tolist() if resamples else (nan, nan)
        out[metric] = (point[i], low, high)
    if baseline != "random":  # the decoder reads all features: nothing is chosen
        out["fvu"] = _decoded(z, x, documents, fit, score, resamples, draw)
    return out


def _decoded(z: Tensor, x: Tensor, documents: Tensor, fit: Tensor, score: Tensor, resamples: int,
             draw: torch.Generator) -> tuple[float, float, float]:  # fmt: skip
    a, b = z[fit].double(), x[fit].double()
    ma, mb = a.mean(0), b.mean(0)
    gram = (a - ma).T @ (a - ma)
    gram.diagonal().add_(_RIDGE * len(fit) * (a.square().mean()).clamp_min(1e-12))
    weights = torch.linalg.solve(gram, (a - ma).T @ (b - mb))
    made, y = (z[score].double() - ma) @ weights + mb, x[score].double()
    names, owner = documents[score].unique(return_inverse=True)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    sums[:, 0].index_add_(0, owner, (y - made).square().sum(1))
    sums[:, 1].index_add_(0, owner, (y - y.mean(0)).square().sum(1))
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    if not resamples:
        return value, float("nan"), float("nan")
    drawn = sums[torch.randint(len(names), (resamples, len(names)), generator=draw)].sum(1)
    low, high = (drawn[:, 0] / drawn[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high
