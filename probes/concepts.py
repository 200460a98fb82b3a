"""TCAV: is the model's output sensitive to a concept, in more inputs than to random directions?

    result = tcav(m, concept_texts, random_texts, inputs, metric, "resid_post[8]")

A concept activation vector v is the normal of a probe that tells activations of concept texts from random ones. The
score is the share of inputs whose metric would rise if their activation moved along v:

    TCAV = |{x : grad_h metric(x) . v > 0}| / |x|

A single v is luck, so it is fitted against several draws of random texts and the scores are averaged. Is the average
more than luck? The paper compares the runs of one concept set with runs on random sets by a t-test. But the runs
share their concept texts: whatever is peculiar to those few texts is in every run, and a random "concept" is called
significant far too often (a test shows it). So each random set is treated as the concept is, a set of the same size
with its own average over the same number of draws, and the p-value asks where the concept's average lies among theirs:

    t = (score - mean_r) / (sd_r sqrt(1 + 1/R)),   R - 1 degrees of freedom, two-sided

Source: Kim et al. 2018 (arXiv:1711.11279), section 3; the test differs as said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.calls import recorded
from interp.metrics import as_metric
from probes.errors import ProbeError
from probes.reading import features

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class TcavResult:
    """Scores of one concept at one site.

    Attributes:
        site: where.
        scores: TCAV of each concept vector [run].
        random: mean TCAV of each random set [random set].
        p_value: chance of a mean so far from the random sets' if the concept were one of them.
        directions: the concept vectors, unit length [run, feature].
    """

    site: str
    scores: np.ndarray
    random: np.ndarray
    p_value: float
    directions: np.ndarray

    @property
    def score(self) -> float:
        return float(self.scores.mean())

    @recorded
    def frame(self) -> pd.DataFrame:
        """One row each for the concept and for random texts: node, baseline, metric, value, low, high, p_value."""
        import pandas as pd

        rows = []
        for name, values in (("none", self.scores), ("random", self.random)):
            low, high = np.quantile(values, [0.025, 0.975])
            rows.append({"node": self.site, "baseline": name, "metric": "tcav", "value": float(values.mean()),
                         "low": float(low), "high": float(high), "p_value": self.p_value})  # fmt: skip
        return pd.DataFrame(rows)


def sensitivities(m: Any, inputs: Any, metric: Any, site: str, *, batch_size: int = 8) -> np.ndarray:
    """Gradient of the metric with respect to the activation at `site`, summed over tokens [input, feature].

    Moving every token's activation along v changes the metric at that rate times v.
    """
    measure = as_metric(metric)
    where = str(m.resolve(site)[0])
    tokens = inputs if hasattr(inputs, "mask") else m.tokens(inputs)
    rows: list[Tensor] = []
    for start in range(0, len(tokens), batch_size):
        part = type(tokens)(tokens.ids[start : start + batch_size], tokens.mask[start : start + batch_size])
        acts = m.capture(part, where, logits=True, grad=True, check=False)
        value = measure.fn(acts.logits, part)
        if not value.requires_grad:
            raise ProbeError(
                "metric: it has no gradient; TCAV needs a metric made of differentiable functions of the logits"
            )
        (slope,) = torch.autograd.grad(value.sum(), acts.tensors[m.resolve(where)[0]])
        slope = slope * part.mask.to(slope).view(*part.mask.shape, *[1] * (slope.dim() - 2))
        rows.append(slope.sum(1).flatten(1).float().cpu())
    return torch.cat(rows).numpy()


@recorded
def tcav(
    m: Any, concept: Sequence[str], random: Sequence[str], inputs: Any, metric: Any, site: str, *, runs: int = 5,
    random_sets: int = 20, at: str = "mean", C: float = 0.01, seed: int = 0,
) -> TcavResult:  # fmt: skip
    """TCAV of a concept at a site, against random concepts.

    Args:
        m: the model.
        concept: texts that have it.
        random: texts drawn without regard to it, several times as many.
        inputs: texts or Tokens whose metric is asked about.
        metric: of the logits, differentiable; one number per input.
        site: where, e.g. ``"resid_post[8]"``.
        runs: draws of counterexamples for each set.
        random_sets: sets of random texts that stand in the concept's place.
        at: how a text's tokens become one vector.
        C: inverse penalty of the probes.
        seed: of the draws.

    Raises ProbeError for too few texts or a metric without gradient.
    """
    slopes = sensitivities(m, inputs, metric, site)
    have, other = features(m, concept, site, at=at), features(m, random, site, at=at)
    where = next(iter(have))
    return from_features(slopes, have[where], other[where], where, runs=runs, random_sets=random_sets, C=C, seed=seed)


def from_features(
    slopes: np.ndarray, concept: np.ndarray, random: np.ndarray, site: str = "", *, runs: int = 5,
    random_sets: int = 20, C: float = 0.01, seed: int = 0,
) -> TcavResult:  # fmt: skip
    """The same from gradients [input, feature] and activations [text, feature]."""
    from scipy.stats import t as student

    rng, n = np.random.default_rng(seed), len(concept)
    if n < 2 or len(random) < 2 * n:
        raise ProbeError(
            f"tcav: {n} concept and {len(random)} random texts; give at least 2 and twice as many random ones, "
            "since a random set and its counterexamples are drawn from them"
        )
    if random_sets < 3:
        raise ProbeError(f"random_sets={random_sets}: a spread needs at least 3")

    def vectors(members: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return np.stack([_vector(members, rest[rng.permutation(len(rest))[:n]], C) for _ in range(runs)])

    directions = vectors(concept, random)
    scores = (slopes @ directions.T > 0).mean(0)
    base = []
    for _ in range(random_sets):
        order = rng.permutation(len(random))
        base.append(float((slopes @ vectors(random[order[:n]], random[order[n:]]).T > 0).mean()))
    null, gap = np.array(base), abs(float(scores.mean() - np.mean(base)))
    spread = float(null.std(ddof=1)) * np.sqrt(1 + 1 / random_sets)
    p = float(2 * student.sf(gap / spread, random_sets - 1)) if spread > 0 else float(gap == 0)
    return TcavResult(site, scores, null, p, directions)


def _vector(positive: np.ndarray, negative: np.ndarray, C: float) -> np.ndarray:
    import warnings

    from probes.errors import ProbeWarning
    from probes.linear import LinearProbe

    X = np.concatenate([positive, negative])
    y = np.r_[np.ones(len(positive), int), np.zeros(len(negative), int)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProbeWarning)  # few texts are TCAV's way; its test is the control
        return LinearProbe(C=C).fit(X, y).direction_
