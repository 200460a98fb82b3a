"""Equal damage: strengths set to one KL budget before methods are compared.

A method that steers twice as far at ten times the damage is not the better one, and multipliers of different methods
do not compare. So each is first given the multiplier at which it changes neutral text by the same KL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

from interp.calls import recorded
from interp.interrupted import salvaged
from steering import pairs as _pairs
from steering.baselines import random_like
from steering.continuation import log_likelihoods
from steering.damage import neutral_passages, token_kl
from steering.errors import SteeringError
from steering.intervals import bootstrap, spread
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
    how: dict[str, Any] = {"most": most, "tolerance": tolerance, "max_tokens": max_tokens, "batch_tokens": batch_tokens}
    return budgets(m, {"": v}, texts, kl, **how)[""]


def budgets(
    m: Any,
    maps: Mapping[Any, SteeringMap],
    texts: Any,
    kl: float = 0.1,
    *,
    most: float | None = None,
    tolerance: float = 0.05,
    max_tokens: int = 48,
    batch_tokens: int = 512,
) -> dict[Any, tuple[float, float]]:
    """`budget` of several maps by their keys; a step of all their searches is one run over the texts."""
    if not 0 < kl < inf:
        raise SteeringError(f"kl={kl}: expected a positive number of nats per token")
    passages = neutral_passages(m, texts, max_tokens)
    searches = {key: _Search.of(v, most) for key, v in maps.items()}
    for _ in range(20):
        going = {key: search for key, search in searches.items() if not search.done}
        if not going:
            break
        runs: dict[Any, Any] = {0.0: []}
        runs |= {("at", key): (maps[key] * search.next).as_edits(m) for key, search in going.items()}
        each, _, mask = token_kl(m, passages, runs, batch_tokens)
        for key, search in going.items():
            search.saw(float(each["at", key].sum() / mask.sum()), kl, tolerance)
            if search.low > 1e6:
                raise SteeringError(
                    f"{maps[key].method}: even {search.low:.2g} times as strong it changes neutral text by "
                    f"{search.found:.2g} nats"
                )
    return {key: (search.k, search.found) for key, search in searches.items()}


@dataclass
class _Search:
    """One map's way to the budget: what was tried last and found there, and between what the answer lies."""

    most: float
    next: float
    k: float = 0.0
    found: float = 0.0
    low: float = 0.0
    high: float = inf
    done: bool = False

    @classmethod
    def of(cls, v: SteeringMap, most: float | None) -> _Search:
        limit = most if most is not None else (inf if isinstance(v, SteeringVector) else 1.0)
        return cls(limit, min(1.0, limit))

    def saw(self, found: float, kl: float, tolerance: float) -> None:
        self.k = k = self.next
        self.found = found
        if abs(found - kl) <= tolerance * kl or (k == self.most and found < kl):
            self.done = True
            return
        self.low, self.high = (k, self.high) if found < kl else (self.low, k)
        k = min(k * min(8.0, max(0.125, sqrt(kl / max(found, 1e-12)))), self.most)
        self.next = k if self.low < k < self.high else (self.low + self.high) / 2


@recorded
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
    value within a behaviour. For "random" value and interval are over controls. Interrupted, it
    leaves the behaviours that were done (`interp.unfinished`).
    """
    import pandas as pd

    if missing := [label for label in methods if label not in pairs]:
        raise SteeringError(f"pairs: there are none for {missing[0]!r}")
    done: list[dict[str, Any]] = []

    def made() -> pd.DataFrame | None:
        if not done:
            return None
        table = pd.DataFrame(done).sort_values(["label", "value"], ascending=[True, False], ignore_index=True)
        table.attrs.update({"model": m.name, "fingerprint": m.fingerprint, "kl": kl, "unit": "nats per token",
                            "controls": controls, "chat": chat, "seed": seed})  # fmt: skip
        return table

    with salvaged("steering.compare", made):
        for label, vectors in methods.items():
            rows: list[dict[str, Any]] = []
            maps: dict[Any, SteeringMap] = {("own", name): v for name, v in vectors.items()}
            drawn = random_like(next(iter(vectors.values())), controls, seed) if controls else []
            maps |= {("random", i): v for i, v in enumerate(drawn)}
            reached = budgets(m, maps, texts, kl, **how)
            runs: dict[Any, Any] = {0.0: []} | {key: (v * reached[key][0]).as_edits(m) for key, v in maps.items()}
            sides = _pairs.sides(m, pairs[label], chat=chat)
            scores = log_likelihoods(m, [p for both in zip(*sides, strict=True) for p in both], runs)
            value = {key: (each := scores.per_token(key).numpy())[0::2] - each[1::2] for key in runs}
            for (kind, name), (k, found) in reached.items():
                if kind == "own":
                    shift = value[kind, name] - value[0.0]
                    rows.append(
                        _row(label, name, k, found, float(shift.mean()), bootstrap(shift, seed=seed), len(shift))
                    )
            if controls:
                shifts = [float((value["random", i] - value[0.0]).mean()) for i in range(controls)]
                k, found = (sum(reached["random", i][j] for i in range(controls)) / controls for j in (0, 1))
                rows.append(_row(label, "random", k, found, sum(shifts) / controls, spread(shifts), controls))
            done += rows
    table = made()
    assert table is not None
    return table


def _row(
    label: str, name: str, k: float, kl: float, value: float, interval: tuple[float, float], n: int
) -> dict[str, Any]:
    low, high = interval
    return {"label": label, "method": name, "multiplier": k, "kl": kl, "value": value, "low": low, "high": high, "n": n}
