"""A guard in two steps: a probe on the prompt's last token says which prompts, and only those are treated.

    g = guard(m, unsafe_prompts, benign_prompts)
    g.detector.table                           per layer: AUROC, false positives on benign prompts, recall
    g.logits(m, prompts, edit)                 flagged prompts run under the edit, the others without it
    g.generate(m, prompts, "I cannot help with that.")

A model made safe as a whole answers benign prompts worse. With the guard they get exactly, bit for bit, what they got
before: the batch is run as it would have been, and only the rows of flagged prompts are exchanged. (Running flagged
prompts as a batch of their own would be cheaper, but sums in a smaller batch differ in their last bits.)

Source: Chrabaszcz et al. 2025, "Maybe I Should Not Answer That, but... Do LLMs Understand The Safety of Their Inputs?"
(arXiv:2502.16174): the last token's hidden state is enough for the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probes.detectors import Detector, detector
from probes.errors import ProbeError

if TYPE_CHECKING:
    from probes.scores import Interval


@dataclass(frozen=True, eq=False)
class Guard:
    """The first step, a `Detector`, and what to do with the prompts that it flags."""

    detector: Detector

    def flags(self, m: Any, prompts: Any) -> Tensor:
        """Which prompts are flagged [prompt], bool."""
        return torch.from_numpy(self.detector.says(m, prompts))

    def logits(self, m: Any, prompts: Any, *safe: Any) -> Tensor:
        """Logits [prompt, pos, vocab]: the rows of flagged prompts under the edits `safe`, the others as ever."""
        if not safe:
            raise ProbeError("safe: give the edits under which flagged prompts run")
        tokens = m.tokens(prompts)
        plain = m(tokens)
        flagged = self.flags(m, tokens)
        if flagged.any():
            with m.intervene(*safe):
                plain[flagged] = m(tokens)[flagged]
        return plain

    def generate(self, m: Any, prompts: Sequence[Any], safe: Any, **how: Any) -> list[str]:
        """A continuation of each prompt.

        Args:
            m: the model.
            prompts: texts or ids.
            safe: what flagged prompts get: a text, or edits under which they are continued.
            how: for `m.generate`.
        """
        tokens = m.tokens(prompts)
        flagged = self.flags(m, tokens).tolist()
        texts = m.generate(tokens, **how).texts
        if isinstance(safe, str):
            return [safe if f else text for f, text in zip(flagged, texts, strict=True)]
        with m.intervene(safe):
            others = m.generate(tokens, **how).texts if any(flagged) else texts
        return [other if f else text for f, text, other in zip(flagged, texts, others, strict=True)]

    def rate(self, m: Any, prompts: Any, *, seed: int = 0) -> Interval:
        """Share of prompts that are flagged, with its 95 % interval: on benign text, the false positive rate."""
        from probes.scores import interval

        flagged = self.detector.says(m, prompts)
        return interval(flagged, flagged, lambda _, said: float(np.mean(said)), seed=seed)


def guard(
    m: Any, unsafe: Sequence[Any], benign: Sequence[Any], sites: str | Sequence[str] = "resid_post[*]", *,
    groups: Sequence[object] | None = None, false_positives: float = 0.05, seed: int = 0,
) -> Guard:  # fmt: skip
    """Fits the first step on prompts of both kinds.

    Args:
        m: the model.
        unsafe: prompts to be flagged.
        benign: prompts not to be; put such among them as only sound unsafe, for those are the likely mistakes.
        sites: where to look; the best on validation is taken.
        groups: template of each prompt, the unsafe ones first.
        false_positives: share of benign prompts that may be flagged, on validation.
        seed: of the split.

    Raises ProbeError where one of the two is empty.
    """
    if not len(unsafe) or not len(benign):
        raise ProbeError(f"guard: {len(unsafe)} unsafe and {len(benign)} benign prompts; both are needed")
    labels = [True] * len(unsafe) + [False] * len(benign)
    return Guard(
        detector(m, [*unsafe, *benign], labels, sites, groups=groups, false_positives=false_positives, seed=seed)
    )
