"""The QK fix of AtP*: queries and keys through the softmax that they meet, not through its slope.

Where attention is saturated the slope of the softmax is 0 and plain AtP is blind to queries and keys. AtP* (Kramár et
al., arXiv 2403.00745, eq. 6-10) recomputes the attention probabilities with the node's activation from the other run
and stays linear behind them: effect = sum over queries and keys of (p' - p) x dL/dp.

*Queries.* A query moves its whole row of scores: p' is the softmax of the new row.

*Keys.* A key t moves one score in every row that sees it, from s_t to s'_t. With the other keys' log-sum-exp
``r_t = log sum_{j != t} exp s_j`` and their mean gradient ``gbar_t = sum_{j != t} p_j g_j / sum_{j != t} p_j``::

    p_t = sigmoid(s_t - r_t)        p'_t = sigmoid(s'_t - r_t)        effect of a row = (p'_t - p_t) (g_t - gbar_t)

All other keys share what t gives away in proportion, which is why their mean is all that counts. The same effect is
often written (p'_t - p_t) / (1 - p_t) (g_t - sum_j p_j g_j); where p_t rounds to 1 that is 0 / 0, in float32 beyond a
lead of 17 nats, so exactly where the fix is needed. Here nothing is divided by 1 - p_t: `Others` leaves t out of the
sums themselves. That takes two maxima per row (the largest score, and the largest beside it), so all keys of all rows
cost O(T^2).

Whatever is added to the scores, masks, windows, biases of distance, sinks, enters `scores` and `sink`; a soft cap is
inside `s`. Under grouped heads a key's effect is the sum over the query heads that share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """How one layer makes its attention probabilities from queries and keys.

    Attributes:
        factor: the factor on q.k.
        cap: soft cap on the scores, or None.
        bias: what is added to them by position alone [pair or 1, head, query, key]; -inf where a key is not seen.
        sink: the score of the learned sink in the same units [pair or 1, head, query, 1]; -inf where there is none.
    """

    factor: float
    cap: float | None
    bias: Tensor
    sink: Tensor

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores [pair, head, query, key] of queries [pair, pos, head, d] and keys [pair, pos, kv head, d]."""
        keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        raw = torch.einsum("bqhd,bkhd->bhqk", _wide(q), _wide(keys)) * self.factor
        return (raw if self.cap is None else self.cap * (raw / self.cap).tanh()) + self.bias

    def pattern(self, scores: Tensor) -> Tensor:
        """The probabilities of the keys [pair, head, query, key]; a sink takes the rest."""
        return self._with_sink(scores).softmax(-1)[..., :-1]

    def _with_sink(self, scores: Tensor) -> Tensor:
        return torch.cat([scores, self.sink.expand(*scores.shape[:-1], 1)], -1)

    def others(self, scores: Tensor) -> Others:
        return Others.of(self._with_sink(scores))


@dataclass(frozen=True, eq=False)
class Others:
    """For each key of each row, all the other keys (the sink among them).

    Attributes:
        lse: log of the sum of their exponentials [..., query, key].
        weight, total: exp(score - largest) and its sum without the key, for every key but the largest.
        beside, rest: exp(score - second largest) without the largest key, and its sum: for the largest key.
        largest: True at the largest key of each row.
    """

    lse: Tensor
    weight: Tensor
    total: Tensor
    beside: Tensor
    rest: Tensor
    largest: Tensor

    @classmethod
    def of(cls, scores: Tensor) -> Others:
        """`scores` [..., query, key + 1], the sink last."""
        top = scores.topk(2, -1).values
        top = top.where(top.isfinite(), torch.zeros_like(top))  # a row that sees one key, or none
        largest = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), True)
        weight = (scores - top[..., :1]).exp()
        beside = (scores - top[..., 1:]).exp().masked_fill(largest, 0)
        total, rest = weight.sum(-1, keepdim=True) - weight, beside.sum(-1, keepdim=True)
        lse = torch.where(largest, top[..., 1:] + rest.log(), top[..., :1] + total.log())
        weight, total, beside = (part[..., :-1].float() for part in (weight, total, beside))  # ratios need no more
        return cls(lse[..., :-1], weight, total, beside, rest.float(), largest[..., :-1])

    def mean(self, g: Tensor) -> Tensor:
        """Mean of `g` [..., query, key] over the other keys, weighed by their probabilities; the sink's g is 0."""
        sums = self.weight * g
        usual = (sums.sum(-1, keepdim=True) - sums) / self.total
        return torch.where(self.largest, (self.beside * g).sum(-1, keepdim=True) / self.rest, usual)


def sigmoid_difference(new: Tensor, old: Tensor) -> Tensor:
    """sigmoid(new) - sigmoid(old) without cancellation: both may be near 1, near 0, or infinite."""
    high, low = torch.maximum(new, old), torch.minimum(new, old)
    size = high.sigmoid() * (-low).sigmoid() * -torch.expm1(low - high)
    return torch.where(new >= old, size, -size).nan_to_num(0.0)  # of two infinities: nothing moves


@dataclass(frozen=True, eq=False)
class QueryMoves:
    """p' - p of every row, when its query is taken from the source run [pair, head, query, key]."""

    change: Tensor

    @classmethod
    def of(cls, scores: Scores, q: Tensor, k: Tensor, q_there: Tensor) -> QueryMoves:
        new, old = scores(q_there, k), scores(q, k)
        return cls((scores.pattern(new) - scores.pattern(old)).nan_to_num(0.0).float())

    def effect(self, g: Tensor) -> Tensor:
        """Effect of each query head at each position [pair, pos, head], from dL/dp [pair, head, query, key]."""
        return (self.change * g.float()).sum(-1).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class KeyMoves:
    """What moves in every row, when one key is taken from the source run.

    Attributes:
        change: p'_t - p_t [pair, head, query, key].
        others: the other keys of each row.
        group: query heads that share a key-value head.
    """

    change: Tensor
    others: Others
    group: int

    @classmethod
    def of(cls, scores: Scores, q: Tensor, k: Tensor, k_there: Tensor) -> KeyMoves:
        old, new = scores(q, k), scores(q, k_there)
        others = scores.others(old)
        change = sigmoid_difference(new - others.lse, old - others.lse)
        return cls(change.float(), others, q.shape[2] // k.shape[2])

    def effect(self, g: Tensor) -> Tensor:
        """Effect of each key head at each position [pair, pos, kv head], from dL/dp [pair, head, query, key]."""
        g = g.float()
        rows = (self.change * (g - self.others.mean(g)).nan_to_num(0.0)).sum(2)  # [pair, head, key]
        return rows.unflatten(1, (-1, self.group)).sum(2).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """In double precision: a score of 200 in float32 is known to 1e-5 only, and so would its probability be."""
    return x.float() if x.device.type == "mps" else x.double()
