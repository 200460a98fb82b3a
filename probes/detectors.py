"""A detector: the probe, at the site that tells best, whose score says yes or no of a text, with its error rates.

    d = detector(m, texts, labels, "resid_post[*]")      labels True or False
    d.table                                              every site: AUROC, calibration, false positives, recall
    d.p(m, new_texts)                                    calibrated probabilities at the best site

Three parts of the data do three things: probes are fitted on train; penalty, site, calibration and threshold come from
validation; every number in the table is of test. `probes.guard` and `probes.knows` are detectors put to use.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.calls import recorded
from probes.errors import ProbeError, ProbeWarning

if TYPE_CHECKING:
    import pandas as pd

PENALTIES = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True, eq=False)
class Detector:
    """What `detector` found.

    Attributes:
        node: the site.
        at: which token is read.
        probe: calibrated, linear; `classes_` are False and True.
        threshold: of the probe's score, above which a text counts as True.
        table: all sites with their controls.
    """

    node: str
    at: str
    probe: Any
    threshold: float
    table: pd.DataFrame

    def score(self, m: Any, texts: Any) -> np.ndarray:
        """The probe's score [text], in nats; larger is more surely True."""
        from probes.reading import features

        return self.probe.decision_function(features(m, texts, self.node, at=self.at)[self.node])

    def p(self, m: Any, texts: Any) -> np.ndarray:
        """Calibrated probability of True [text]."""
        from scipy.special import expit

        return expit(self.score(m, texts))

    def says(self, m: Any, texts: Any) -> np.ndarray:
        """Which texts lie above the threshold [text], bool."""
        return self.score(m, texts) > self.threshold


@recorded
def detector(
    m: Any, texts: Any, labels: Sequence[Any], sites: str | Sequence[str] = "resid_post[*]", *, at: str = "last",
    groups: Sequence[object] | None = None, false_positives: float = 0.05, seed: int = 0,
) -> Detector:  # fmt: skip
    """Fits a probe at every site and keeps the one with the best AUROC on validation.

    Args:
        m: the model.
        texts: texts or Tokens.
        labels: True or False for each.
        sites: where to look.
        at: which token; the last one sees the whole prompt.
        groups: template or entity of each text, so that none stands on both sides.
        false_positives: share of False texts of validation that may lie above the threshold.
        seed: of split, shuffle and bootstrap.

    Returns:
        A Detector. Its table: node, baseline ("none" or "shuffled" labels), metric (auroc, ece, brier, false_positives,
        recall), value, low, high (95 %, over groups), validation (AUROC there). `.attrs`: best, base_rate, and the
        sizes of the parts.

    Raises ProbeError for labels that are not True or False, one class only, or the wrong length.
    """
    from probes.reading import features
    from probes.splitting import split

    y = np.asarray(labels)
    if y.dtype != bool:
        if not np.isin(y, (0, 1)).all():
            raise ProbeError(f"labels: {y[~np.isin(y, (0, 1))][0]!r} is neither True nor False")
        y = y.astype(bool)
    if len(y) != len(texts):
        raise ProbeError(f"labels: {len(y)} for {len(texts)} texts; give one per text")
    if not 0 <= false_positives < 1:
        raise ProbeError(f"false_positives={false_positives!r}: expected a share in [0, 1)")
    read = features(m, texts, sites, at=at)
    parts = split(y, groups, seed=seed)
    drawn = None if groups is None else np.asarray(groups)[parts.test]
    rows, best = [], None
    permuted = np.random.default_rng(seed).permutation(y)
    for node in read:
        for baseline, labelled in (("none", y), ("shuffled", permuted)):
            probe, cut, validation = _fit(read[node], labelled, parts, false_positives)
            scored = _test(probe, cut, read[node][parts.test], labelled[parts.test], drawn, seed)
            rows += [{"node": node, "baseline": baseline, **row, "validation": validation} for row in scored]
            if baseline == "none" and (best is None or validation > best[0]):
                best = (validation, node, probe, cut)
    assert best is not None
    _, node, probe, cut = best
    return Detector(node, at, probe, cut, _table(m, rows, node, at, y, parts, false_positives, seed))


def _fit(X: np.ndarray, y: np.ndarray, parts: Any, rate: float) -> tuple[Any, float, float]:
    """(calibrated probe, threshold, AUROC on validation): the penalty with the best AUROC there."""
    from probes.calibrate import calibrated
    from probes.linear import LinearProbe
    from probes.scores import auroc

    held, truth = X[parts.validation], y[parts.validation]
    best: tuple[float, Any] | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProbeWarning)  # the shuffled control says what a warning would
        for C in PENALTIES:
            probe = LinearProbe(C=C).fit(X[parts.train], y[parts.train])
            got = auroc(truth, probe.decision_function(held))
            if best is None or got > best[0]:
                best = (got, probe)
    assert best is not None
    probe = calibrated(best[1], held, truth, smooth=True)
    cut = float(np.quantile(probe.decision_function(held)[~truth], 1 - rate, method="higher"))
    return probe, cut, best[0]


def _test(probe: Any, cut: float, X: np.ndarray, y: np.ndarray, groups: Any, seed: int) -> list[dict[str, Any]]:
    from scipy.special import expit

    from probes.scores import auroc, calibration, interval

    score = probe.decision_function(X)
    p = expit(score)

    def share(of: bool) -> Any:
        return lambda truth, above: float(above[truth == of].mean()) if (truth == of).any() else np.nan

    measures = {
        "auroc": (auroc, score), "ece": (lambda t, q: calibration(t, q)["ece"], p),
        "brier": (lambda t, q: calibration(t, q)["brier"], p), "false_positives": (share(False), score > cut),
        "recall": (share(True), score > cut),
    }  # fmt: skip
    rows = []
    for metric, (measure, said) in measures.items():
        got = interval(y, said, measure, groups, seed=seed)
        rows.append({"metric": metric, "value": got.value, "low": got.low, "high": got.high})
    return rows


def _table(m: Any, rows: Any, node: str, at: str, y: np.ndarray, parts: Any, rate: float, seed: int) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows)
    chosen = table[(table.node == node) & (table.baseline == "none")].set_index("metric").value
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "best": node, **chosen.to_dict(), "at": at,
                   "base_rate": float(y.mean()), "asked_false_positives": rate, "seed": seed,
                   "train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)}  # fmt: skip
    return table
