"""Steering a model towards how it computes when it is right, and what that does to its final logits.

    fit, held_out = problems[:n], problems[n:]
    v = steering.reasoning_vector(m, fit, layer=12)          from the problems that it solves, and from no others
    steering.final_logits(m, v, held_out, [-1, 0, 1])        KL, entropy and accuracy, in one frame

Source: Hoejer et al. 2025 (arXiv:2504.19483): control vectors read at the last token of tasks that were processed
rightly, scored by the KL and entropy of the final logits and by accuracy over the strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.calls import recorded
from steering import pairs as _pairs
from steering.continuation import divergences
from steering.errors import SteeringError
from steering.fit_mean import caa
from steering.intervals import bootstrap
from steering.propensity import MULTIPLIERS, check_multipliers
from steering.vector import SteeringMap, SteeringVector

if TYPE_CHECKING:
    import pandas as pd

Problem = tuple[Any, Any]


def solved(m: Any, problems: Sequence[Problem], *, chat: bool = False, batch_tokens: int = 512) -> Tensor:
    """Which (prompt, answer) problems the model solves, those whose answer greedy decoding writes: bool [problem]."""
    return _right(m, problems, {0.0: []}, chat, batch_tokens)[0.0]["accuracy"] > 0


def reasoning_vector(
    m: Any, problems: Sequence[Problem], layer: Any, *, wrong: Sequence[Any] | None = None, chat: bool = False
) -> SteeringVector:
    """A vector from the problems that the model solves: right answers against wrong ones, over their tokens.

    Args:
        m: the model.
        problems: (prompt, answer); those it does not solve are left out.
        layer: where.
        wrong: a wrong answer for each problem; default the answer of the next solved problem that has another one.
        chat: put the prompts into the model's chat template.

    The record names how many were solved and which, so that a later evaluation can check that it is on others. Raises
    SteeringError where fewer than two are solved.
    """
    kept = [i for i, right in enumerate(solved(m, problems, chat=chat).tolist()) if right]
    if len(kept) < 2:
        raise SteeringError(f"problems: {m.name} solves {len(kept)} of {len(problems)}; at least two are needed")
    triples = []
    for place, i in enumerate(kept):
        prompt, answer = problems[i]
        others = [problems[j][1] for j in kept[place + 1 :] + kept[:place] if problems[j][1] != answer]
        other = wrong[i] if wrong is not None else next(iter(others), None)
        if other is None:
            raise SteeringError("problems: all solved ones have the same answer; give wrong=[...] answers")
        triples.append((prompt, answer, other))
    v = caa(m, triples, layer, chat=chat)
    record = {**v.record, "solved": len(kept), "of": len(problems), "fitted_on": [_key(problems[i][0]) for i in kept]}
    return SteeringVector(v.parts, v.fingerprint, v.model, "reasoning", record)


@recorded
def final_logits(
    m: Any,
    v: SteeringMap,
    problems: Sequence[Problem],
    multipliers: Sequence[float] = MULTIPLIERS,
    *,
    chat: bool = False,
    seed: int = 0,
    batch_tokens: int = 512,
) -> pd.DataFrame:
    """KL(unsteered || steered), entropy and accuracy at the answers, over multipliers.

    Args:
        m: the model.
        v: the vector or map.
        problems: held-out (prompt, answer). One that `v` was fitted on is refused.
        multipliers: strengths.
        chat: put the prompts into the model's chat template.
        seed: of the bootstrap over problems.
        batch_tokens: answer tokens run at once.

    Returns columns multiplier, metric ("kl" and "entropy" in nats, means over the answer's tokens; "accuracy": the
    whole answer is the greedy one), value, low, high, n.
    """
    import pandas as pd

    seen = set(v.record.get("fitted_on", []))
    if leaked := [prompt for prompt, _ in problems if _key(prompt) in seen]:
        raise SteeringError(f"problems: {len(leaked)} were fitted on ({leaked[0]!r:.60}); score on others")
    ks = check_multipliers(multipliers)
    runs: dict[float, Any] = {0.0: []} | {k: (v * k).as_edits(m) for k in ks if k}
    found = _right(m, problems, runs, chat, batch_tokens)
    rows = []
    for k in ks:
        for metric, each in found[k].items():
            low, high = bootstrap(each.numpy(), seed=seed)
            rows.append({"multiplier": k, "metric": metric, "value": float(each.mean()), "low": low, "high": high,
                         "n": len(each)})  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs.update({"model": m.name, "method": v.method, "sites": v.sites, "problems": len(problems), "chat": chat})
    return table


def _right(
    m: Any, problems: Sequence[Problem], runs: dict[float, Any], chat: bool, batch_tokens: int
) -> dict[float, dict[str, Tensor]]:
    """run -> metric -> [problem]; the unsteered run must come first."""
    if not problems:
        raise SteeringError("problems: the list is empty; give (prompt, answer) pairs")
    passages = [_pairs.passage(m, prompt, answer, chat=chat) for prompt, answer in problems]
    out = {k: {x: torch.zeros(len(problems), dtype=torch.float64) for x in ("kl", "entropy", "accuracy")} for k in runs}
    for part, logp, kl in divergences(m, passages, runs, batch_tokens=batch_tokens):
        n = part.mask.sum(1)
        entropy = -(logp.exp() * logp).sum(-1).masked_fill(~part.mask, 0).sum(1) / n
        right = ((logp.argmax(-1) == part.targets) | ~part.mask).all(1)
        for name, each in (("kl", kl.sum(1) / n), ("entropy", entropy), ("accuracy", right)):
            out[part.run][name][part.rows] = each.double().cpu()
    return out


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str([int(i) for i in np.asarray(prompt)])
