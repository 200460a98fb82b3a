"""Ext-Sub: subtracting from an adapter only what is deficient in an anti-expert, not what both have in common.

Two adapters are trained alike, an expert's (W+) on good data and an anti-expert's (W-) on bad. Plain negation W+ -
alpha W- takes away what both learnt, language and task, along with the fault. Ext-Sub first splits W-, row by row:

    c = unit(unit(w+) + unit(w-))                the direction that both share
    common = (w- . c) c,   deficient = w- - common
    w  = w+ - alpha deficient

Source: Hu et al. 2024 (arXiv:2308.08090, section 3.2). On LoRA weights W = B A is formed per module; what comes out has
full rank, so it is kept as a difference of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steering.errors import SteeringError


def extract(expert: Tensor, anti: Tensor) -> tuple[Tensor, Tensor]:
    """(common, deficient) parts of the anti-expert's rows, which sum to it; both arguments [row, column].

    A row in which the two point exactly opposite ways has no common direction: all of it is deficient. A row that
    one of them leaves at zero has the other's direction as common one, as the formula says, so nothing of it is
    deficient.
    """
    if expert.shape != anti.shape or expert.dim() != 2:
        raise SteeringError(
            f"the adapters' matrices are {list(expert.shape)} and {list(anti.shape)}; expected equal [row, column]"
        )
    unit = torch.nn.functional.normalize
    both = unit(expert, dim=-1) + unit(anti, dim=-1)
    c = torch.where(both.norm(dim=-1, keepdim=True) > 1e-6, unit(both, dim=-1), torch.zeros_like(both))
    common = (anti * c).sum(-1, keepdim=True) * c
    return common, anti - common


def ext_sub(expert: Mapping[str, Tensor], anti: Mapping[str, Tensor], alpha: float = 1.0) -> dict[str, Tensor]:
    """Module -> change of its weight [out, in]: the expert's less the anti-expert's deficient part.

    Args:
        expert: an adapter: LoRA weights by name (``*lora_A.weight`` [rank, in], ``*lora_B.weight`` [out, rank], as
            PEFT writes them, scaled by alpha/rank already), or differences of weights by module.
        anti: the anti-expert's, of the same modules.
        alpha: how much of the deficient part is taken away.
    """
    plus, minus = deltas(expert), deltas(anti)
    if plus.keys() != minus.keys():
        odd = sorted(plus.keys() ^ minus.keys())
        raise SteeringError(f"the adapters change different modules: {odd[0]!r} is in one only")
    return {name: plus[name] - alpha * extract(plus[name], minus[name])[1] for name in plus}


def negation(expert: Mapping[str, Tensor], anti: Mapping[str, Tensor], alpha: float = 1.0) -> dict[str, Tensor]:
    """The baseline: W+ - alpha W-, what is common included."""
    plus, minus = deltas(expert), deltas(anti)
    return {name: plus[name] - alpha * minus[name] for name in plus}


def deltas(adapter: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Module -> B A [out, in] in float32 of LoRA weights; a mapping without LoRA names is taken as differences.

    `scale` is LoRA's alpha / rank.
    """
    if not any("lora_" in name for name in adapter):
        return {name: w.float() * scale for name, w in adapter.items()}
    found = {}
    for name, b in adapter.items():
        if "lora_B" not in name:
            continue
        a = adapter.get(name.replace("lora_B", "lora_A"))
        if a is None:
            raise SteeringError(f"{name}: there is no lora_A beside it")
        module = name.partition(".lora_B")[0].removeprefix("base_model.model.")
        found[module] = scale * (b.float() @ a.float())
    return found


@contextmanager
def merged(m: Any, changes: Mapping[str, Tensor], scale: float = 1.0) -> Iterator[None]:
    """The model with `changes` added to its weights; afterwards they are as before, bit for bit."""
    modules = dict(m.hf.named_modules())
    if missing := [name for name in changes if not hasattr(modules.get(name), "weight")]:
        raise SteeringError(f"{missing[0]!r}: {m.name} has no module of that name with a weight")
    kept = {name: modules[name].weight.data for name in changes}
    try:
        for name, change in changes.items():
            modules[name].weight.data = kept[name] + scale * change.to(kept[name])
        yield
    finally:
        for name, weight in kept.items():
            modules[name].weight.data = weight
