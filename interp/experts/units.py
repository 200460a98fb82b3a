"""Units: what can be switched off one by one, under one interface for three kinds of model.

    kind       a unit is                               weight of a unit at a token                switched off by
    monet      a pair (i, j) of parts, id = i * n + j  sum over heads of g1_hi g2_hj              an exact mask
    routed     an expert of a Mixture of Experts       its routing weight, 0 if not chosen        routing weight 0
    neurons    a neuron of a dense MLP                 absolute activation                        activation 0

Routing statistics, selection rules, controls and reports see only units, so that the three can be compared on equal
terms (as Monet's section 5.1 compares itself with OLMoE's experts and LLaMA's neurons). Where layers share a router, as
in Monet, the weight is measured once per *router* and a unit is switched off in each of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from interp import edits
from interp.factored import FactoredExperts


class ExpertError(ValueError):
    """Experts asked for where there are none, or that do not fit the model."""


class Units(Protocol):
    """Units of one model.

    Attributes:
        kind: "monet", "routed" or "neurons".
        size: units in one layer.
        layers: the layers that have units -> the router that weighs them.
    """

    kind: str
    size: int
    layers: dict[int, int]

    def weigh(self, model: Any, tokens: Any, *, norms: bool = False) -> Iterator[tuple[int, Weights]]:
        """(router, weights of its units at every token) for one batch; with `norms` they know their outputs' norms."""
        ...

    def off(self, model: Any, ids: Mapping[int, Tensor]) -> Any:
        """A context in which these units are off: layer -> ids [unit]."""
        ...


class Weights(Protocol):
    """Weights of all units of one router at the tokens of one batch (those of its mask, in order).

    Where units are many they are summed without ever being written out per token.
    """

    def total(self, group: Tensor, n: int) -> Tensor:
        """Each unit's weight summed over the tokens of each group: group [token] in 0..n-1 -> [n, unit]."""
        ...

    def uses(self, group: Tensor, n: int) -> Tensor:
        """The same for whether a token uses the unit; Monet counts each head that does."""
        ...

    def of(self, units: Tensor) -> Tensor:
        """Weights of some units: [token, unit]."""
        ...

    def above(self, threshold: float) -> Tensor:
        """How many units weigh more than this at each token: [token]."""
        ...


