"""What each expert puts out on average over reference text: what mean ablation puts in its place.

    means = experts.mean_outputs(m, neutral_texts)
    with m.intervene(experts.ablate(law, "mean", reference=means)): ...

Measured once and used often; given text, `ablate` measures it each time its context is entered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.units import ExpertError, identity, units_of


@dataclass(frozen=True, eq=False)
class Means:
    """Mean outputs of one model's units over some text.

    Attributes:
        kind: "routed" or "neurons".
        fingerprint: of the model.
        values: layer -> [expert, d_model] (routed, before the weight) or [neuron] (neurons: the mean activation).
        counts: layer -> tokens each mean is over [unit]; an expert with 0 was never chosen, and has no mean.
    """

    kind: str
    fingerprint: str
    values: dict[int, Tensor]
    counts: dict[int, Tensor]


@recorded
@torch.no_grad()
def mean_outputs(model: Any, texts: Any, *, kind: str = "auto", batch_rows: int = 8) -> Means:
    """Mean output of every unit, over the tokens routed to it (routed) or all tokens (neurons).

    Args:
        model: the model.
        texts: reference text: a text, texts, token ids [batch, pos] or Tokens. Padding is left out.
        kind: "routed", "neurons" or "auto".
        batch_rows: rows run at once.

    Raises ExpertError for a model without such units, and for Monet, whose experts are never put out one by one.
    """
    units = units_of(model, kind)
    if units.kind == "monet":
        raise ExpertError(f"{model.name}: Monet's {units.size:,} experts are summed in factors; none has a mean")
    site = "expert_out" if units.kind == "routed" else "mlp_hidden"
    sums: dict[int, Tensor] = {}
    counts = {layer: torch.zeros(units.size, dtype=torch.float64) for layer in units.layers}
    tokens = model.tokens(texts)
    for start in range(0, len(tokens), batch_rows):
        rows = type(tokens)(tokens.ids[start : start + batch_rows], tokens.mask[start : start + batch_rows])
        acts = model.capture(rows, [f"{site}[{layer}]" for layer in units.layers], check=False)
        for layer in units.layers:
            out = acts[f"{site}[{layer}]"][acts.mask].double().cpu()  # [token, slot, d_model] or [token, neuron]
            if units.kind == "routed":
                ids = acts[f"expert_ids[{layer}]"][acts.mask].flatten().cpu()
                # the width of an output is its own: Muse's experts work in a space narrower than the stream
                total = out.new_zeros(units.size, out.shape[-1]).index_add_(0, ids, out.flatten(0, 1))
                counts[layer] += torch.bincount(ids, minlength=units.size)
            else:
                total = out.sum(0)
                counts[layer] += len(out)
            sums[layer] = sums[layer] + total if layer in sums else total
    shape = (-1, 1) if units.kind == "routed" else (-1,)
    values = {layer: (sums[layer] / counts[layer].clamp(min=1).view(shape)).float() for layer in sums}
    return Means(units.kind, identity(model), values, {layer: c.long() for layer, c in counts.items()})
