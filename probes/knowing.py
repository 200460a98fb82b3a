"""Does the model know that it knows? P(True), asked in words, and P(IK), read from the inside.

    p_true(m, ["... Proposed answer: Paris. Is it true or false? It is"])       P(" true") against P(" false")
    k = knows(m, questions, answers)          a probe on the question alone: will the model get it right?
    k.p(m, new_questions)                     P(I know), calibrated, before a word is said
    k.raised(m, questions, with_source)       does it rise when the source is given?

P(IK) is trained on what this model gets right, not on what is true: its labels come from the model's own greedy
answers. So it is scored on questions it was not fitted on, with AUROC (does it rank), and with calibration error and
Brier score (does it mean what it says) beside those of a guess at the base rate.

Source: Kadavath et al. 2022, "Language Models (Mostly) Know What They Know" (arXiv:2207.05221), sections 3 and 5. They
train a value head with the whole model; here it is a linear probe on the last token of a frozen one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.calls import recorded
from interp.metrics import last_logits
from probes.detectors import Detector, detector
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd

    from probes.scores import Interval

Answer = str | Sequence[int]


def p_true(
    m: Any, prompts: Any, true: Sequence[str | int] = (" true", " True"),
    false: Sequence[str | int] = (" false", " False"), *, batch_size: int = 32,
) -> np.ndarray:  # fmt: skip
    """P(True) [prompt]: the next token's probability of the words for true over that of the words for either.

    Args:
        m: the model.
        prompts: each ends where "true" or "false" is due.
        true: words (their first tokens are read) or token ids.
        false: the same.
        batch_size: prompts per forward pass.

    Raises ProbeError where the two share a first token.
    """

    def firsts(words: Sequence[str | int]) -> list[int]:
        return sorted({w if isinstance(w, int) else int(m.tokens(w, special=False).row(0)[0]) for w in words})

    a, b = firsts(true), firsts(false)
    if set(a) & set(b):
        raise ProbeError(f"p_true: {list(true)} and {list(false)} begin with the same token; choose other words")
    tokens = m.tokens(prompts)
    found = []
    for start in range(0, len(tokens), batch_size):
        part = type(tokens)(tokens.ids[start : start + batch_size], tokens.mask[start : start + batch_size])
        logits = last_logits(m(part), part).float()
        found.append(torch.sigmoid(logits[:, a].logsumexp(-1) - logits[:, b].logsumexp(-1)).cpu())
    return torch.cat(found).numpy()


def answered(m: Any, questions: Sequence[Any], answers: Sequence[Answer], *, batch_size: int = 32) -> np.ndarray:
    """Whether the model's greedy continuation begins with the answer's tokens [question], bool.

    Args:
        m: the model.
        questions: texts or ids; the answer follows.
        answers: one per question, as text with its leading space, or as token ids.
        batch_size: questions per generation.
    """
    if len(questions) != len(answers):
        raise ProbeError(f"answers: {len(answers)} for {len(questions)} questions; give one per question")
    wanted = [
        list(a) if not isinstance(a, str) else m.tokens(a, special=False).row(0).tolist() for a in answers
    ]  # fmt: skip
    if not all(wanted):
        raise ProbeError(f"answers: number {[bool(w) for w in wanted].index(False)} is empty")
    right = []
    for start in range(0, len(questions), batch_size):
        part = wanted[start : start + batch_size]
        new = m.generate(
            list(questions[start : start + batch_size]), max_new_tokens=max(map(len, part)), do_sample=False
        ).new_ids
        right += [ids[: len(w)] == w for ids, w in zip(new.tolist(), part, strict=True)]
    return np.array(right)


@dataclass(frozen=True, eq=False)
class Knows:
    """P(IK) of a model.

    Attributes:
        detector: the probe, its site, and the table of all sites.
        right: which of the questions the model answered [question].
    """

    detector: Detector
    right: np.ndarray

    @property
    def table(self) -> pd.DataFrame:
        """`Detector.table`, and the Brier score of the base rate as the row "guess"."""
        return self.detector.table

    def p(self, m: Any, questions: Any) -> np.ndarray:
        """P(I know) of each question [question], calibrated."""
        return self.detector.p(m, questions)

    def raised(self, m: Any, plain: Sequence[Any], sourced: Sequence[Any], *, seed: int = 0) -> Interval:
        """Mean rise of P(IK) from `plain` questions to the same ones with a source before them, with its interval."""
        from probes.scores import interval

        if len(plain) != len(sourced):
            raise ProbeError(f"sourced: {len(sourced)} for {len(plain)} questions; give the same questions twice")
        before, after = self.p(m, list(plain)), self.p(m, list(sourced))
        return interval(before, after, lambda b, a: float((a - b).mean()), seed=seed)


@recorded
def knows(
    m: Any, questions: Sequence[Any], answers: Sequence[Answer], sites: str | Sequence[str] = "resid_post[*]", *,
    at: str = "last", groups: Sequence[object] | None = None, seed: int = 0,
) -> Knows:  # fmt: skip
    """Lets the model answer, then fits P(IK) on the questions.

    Args:
        m: the model.
        questions: texts or ids that end where the answer is due.
        answers: the right ones, see `answered`.
        sites: where to look; the best on validation is taken.
        at: which token.
        groups: entity of each question, so that none stands on both sides.
        seed: of split and bootstrap.

    Raises ProbeError where the model answers all right, or none.
    """
    import pandas as pd

    right = answered(m, questions, answers)
    if right.all() or not right.any():
        raise ProbeError(
            f"knows: the model answers {int(right.sum())} of {len(right)} questions right; P(IK) needs some of both"
        )
    found = detector(m, list(questions), right.tolist(), sites, at=at, groups=groups, seed=seed)
    rate = float(right.mean())
    guess = pd.DataFrame([{"node": "base rate", "baseline": "guess", "metric": "brier", "value": rate * (1 - rate),
                           "low": np.nan, "high": np.nan, "validation": np.nan}])  # fmt: skip
    about = dict(found.table.attrs)
    found.table.attrs = {}
    table = pd.concat([found.table, guess], ignore_index=True)
    table.attrs = {**about, "right": rate}
    return Knows(Detector(found.node, found.at, found.probe, found.threshold, table), right)
