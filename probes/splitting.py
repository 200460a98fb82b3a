"""Train, validation and test, so that a template never stands on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes.errors import ProbeError


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts. Probes are fitted on train, chosen on validation, scored on test."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def check(self, groups: Sequence[object] | np.ndarray | None, n: int | None = None) -> Split:
        """Raises ProbeError where parts overlap, or share a group."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        keys = (
            np.arange(n or int(max(p.max(initial=0) for p in parts.values())) + 1)
            if groups is None
            else np.asarray(groups)
        )
        names = list(parts)
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                shared = np.intersect1d(keys[parts[one]], keys[parts[other]])
                if len(shared):
                    what = "rows" if groups is None else "groups"
                    raise ProbeError(
                        f"split: {len(shared)} {what} stand in {one} and in {other}, e.g. {shared[0].item()!r}; "
                        "what the probe saw there it would be scored on. Use probes.split(y, groups)"
                    )
        return self


def split(
    y: Sequence[object] | np.ndarray, groups: Sequence[object] | np.ndarray | None = None, *,
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2), seed: int = 0,
) -> Split:  # fmt: skip
    """Cuts examples into train, validation and test; whole groups stay together, and classes are spread evenly.

    Args:
        y: labels [sample].
        groups: template, document or entity of each example [sample]; None takes each for itself.
        shares: of the three parts.
        seed: of the draw.

    Raises ProbeError where a class is missing from a part (too few groups for it).
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    y = np.asarray(y)
    if groups is not None and len(groups) != len(y):
        raise ProbeError(f"groups has {len(groups)} entries and y {len(y)}; give one per example")
    if not np.isclose(sum(shares), 1) or min(shares) < 0.05:
        raise ProbeError(f"shares={shares}: expected three of at least .05 that add up to 1")
    folds = 20
    smallest = min(np.unique(y, return_counts=True)[1])
    if groups is None:
        folds = int(min(folds, smallest))
    else:
        numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
        folds = int(min([folds] + [len(np.unique(numbers[y == c])) for c in np.unique(y)]))
    if folds < 3:
        what = "examples" if groups is None else "groups"
        raise ProbeError(f"split: a class has only {folds} {what}; three are needed, one for each part")
    cutter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
    pieces = [test for _, test in cutter.split(np.zeros(len(y)), y, groups)]
    n_test = max(1, round(shares[2] * folds))
    n_validation = max(1, round(shares[1] * folds))
    rows = [
        np.sort(np.concatenate(p))
        for p in (pieces[n_test + n_validation :], pieces[n_test : n_test + n_validation], pieces[:n_test])
    ]
    made = Split(*rows)
    for name, part in (("train", made.train), ("validation", made.validation), ("test", made.test)):
        if missing := set(np.unique(y)) - set(np.unique(y[part])):
            raise ProbeError(
                f"split: class {sorted(missing, key=str)[0]!r} is missing from {name}; give more groups of it"
            )
    return made.check(groups, len(y))
