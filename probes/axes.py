"""An axis: one direction, found from phrases, with its sign anchored and a scale on which any phrase is rated.

    a = axis(m, kind_deeds, unkind_deeds, "resid_post[8]", templates=["Should I {}?", "Is it good to {}?"])
    a.ratings(m, ["help a friend", "break a window"])      -1 .. 1, positive as the first phrases are
    with m.intervene(a.edit(-2.0)): ...                    steer along it
    a.keep(m, texts)                                       filter by it

The moral direction is one: the first principal component of phrases that say what to do and what not to. Schramowski et
al. 2022, "Large pre-trained language models contain human-like biases of what is right and wrong to do"
(arXiv:2103.11790), average each phrase over question templates, take the first component and divide by the largest
value. A component has no sign and need not be about what the phrases were chosen for: the anchors give it the one and
test the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from interp import edits
from interp.calls import recorded
from interp.edits import Edit
from probes.errors import ProbeError, ProbeWarning

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["pca", "means", "logistic"]


@dataclass(frozen=True, eq=False)
class Axis:
    """A direction with a sign and a scale.

    Attributes:
        direction: unit vector [feature], towards the positive anchors; "direction_" of a probe, so `probes.edit` and
            `probes.causal` take an Axis too.
        centre: mean of the phrases it was found from [feature]; rated 0.
        scale: the largest |projection| among them, which is rated 1.
        spread: standard deviation of their projections.
        explained: share of their variance along it.
        anchored: AUROC of the anchors on it, .5 to 1.
        site, at, templates: where and how phrases are read; empty where it came from arrays.
    """

    direction: np.ndarray
    centre: np.ndarray
    scale: float
    spread: float
    explained: float
    anchored: float
    site: str = ""
    at: str = "mean"
    templates: tuple[str, ...] = ("{}",)

    @property
    def direction_(self) -> np.ndarray:
        return self.direction

    def rate(self, X: np.ndarray) -> np.ndarray:
        """Ratings of activations [phrase, feature] -> [phrase]; the phrases it was found from lie in -1 .. 1."""
        return (np.asarray(X, np.float64) - self.centre) @ self.direction / self.scale

    @recorded
    def ratings(self, m: Any, phrases: Sequence[Any]) -> pd.DataFrame:
        """Table: phrase, value."""
        import pandas as pd

        value = self.rate(phrase_features(m, phrases, self._where(), self.at, self.templates))
        table = pd.DataFrame({"phrase": list(phrases), "value": value})
        table.attrs = {"model": m.name, "site": self.site, "at": self.at, "templates": list(self.templates)}
        return table

    def keep(self, m: Any, texts: Sequence[Any], above: float = 0.0) -> list[bool]:
        """Which texts are rated above a value, read as they are, without templates."""
        return (self.rate(phrase_features(m, texts, self._where(), self.at, ("{}",))) > above).tolist()

    def edit(self, strength: float, site: str | None = None, **how: Any) -> Edit:
        """Adds `strength` spreads along it at its site (or at `site`); negative towards the negative anchors."""
        vector = torch.from_numpy(strength * self.spread * self.direction).float()
        return edits.add(site or self._where(), vector, **{"name": f"axis x {strength:g}", **how})

    def _where(self) -> str:
        if not self.site:
            raise ProbeError("this axis came from arrays, so it has no site; give one, or use axis(m, ...)")
        return self.site


@recorded
def fit_axis(X: np.ndarray, positive: np.ndarray, method: Method = "pca", **about: Any) -> Axis:
    """The axis of activations [phrase, feature].

    Args:
        X: one row per phrase.
        positive: True for positive anchors, False for negative ones [phrase].
        method: "pca": the first principal component, which sees no label but for the sign; "means": the difference
            of the anchors' means; "logistic": a probe's direction.
        about: site, at, templates.

    Raises ProbeError where all anchors are of one side. Warns where the first component hardly tells them apart.
    """
    from probes.linear import LinearProbe, MeanDifference
    from probes.scores import auroc

    X, y = np.asarray(X, np.float64), np.asarray(positive, bool)
    if len(X) != len(y):
        raise ProbeError(f"positive: {len(y)} entries for {len(X)} phrases; give one per phrase")
    if y.all() or not y.any():
        raise ProbeError("anchors: phrases of one side only; the axis needs both to know its sign")
    centre = X.mean(0)
    x = X - centre
    if method == "pca":
        found = np.linalg.svd(x, full_matrices=False)[2][0]
    elif method in ("means", "logistic"):
        probe = MeanDifference() if method == "means" else LinearProbe(C=0.1)
        found = probe.fit(X, y).direction_
    else:
        raise ProbeError(f"method={method!r}: expected pca, means or logistic")
    told = auroc(y, x @ found)
    if told < 0.5:
        found, told = -found, 1 - told
    if told < 0.7:
        warnings.warn(
            f"the first component tells the anchors apart with AUROC {told:.2f} only: the phrases differ more in "
            "something else. Try method='means', another site, or more templates",
            ProbeWarning,
            stacklevel=2,
        )
    along = x @ found
    return Axis(found, centre, float(np.abs(along).max()), float(along.std()),
                float((along**2).sum() / (x**2).sum()), told, **about)  # fmt: skip


def axis(
    m: Any, positive: Sequence[Any], negative: Sequence[Any], site: str, *, at: str = "mean",
    templates: Sequence[str] = ("{}",), method: Method = "pca",
) -> Axis:  # fmt: skip
    """The axis between two sets of phrases at a site of a model.

    Args:
        m: the model.
        positive: phrases rated positive.
        negative: phrases rated negative.
        site: e.g. "resid_post[8]".
        at: how a phrase's tokens become one vector.
        templates: each with one {} for the phrase; activations are averaged over them. Phrases given as token ids take
            no templates.
        method: see `fit_axis`.
    """
    where = str(m.resolve(site)[0])
    X = phrase_features(m, [*positive, *negative], where, at, templates)
    y = np.r_[np.ones(len(positive), bool), np.zeros(len(negative), bool)]
    return fit_axis(X, y, method, site=where, at=at, templates=tuple(templates))


def phrase_features(m: Any, phrases: Sequence[Any], site: str, at: str, templates: Sequence[str]) -> np.ndarray:
    """Activations [phrase, feature] averaged over templates."""
    from probes.reading import features

    if not templates or any(t.count("{}") != 1 for t in templates):
        raise ProbeError(f"templates: {list(templates)!r}; each holds {{}} once, in the phrase's place")
    if tuple(templates) == ("{}",):
        return features(m, list(phrases), site, at=at)[site]
    if not all(isinstance(p, str) for p in phrases):
        raise ProbeError("templates: they need phrases as text, these are token ids")
    each = [features(m, [t.format(p) for p in phrases], site, at=at)[site] for t in templates]
    return np.mean(each, axis=0)
