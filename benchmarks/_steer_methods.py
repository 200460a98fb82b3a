"""Published methods at one budget of damage, on the same pairs, layer and tokens, beside random vectors.

Each method gets the multiplier at which it changes neutral text by the same KL; then what it moved is compared. All
read the answers' tokens and act from the prompt's last token on, so that what differs is the map.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _steer_data as data
from _steer_behaviours import spaced

import steering
from steering import pairs as _pairs
from steering.fit_conceptor import conceptor
from steering.reading import read
from steering.vector import AFTER_PROMPT, SteeringMap

BEHAVIOURS = ["corrigible", "sadness against happiness", "happiness against anger"]


def equal_kl(
    m: Any, directory: Path, out: Path, *, layer: int, fit: int, items: int, controls: int, chat: bool, kl: float,
    only: list[str] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of `steering.compare`, one per behaviour and method; arguments as for `_steer_behaviours.behaviours`."""
    import pandas as pd

    names = only or BEHAVIOURS
    for name, (train, test) in data.behaviours(directory).items():
        if not any(name.startswith(start) for start in names):
            continue
        file = out / f"equal-kl-{name.replace(' ', '-')}.csv"
        if not file.exists():
            made = {name: methods(m, spaced(train, fit), layer, chat)}
            held_out = {name: spaced(test, items)}
            table = steering.compare(
                m, made, held_out, data.NEUTRAL[:8], kl, controls=controls, chat=chat, max_tokens=24
            )
            table.to_csv(file, index=False)
        yield from pd.read_csv(file).round(3).to_dict("records")


def methods(m: Any, pairs: list[Any], layer: int, chat: bool) -> dict[str, SteeringMap]:
    """Each method fitted on the pairs, the first of them caa."""
    positive, negative = _pairs.sides(m, pairs, chat=chat)
    near = list(range(max(0, layer - 3), min(m.n_layers, layer + 4), 2))
    labels = ["with"] * len(positive) + ["without"] * len(negative)
    apart: dict[str, Any] = {"at": "answer", "scope": AFTER_PROMPT}  # how the answers' tokens are read and steered
    each: dict[str, Any] = {**apart, "chat": chat}
    site = f"resid_post[{layer}]"
    states = read(m, positive, [site], "answer")[site]
    spread = float(states.var(0).mean())
    return {
        "caa": steering.caa(m, pairs, layer, **each),
        "caa, several layers": steering.caa(m, pairs, near, **each),
        "mean-centring": steering.mean_centre(m, [a for _, a, _ in pairs], data.NEUTRAL, layer, skip=1),
        "pca": steering.pca(m, pairs, near, **each),
        "probe": steering.probe(m, pairs, layer, **each),
        "iti": steering.iti(m, pairs, heads=30, at="answer", chat=chat),
        "transport, linear": steering.act(m, negative, positive, near, support=False, **apart),
        "transport, mean": steering.act(m, negative, positive, near, how="mean", support=False, **apart),
        "affine, mean": steering.affine(m, negative, positive, layer, how="mean", at="last"),
        # with fewer texts than dimensions covariances are singular, so the ridge is as large as a dimension's variance
        "affine, covariance": steering.affine(m, negative, positive, layer, ridge=spread, **apart),
        "conceptor": steering.conceptor_map(
            m, conceptor(m, positive, layer, at="answer", aperture=spread**-0.5), layer, centre=states.mean(0)
        ),
        "probe, then edit": steering.probe_edit(
            m, [*positive, *negative], labels, "with", layer=near, min_accuracy=0.5, **apart
        ),
    }
