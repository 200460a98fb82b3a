"""Experts against latents: which features of a layer mean one thing, at the same number per token.

    codes = {
        "sae":      versus.latents(s, acts),                  SAE latents of the residual stream, or of the MoE's output
        "routing":  versus.routing(acts, 3),                  router weights of the chosen experts
        "routing x norm": versus.routing(acts, 3, norm=True), times the size of what the expert says
        "neurons":  versus.neurons(acts, "mlp_hidden[3]"),    a dense MLP's neurons
    }
    table = versus.compare(codes, x, labels, documents, l0=8)
    table.attrs["chosen"]["sae"]["law"]                       the latents that tell law best, the best first
    versus.removal(m, {"sae": s.ablate(best)}, texts)         what each label loses without some of them

`gather` makes such codes text by text. Monet (arXiv:2412.04139) claims monosemantic experts without the reconstruction
that an SAE pays for. That can be measured only on like terms: each kind of feature gives codes [row, feature] of the
same tokens, is cut to its `l0` largest per token (in units of each feature's own spread), and gets the same probes,
linear decoder and controls. Features are chosen on one half of the documents and scored on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.factored import FactoredExperts
from interp.progress import bar
from interp.sae.autoencoder import SAE
from interp.sae.dark import halves
from interp.sae.latents import _difference, _nats

if TYPE_CHECKING:
    import pandas as pd

    from interp.activations import Activations
    from interp.model import Model

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


@torch.no_grad()
def gather(
    m: Model, texts: Sequence[Any], sites: Any, read: Mapping[str, Callable[[Activations], Tensor]], *,
    context: int = 128, run: int = 16,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """What is read from texts, by name [row, ...] for the real tokens, and the number of each row's text [row].

        codes, documents = versus.gather(m, texts, ["resid_post[3]", "expert_weight[3]"], {
            "sae": lambda acts: versus.latents(s, acts), "experts": lambda acts: versus.routing(acts, 3)})

    Args:
        m: the model.
        texts: what it reads.
        sites: what must be captured for that.
        read: name -> a function of the activations of some texts.
        context: tokens per text at most.
        run: texts per forward pass.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in read}
    owners = []
    with bar("reading codes", total=len(texts)) as advance:
        for first in range(0, len(texts), run):
            tokens = m.tokens(list(texts[first : first + run]), max_length=context, truncate=True)
            acts = m.capture(tokens, sites)
            for name, function in read.items():
                parts[name].append(function(acts).cpu())
            owners.append(first + tokens.mask.nonzero()[:, 0].cpu())
            advance(len(tokens.ids))
    return {name: torch.cat(pieces) for name, pieces in parts.items()}, torch.cat(owners)


