"""Equal damage: strengths set to one KL budget before methods are compared.

A method that steers twice as far at ten times the damage is not the better one, and multipliers of different methods
do not compare. So each is first given the multiplier at which it changes neutral text by the same KL.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from steering.damage import neutral_passages, token_kl
from steering.errors import SteeringError
from steering.intervals import bootstrap
from steering.propensity import propensities
from steering.vector import SteeringMap, SteeringVector

if TYPE_CHECKING:
    import pandas as pd


def budget(
    m: Any,
    v: SteeringMap,
    texts: Any,
    kl: float = 0.1,
    *,
    most: float | None = None,
    tolerance: float = 0.05,
    max_tokens: int = 48,
    batch_tokens: int = 512,
) -> tuple[float, float]:
    """The multiplier k > 0 at which the mean KL(unsteered || steered) on neutral text reaches `kl`: (k, KL there).

    Args:
        m: the model.
        v: the vector or map.
        texts: neutral texts.
        kl: budget in nats per token.
        most: largest multiplier; default none for vectors and 1 for other maps, which are whole at 1.
        tolerance: relative, of the KL.
        max_tokens: of each text.
        batch_tokens: tokens run at once.

    For small k the KL grows as k squared, so each step multiplies k by sqrt(budget / KL), kept between what is known
    to be too little and too much. Where `most` stays below the budget, that is returned: look at the KL.
    """
    if not 0 < kl < inf:
        raise SteeringError(f"kl={kl}: expected a positive number of nats per token")
    most = most if most is not None else (inf if isinstance(v, SteeringVector) else 1.0)
    passages = neutral_passages(m, texts, max_tokens)
    low, high, k, found = 0.0, inf, min(1.0, most), 0.0
    for _ in range(20):
        each, _, mask = token_kl(m, passages, {0.0: [], k: (v * k).as_edits(m)}, batch_tokens)
        found = float(each[k].sum() / mask.sum())
        if abs(found - kl) <= tolerance * kl or (k == most and found < kl):
            return k, found
        low, high = (k, high) if found < kl else (low, k)
        k = min(k * min(8.0, max(0.125, sqrt(kl / max(found, 1e-12)))), most)
        if not low < k < high:
            k = (low + high) / 2
        if low > 1e6:
            raise SteeringError(
                f"{v.method}: even {low:.2g} times as strong it changes neutral text by {found:.2g} nats"
            )
    return k, found


def compare(
    m: Any,
    methods: Mapping[str, Mapping[str, SteeringMap]],
    pairs: Mapping[str, Any],
    texts: Any,
    kl: float = 0.1,
    *,
    controls: int = 20,
    chat: bool = False,
    seed: int = 0,
    **how: Any,
) -> pd.DataFrame:
    """Methods at equal damage: one row per behaviour and method, random controls among them.

    Args:
        m: the model.
        methods: behaviour -> method -> its vector or map.
        pairs: behaviour -> held-out (prompt, positive_text, negative_text) triples.
        texts: neutral texts on which the budget is measured.
        kl: budget in nats per token.
        controls: random controls of the first method of each behaviour, at its budget each for itself.
        chat: put the prompts into the model's chat template.
        seed: of the controls and the bootstrap.
        **how: further settings of `budget`.

    Returns columns label (the behaviour), method, multiplier, kl, value, low, high, n: `value` is the change of
    propensity (nats per token) from the unsteered model, its interval bootstrapped over items. Rows are sorted by
    value within a behaviour. For "random" value and interval are over controls.
    """
    import pandas as pd

    from steering.baselines import random_like
    from steering.intervals import spread

    if missing := [label for label in methods if label not in pairs]:
        raise SteeringError(f"pairs: there are none for {missing[0]!r}")
    rows: list[dict[str, Any]] = []
    for label, vectors in methods.items():
        shared: dict[str, Any] = {"chat": chat, "controls": 0}
        for name, v in vectors.items():
            k, reached = budget(m, v, texts, kl, **how)
            shift = _shift(propensities(m, v, pairs[label], [0.0, k], **shared), k)
            low, high = bootstrap(shift, seed=seed)
            rows.append({"label": label, "method": name, "multiplier": k, "kl": reached, "value": float(shift.mean()),
                         "low": low, "high": high, "n": len(shift)})  # fmt: skip
        if controls:
            first, found = next(iter(vectors.values())), []
            for control in random_like(first, controls, seed):
                k, reached = budget(m, control, texts, kl, **how)
                shift = _shift(propensities(m, control, pairs[label], [0.0, k], **shared), k)
                found.append((k, reached, float(shift.mean())))
            ks, reach, values = (np.array(x) for x in zip(*found, strict=True))
            low, high = spread(values)
            rows.append({"label": label, "method": "random", "multiplier": float(ks.mean()), "kl": float(reach.mean()),
                         "value": float(values.mean()), "low": low, "high": high, "n": controls})  # fmt: skip
    table = pd.DataFrame(rows).sort_values(["label", "value"], ascending=[True, False], ignore_index=True)
    table.attrs.update({"model": m.name, "kl": kl, "unit": "nats per token", "chat": chat, "seed": seed})
    return table


def _shift(table: pd.DataFrame, k: float) -> np.ndarray:
    grid = table[table["baseline"] == "none"].pivot(index="item", columns="multiplier", values="value")
    return (grid[k] - grid[0.0]).to_numpy()
