"""What removing one expert does to a token's routing, in closed form.

A router scores E experts, z [expert], keeps the k best, S, and weighs them. Without expert e of S the runner-up r takes
its slot, S' = S - {e} + {r}, and the weights follow from the same formula:

    softmax, then top-k            w_j = exp z_j / sum over all i      ->  exp z_j / sum over i != e
    the same, normalised           w_j = exp z_j / sum over S          ->  exp z_j / sum over S'
    sigmoid                        w_j = sigmoid z_j                   ->  the same
    sigmoid, normalised            w_j = sigmoid z_j / sum over S      ->  sigmoid z_j / sum over S'

each times a constant, with or without a bias that counts in choosing only. In the first of them even an expert that
was not chosen matters a little: it took a share of the softmax, which the others get when it is gone.

Which of these a model follows is not looked up but measured: the formula is the one that gives the weights and the
choice that the model's own router has given. A router that follows none of them (one that limits itself to groups of
experts, say) is refused here; `experts.sweep` and `experts.ablate` use the router itself, and can do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.experts.units import ExpertError

FORMULAS = tuple((score, normalised) for score in ("softmax", "sigmoid") for normalised in (True, False))


@dataclass(frozen=True)
class Formula:
    """How one router makes weights of logits.

    Attributes:
        score: "softmax" or "sigmoid".
        normalised: the chosen experts' weights are made to add up to `scale`.
        scale: the constant.
        bias: added to scores for choosing only [expert], or None.
    """

    score: str
    normalised: bool
    scale: float
    bias: Tensor | None = None

    def order(self, logits: Tensor) -> Tensor:
        """What experts are chosen by [token, expert]: the larger the sooner."""
        if self.bias is None:
            return logits
        return self.scores(logits) + self.bias.to(logits)

    def scores(self, logits: Tensor) -> Tensor:
        """Scores of all experts before weights are made of them [token, expert]."""
        return logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()

    def weights(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Weights of the chosen experts [token, slot]."""
        z = logits.gather(-1, ids)
        if self.score == "sigmoid":
            s = z.sigmoid()
            return self.scale * (s / s.sum(-1, keepdim=True) if self.normalised else s)
        if self.normalised:
            return self.scale * z.softmax(-1)
        return self.scale * (z - logits.logsumexp(-1, keepdim=True)).exp()

    def without(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Weights after the expert of each slot in turn is gone.

        Args:
            logits: [token, expert], float64 so that a saturated router keeps its runner-up.
            ids: chosen experts [token, slot].

        Returns the runner-up [token], and weights [token, removed slot, slot + 1], the runner-up's last; 0 for the
        removed one.
        """
        k = ids.shape[-1]
        order = self.order(logits).scatter(-1, ids, -torch.inf)
        runner = order.argmax(-1)
        z = logits.gather(-1, torch.cat([ids, runner[:, None]], -1))[:, None].expand(-1, k, -1)  # [token, removed, k+1]
        gone = torch.eye(k, k + 1, dtype=torch.bool, device=z.device)
        if self.score == "sigmoid":
            left = z.sigmoid().masked_fill(gone, 0.0)
            out = left / left.sum(-1, keepdim=True) if self.normalised else left
        else:
            left = z.masked_fill(gone, -torch.inf)
            if self.normalised:
                out = left.softmax(-1)
            else:
                others = logits[:, None].expand(-1, k, -1).scatter(-1, ids[..., None], -torch.inf)
                out = (left - others.logsumexp(-1, keepdim=True)).exp()
        return runner, self.scale * out

    def share(self, logits: Tensor, ids: Tensor) -> Tensor | None:
        """By which part all weights of a token rise if an expert is gone that it had *not* chosen [token, expert].

        p_e / (1 - p_e) where weights are an unnormalised softmax over all experts, 0 for chosen ones; None elsewhere.
        """
        if self.normalised or self.score != "softmax":
            return None
        p = logits.softmax(-1).scatter(-1, ids, 0.0)
        return p / (1 - p)


def renormalised(weights: Tensor) -> Tensor:
    """Weights after the expert of each slot in turn is gone and the others share what it leaves.

    [token, removed slot, slot + 1], the last column 0: nobody takes the slot. A lone expert leaves nothing.
    """
    k = weights.shape[-1]
    left = weights[:, None].expand(-1, k, -1).masked_fill(torch.eye(k, dtype=torch.bool, device=weights.device), 0.0)
    total, rest = weights.sum(-1)[:, None, None], left.sum(-1, keepdim=True)
    share = left * torch.where(rest == 0, torch.zeros_like(rest), total / rest)
    return torch.nn.functional.pad(share, (0, 1))


def zeroed(weights: Tensor) -> Tensor:
    """Weights after the expert of each slot in turn is gone and nothing else changes; as `renormalised` gives them."""
    k = weights.shape[-1]
    left = weights[:, None].expand(-1, k, -1).masked_fill(torch.eye(k, dtype=torch.bool, device=weights.device), 0.0)
    return torch.nn.functional.pad(left, (0, 1))


def formula(logits: Tensor, ids: Tensor, weights: Tensor, biases: Sequence[Tensor] = (), where: str = "") -> Formula:
    """The formula that this router has followed on these tokens.

    Args:
        logits: [token, expert].
        ids: experts chosen [token, slot].
        weights: their weights [token, slot].
        biases: vectors [expert] that the router may have added to scores for choosing.
        where: the layer, for the message.

    Raises ExpertError where none fits.
    """
    z, w = logits.double(), weights.double()
    chosen = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, ids, True)
    for score, normalised in FORMULAS:
        plain = Formula(score, normalised, 1.0).weights(z, ids)
        scale = float(w.sum() / plain.sum())
        if not torch.allclose(w, scale * plain, rtol=1e-2 if weights.dtype != torch.float32 else 1e-4, atol=1e-6):
            continue
        for bias in (None, *biases):
            found = Formula(score, normalised, scale, bias)
            order = found.scores(z) + (0.0 if bias is None else bias.to(z))
            # where a saturated router's scores have run out of digits, it may choose either of two
            if bool((order.masked_fill(chosen, -9.0).amax(-1) <= order.gather(-1, ids).amin(-1) + 1e-7).all()):
                return found
    raise ExpertError(
        f"{where}: this router's weights or choice follow none of the formulas that are known here, so the weights "
        "after a removal cannot be worked out; use mode='zero' or 'renormalise', or measure with experts.sweep"
    )
