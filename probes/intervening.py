"""From probe to edit: move along the probe's direction, and ask whether the output follows.

    edit(p, "resid_post[8]", 2.0)                  the stream moved two standard units towards classes_[1]
    causal(m, p, site, inputs, metric)             does the metric rise with the strength, more than for random
    directions?

A probe reads what is there; the model may not. The check: add k u, u the probe's unit direction times the spread of the
projections in the data, for k = -2 .. 2, and measure. Random unit vectors of the same length are the control, since any
push of that size does something (Ravichander et al. 2021, arXiv:2005.00719, on why probing is not use).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp import edits
from interp.calls import recorded
from interp.edits import Edit
from interp.metrics import as_metric
from interp.progress import bar
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd


def direction(probe: Any) -> Tensor:
    """The probe's unit direction [feature], towards ``classes_[1]``."""
    return torch.as_tensor(np.asarray(probe.direction_)).float()


def edit(probe: Any, site: str, strength: float, *, unit: float = 1.0, scope: Any = "all") -> Edit:
    """``h -> h + strength * unit * u``: along the probe's direction u.

    Args:
        probe: of two classes, linear.
        site: where it was fitted.
        strength: how many units; negative towards ``classes_[0]``.
        unit: the length of one, e.g. the standard deviation of the data's projections on u.
        scope: which tokens.
    """
    return edits.add(site, strength * unit * direction(probe), scope=scope, name=f"probe x {strength:g}")


def goal(probe: Any, site: str, p: float, *, scope: Any = "last") -> Edit:
    """The smallest move after which the probe says probability p for ``classes_[1]``; nothing where it says more
    already.

    ``h -> h + max(0, logit(p) - score(h)) / |w| * u``. Probe-then-edit; see `steering` for the multi-layer form.
    """
    if not 0 < p < 1:
        raise ProbeError(f"p={p!r}: a goal between 0 and 1")
    w = torch.as_tensor(np.asarray(probe.coef_[0], np.float64))
    b, wanted = float(probe.intercept_[0]), float(np.log(p / (1 - p)))

    def move(h: Tensor, where: Any) -> Tensor:
        weight = w.to(h)
        short = (wanted - (h @ weight + b)).clamp(min=0)
        return h + short[..., None] * weight / (weight @ weight)

    return Edit(site, move, edits.Scope.parse(scope), name=f"probe to p = {p:g}")


@recorded
def causal(
    m: Any, probe: Any, site: str, inputs: Any, metric: Any, *, unit: float,
    strengths: Sequence[float] = (-2, -1, 0, 1, 2), controls: int = 20, scope: Any = "all", seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """The metric against the strength of the push, for the probe's direction and for random ones of the same length.

    Args:
        m: the model.
        probe: linear, of two classes.
        site: where it was fitted.
        inputs: texts or Tokens that the probe was not fitted on.
        metric: of the logits; larger should go with ``classes_[1]``.
        unit: length of one step, in the activation's units: the projections' standard deviation is a natural one.
        strengths: how many steps; negative towards ``classes_[0]``.
        controls: random directions.
        scope: which tokens are moved.
        seed: of the random directions.

    Returns:
        Table: node, baseline ("none" | "random"), strength, metric, value (mean over inputs), low, high (95 %: over
            inputs by
        bootstrap; for the controls the range over directions). `.attrs` holds the slope (of value over strength), the
        random slopes' interval, and `causal`: whether the slope lies above all of it.
    """
    import pandas as pd

    measure = as_metric(metric)
    tokens = inputs if hasattr(inputs, "mask") else m.tokens(inputs)
    where = str(m.resolve(site)[0])
    rng = np.random.default_rng(seed)

    def curve(u: Tensor, advance: Callable[[int], None]) -> np.ndarray:
        rows = []
        for k in strengths:
            with m.intervene(edits.add(where, k * unit * u, scope=scope)):
                rows.append(measure.fn(m(tokens), tokens).float().cpu().numpy())
            advance(1)
        return np.stack(rows)  # [strength, input]

    width = len(direction(probe))
    others = []
    with bar("pushing", (1 + controls) * len(strengths)) as advance:
        mine = curve(direction(probe), advance)
        for _ in range(controls):
            draw = torch.from_numpy(rng.standard_normal(width)).float()
            others.append(curve(draw / draw.norm(), advance).mean(1))
    null = np.array(others).reshape(controls, len(strengths))
    ks = np.asarray(strengths, float)
    slope = float(np.polyfit(ks, mine.mean(1), 1)[0])
    slopes = np.array([np.polyfit(ks, row, 1)[0] for row in null])
    low, high = np.quantile(slopes, [0.025, 0.975]) if controls else (np.nan, np.nan)
    picks = rng.integers(mine.shape[1], size=(500, mine.shape[1]))
    rows = []
    for i, k in enumerate(strengths):
        boot = mine[i][picks].mean(1)
        base = {"node": where, "metric": measure.name, "strength": float(k)}
        rows.append({**base, "baseline": "none", "value": float(mine[i].mean()),
                     "low": float(np.quantile(boot, 0.025)), "high": float(np.quantile(boot, 0.975))})  # fmt: skip
        if controls:
            q = np.quantile(null[:, i], [0.025, 0.975])
            rows.append(
                {
                    **base,
                    "baseline": "random",
                    "value": float(null[:, i].mean()),
                    "low": float(q[0]),
                    "high": float(q[1]),
                }
            )
    table = pd.DataFrame(rows)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "unit": unit, "controls": controls, "seed": seed,
                   "slope": slope, "random_low": float(low), "random_high": float(high),
                   "causal": bool(slope > high)}  # fmt: skip
    return table
