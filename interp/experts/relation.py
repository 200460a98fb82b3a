"""Facts and the neurons of a relation: does switching off what one relation uses harm it, and the others?

    found = {r: experts.select(stats, r, rule="precision", total=50) for r in facts}
    table = experts.interference(m, found, facts, controls=10, stats=stats)

"On relation-specific neurons in large language models" (arXiv 2502.17355) finds neurons by how well their activity
tells a relation's prompts from others (average precision), and reports that they are cumulative (the more are off, the
more facts go), shared between relations, and *interfering*: without those of one relation, some facts of another are
told better. The units may be experts as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.controls import matched
from interp.experts.divergence import mean_with_interval
from interp.experts.evaluate import switched_off
from interp.experts.sets import ExpertSet
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError

if TYPE_CHECKING:
    import pandas as pd

Facts = Mapping[str, Sequence[tuple[str, str]]]
METRICS = ("log_prob", "accuracy")


@torch.no_grad()
def recall(model: Any, facts: Facts, *, batch_rows: int = 32) -> dict[str, Tensor]:
    """How well the first token of each answer is predicted: relation -> [fact, (log-probability in nats, 1 if best)].

    Args:
        model: the model.
        facts: relation -> (prompt, answer); the answer is read as it follows the prompt, leading space and all.
        batch_rows: prompts run at once.

    Raises ExpertError for a relation without facts, or an answer that adds no token.
    """
    out = {}
    for relation, pairs in facts.items():
        if not pairs:
            raise ExpertError(f"facts[{relation!r}]: no fact is given")
        rows = []
        for start in range(0, len(pairs), batch_rows):
            part = pairs[start : start + batch_rows]
            tokens = model.tokens([prompt for prompt, _ in part])
            answers = torch.tensor([_first(model, prompt, answer, relation) for prompt, answer in part])
            last = model(tokens)[torch.arange(len(part)), tokens.last.cpu()].float().log_softmax(-1).cpu()
            told = last.gather(1, answers[:, None])[:, 0]
            rows.append(torch.stack([told, (last.argmax(-1) == answers).float()], 1))
        out[relation] = torch.cat(rows).double()
    return out


def _first(model: Any, prompt: str, answer: str, relation: str) -> int:
    """The token with which the answer begins."""
    before, whole = (model.tokens(text).row(0).tolist() for text in (prompt, prompt + answer))
    if len(whole) <= len(before) or whole[: len(before)] != before:
        raise ExpertError(
            f"facts[{relation!r}]: {answer!r} does not begin a token of its own behind {prompt!r}; give it a leading "
            "space"
        )
    return int(whole[len(before)])


@recorded
def interference(
    model: Any,
    sets: Mapping[str, ExpertSet],
    facts: Facts,
    *,
    controls: int = 0,
    stats: RoutingStats | None = None,
    batch_rows: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Switches off each relation's units in turn and asks for every relation's facts.

    Args:
        model: the model.
        sets: relation -> units.
        facts: relation -> (prompt, answer); others than the units were found on.
        controls: random sets for each relation, matched on layer and frequency.
        stats: routing statistics to match on; needed for controls.
        batch_rows: prompts run at once.
        seed: of controls and bootstrap.

    Returns columns removed, label, metric (log_prob, nats; accuracy, of the first token), baseline, before, after,
    value (a loss is negative, a gain positive), low, high (95 % over facts), units.
    """
    import pandas as pd

    if controls and stats is None:
        raise ExpertError("controls: random units are matched on frequency; pass stats")
    generator = torch.Generator().manual_seed(seed)
    sides: dict[str, list[tuple[str, list[ExpertSet]]]] = {
        removed: [("none", [chosen])] for removed, chosen in sets.items()
    }
    if controls and stats is not None:
        for removed, chosen in sets.items():
            sides[removed].append(("random", [matched(stats, chosen, generator) for _ in range(controls)]))
    before = recall(model, facts, batch_rows=batch_rows)
    rows = []
    for removed, chosen in sets.items():
        for baseline, tried in sides[removed]:
            runs = []
            for one in tried:
                with switched_off(model, one):
                    runs.append(recall(model, facts, batch_rows=batch_rows))
            for label in facts:
                after = torch.stack([run[label] for run in runs]).mean(0)  # [fact, metric]
                for i, name in enumerate(METRICS):
                    change = mean_with_interval(after[:, i] - before[label][:, i], torch.ones(len(after)), seed=seed)
                    means = {"before": float(before[label][:, i].mean()), "after": float(after[:, i].mean())}
                    about = {"removed": removed, "label": label, "metric": name, "baseline": baseline}
                    rows.append({**about, **means, **change, "units": len(chosen)})
    frame = pd.DataFrame(rows)
    frame.attrs.update({"model": model.name, "controls": controls, "seed": seed})
    return frame
