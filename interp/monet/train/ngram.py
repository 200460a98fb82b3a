"""The baseline: an interpolated modified Kneser-Ney 5-gram over the same token ids.

    p_k(w | h) = max(0, c(h w) - D(c(h w))) / c(h)  +  gamma(h) p_{k-1}(w | h')    h' = h without its first token
    gamma(h)   = (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h)            N_c(h): words seen c times after h
    p_0(w)     = 1 / V

At the highest order c counts occurrences; below it c(h w) counts the different tokens seen before h w, since a lower
order is asked only where the higher one has little to say. The three discounts of each order come from the numbers
n1..n4 of n-grams seen once to four times: Y = n1 / (n1 + 2 n2), D_c = c - (c + 1) Y n_{c+1} / n_c.

Where h was never seen the lower order answers alone, so every p_k(. | h) sums to 1.

Source: Chen & Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1998, sections 2.7 and 4.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """One order k: its n-grams and their histories, each as sorted keys (k tokens packed into 64 bits).

    Attributes:
        grams: keys [gram]; kept: (c - D(c)) / c(h) of each [gram].
        histories: keys [history]; gamma: weight of the lower order [history].
    """

    grams: Keys
    kept: Floats
    histories: Keys
    gamma: Floats


class KneserNey:
    """An n-gram model of token ids.

    Args:
        runs: sequences of token ids [token]; no n-gram crosses from one to the next.
        vocabulary: number of token ids V; the model gives each of them a probability.
        order: n. `order` token ids must fit in 63 bits: V up to 4,096 at order 5.
    """

    def __init__(self, runs: Iterable[NDArray[np.integer]], vocabulary: int, order: int = 5) -> None:
        self.vocabulary, self.order = vocabulary, order
        self.bits = max(1, (vocabulary - 1).bit_length())
        if order < 1 or self.bits * order > 63:
            raise ValueError(
                f"order={order}, vocabulary={vocabulary}: an n-gram takes {self.bits * order} bits, expected 1 to 63; "
                f"orders up to {63 // self.bits} fit"
            )
        packed = [self._pack(np.asarray(run), order) for run in runs if len(run) >= order]
        if not packed:
            raise ValueError(f"runs: none has {order} tokens, so there is no {order}-gram to count")
        grams, counts = np.unique(np.concatenate(packed), return_counts=True)
        self.orders: list[_Order] = []
        for k in range(order, 0, -1):
            self.orders.insert(0, self._smooth(grams, counts))
            if k > 1:  # how many different tokens precede each (k - 1)-gram
                grams, counts = np.unique(grams & self._mask(k - 1), return_counts=True)

    def log_probs(self, tokens: NDArray[np.integer]) -> Floats:
        """log p of each token given those before it in the sequence, nats: ids [pos] -> [pos].

        The first tokens have shorter histories, the very first none.
        """
        tokens = np.asarray(tokens)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise ValueError(f"tokens: ids {tokens.min()}..{tokens.max()}, expected 0..{self.vocabulary - 1}")
        p = np.full(len(tokens), 1 / self.vocabulary)
        for k, order in enumerate(self.orders, 1):
            if len(tokens) < k:
                break
            grams = self._pack(tokens, k)
            kept = _look_up(order.grams, order.kept, grams, 0.0)
            gamma = _look_up(order.histories, order.gamma, grams >> np.uint64(self.bits), 1.0)
            p[k - 1 :] = kept + gamma * p[k - 1 :]
        return np.log(p)

    def _pack(self, tokens: NDArray[np.integer], k: int) -> Keys:
        """Keys of the k-grams of a sequence [pos] -> [pos - k + 1]; the last token is in the lowest bits."""
        keys = np.zeros(len(tokens) - k + 1, dtype=np.uint64)
        for place in range(k):
            keys = (keys << np.uint64(self.bits)) | tokens[place : len(tokens) - k + 1 + place].astype(np.uint64)
        return keys

    def _mask(self, k: int) -> np.uint64:
        return np.uint64((1 << (self.bits * k)) - 1)

    def _smooth(self, grams: Keys, counts: NDArray[np.int64]) -> _Order:
        discount = discounts(counts)[np.minimum(counts, 3)]
        histories, first = np.unique(grams >> np.uint64(self.bits), return_index=True)
        total = np.add.reduceat(counts, first)
        gamma = np.add.reduceat(discount, first) / total  # the mass that discounting has taken from h
        kept = (counts - discount) / np.repeat(total, np.diff(np.append(first, len(grams))))
        return _Order(grams, kept, histories, gamma)


def discounts(counts: NDArray[np.int64]) -> Floats:
    """[0, D1, D2, D3+] from the counts of all n-grams of one order.

    Where the counts of counts (small corpora) give no D between 0 and c, it is 1/2.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    found = np.zeros(4)
    for c in (1, 2, 3):
        y = n[1] / (n[1] + 2 * n[2]) if n[1] + n[2] else 0.0
        estimate = c - (c + 1) * y * n[c + 1] / n[c] if n[c] else 0.0
        found[c] = estimate if 0 < estimate < c else 0.5  # 0 would leave the lower order nothing
    return found


def _look_up(keys: Keys, values: Floats, wanted: Keys, absent: float) -> Floats:
    """Values of sorted keys, `absent` where a wanted key is not among them."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], absent)
