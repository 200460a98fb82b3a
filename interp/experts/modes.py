"""Ways to change a Mixture of Experts, each one map at one site of a layer.

A token's router gives scores, k of the experts are chosen, and the layer's routed output is, over slots s,

    y = sum_s w_s E_{e_s}(x)          e_s: the expert in slot s,  w_s: its weight,  E_e(x): its output

With B the set of experts, the modes are

    zero          w_s -> 0                            for e_s in B; all else stays, so weights add up to less
    scale         w_s -> factor w_s                   for e_s in B
    renormalise   w_s -> w_s [e_s not in B] S / S'    S the sum of all slots' weights, S' of those not in B: survivors
                                                      share what the others leave (MoTE, arXiv 2502.11096); 0 where no
                                                      survivor is left
    reroute       logit_e -> -inf                     for e in B, before anything is chosen: the router as it would be
                                                      without its rows for B. The true runner-up takes the slot, and
                                                      weights are what the family's formula makes of the rest
    force         logit_e -> max_j logit_j + 0.01     for e in B, which take slots from the weakest (SteerMoE, arXiv
                                                      2509.09660); chosen whatever a bias says, weight by formula
    mean          E_e(x) -> its mean over reference   for e in B, averaged over the tokens routed to e in that text; the
                                                      weight stays what this token's routing says
    swap          E_e(x) -> E_p(e)(x)                 for e in B with partner p(e), which so may fill two slots
    freeze        (e_s, w_s) -> recorded (e_s, w_s)   in the layers of B (`interp.experts.replay`)

reroute and force happen inside the family's own router (`interp.hooks.choice`), so they are exact for softmax before or
after the choice, sigmoid with a correction bias, groups and sparsemixer alike. Shared experts keep their weight in all
modes, unless the family weighs them together with the chosen ones (Inkling): then reroute and force change it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.edits import EditError, Where


def _hit(member: Tensor, where: Where) -> Tensor:
    """True where the slot's expert is in the set [batch, pos, slot]; member bool [expert]."""
    return member.to(where.inputs[0].device)[where.inputs[0]]


@dataclass(frozen=True, eq=False)
class Scaled:
    """At expert_weight: ``w_s -> factor * w_s`` for slots whose expert is a member; factor 0 is mode "zero"."""

    member: Tensor
    factor: float

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        return torch.where(_hit(self.member, where), h * self.factor, h)


@dataclass(frozen=True, eq=False)
class Renormalised:
    """At expert_weight: members' weights go to the other slots in proportion, so that the sum is as before."""

    member: Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        weights = h.float()
        kept = weights.masked_fill(_hit(self.member, where), 0.0)
        total, left = weights.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        return (kept * torch.where(left == 0, 0.0, total / left)).to(h.dtype)


@dataclass(frozen=True, eq=False)
class Marked:
    """At router_logits: ``logit -> mark`` for members; -inf leaves them out of the choice, +inf puts them into it."""

    member: Tensor
    mark: float

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        member = self.member.to(h.device)
        if h.shape[-1] > len(member):  # the router also scores shared experts, or doing nothing; they come last
            member = torch.nn.functional.pad(member, (0, h.shape[-1] - len(member)))
        return h.masked_fill(member, self.mark)


@dataclass(frozen=True, eq=False)
class Averaged:
    """At expert_out: ``E_e(x) -> means[e]`` for members; means [expert, d_model]."""

    member: Tensor
    means: Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        mean = self.means.to(h.device, h.dtype)[where.inputs[0]]
        return torch.where(_hit(self.member, where)[..., None], mean, h)


@dataclass(frozen=True, eq=False)
class Swapped:
    """At expert_ids: ``e -> partner[e]``; partner [expert], itself for those that stay. Weights are not touched."""

    partner: Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        return self.partner.to(h.device)[h]


@dataclass(frozen=True, eq=False)
class WithoutPairs:
    """At Monet's mlp_out: ``y -> y - share * sum over pairs in `off` of W_ij E_ij(x)``, from the layer's x, g1, g2.

    The sum is the layer's own exact sum with every other pair masked. It is worked out anew from x, so an edit of
    z1 or z2 in the same layer does not reach it.
    """

    experts: Any
    off: Tensor
    share: float = 1.0

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        if len(where.inputs) != 3:
            raise EditError(f"{where.site}: Monet's experts were not given x, g1 and g2; is this the set's own model?")
        kept = self.experts.keep
        off = self.off.to(h.device)
        self.experts.keep = off if kept is None else off & kept
        try:
            part = type(self.experts).forward(self.experts, *where.inputs).to(h.dtype)
        finally:
            self.experts.keep = kept
        return h - self.share * part
