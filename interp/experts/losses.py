"""Next-token losses per document, and intervals for their change.

Everything is summed per document. A change is measured on the same documents before and after, and its interval comes
from resampling documents (percentile bootstrap): tokens of a document are not independent draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.batches import Corpus, Labelled, corpus

METRICS = ("loss", "perplexity", "accuracy")


@dataclass(frozen=True, eq=False)
class Losses:
    """Sums over the predicted tokens of each document (its first token in a window is not predicted).

    Attributes:
        label: index into `labels` [document].
        nats: cross-entropy [document].
        correct: tokens whose most likely prediction was right [document].
        tokens: tokens predicted [document]; 0 for documents that were not run.
    """

    labels: list[str]
    label: Tensor
    nats: Tensor
    correct: Tensor
    tokens: Tensor

    def of(self, label: str) -> Tensor:
        """[document of that label, (nats, correct, tokens)]."""
        rows = (self.label == self.labels.index(label)) & (self.tokens > 0)
        return torch.stack([self.nats[rows], self.correct[rows], self.tokens[rows]], 1)


@recorded
def losses(
    model: Any, texts: Labelled | Corpus, *, max_tokens: int | None = None, batch_tokens: int = 4096
) -> Losses:  # fmt: skip
    """Runs the model, as it is now, over labelled documents."""
    data = corpus(model, texts, max_tokens)
    nats, correct, tokens = (torch.zeros(len(data.documents), dtype=torch.float64) for _ in range(3))
    for batch in data.batches(model, batch_tokens, "measuring losses"):
        target, real = batch.tokens.ids[:, 1:], batch.tokens.mask[:, 1:]
        loss, right = _scores(model(batch.tokens)[:, :-1], target)
        for into, values in ((nats, loss.double() * real), (correct, right & real), (tokens, real)):
            into.index_add_(0, batch.document, values.double().sum(1).cpu())
    return Losses(data.labels, data.documents, nats, correct, tokens)


def _scores(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and whether the prediction is right [row, pos], one row at a time: a processor's cache holds that,
    where copies of all rows' logits [row, pos, vocab] would go through memory."""
    loss = [
        torch.nn.functional.cross_entropy(z.float(), t, reduction="none") for z, t in zip(logits, target, strict=True)
    ]
    right = [z.argmax(-1) == t for z, t in zip(logits, target, strict=True)]
    return torch.stack(loss), torch.stack(right)


def metric(sums: Tensor, name: str) -> Tensor:
    """A metric from sums [..., (nats, correct, tokens)]: loss in nats per token, perplexity, or accuracy 0..1."""
    if name == "accuracy":
        return sums[..., 1] / sums[..., 2]
    loss = sums[..., 0] / sums[..., 2]
    return loss.exp() if name == "perplexity" else loss


def change(
    before: Losses, after: Losses, label: str, *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """metric -> before, after, value (after - before), low, high: a 95 % interval over documents, NaN for one alone."""
    a, b = before.of(label), after.of(label)  # [document, 3], the same documents
    n = len(a)
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, draws, torch.ones(1).double().expand_as(draws)
    )
    out = {}
    for name in METRICS:
        was, now = metric(a.sum(0), name), metric(b.sum(0), name)
        spread = metric(counts @ b, name) - metric(counts @ a, name)
        low, high = spread.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist() if n > 1 else (nan, nan)
        out[name] = {"before": float(was), "after": float(now), "value": float(now - was), "low": low, "high": high}
    return out