# -- the comparison --------------------------------------------------------------------------------------------
@recorded
def compare(
    codes: Mapping[str, Tensor],
    x: Tensor | Mapping[str, Tensor],
    labels: Sequence[Any],
    documents: Tensor,
    *,
    l0: int | None = None,
    groups: Sequence[Any] | None = None,
    resamples: int = 200,
    named: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """The Table: method, baseline (none | permuted | random), metric, value, low, high.

    Metrics, on the half of the documents that chose nothing:

    ``l0`` features per token; ``density`` median share of tokens at which a living feature fires; ``auroc``: for each
    label the one feature that tells its documents best from the others (chosen on the first half), mean over labels;
    ``selectivity``: the share of that feature's mass that lies on its label, labels weighted alike; ``fvu``: of `x`
    by a ridge regression on the codes (fitted on the first half); of several x, ``fvu NAME`` of each.

    ``.attrs["chosen"]`` has by method and label the features that tell it best on the first half, the best first.

    Baselines: ``permuted`` gives every token another token's codes, which keeps densities and norms and breaks their
    meaning; ``random`` takes for each label a random living feature. Intervals: 95 % bootstrap over groups.

    Args:
        codes: for each kind of feature its codes [row, feature], none negative.
        x: what is to be reconstructed [row, d], or several by name.
        labels: label of each document.
        documents: number of each row's document [row], into `labels`.
        l0: features per token for all kinds; by default the smallest mean among them.
        groups: of each document, where several are passages of one text: they stay in one half, and are drawn together.
        resamples: of the bootstrap.
        named: how many features of each label ``chosen`` has.
        seed: of split, permutation and choice.
    """
    import pandas as pd

    aims = {"fvu": x} if isinstance(x, Tensor) else {f"fvu {name}": aim for name, aim in x.items()}
    n = len(documents)
    for name, z in (*codes.items(), *aims.items()):
        if len(z) != n:
            what = "x" if name in aims else f"codes[{name!r}]"
            raise SAEError(f"{what}: {len(z)} rows, and there are {n} of documents; one per token")
    for name, z in codes.items():
        if bool((z < 0).any()):
            raise SAEError(f"codes[{name!r}] are negative somewhere; a feature's size is wanted")
    kinds = sorted(set(labels), key=str)
    if len(kinds) < 2:
        raise SAEError(f"labels={kinds}: at least two are needed to tell apart")
    truth = torch.tensor([kinds.index(label) for label in labels])
    if groups is not None and len(groups) != len(labels):
        raise SAEError(f"groups: {len(groups)} for {len(labels)} documents; one for each")
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups if groups is not None else range(len(labels))))}
    owner = torch.tensor([numbers[name] for name in (groups if groups is not None else range(len(labels)))])
    k = l0 or usual_l0(codes)
    fit, score = halves(n, seed, owner[documents])
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rows: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, list[int]]] = {}
    with bar("comparing features", total=3 * len(codes)) as advance:
        for name, z in codes.items():
            few = cut(z, k, fit)
            for baseline, used in (("none", few), ("permuted", few[mixed]), ("random", few)):
                found, best = _score(
                    used, aims, truth, documents, owner, fit, score, len(kinds), baseline, resamples, named, seed
                )
                rows += [{"method": name, "baseline": baseline, "metric": metric, "value": v, "low": low, "high": high}
                         for metric, (v, low, high) in found.items()]  # fmt: skip
                if baseline == "none":
                    chosen[name] = dict(zip(map(str, kinds), best, strict=True))
                advance(1)
    frame = pd.DataFrame(rows)
    frame.attrs.update({"l0": k, "labels": kinds, "seed": seed, "tokens": n, "documents": len(labels),
                        "groups": len(numbers), "chosen": chosen})  # fmt: skip
    return frame


def usual_l0(codes: Mapping[str, Tensor]) -> int:
    """The smallest mean number of features per token among kinds."""
    return max(1, int(min(float((z > 0).float().sum(1).mean()) for z in codes.values())))


def cut(z: Tensor, k: int, fit: Tensor) -> Tensor:
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


