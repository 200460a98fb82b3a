"""The loss of a batch and its gradients: of all tokens at once, or of a piece after another.

A fresh autoencoder with a ReLU fires at half of its latents, so codes, their gradients and all between them are dense
matrices [token, latent]: 75 MB each for 4,096 tokens and 4,608 latents, and a step reads and writes some twenty times
as much. On a CPU that takes a third of its time beside the products. Cut into pieces whose matrices stay in the
processor's cache, the batch gives the same gradients, since its loss is a mean over tokens, and memory hardly counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interp.sae.architectures import FORWARD, State, Step, Weights, exponent, fires_everywhere
from interp.sae.settings import Settings

ENTRIES = 1 << 22  # of a piece: 17 MB in float32
LEAST = 256  # tokens of a piece; fewer make the products slow


def learn(w: Weights, x: Tensor, y: Tensor, state: State, s: Settings) -> Step:
    """Forward and backward: the gradients are added to the weights'."""
    state.full = fires_everywhere(w, x, state, s)
    if state.full and x.device.type == "cpu" and state.part.world == 1 and _additive(state, s):
        size = max(LEAST, ENTRIES // s.d_sae)
        return _joined([_learnt(w, a, b, state, s, len(x)) for a, b in zip(x.split(size), y.split(size), strict=True)])
    step = FORWARD[s.arch](w, x, y, state, s)
    step.loss.backward()
    return step


def _learnt(w: Weights, x: Tensor, y: Tensor, state: State, s: Settings, tokens: int) -> Step:
    """A piece of a batch of so many tokens; its loss and their terms weigh as much as its share."""
    step, share = FORWARD[s.arch](w, x, y, state, s), len(x) / tokens
    (step.loss * share).backward()
    parts = {name: part * share for name, part in step.parts.items()}
    return Step(step.loss.detach() * share, step.fired, step.output, parts)


def _joined(pieces: list[Step]) -> Step:
    return Step(
        torch.stack([piece.loss for piece in pieces]).sum(),
        torch.stack([piece.fired for piece in pieces]).sum(0),
        torch.cat([piece.output for piece in pieces]),
        {name: sum(piece.parts[name] for piece in pieces) for name in pieces[0].parts},
    )


def _additive(state: State, s: Settings) -> bool:
    """Whether the next loss is a mean over tokens, so that pieces of the batch can follow each other."""
    if s.arch == "jumprelu":
        return s.k is None  # else of the batch's mean L0 a square is taken
    return s.arch != "panneal" or exponent(state, s) == state.p  # when p changes, the whole batch sets the factor
