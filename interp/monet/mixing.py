"""How n^2 expert weights act on a token without being written down.

With keys weights g1, g2 [head, n] and a mask M [n, n] (1 = expert kept), expert (i, j) of a token has weight

    W_ij = M_ij sum_h g1_hi g2_hj

Expert (i, j) is put together from part i and part j, so a layer never needs W itself, only four products of it, with
z1_i and z2_j [m] the hidden neurons of the parts:

    r = W 1        c = W^T 1        W z2        W^T z1

Without a mask W has rank H and everything factors through the heads (`_factored`): O(n H m) a token. A mask of whole
rows and columns is M_ij = a_i b_j, which goes into g1 and g2. Any other mask destroys the rank, but not the
sparsity: of a token's n^2 = 262,144 weights only those of surviving keys, about H k^2 = 400, are not zero. So the
masked products go over these pairs (`_over_pairs`), or, where n is so small or survivors so many that a dense W is
less work, over the W of a few tokens at a time (`_over_tokens`). Both give the same sums in another order; neither
holds more than a chunk, so peak memory does not grow with n^2 x tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Numbers in the largest temporary of a chunk. On a processor, what stays in its cache; on a GPU, what keeps it busy.
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**25

#: A pair costs as much as this many entries of a dense W (measured on a processor, moe_dim 12; see benchmarks).
PAIR_COST = 80


class Kept(NamedTuple):
    """A mask with what is known of its structure: matrix [n, n] = outer(rows [n], cols [n]) if these are given."""

    matrix: Tensor
    rows: Tensor | None
    cols: Tensor | None


class Mixed(NamedTuple):
    """The four products, for each token: r, c [token, n]; w_z2, wt_z1 [token, n, m] (None if not asked for)."""

    r: Tensor
    c: Tensor
    w_z2: Any  # Tensor | None
    wt_z1: Any


def structure(keep: Tensor | None) -> Kept | None:
    """What a mask [n, n] (True = kept) allows us to do; None when it switches nothing off."""
    if keep is None or bool(keep.all()):
        return None
    rows, cols = keep.any(1), keep.any(0)
    if torch.equal(keep, rows[:, None] & cols):
        return Kept(keep, rows, cols)
    return Kept(keep, None, None)


def mix(g1: Tensor, g2: Tensor, z1: Tensor | None, z2: Tensor | None, kept: Kept | None = None) -> Mixed:
    """The products of W with ones, z2 and z1.

    Args:
        g1: weights of the first axis's keys [token, head, n]; any values, rows need not sum to 1.
        g2: weights of the second axis's keys [token, head, n].
        z1: neurons of the first axis's parts [token, n, m], or None if W^T z1 is not wanted.
        z2: neurons of the second axis's parts [token, n, m], or None if W z2 is not wanted.
        kept: the mask, from `structure`.
    """
    if kept is None:
        return _factored(g1, g2, z1, z2)
    if kept.rows is not None and kept.cols is not None:
        return _factored(g1 * kept.rows, g2 * kept.cols, z1, z2)
    pairs = ((g1 != 0).sum(-1) * (g2 != 0).sum(-1)).sum(-1)  # [token]
    entries = g1.shape[-1] ** 2
    budget = CHUNK.get(g1.device.type, CHUNK_ELSEWHERE)
    sparse = int(pairs.sum()) * PAIR_COST < len(g1) * entries
    if sparse:
        width = max(z.shape[-1] for z in (z1, z2) if z is not None)  # a pair's temporary is as wide as z
        sizes = _split(pairs, max(1, budget // width))
    else:
        sizes = _split(torch.full_like(pairs, entries), budget)
    chunks = zip(*(_pieces(t, sizes) for t in (g1, g2, z1, z2)), strict=True)
    part: Callable[..., Mixed] = _over_pairs if sparse else _over_tokens_bounded
    columns = zip(*(part(*chunk, kept.matrix) for chunk in chunks), strict=True)
    return Mixed._make(column[0] if column[0] is None else torch.cat(column) for column in columns)


def pair_weights(g1: Tensor, g2: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Weights of some experts, sum_h g1_hi g2_hj: g1, g2 [..., head, n], i and j [pair] -> [..., pair]."""
    return (g1[..., i] * g2[..., j]).sum(-2)


