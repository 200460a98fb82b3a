"""Sparse probing, and whether another seed finds the same latents.

    table = probe(s, m, {"law": texts, "code": texts})
    table = stability([s0, s1, s2])

Sparse probing (Gurnee et al. 2023, arXiv:2305.01610; as in SAEBench): codes are averaged over a text, the k latents
whose class means differ most are taken, and a logistic regression reads only those. Latents and regression are fitted
on one half of the texts and scored on the other. Beside it: k random latents that fire, and a probe on the whole
activation, which no sparse probe need beat. SCR and TPP are left out: an audit (arXiv:2605.18229) advises against
both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.sae.autoencoder import SAE
from interp.sae.dark import halves

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model


@torch.no_grad()
def pooled(s: SAE, m: Model, texts: Sequence[Any], *, context: int = 128, run: int = 8) -> tuple[Tensor, Tensor]:
    """(mean code [text, d_sae], mean activation [text, d_in]) over the real tokens of each text."""
    codes, raw = [], []
    for first in range(0, len(texts), run):
        tokens = m.tokens(list(texts[first : first + run]), max_length=context, truncate=True)
        h = s.read(m.capture(tokens, list(s.sites))).float()
        weight = tokens.mask[..., None] / tokens.mask.sum(1)[:, None, None]
        codes.append((s.encode(h) * weight).sum(1))
        raw.append((s._flat(h) * weight).sum(1))
    return torch.cat(codes), torch.cat(raw)


@recorded
def probe(
    s: SAE, m: Model, texts: Mapping[str, Sequence[Any]], *, ks: Sequence[int] = (1, 2, 5), resamples: int = 1000,
    context: int = 128, run: int = 8, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Accuracy of each label against the others: label, k, baseline (none | random | activation), value, low, high.

    Accuracy is balanced: the mean of the shares of right answers among texts of the label and among the others.
    Intervals are 95 % bootstraps over the scored texts. Needs at least four texts of each label.
    """
    import pandas as pd

    if len(texts) < 2 or min(map(len, texts.values())) < 4:
        raise SAEError("texts: at least two labels with four texts each, to fit on half and to score on half")
    everything = [text for group in texts.values() for text in group]
    kind = torch.tensor([i for i, group in enumerate(texts.values()) for _ in group])
    z, raw = pooled(s, m, everything, context=context, run=run)
    split = [halves(int((kind == i).sum()), seed) for i in range(len(texts))]
    where = [(kind == i).nonzero().squeeze(1) for i in range(len(texts))]
    fit = torch.cat([w[a] for w, (a, _) in zip(where, split, strict=True)])
    score = torch.cat([w[b] for w, (_, b) in zip(where, split, strict=True)])
    draw = torch.Generator().manual_seed(seed)
    alive = (z[fit] > 0).any(0).nonzero().squeeze(1)
    if not len(alive):
        raise SAEError("no latent fires in these texts: is this the SAE's model and site?")
    rows = []
    for i, label in enumerate(texts):
        truth = kind == i
        a, b = z[fit][truth[fit]], z[fit][~truth[fit]]
        order = (a.mean(0) - b.mean(0)).abs().argsort(descending=True)
        tried: list[tuple[str, int, Tensor]] = [("activation", raw.shape[1], raw)]
        for k in ks:
            random = alive[torch.randperm(len(alive), generator=draw)[:k]]
            tried += [("none", k, z[:, order[:k]]), ("random", k, z[:, random])]
        for baseline, k, features in tried:
            right = _right(features, truth, fit, score)
            value, low, high = _balanced(right, truth[score], resamples, draw)
            rows.append({"label": label, "k": k, "metric": "accuracy", "baseline": baseline, "value": value,
                         "low": low, "high": high,
                         "latents": order[:k].tolist() if baseline == "none" else []})  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs.update({"fit_texts": len(fit), "scored_texts": len(score), "sites": list(s.sites), "model": m.name})
    return frame


def _right(features: Tensor, truth: Tensor, fit: Tensor, score: Tensor) -> Tensor:
    """Whether a logistic regression on standardised features is right at each scored text [text]."""
    from sklearn.linear_model import LogisticRegression

    x = features.double()
    x = (x - x[fit].mean(0)) / x[fit].std(0).clamp_min(1e-9)
    model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(x[fit].numpy(), truth[fit].numpy())
    return torch.from_numpy(model.predict(x[score].numpy())) == truth[score]


def _balanced(right: Tensor, truth: Tensor, resamples: int, draw: torch.Generator) -> tuple[float, float, float]:
    yes, no = right[truth].double(), right[~truth].double()
    value = float(yes.mean() + no.mean()) / 2
    drawn = [side[torch.randint(len(side), (resamples, len(side)), generator=draw)].mean(1) for side in (yes, no)]
    both = (drawn[0] + drawn[1]) / 2
    low, high = both.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high


@recorded
def stability(saes: Sequence[SAE], *, same: float = 0.7) -> pd.DataFrame:
    """How much of one dictionary is in another: first, second, metric, value, baseline.

    Latents are matched one to one so that the summed cosine of their decoder rows is largest (Hungarian method; Paulo &
    Belrose 2025, arXiv:2501.16615). ``cosine`` is the mean over pairs, ``shared`` the share of pairs above `same`.
    ``baseline="random"`` matches the first with as many random directions.
    """
    import pandas as pd
    from scipy.optimize import linear_sum_assignment

    if len(saes) < 2 or len({s.d_out for s in saes}) > 1:
        raise SAEError("stability: give at least two SAEs of one site, such as one setting trained with several seeds")
    rows = []
    for i, a in enumerate(saes):
        for j in range(i + 1, len(saes)):
            noise = torch.randn(saes[j].decoder.shape, generator=torch.Generator().manual_seed(0))
            for baseline, other in (("none", saes[j].decoder), ("random", noise)):
                cosine = torch.nn.functional.normalize(a.decoder, dim=1) @ torch.nn.functional.normalize(other, dim=1).T
                found = linear_sum_assignment(cosine.numpy(), maximize=True)
                pairs = cosine[torch.from_numpy(found[0]), torch.from_numpy(found[1])]
                for metric, value in (("cosine", pairs.mean()), ("shared", (pairs > same).float().mean())):
                    rows.append({"first": i, "second": j, "metric": metric, "value": float(value),
                                 "baseline": baseline})  # fmt: skip
    return pd.DataFrame(rows)