def _auroc(values: Tensor, kind: Tensor, label: int | None = None, n_labels: int = 1) -> Tensor:
    """Chance that a row of a label is above another, ties half [label, feature]; or of one label [1, feature]."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(values.numpy(), axis=0))
    out = []
    for i in range(n_labels) if label is None else [label]:
        positive = kind == i
        n, m = int(positive.sum()), int((~positive).sum())
        above = (ranks[positive].sum(0) - n * (n + 1) / 2) / max(1, n * m)
        out.append(above if n and m else torch.full_like(above, torch.nan))
    return torch.stack(out)


def _score(z: Tensor, aims: Mapping[str, Tensor], truth: Tensor, documents: Tensor, owner: Tensor, fit: Tensor,
           score: Tensor, n_labels: int, baseline: str, resamples: int, named: int, seed: int
           ) -> tuple[dict[str, tuple[float, float, float]], list[list[int]]]:  # fmt: skip
    """({metric: (value, low, high)}, the features that tell each label best, the best first)."""
    nan = float("nan")
    fires = (z[score] > 0).double()
    share = fires.mean(0)
    out = {"l0": (float(fires.sum(1).mean()), nan, nan),
           "density": (float(share[share > 0].median()) if bool((share > 0).any()) else 0.0, nan, nan)}  # fmt: skip
    first, known = _pooled(z, documents, fit)
    second, held = _pooled(z, documents, score)
    draw = torch.Generator().manual_seed(seed)
    alive = (first.sum(0) > 0).nonzero().squeeze(1)
    if baseline == "random":
        best = alive[torch.randint(len(alive), (n_labels, 1), generator=draw)].tolist()
    else:
        telling = _auroc(first, truth[known], n_labels=n_labels).nan_to_num(0.0)
        best = telling.argsort(dim=1, descending=True)[:, :named].tolist()
    chosen = [features[0] for features in best]
    picked, kind = second[:, chosen], truth[held]
    together = [(owner[held] == group).nonzero().squeeze(1) for group in owner[held].unique()]

    def measured(rows: Tensor) -> tuple[float, float]:
        aurocs, shares = [], []
        for label in range(n_labels):
            aurocs.append(_auroc(picked[rows][:, [label]], kind[rows], label)[0, 0])
            means = torch.stack([picked[rows][kind[rows] == other, label].mean() for other in range(n_labels)])
            shares.append(means[label] / means.nansum().clamp_min(1e-12))
        return float(torch.stack(aurocs).nanmean()), float(torch.stack(shares).nanmean())

    point = measured(torch.arange(len(held)))
    draws = [torch.randint(len(together), (len(together),), generator=draw).tolist() for _ in range(resamples)]
    spread = torch.tensor([measured(torch.cat([together[group] for group in drawn])) for drawn in draws])
    for i, metric in enumerate(("auroc", "selectivity")):
        low, high = spread[:, i].nanquantile(torch.tensor([0.025, 0.975])).tolist() if resamples else (nan, nan)
        out[metric] = (point[i], low, high)
    if baseline != "random":  # the decoder reads all features: nothing is chosen
        out |= _decoded(z, aims, owner[documents], fit, score, resamples, draw)
    return out, best


def _decoded(z: Tensor, aims: Mapping[str, Tensor], groups: Tensor, fit: Tensor, score: Tensor, resamples: int,
             draw: torch.Generator) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """Of each aim the fraction of variance that a ridge regression on the codes leaves over."""
    a, y = z[fit].double(), torch.cat([x.double() for x in aims.values()], 1)
    ma, mb = a.mean(0), y[fit].mean(0)
    gram = (a - ma).T @ (a - ma)
    gram.diagonal().add_(_RIDGE * len(fit) * (a.square().mean()).clamp_min(1e-12))
    weights = torch.linalg.solve(gram, (a - ma).T @ (y[fit] - mb))
    made = (z[score].double() - ma) @ weights + mb
    widths = [x.shape[1] for x in aims.values()]
    parts = zip(aims, y[score].split(widths, 1), made.split(widths, 1), strict=True)
    return {name: _unexplained(of, by, groups[score], resamples, draw) for name, of, by in parts}


def _unexplained(y: Tensor, made: Tensor, groups: Tensor, resamples: int,
                 draw: torch.Generator) -> tuple[float, float, float]:  # fmt: skip
    names, owner = groups.unique(return_inverse=True)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    sums[:, 0].index_add_(0, owner, (y - made).square().sum(1))
    sums[:, 1].index_add_(0, owner, (y - y.mean(0)).square().sum(1))
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    if not resamples:
        return value, float("nan"), float("nan")
    drawn = sums[torch.randint(len(names), (resamples, len(names)), generator=draw)].sum(1)
    low, high = (drawn[:, 0] / drawn[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high


# -- taking features away --------------------------------------------------------------------------------------
@recorded
def removal(
    m: Model, off: Mapping[str, Any], texts: Mapping[str, Sequence[Any]], *, context: int = 128,
    run: int = 8, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """What each label's texts lose when features are off: method, label, metric (ce), before, value, low, high.

    ``value`` is the change of the loss in nats per predicted token, with a 95 % bootstrap over texts. Features of one
    meaning cost their own label much and the others little; random features of the same kind, given as a method of
    their own, tell what any would cost.

    Args:
        m: the model.
        off: name -> what `Model.intervene` takes (an edit, `experts.ablate(...)`), or a list of such.
        texts: label -> texts on which no feature was chosen.
        context: tokens per text at most.
        run: texts per forward pass.
        seed: of the bootstrap.
    """
    import pandas as pd

    rows = []
    with bar("switching features off", total=(1 + len(off)) * len(texts)) as advance:
        clean = {}
        for label, given in texts.items():
            clean[label] = _nats(m, given, context, run)
            advance(1)
        for name, edit in off.items():
            edits = edit if isinstance(edit, list | tuple) else [edit]
            for label, given in texts.items():
                with m.intervene(*edits):
                    after = _nats(m, given, context, run)
                value, low, high = _difference(clean[label], after, seed)
                before = float(clean[label][:, 0].sum() / clean[label][:, 1].sum())
                rows.append({"method": name, "label": label, "metric": "ce", "before": before, "value": value,
                             "low": low, "high": high})  # fmt: skip
                advance(1)
    frame = pd.DataFrame(rows)
    frame.attrs.update({"model": m.name, "context": context, "seed": seed})
    return frame