class Listed(Weights, Protocol):
    """Weights that can be written out per token, as those of routed experts and of neurons can."""

    @property
    def all(self) -> Tensor:
        """Weight of every unit [token, unit], 0 where it is not used."""
        ...

    @property
    def used(self) -> Tensor:
        """1 where the token uses the unit, else 0 [token, unit]."""
        ...

    def norms(self, group: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Summed over the tokens of each group that use the unit: norm of its output, of weight x output [n, unit]."""
        ...


def units_of(model: Any, kind: str = "auto") -> Units:
    """The units of a model: its experts, or with kind "neurons" those of its dense MLPs.

    Raises ExpertError where the model has no such units, with what to do instead.
    """
    if kind not in ("auto", "monet", "routed", "neurons"):
        raise ExpertError(f"kind={kind!r}: expected auto, monet, routed or neurons")
    monet = hasattr(model.hf, "set_expert_mask")
    routed = list(model.anatomy.having("expert_weight")) if not monet else []
    if kind == "monet" or (kind == "auto" and monet):
        if not monet:
            raise ExpertError(f"{model.name} is no Monet model; kind='auto' finds what it has")
        return MonetPairs(model)
    if kind == "routed" or (kind == "auto" and (routed or _unreached(model))):
        if not routed and (why := _unreached(model)):
            raise ExpertError(f"{model.name} has experts that cannot be read or changed one by one: {why}")
        if not routed:
            raise ExpertError(
                f"{model.name} has no routed experts; experts.split(m, n=...) makes some of its MLPs, and "
                "kind='neurons' takes their neurons"
            )
        return RoutedExperts(model, routed)
    neurons = model.anatomy.having("mlp_hidden")
    if kind == "auto":
        raise ExpertError(
            f"{model.name} is dense: it has no experts. experts.split(m, n=...) makes experts of its MLPs, and "
            f"kind='neurons' treats the {len(neurons)} layers' MLP neurons as the finest experts"
        )
    if not neurons:
        raise ExpertError(f"{model.name} has no layer with dense MLP neurons; m.map() says why")
    return Neurons(model, neurons)


def _unreached(model: Any) -> str:
    """Why the experts of a Mixture of Experts are out of reach; "" for a model without any."""
    reasons = {why for (site, _), why in model.anatomy.absent.items() if site == "expert_weight"}
    return next((why for why in sorted(reasons) if "has no experts" not in why and "factored" not in why), "")


def identity(model: Any) -> str:
    """Fingerprint of the model whose units these are: `Model.fingerprint`, except that a Monet's mask does not count.

    Switching experts off leaves the ids of all others what they were.
    """
    mask = getattr(model.hf, "expert_mask", None)
    if not mask:
        return model.fingerprint
    model.hf.clear_expert_mask()
    try:
        return model.fingerprint
    finally:
        model.hf.set_expert_mask(mask)


# -- Monet -----------------------------------------------------------------------------------------------------
class MonetPairs:
    """n^2 experts per layer, weighed by two factors per head; layers of a group share a router."""

    kind = "monet"

    def __init__(self, model: Any) -> None:
        config = model.hf.config
        self.n: int = config.moe_experts
        self.size = self.n**2
        self.layers = {layer: layer // config.moe_groups for layer in range(config.num_hidden_layers)}
        self.first = [config.layers_of_group(group)[0] for group in range(config.n_groups)]

    def weigh(self, model: Any, tokens: Any, *, norms: bool = False) -> Iterator[tuple[int, Weights]]:
        if norms:
            raise ExpertError(
                f"norms: {model.name} has {self.size:,} pairs a layer, whose outputs are never written out; ask "
                "model.expert_output for those of some experts"
            )
        acts = model.capture(tokens, [f"{g}[{layer}]" for layer in self.first for g in ("g1", "g2")], check=False)
        for router, layer in enumerate(self.first):
            yield router, Factored(acts[f"g1[{layer}]"][acts.mask], acts[f"g2[{layer}]"][acts.mask])

    @contextmanager
    def off(self, model: Any, ids: Mapping[int, Tensor]) -> Iterator[None]:
        from interp.monet import MonetMask, masked

        with masked(model.hf, MonetMask.from_ids(model.hf, ids)):
            yield


class Factored:
    """Weights W_ij = sum_h g1_hi g2_hj of n^2 pairs; g1, g2 [token, head, n]."""

    def __init__(self, g1: Tensor, g2: Tensor) -> None:
        self.g1, self.g2 = g1.double(), g2.double()
        mask = torch.ones(1, len(g1), dtype=torch.bool, device=g1.device)
        self.experts = FactoredExperts(0, self.g1[None], self.g2[None], mask)

    def total(self, group: Tensor, n: int) -> Tensor:
        """sum_t W_ij(t) = g1^T g2 over (token, head): one matrix product per group, never [token, n^2]."""
        return _outer(self.g1, self.g2, group, n)

    def uses(self, group: Tensor, n: int) -> Tensor:
        return _outer((self.g1 > 0).to(self.g1), (self.g2 > 0).to(self.g2), group, n)

    def of(self, units: Tensor) -> Tensor:
        return self.experts.weights(units)[0]

    def above(self, threshold: float) -> Tensor:
        return self.experts.count(threshold)[0]


def _outer(g1: Tensor, g2: Tensor, group: Tensor, n: int) -> Tensor:
    parts = [g1[group == k].flatten(0, 1).T @ g2[group == k].flatten(0, 1) for k in range(n)]
    return torch.stack(parts).flatten(1)


# -- routed experts --------------------------------------------------------------------------------------------
class RoutedExperts:
    """The experts of any Mixture of Experts that our hooks can reach."""

    kind = "routed"

    def __init__(self, model: Any, layers: list[int]) -> None:
        self.size = model.n_experts
        self.layers = {layer: index for index, layer in enumerate(layers)}

    def weigh(self, model: Any, tokens: Any, *, norms: bool = False) -> Iterator[tuple[int, Weights]]:
        site = "expert_out" if norms else "expert_weight"
        acts = model.capture(tokens, [f"{site}[{layer}]" for layer in self.layers], check=False)
        for layer, router in self.layers.items():
            routed = acts.experts(layer)
            norm = routed.out[acts.mask].float().norm(dim=-1) if norms else None
            yield router, Slots(routed.ids[acts.mask], routed.weights[acts.mask], self.size, norm)

    def off(self, model: Any, ids: Mapping[int, Tensor]) -> Any:
        """Routing weight 0: the expert's contribution goes, the other weights stay (nothing is renormalised)."""
        zeros = [edits.zero(f"expert_weight[{la}, expert={e}]") for la, chosen in ids.items() for e in chosen.tolist()]
        return model.intervene(*zeros)


class _WrittenOut:
    """What follows from `all`, the weight of every unit [token, unit]."""

    all: Any

    def of(self, units: Tensor) -> Tensor:
        return self.all[:, units]

    def above(self, threshold: float) -> Tensor:
        return (self.all > threshold).sum(1)


class Slots(_WrittenOut):
    """Weights of the chosen experts: ids and weights [token, slot], perhaps norms of their outputs [token, slot]."""

    def __init__(self, ids: Tensor, weights: Tensor, size: int, norm: Tensor | None = None) -> None:
        self.ids, self.weights, self.size, self.norm = ids, weights.double(), size, norm

    @cached_property
    def all(self) -> Tensor:
        return self.weights.new_zeros(len(self.ids), self.size).scatter_add_(1, self.ids, self.weights)

    @cached_property
    def used(self) -> Tensor:
        return self.weights.new_zeros(len(self.ids), self.size).scatter_(1, self.ids, 1.0)

    def total(self, group: Tensor, n: int) -> Tensor:
        return self._sums(self.weights, group, n)

    def uses(self, group: Tensor, n: int) -> Tensor:
        return self._sums(torch.ones_like(self.weights), group, n)

    def norms(self, group: Tensor, n: int) -> tuple[Tensor, Tensor]:
        if self.norm is None:
            raise ExpertError("the outputs' norms were not measured; weigh with norms=True")
        norm = self.norm.double()
        return self._sums(norm, group, n), self._sums(norm * self.weights.abs(), group, n)

    def _sums(self, values: Tensor, group: Tensor, n: int) -> Tensor:
        """values [token, slot] summed by the token's group and the slot's expert [n, unit], never [token, unit]."""
        bins = group[:, None] * self.size + self.ids
        return values.new_zeros(n * self.size).index_add_(0, bins.flatten(), values.flatten()).view(n, self.size)


def _by_group(values: Tensor, group: Tensor, n: int) -> Tensor:
    return values.new_zeros(n, values.shape[1]).index_add_(0, group, values)


# -- neurons ---------------------------------------------------------------------------------------------------
class Neurons:
    """The neurons of dense MLPs, as what they are worth: weighed by their absolute activation."""

    kind = "neurons"

    def __init__(self, model: Any, layers: list[int]) -> None:
        sizes = {model.anatomy.sizes["mlp_hidden", layer]["neuron"] for layer in layers}
        if len(sizes) > 1:
            raise ExpertError(f"{model.name}: its MLPs differ in width ({sorted(sizes)}); no common set of units")
        self.size = sizes.pop()
        self.layers = {layer: index for index, layer in enumerate(layers)}

    def weigh(self, model: Any, tokens: Any, *, norms: bool = False) -> Iterator[tuple[int, Weights]]:
        acts = model.capture(tokens, [f"mlp_hidden[{layer}]" for layer in self.layers], check=False)
        for layer, router in self.layers.items():
            size = output_weight(model, layer).norm(dim=0) if norms else None
            yield router, Dense(acts[f"mlp_hidden[{layer}]"][acts.mask].abs(), size)

    def off(self, model: Any, ids: Mapping[int, Tensor]) -> Any:
        keep = {la: torch.ones(self.size).index_fill(0, chosen.cpu(), 0.0) for la, chosen in ids.items()}
        return model.intervene(*(edits.scale(f"mlp_hidden[{la}]", mask) for la, mask in keep.items()))


def output_weight(model: Any, layer: int) -> Tensor:
    """The matrix that reads a dense MLP's neurons, one column per neuron [d_model, neuron]."""
    down = model.anatomy.places["mlp_hidden", layer].module
    weight: Tensor = down.weight.detach().float()
    return weight if isinstance(down, torch.nn.Linear) else weight.T  # GPT-2's Conv1D keeps it transposed


class Dense(_WrittenOut):
    """One weight per token and unit [token, unit]; with the norms of the units' output vectors [unit]."""

    def __init__(self, weights: Tensor, norm: Tensor | None = None) -> None:
        self.all, self.norm = weights.double(), norm

    @property
    def used(self) -> Tensor:
        return (self.all > 0).double()

    def total(self, group: Tensor, n: int) -> Tensor:
        return _by_group(self.all, group, n)

    def uses(self, group: Tensor, n: int) -> Tensor:
        return _by_group(self.used, group, n)

    def norms(self, group: Tensor, n: int) -> tuple[Tensor, Tensor]:
        if self.norm is None:
            raise ExpertError("the outputs' norms were not measured; weigh with norms=True")
        norm = self.norm.double()
        return self.uses(group, n) * norm, self.total(group, n) * norm
