"""Which latents fire: from activations to the support of their code, and its values.

Pre-activations are computed for a thousand tokens at a time into one buffer (`dense`), and what is not chosen is never
kept: the matrix [token, latent] of a batch (300 MB at 18,432 latents) is never whole. Choices are exact, ties aside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interp.sae import dense
from interp.sae.kernels import Support
from interp.sae.scratch import Scratch
from interp.sae.shards import WHOLE, Shard

BUSY, BUSY_ON_GPU = 0.1, 0.05  # share of entries
_GROUPS = 8
_MARGIN = 0.8  # of the expected threshold of a batch: what is above it is looked at

Chosen = tuple[Support, Tensor]


def _nonzero(mask: Tensor) -> Tensor:
    """Places of True in the flat mask. NumPy's search through bytes is some times quicker than torch's on a CPU."""
    if mask.device.type != "cpu":
        return mask.flatten().nonzero().squeeze(1)
    import numpy as np

    return torch.from_numpy(np.flatnonzero(mask.numpy()))


@torch.no_grad()
def top_k(x: Tensor, encoder: Tensor, bias: Tensor, k: int, half: bool = False, part: Shard = WHOLE,
          scratch: Scratch | None = None) -> Chosen:  # fmt: skip
    """The k largest pre-activations of each token, and their values, negative ones included."""
    ids, values = [], []
    for _, p in dense.chunks(x, encoder, bias, half, scratch):
        value, place = largest(p, min(k, len(encoder)))
        ids.append(place)
        values.append(value)
    support, found = Support.slots(torch.cat(ids), len(encoder)), torch.cat(values)
    if part.world == 1:
        return support, found.flatten()
    short = torch.nn.functional.pad(found, (0, k - found.shape[1]), value=-torch.inf)  # as many from everyone
    keep = part.above_bar(short, k)[:, : found.shape[1]].flatten()
    return support.where(keep), found.flatten()[keep]


def largest(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places of the k largest in each row [row, k].

    A row's k largest lie in the k groups with the largest maxima (each such group has one entry at least as large as
    anything in the others), so only those are searched: the maxima take one quick pass, and which of them are the
    largest is the same question again.
    """
    width = p.shape[1] // _GROUPS
    if p.shape[1] % _GROUPS or width < 4 * max(1, k):
        return _largest_of_few(p, k)
    groups = largest(p.view(len(p), _GROUPS, width).amax(1), k)[1]
    steps = torch.arange(_GROUPS, device=p.device)[:, None] * width
    candidates = (groups[:, None, :] + steps).flatten(1)
    values, place = _largest_of_few(p.gather(1, candidates), k)
    return values, candidates.gather(1, place)


def _largest_of_few(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same for short rows. NumPy finds a row's k-th largest entry five times quicker than torch its k largest."""
    if p.device.type == "cpu" and p.dtype == torch.float32 and 0 < k < p.shape[1]:
        import numpy as np

        least = torch.from_numpy(np.partition(p.detach().numpy(), -k, axis=1)[:, -k])
        found = _nonzero(p >= least[:, None])
        if len(found) == k * len(p):  # else entries are equal, or NaN
            found = found.view(len(p), k)
            place = found - torch.arange(len(p))[:, None] * p.shape[1]
            if place.min() >= 0 and place.max() < p.shape[1]:
                return p.gather(1, place), place
    top = p.topk(k, dim=1, sorted=False)
    return top.values, top.indices


@torch.no_grad()
def above(x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor | float, half: bool = False,
          scratch: Scratch | None = None) -> Chosen:  # fmt: skip
    """All pre-activations above a threshold (one number, or one per latent [d_sae]), and their values."""
    places, values = [], []
    for start, p in dense.chunks(x, encoder, bias, half, scratch):
        over = p > threshold if scratch is None else _over(p, threshold, scratch)
        found = _nonzero(over)
        places.append(found + start * len(encoder))
        values.append(p.flatten()[found])
    return Support.flat(torch.cat(places), len(x), len(encoder)), torch.cat(values)


def _over(p: Tensor, threshold: Tensor | float, scratch: Scratch) -> Tensor:
    """p > threshold, in memory that is kept."""
    out = scratch("over", (dense.CHUNK, p.shape[1]), p, torch.bool)[: len(p)]
    return torch.gt(p, torch.as_tensor(threshold, device=p.device), out=out)


@torch.no_grad()
def batch_top_k(x: Tensor, encoder: Tensor, bias: Tensor, k: float, guess: float = 0.0, half: bool = False,
                part: Shard = WHOLE, scratch: Scratch | None = None) -> Chosen:  # fmt: skip
    """The k * tokens largest positive pre-activations of the whole batch (Bussmann et al. 2024, arXiv:2412.06410).

    `guess` is what the smallest of them was in recent batches (0: unknown). Only what exceeds a little less is
    collected; if that proves to be too little, everything positive is: a guess saves time and changes no result.
    """
    wanted = int(k * len(x))
    if guess <= 0:  # a few tokens tell about where it lies
        p = torch.addmm(bias, x[:64], encoder.T).flatten()
        few = min(int(k * len(x[:64])), len(p) * part.world)
        guess = part.least(p[part.best(p, few)]) or 0.0
    support, values = above(x, encoder, bias, max(0.0, guess * _MARGIN), half, scratch)
    if part.count(len(values)) < wanted and guess > 0:
        support, values = above(x, encoder, bias, 0.0, half, scratch)
    if part.count(len(values)) > wanted:
        kept = part.best(values, wanted)
        support, values = support.where(kept), values[kept]
    return support, values


@torch.no_grad()
def busy(x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor | float) -> bool:
    """Whether so many pre-activations of these tokens exceed the threshold that dense arithmetic is the quicker."""
    p = torch.addmm(bias, x, encoder.T)
    return float((p > threshold).float().mean()) > (BUSY if p.device.type == "cpu" else BUSY_ON_GPU)
