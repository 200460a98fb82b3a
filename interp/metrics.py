"""Metrics: one number per example from logits, each with its direction.

A metric takes logits [batch, pos, vocab] (and, where rows are padded, the `Tokens` they belong to) and gives [batch].
It reads each row's last real token unless it says otherwise. Any function of that shape works where a metric is taken;
`Metric` adds a name and says whether larger means more of the behaviour, so that tables and plots can too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.activations import Tokens
from interp.calls import recorded

Answer = int | Sequence[int] | Tensor


@dataclass(frozen=True)
class Metric:
    """A named function of logits.

    Attributes:
        fn: (logits [batch, pos, vocab], tokens or None) -> [batch].
        name: what tables call it.
        larger_is_more: True if a larger value means more of what is measured (False for a loss or a divergence).
    """

    fn: Callable[[Tensor, Tokens | None], Tensor]
    name: str
    larger_is_more: bool = True

    def __call__(self, logits: Tensor, tokens: Tokens | None = None) -> Tensor:
        if logits.dim() != 3:
            raise ValueError(f"{self.name}: logits must be [batch, pos, vocab], got {list(logits.shape)}")
        value = self.fn(logits, tokens)
        if value.shape != logits.shape[:1]:
            raise ValueError(
                f"{self.name}: a metric gives one number per example, [{logits.shape[0]}]; got {list(value.shape)}"
            )
        return value


def as_metric(metric: Metric | Callable[..., Tensor]) -> Metric:
    """A Metric from a Metric or from a plain function of logits."""
    if isinstance(metric, Metric):
        return metric
    return Metric(lambda logits, tokens: metric(logits), getattr(metric, "__name__", "custom"))


def last_logits(logits: Tensor, tokens: Tokens | None) -> Tensor:
    """Logits at each row's last real token [batch, vocab]."""
    if tokens is None:
        return logits[:, -1]
    return logits[torch.arange(len(logits), device=logits.device), tokens.last.to(logits.device)]


def _chosen(logits: Tensor, answer: Answer, what: str) -> Tensor:
    """Logits of one token id, or of one id per row, at the last token [batch]."""
    ids = torch.as_tensor(answer, device=logits.device)
    if ids.dim() > 1 or (ids.dim() == 1 and len(ids) not in (1, len(logits))):
        raise ValueError(f"{what}: give one token id or one per example ({len(logits)}), got {list(ids.shape)}")
    if bool((ids < 0).any()) or bool((ids >= logits.shape[-1]).any()):
        raise ValueError(f"{what}: token id outside the vocabulary 0..{logits.shape[-1] - 1}: {ids.tolist()}")
    return logits.gather(1, ids.expand(len(logits))[:, None])[:, 0]


@recorded
def logit_diff(correct: Answer, wrong: Answer) -> Metric:
    """logit(correct) - logit(wrong) at the last token; ids, or one id per example."""

    def fn(logits: Tensor, tokens: Tokens | None) -> Tensor:
        final = last_logits(logits, tokens)
        return _chosen(final, correct, "logit_diff: correct") - _chosen(final, wrong, "logit_diff: wrong")

    return Metric(fn, "logit_diff")


@recorded
def log_prob(target: Answer) -> Metric:
    """Log-probability (nats) of the target at the last token."""
    return Metric(
        lambda logits, tokens: _chosen(last_logits(logits, tokens).log_softmax(-1), target, "log_prob: target"),
        "log_prob",
    )


@recorded
def kl(reference: Tensor, *, every: bool = False) -> Metric:
    """KL(reference || run), nats, at the last token, or with `every` averaged over each row's real tokens.

    Args:
        reference: logits of the unedited run [batch, pos, vocab].
        every: average over all real tokens instead of reading the last.
    """
    reference = reference.detach()

    def fn(logits: Tensor, tokens: Tokens | None) -> Tensor:
        if reference.shape != logits.shape:
            raise ValueError(
                f"kl: the reference is {list(reference.shape)}, the run {list(logits.shape)}; use the same tokens"
            )
        p, q = reference.log_softmax(-1), logits.log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1)
        if every:
            weight = torch.ones_like(each) if tokens is None else tokens.mask.to(each)
            return (each * weight).sum(1) / weight.sum(1)
        return last_logits(each[..., None], tokens)[:, 0]

    return Metric(fn, "kl", larger_is_more=False)


@recorded
def loss(tokens: Tokens | Tensor) -> Metric:
    """Mean next-token cross-entropy (nats) over each row's real tokens."""
    given = tokens if isinstance(tokens, Tokens) else Tokens(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def fn(logits: Tensor, _: Any) -> Tensor:
        each = -logits[:, :-1].log_softmax(-1).gather(-1, given.ids[:, 1:, None].to(logits.device))[..., 0]
        weight = (given.mask[:, 1:] & given.mask[:, :-1]).to(each)
        return (each * weight).sum(1) / weight.sum(1).clamp(min=1)

    return Metric(fn, "loss", larger_is_more=False)
