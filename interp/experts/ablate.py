"""Changing what a set of experts does, as an Edit: on the tokens of a scope, during generation, beside other edits.

    with m.intervene(experts.ablate(law, scope="generated")):
        m.generate("The court")
    experts.ablate(law, "reroute")                      the runner-up takes each slot
    experts.ablate(law, "mean", reference=texts)        the expert's mean output in place of its output

What each mode does is an equation: `interp.experts.modes`. "zero" for all tokens alike is also
`experts.switched_off`, and for Monet at less cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from interp import edits
from interp.activations import Activations
from interp.edits import Edit, Gate, Map
from interp.experts import modes
from interp.experts.reference import Means, mean_outputs
from interp.experts.replay import replay
from interp.experts.sets import ExpertSet
from interp.experts.units import ExpertError, Units
from interp.scope import Scope

Mode = Literal["zero", "renormalise", "reroute", "mean", "scale", "force", "swap", "freeze"]

#: mode -> (the site it acts at, the setting it needs)
MODES: dict[str, tuple[str, str | None]] = {
    "zero": ("expert_weight", None),
    "renormalise": ("expert_weight", None),
    "reroute": ("router_logits", None),
    "mean": ("expert_out", "reference"),
    "scale": ("expert_weight", "factor"),
    "force": ("router_logits", None),
    "swap": ("expert_ids", "partners"),
    "freeze": ("expert_ids", "recorded"),
}
#: What units without a router and without outputs of their own take.
_OTHERS = {"monet": ("zero", "scale"), "neurons": ("zero", "scale", "mean")}
#: Modes that change which experts are chosen: there is no half of a choice.
_WHOLE = ("reroute", "force", "swap", "freeze")


@dataclass(frozen=True, eq=False)
class Ablation:
    """What `ablate` returns: anything that takes edits takes it. Its attributes are the arguments of `ablate`."""

    chosen: ExpertSet
    mode: str
    scope: Scope
    gate: Gate | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_edits(self, model: Any) -> list[Edit]:
        """The edits of this ablation on a model: one per layer (two for "freeze").

        Raises ExpertError unless the set was made for it, or where a layer cannot take this mode, with the reason.
        """
        units = self.chosen.check(model)
        if self.mode == "freeze":
            return replay(self.settings["recorded"], self.chosen.ids, scope=self.scope)
        how: dict[str, Any] = {"name": f"ablate ({self.mode})", "scope": self.scope, "gate": self.gate}
        make = {"monet": self._pairs, "routed": self._routed, "neurons": self._neurons}[units.kind]
        means = self.means(model) if self.mode == "mean" else None
        return [Edit(*make(model, units, layer, means), **how) for layer in self.chosen.ids]

    def _routed(self, model: Any, units: Units, layer: int, means: Means | None) -> tuple[str, Map]:
        site, member = MODES[self.mode][0], self.chosen.mask(layer)
        if reason := model.anatomy.absent.get((site, layer)) or (site == "router_logits" and _by_table(model, layer)):
            raise ExpertError(f"mode={self.mode!r}: {model.name}, layer {layer}: {reason}")
        return f"{site}[{layer}]", self._map(model, layer, member, means)

    def _map(self, model: Any, layer: int, member: Tensor, means: Means | None) -> Map:
        count, where = int(member.sum()), f"{model.name}, layer {layer}"
        if self.mode == "renormalise":
            return modes.Renormalised(member)
        if self.mode == "reroute":
            if len(member) - count < model.top_k:
                raise ExpertError(
                    f"mode='reroute': {where}: without {count} of {len(member)} experts there are fewer left than the "
                    f"{model.top_k} that a token visits; use mode='zero'"
                )
            return modes.Marked(member, -torch.inf)
        if self.mode == "force":
            if count > model.top_k:
                raise ExpertError(
                    f"mode='force': {where}: {count} experts cannot all be on where a token visits {model.top_k}; "
                    "choose fewer"
                )
            return modes.Marked(member, torch.inf)
        if self.mode == "swap":
            return modes.Swapped(partners_of(self.settings["partners"], self.chosen, layer))
        if means is not None:
            return modes.Averaged(member, measured(means, self.chosen, layer))
        return modes.Scaled(member, self.settings.get("factor", 0.0))

    def _neurons(self, model: Any, units: Units, layer: int, means: Means | None) -> tuple[str, Map]:
        off = self.chosen.mask(layer)
        if means is not None:
            return f"mlp_hidden[{layer}]", _Blend((~off).float(), off * measured(means, self.chosen, layer))
        scale = torch.where(off, self.settings.get("factor", 0.0), 1.0)
        return f"mlp_hidden[{layer}]", edits.Affine(A=scale)

    def _pairs(self, model: Any, units: Units, layer: int, means: Means | None) -> tuple[str, Map]:
        n = model.hf.config.moe_experts
        experts, off = list(model.hf.experts())[layer], self.chosen.mask(layer).view(n, n)
        return f"mlp_out[{layer}]", modes.WithoutPairs(experts, off, 1.0 - self.settings.get("factor", 0.0))

    def means(self, model: Any) -> Means:
        """The mean outputs that mode "mean" puts in, measured if text was given."""
        reference = self.settings["reference"]
        means = reference if isinstance(reference, Means) else mean_outputs(model, reference, kind=self.chosen.kind)
        if (means.kind, means.fingerprint) != (self.chosen.kind, self.chosen.fingerprint):
            raise ExpertError("mode='mean': these means were measured on another model, or on units of another kind")
        return means

    def within(self, scope: str | Scope | Tensor) -> Ablation:
        """The same on other tokens."""
        return replace(self, scope=Scope.parse(scope))


@dataclass(frozen=True, eq=False)
class _Blend:
    """``h -> keep * h + value``, at a neuron site [.., neuron]."""

    keep: Tensor
    value: Tensor

    def __call__(self, h: Tensor, where: Any) -> Tensor:
        return h * self.keep.to(h) + self.value.to(h)


def ablate(
    chosen: ExpertSet,
    mode: Mode = "zero",
    *,
    scope: str | Scope | Tensor | None = None,
    gate: Gate | None = None,
    factor: float | None = None,
    partners: Mapping[int, Mapping[int, int]] | None = None,
    reference: Any = None,
    recorded: Activations | None = None,
) -> Ablation:
    """Change what a set of experts does, as an Edit.

    Args:
        chosen: which experts; for "freeze" its layers count, for their whole routing is replayed.
        mode: what happens to them: see `interp.experts.modes`. Monet's pairs take "zero" and "scale", neurons also
            "mean": they have no router to choose again.
        scope: which tokens, as in every edit; all if missing, for "freeze" those of the prompt.
        gate: how much, as in every edit; not for modes that change the choice itself.
        factor: "scale": what the weight is multiplied with; 0 is "zero", above 1 the expert counts for more.
        partners: "swap": layer -> expert -> the expert that computes in its place, for every expert of the set.
        reference: "mean": text (or token ids) to average over, or what `mean_outputs` made of it.
        recorded: "freeze": a capture with "expert_weight" of the set's layers.

    Raises ExpertError for an unknown mode, a setting that is missing or belongs to another mode.
    """
    if mode not in MODES:
        raise ExpertError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    given = {"factor": factor, "partners": partners, "reference": reference, "recorded": recorded}
    needed = MODES[mode][1]
    for name, value in given.items():
        if (value is None) != (name != needed):
            owner = next(m for m, (_, setting) in MODES.items() if setting == name)
            raise ExpertError(
                f"mode={mode!r} needs {name}=" if name == needed else f"{name}= belongs to mode={owner!r}, not {mode!r}"
            )
    if chosen.kind in _OTHERS and mode not in _OTHERS[chosen.kind]:
        what = "Monet's pairs are chosen in factors" if chosen.kind == "monet" else "neurons are not chosen at all"
        raise ExpertError(f"mode={mode!r}: {what}; they take {', '.join(_OTHERS[chosen.kind])}")
    if gate is not None and mode in _WHOLE:
        raise ExpertError(f"gate= with mode={mode!r}: there is no half of a choice; limit it with scope=")
    within = Scope.parse(scope if scope is not None else "prompt" if mode == "freeze" else "all")
    settings = {name: value for name, value in given.items() if value is not None}
    if partners is not None:
        for layer in chosen.ids:
            partners_of(partners, chosen, layer)
    return Ablation(chosen, mode, within, gate, settings)


def partners_of(partners: Mapping[int, Mapping[int, int]], chosen: ExpertSet, layer: int) -> Tensor:
    """expert -> who computes in its place [expert]."""
    table = torch.arange(chosen.size)
    given = partners.get(layer, {})
    for expert in chosen.ids[layer].tolist():
        other = given.get(expert)
        if other is None or not 0 <= other < chosen.size:
            raise ExpertError(
                f"partners: layer {layer}, expert {expert}: "
                + ("has none" if other is None else f"{other} is no expert; a layer has 0..{chosen.size - 1}")
            )
        table[expert] = other
    if extra := [e for e in given if (layer, e) not in chosen]:
        raise ExpertError(f"partners: layer {layer}, expert {extra[0]} is not in the set")
    return table


def _by_table(model: Any, layer: int) -> str:
    """Why logits do not decide in this layer: DeepSeek-V4's first layers look experts up by token id. "" if they do."""
    router = model.anatomy.places["router_logits", layer].module
    if any(name.rpartition(".")[2] == "tid2eid" for name, _ in router.named_buffers()):
        return "its experts are looked up by token id, not chosen: none can be kept out or in; 'zero' and 'swap' work"
    return ""


def measured(means: Means, chosen: ExpertSet, layer: int) -> Tensor:
    """The means of a layer. Raises ExpertError where one that is needed was not measured."""
    never = [e for e in chosen.ids[layer].tolist() if not means.counts[layer][e]]
    if never:
        raise ExpertError(
            f"mode='mean': layer {layer}, expert {never[0]} was never chosen in the reference text, so it has no mean "
            "output; give more text"
        )
    return means.values[layer]
