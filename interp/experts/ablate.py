"""Switching a set off as an Edit: on the tokens of a scope, with a gate, during generation, beside other edits.

    with m.intervene(experts.ablate(law, scope="generated")):
        m.generate("The court")

What is taken out is the set's contribution to the layer's sum, sum over units of weight x output; the other units keep
their weights (mode "zero"). For all tokens alike `experts.switched_off` does the same, and for Monet at less cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from interp import edits
from interp.edits import Edit, EditError, Gate, Where
from interp.experts.sets import ExpertSet
from interp.experts.units import ExpertError
from interp.scope import Scope

MODES = ("zero",)


@dataclass(frozen=True, eq=False)
class Ablation:
    """What `ablate` returns: anything that takes edits takes it."""

    chosen: ExpertSet
    mode: str
    how: dict[str, Any]

    def as_edits(self, model: Any) -> list[Edit]:
        """The edits of this ablation on a model. Raises ExpertError unless the set was made for it."""
        self.chosen.check(model)
        how = {"name": f"ablate ({self.mode})", **self.how}
        if self.chosen.kind == "routed":
            pairs = [(layer, e) for layer, ids in self.chosen.ids.items() for e in ids.tolist()]
            return [edits.zero(f"expert_weight[{layer}, expert={e}]", **how) for layer, e in pairs]
        if self.chosen.kind == "neurons":
            keep = {layer: (~self.chosen.mask(layer)).float() for layer in self.chosen.ids}
            return [edits.scale(f"mlp_hidden[{layer}]", mask, **how) for layer, mask in keep.items()]
        n = model.hf.config.moe_experts
        masks = {layer: self.chosen.mask(layer).view(n, n) for layer in self.chosen.ids}
        experts = list(model.hf.experts())
        return [Edit(f"mlp_out[{layer}]", WithoutPairs(experts[layer], off), **how) for layer, off in masks.items()]


def ablate(
    chosen: ExpertSet, mode: Literal["zero"] = "zero", *, scope: str | Scope | Tensor = "all", gate: Gate | None = None
) -> Ablation:
    """Switch a set off, as an Edit.

    Args:
        chosen: what to switch off.
        mode: "zero": the contribution goes, nothing is renormalised.
        scope: which tokens, as in every edit.
        gate: how much, as in every edit.

    Raises ExpertError for an unknown mode.
    """
    if mode not in MODES:
        raise ExpertError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    return Ablation(chosen, mode, {"scope": Scope.parse(scope), **({"gate": gate} if gate else {})})


@dataclass(frozen=True, eq=False)
class WithoutPairs:
    """``y -> y - sum over pairs in `off` of W_ij E_ij(x)``, from what Monet's layer was given: x, g1, g2.

    The sum is the layer's own exact sum with every other pair masked. It is worked out anew from x, so an edit of
    z1 or z2 in the same layer does not reach it.
    """

    experts: Any
    off: Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        if len(where.inputs) != 3:
            raise EditError(f"{where.site}: Monet's experts were not given x, g1 and g2; is this the set's own model?")
        kept = self.experts.keep
        off = self.off.to(h.device)
        self.experts.keep = off if kept is None else off & kept
        try:
            return h - type(self.experts).forward(self.experts, *where.inputs).to(h.dtype)
        finally:
            self.experts.keep = kept
