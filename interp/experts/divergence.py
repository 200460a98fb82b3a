"""How much a model's predictions move on text that they should not move on: KL divergence, with an interval.

A set that carries one label should leave neutral text alone. Loss may hide harm there (some tokens gain what others
lose); the divergence between the predictions with and without the set cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.sets import ExpertSet


@torch.no_grad()
def divergence(
    model: Any,
    chosen: ExpertSet,
    texts: Labelled | Corpus,
    *,
    max_tokens: int | None = None,
    batch_tokens: int = 1024,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Mean over tokens of KL(whole model || without the set), nats, per label.

    Returns label -> value, low, high (95 % bootstrap over documents). Raises ExpertError unless the set is the model's.
    """
    units = chosen.check(model)
    data = corpus(model, texts, max_tokens)
    nats, tokens = (torch.zeros(len(data.documents), dtype=torch.float64) for _ in range(2))
    for batch in data.batches(model, batch_tokens):
        before = model(batch.tokens).float().log_softmax(-1)
        with units.off(model, chosen.ids):
            after = model(batch.tokens).float().log_softmax(-1)
        each = (before.exp() * (before - after)).sum(-1).double() * batch.tokens.mask
        nats.index_add_(0, batch.document, each.sum(1).cpu())
        tokens.index_add_(0, batch.document, batch.tokens.mask.sum(1).double().cpu())
    out = {}
    for at, label in enumerate(data.labels):
        rows = (data.documents == at) & (tokens > 0)
        out[label] = mean_with_interval(nats[rows], tokens[rows], resamples, seed)
    return out


def mean_with_interval(sums: Tensor, counts: Tensor, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """A ratio of sums over documents, and its 95 % interval when documents are drawn anew; NaN for one alone."""
    value, n = float(sums.sum() / counts.sum()), len(sums)
    if n < 2:
        return {"value": value, "low": float("nan"), "high": float("nan")}
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "low": low, "high": high}
