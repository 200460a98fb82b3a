"""The n^2 experts of a Monet layer as a run left them: factored, and unfolded only where weight is.

Expert (i, j), with id i * n + j, has weight

    W_ij = M_ij sum_h g1_hi g2_hj          M: the experts that are on

on a token. With n = 512 these are 262,144 numbers a token, of which a few hundred to a few thousand are not zero: those
of *surviving* keys, that is keys whose g is not zero. All that is asked here is found over the pairs of surviving keys,
some tokens at a time, or factor by factor.

Source: Monet, arXiv 2412.04139.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from interp.calls import recorded

if TYPE_CHECKING:
    import pandas as pd

#: (token, head, i, j) looked at in one go. A single token may need more, if nearly all its keys survive.
PAIRS = 2**20


class Top(NamedTuple):
    """The heaviest experts of each token, heaviest first.

    Attributes:
        ids: i * n + j [batch, pos, k]; -1 where fewer than k experts have weight.
        weights: [batch, pos, k]; 0 there.
    """

    ids: Tensor
    weights: Tensor


class _Found(NamedTuple):
    """The experts that have weight, over a run of tokens: token, id, weight [found], sorted by token and id."""

    token: Tensor
    id: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class FactoredExperts:
    """The experts of one Monet layer.

    Attributes:
        g1: weights of the keys of axis 1 [batch, pos, head, key].
        g2: weights of the keys of axis 2 [batch, pos, head, key].
        mask: real tokens [batch, pos].
        keep: True = expert (i, j) is on [key, key]; None if all are.
    """

    layer: int
    g1: Tensor
    g2: Tensor
    mask: Tensor
    keep: Tensor | None = None

    @property
    def n(self) -> int:
        """Keys on each axis."""
        return self.g1.shape[-1]

    @property
    def n_experts(self) -> int:
        return self.n**2

    def weights(self, ids: int | Iterable[int] | Tensor) -> Tensor:
        """W of some experts [batch, pos, expert], without the last axis for a single id; zero for those that are off.

        Raises ValueError for an id that does not exist.
        """
        chosen = torch.as_tensor(ids if isinstance(ids, (int, Tensor)) else list(ids), device=self.g1.device)
        i, j = self.pair(chosen.reshape(-1))
        heads = range(self.g1.shape[2])  # one after the other, so that nothing is larger than the result
        total = sum((self.g1[:, :, h, i] * self.g2[:, :, h, j] for h in heads), self.g1.new_zeros(()))
        assert isinstance(total, Tensor)
        return (total if self.keep is None else total * self.keep[i, j]).reshape(*self.g1.shape[:2], *chosen.shape)

    def pair(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(i, j) of each id i * n + j."""
        wrong = ids[(ids < 0) | (ids >= self.n_experts)]
        if wrong.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
            bad = wrong.flatten()[0].item() if wrong.numel() else f"of {ids.dtype}"
            raise ValueError(f"expert {bad}: layer {self.layer} has experts 0..{self.n_experts - 1} (i * {self.n} + j)")
        return ids // self.n, ids % self.n

    def top(self, k: int = 8) -> Top:
        """The `k` heaviest experts of each token; of equals the smaller id first."""
        if not 1 <= k <= self.n_experts:
            raise ValueError(f"k={k}: layer {self.layer} has {self.n_experts} experts, so k is 1..{self.n_experts}")
        ids = self.mask.new_full((self.mask.numel(), k), -1, dtype=torch.long)
        rows: list[Tensor] = []
        places: list[Tensor] = []
        for found in self._found():
            order = found.weight.argsort(descending=True, stable=True)
            order = order[found.token[order].argsort(stable=True)]
            rank = torch.arange(len(order), device=order.device) - _starts(found.token)
            order, rank = order[rank < k], rank[rank < k]
            place = found.token[order] * k + rank
            ids.view(-1)[place] = found.id[order]
            rows.append(found.weight[order])
            places.append(place)
        weights = self.g1.new_zeros(ids.numel())
        if rows:
            weights = weights.index_put((torch.cat(places),), torch.cat(rows))
        frame = (*self.mask.shape, k)
        return Top(ids.view(frame), weights.view(frame))

    def count(self, threshold: float = 0.0) -> Tensor:
        """Experts per token whose weight is above `threshold` [batch, pos]."""
        if threshold < 0:
            raise ValueError(f"threshold={threshold}: expected at least 0 (experts without weight are not looked at)")
        counts = self.mask.new_zeros(self.mask.numel(), dtype=torch.long)
        for found in self._found():
            counts += torch.bincount(found.token[found.weight > threshold], minlength=len(counts))
        return counts.view_as(self.mask)

    def load(self, threshold: float = 0.0) -> Tensor:
        """Tokens on which each expert's weight is above `threshold` [expert]; padding is not counted."""
        if threshold < 0:
            raise ValueError(f"threshold={threshold}: expected at least 0 (experts without weight are not looked at)")
        total, real = self.mask.new_zeros(self.n_experts, dtype=torch.long), self.mask.flatten()
        for found in self._found():
            heavy = (found.weight > threshold) & real[found.token]
            total += torch.bincount(found.id[heavy], minlength=len(total))
        return total

    @recorded
    def frame(self, k: int = 8) -> pd.DataFrame:
        """One line per real token and each of its `k` heaviest experts.

        Columns: batch, position (among real tokens), rank (0 = heaviest), layer, expert, i, j, weight.
        """
        import pandas as pd

        ids, weights = self.top(k)
        batch, pos, rank = ((ids >= 0) & self.mask[..., None]).nonzero(as_tuple=True)
        expert = ids[batch, pos, rank]
        columns: dict[str, Any] = {
            "batch": batch,
            "position": (self.mask.long().cumsum(1) - 1)[batch, pos],
            "rank": rank,
            "layer": self.layer,
            "expert": expert,
            "i": expert // self.n,
            "j": expert % self.n,
            "weight": weights[batch, pos, rank].float(),
        }
        frame = pd.DataFrame({c: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for c, v in columns.items()})
        frame.attrs = {"layer": self.layer, "n_experts": self.n_experts, "tokens": int(self.mask.sum()), "heaviest": k}
        return frame

    def _found(self) -> Iterator[_Found]:
        """The experts that have weight, a run of tokens at a time."""
        g1, g2 = self.g1.flatten(0, 1), self.g2.flatten(0, 1)  # [token, head, key]
        wide = [int((g != 0).sum(-1).amax()) if g.numel() else 0 for g in (g1, g2)]  # most survivors of a head
        size = max(1, PAIRS // max(1, g1.shape[1] * wide[0] * wide[1]))
        for begin in range(0, len(g1), size):
            (i, v1), (j, v2) = (_surviving(g[begin : begin + size], s) for g, s in zip((g1, g2), wide, strict=True))
            pair = i[..., :, None] * self.n + j[..., None, :]  # [token, head, survivor, survivor]
            weight = v1[..., :, None] * v2[..., None, :]
            on = weight != 0
            if self.keep is not None:
                on &= self.keep.flatten()[pair]
            token = torch.arange(len(pair), device=pair.device).view(-1, 1, 1, 1)
            # one expert may be chosen by several heads: its weights there are added
            key, where = (token * self.n_experts + pair)[on].unique(return_inverse=True)
            total = weight.new_zeros(len(key)).index_add(0, where, weight[on])
            yield _Found(key // self.n_experts + begin, key % self.n_experts, total)


def _surviving(g: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Keys whose g is not zero, and g there: [token, head, key] -> twice [token, head, most], filled up with zeros."""
    keys = (g != 0).to(torch.uint8).topk(most, -1).indices
    return keys, g.gather(-1, keys)


def _starts(token: Tensor) -> Tensor:
    """For each entry of a sorted list, where the run of its value begins."""
    counts = token.unique_consecutive(return_counts=True)[1]
    return (counts.cumsum(0) - counts).repeat_interleave(counts)
