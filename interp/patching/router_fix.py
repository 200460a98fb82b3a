"""The QK fix's twin for routers: an expert's score through the choice that it takes part in, not through its slope.

A router saturates as attention does: where one expert takes all the weight, or an expert is just not chosen, the slope
of the weights is 0 or says nothing, though another score would change the choice. So for each expert alone the weights
are worked out anew with its score from the other run, among the scores of its rivals as they are, and the effect is
linear only behind that: sum over experts f of (w'_f - w_f) x dL/dw_f.

How a family makes weights from scores is found by trial (`rule_of`): the rule must give back the weights that the
base run had. A router that none of the rules explains (groups, biases of the choice) keeps the plain estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from interp.model import Model


@dataclass(frozen=True)
class Rule:
    """scores [..., expert] -> weights [..., expert], 0 where an expert is not chosen.

    Attributes:
        gate: "softmax" or "sigmoid".
        normalised: the chosen weights are divided by their sum. With softmax this equals a softmax over the chosen.
        top_k: how many are chosen.
        scale: a constant factor.
    """

    gate: str
    normalised: bool
    top_k: int
    scale: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        gates = logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()
        chosen = logits.topk(self.top_k, -1).indices
        on = torch.zeros_like(gates, dtype=torch.bool).scatter_(-1, chosen, True)
        if self.normalised and self.gate == "softmax":  # stays exact where a gate outside the choice takes all
            weights = logits.masked_fill(~on, -torch.inf).softmax(-1)
        else:
            weights = gates * on
            weights = weights / weights.sum(-1, keepdim=True) if self.normalised else weights
        return weights * self.scale


def reaches(m: Model, layer: int) -> bool:
    """Can experts that were not chosen be run too? Only transformers' experts interface takes more slots."""
    return all(
        (place := m.anatomy.places.get((name, layer))) is not None and place.how == "experts"
        for name in ("expert_ids", "expert_weight", "expert_out")
    )


def dense(ids: Tensor, weights: Tensor, n_experts: int) -> Tensor:
    """Weight of every expert [..., expert], from the chosen ones and their weights [..., slot]."""
    out = torch.zeros(*ids.shape[:-1], n_experts, dtype=torch.float32, device=ids.device)
    return out.scatter_add(-1, ids, weights.float())


def rule_of(logits: Tensor, ids: Tensor, weights: Tensor) -> Rule | None:
    """The rule that makes `weights` and `ids` [token, slot] of `logits` [token, expert]; None if none does."""
    truth, fits = dense(ids, weights, logits.shape[-1]), dict[Rule, float]()
    for gate in ("softmax", "sigmoid"):
        for normalised in (True, False):
            made = Rule(gate, normalised, ids.shape[-1])(logits)
            scale = float(truth.sum() / made.sum().clamp_min(1e-30))
            fits[Rule(gate, normalised, ids.shape[-1], scale)] = float((made * scale - truth).abs().max())
    rule = min(
        fits, key=lambda r: fits[r]
    )  # saturated routers look much alike: the closest, not the first that will do
    close = 2e-2 if weights.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return rule if fits[rule] <= close * max(1.0, float(truth.max())) else None


def moved(rule: Rule, here: Tensor, there: Tensor) -> Tensor:
    """w' - w [token, expert moved, expert]: each expert's score in turn from `there` [token, expert]."""
    n = here.shape[-1]
    scores = here.float()[:, None].expand(-1, n, -1).clone()
    scores.diagonal(dim1=1, dim2=2).copy_(there.float())
    return rule(scores) - rule(here)[:, None]


def entering(change: Tensor, chosen: Tensor) -> Tensor:
    """Experts outside a token's choice that some move brings in [token, slot], filled up with the first chosen.

    Args:
        change: see `moved` [token, expert moved, expert].
        chosen: the experts chosen as it is [token, slot].
    """
    new = (change > 0).any(1).scatter_(-1, chosen, False)  # [token, expert]
    most = int(new.sum(-1).max())
    order = new.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    return torch.where(new.gather(1, order), order, chosen[:, :1])