def _factored(g1: Tensor, g2: Tensor, z1: Tensor | None, z2: Tensor | None) -> Mixed:
    """Rank H. The sums over the other axis are 1 as the router makes them; they are kept for edited weights."""
    r = (g1 * g2.sum(-1, keepdim=True)).sum(1)
    c = (g2 * g1.sum(-1, keepdim=True)).sum(1)
    w_z2 = None if z2 is None else g1.transpose(1, 2) @ (g2 @ z2)
    wt_z1 = None if z1 is None else g2.transpose(1, 2) @ (g1 @ z1)
    return Mixed(r, c, w_z2, wt_z1)


def _over_tokens(g1: Tensor, g2: Tensor, z1: Tensor | None, z2: Tensor | None, keep: Tensor) -> Mixed:
    """The equations as they stand, W [token, n, n] of a few tokens."""
    w = (g1.transpose(1, 2) @ g2) * keep.to(g1)
    # z^T W^T and z^T W, transposed: several times as quick as W z and W^T z where z has few columns
    w_z2 = None if z2 is None else (z2.transpose(1, 2) @ w.transpose(1, 2)).transpose(1, 2)
    wt_z1 = None if z1 is None else (z1.transpose(1, 2) @ w).transpose(1, 2)
    return Mixed(w.sum(2), w.sum(1), w_z2, wt_z1)


def _over_tokens_bounded(*args: Any) -> Mixed:
    """`_over_tokens`; if gradients will be wanted, W is made again for them, lest every chunk's stays alive."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        return checkpoint(_over_tokens, *args, use_reentrant=False, preserve_rng_state=False)
    return _over_tokens(*args)


def _over_pairs(g1: Tensor, g2: Tensor, z1: Tensor | None, z2: Tensor | None, keep: Tensor) -> Mixed:
    """A list of the (token, head, i, j) whose weight is not zero; sums over it by index."""
    tokens, heads, n = g1.shape
    g1, g2 = g1.flatten(0, 1), g2.flatten(0, 1)  # [row, n], a row being a token's head
    row, i = g1.nonzero(as_tuple=True)
    row2, j = g2.nonzero(as_tuple=True)  # both ordered by row
    v1, v2 = g1[row, i], g2[row2, j]
    # each surviving i of a row meets every surviving j of the same row
    partners = torch.bincount(row2, minlength=len(g2))
    start = (partners.cumsum(0) - partners)[row]  # where the partners of this i begin in the list of j
    times = partners[row]
    left = torch.arange(len(row), device=row.device).repeat_interleave(times)
    within = torch.arange(len(left), device=row.device) - (times.cumsum(0) - times)[left]
    right = start[left] + within
    i, j = i[left], j[right]
    weight = v1[left] * v2[right] * keep[i, j]
    base = (row // heads * n)[left]  # where the token's n entries begin
    at_i, at_j = base + i, base + j

    def add(where: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(tokens * n, *values.shape[1:]).index_add(0, where, values).unflatten(0, (tokens, n))

    return Mixed(
        add(at_i, weight),
        add(at_j, weight),
        None if z2 is None else add(at_i, weight[:, None] * z2.flatten(0, 1)[at_j]),
        None if z1 is None else add(at_j, weight[:, None] * z1.flatten(0, 1)[at_i]),
    )


def _split(costs: Tensor, budget: int) -> list[int]:
    """Lengths of runs of tokens whose costs [token] add up to about `budget` (a single token may exceed it)."""
    run = (costs.cumsum(0) - costs) // budget
    return run.unique_consecutive(return_counts=True)[1].tolist() or [0]


def _pieces(tensor: Tensor | None, sizes: list[int]) -> Any:
    return (None,) * len(sizes) if tensor is None else tensor.split(sizes)
