"""Layer x multiplier sweeps: every layer's vector at every strength, over the same items, as one batch of runs.

    v = steering.caa(m, pairs, layer="*")
    steering.sweep(m, v, other_pairs, multipliers=[-1, 0, 1])

All runs share the prompt's keys and values and what the layers before the edited one return
(`steering.continuation`), so a layer at the top costs a fraction of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp.calls import recorded
from interp.edits import Edit
from interp.interrupted import handed_on
from steering import pairs as _pairs
from steering.continuation import Scores, log_likelihoods
from steering.errors import SteeringError
from steering.intervals import bootstrap
from steering.propensity import check_multipliers
from steering.vector import SteeringMap

if TYPE_CHECKING:
    import pandas as pd


@recorded
def sweep(
    m: Any,
    v: SteeringMap,
    pairs: Any,
    multipliers: Sequence[float] = (-1.0, 0.0, 1.0),
    *,
    layers: Sequence[int] | None = None,
    chat: bool = False,
    system: str | None = None,
    seed: int = 0,
    batch_tokens: int = 1024,
    share: bool = True,
) -> pd.DataFrame:
    """Propensity for each layer's part of `v` alone, at each multiplier.

    Args:
        m: the model.
        v: a vector or map with parts in several layers, e.g. fitted with ``layer="*"``.
        pairs: (prompt, positive_text, negative_text) triples. Choose a layer on one set and report it on another.
        multipliers: strengths.
        layers: which of its layers; default all.
        chat: put the prompts into the model's chat template.
        system: the template's system turn.
        seed: of the bootstrap over items.
        batch_tokens: answer tokens run at once.
        share: False runs everything through the whole model; same numbers, more time.

    Returns columns layer, multiplier, metric, value, low, high, n. `value` as in `evaluate`. Interrupted, it leaves the
    same of the items that were done, `n` of them (`interp.unfinished`).
    """
    import pandas as pd

    chosen = v.layers if layers is None else list(layers)
    if not chosen:
        raise SteeringError(f"sweep: {v!r} has no part in a layer")
    ks, triples = check_multipliers(multipliers), _pairs.check(pairs)
    runs: dict[Any, list[Edit]] = {0.0: []} if 0.0 in ks else {}
    for layer in chosen:
        runs |= {(layer, k): (v.only(layer) * k).as_edits(m) for k in ks if k}
    sides = _pairs.sides(m, triples, chat=chat, system=system)
    passages = [p for both in zip(*sides, strict=True) for p in both]

    def made(scores: Scores) -> pd.DataFrame | None:
        if not scores.items():
            return None
        rows = []
        for layer in chosen:
            for k in ks:
                value = scores.differences((layer, k) if k else 0.0).numpy()
                low, high = bootstrap(value, seed=seed)
                rows.append({"layer": layer, "multiplier": k, "metric": "propensity", "value": float(value.mean()),
                             "low": low, "high": high, "n": len(value)})  # fmt: skip
        table = pd.DataFrame(rows)
        table.attrs.update({"model": m.name, "fingerprint": m.fingerprint, "method": v.method, "record": v.record,
                            "scope": v.scope.text, "chat": chat, "seed": seed, "unit": "nats per token",
                            "literal": scores.literal})  # fmt: skip
        return table

    with handed_on("steering.sweep", made):
        scores = log_likelihoods(m, passages, runs, batch_tokens=batch_tokens, share=share)
    found = made(scores)
    assert found is not None
    return found
