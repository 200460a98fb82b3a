"""Who is asking? What a refused request still says inside, and whether geometry foretells what a persona does to it.

    steering.early_decoding(m, prompts, layer=[8, 12, 16])                     what the lower layers alone would say
    personas = {"cares": steering.caa(m, pairs_of_it, layer=13), ...}
    steering.persona_effects(m, personas, found.vector, held_out, ["I cannot"])     found = steering.refusal(...)

A model that refuses has often formed an answer first: the layers that turn it down come late. And whether it refuses
depends on who it takes the user to be: adding a persona's direction moves refusal up or down, as its cosine with the
refusal direction says beforehand. Source: Ghandeharioun et al. 2024, "Who's asking? User personas and the mechanics of
latent misalignment". Both are measurements of how far refusal reaches; what is tested here is planted refusal only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.calls import recorded
from interp.hooks import resume
from interp.progress import bar
from interp.sites import Site
from steering import pairs as _pairs
from steering.baselines import random_like
from steering.continuation import log_likelihoods
from steering.errors import SteeringError
from steering.fit_refusal import last_logits, opening, score
from steering.intervals import bootstrap, spread
from steering.pairs import Passage
from steering.reading import sites_at
from steering.vector import SteeringMap, SteeringVector

if TYPE_CHECKING:
    import pandas as pd


_AT_ONCE = 16  # prompts


@recorded
def early_decoding(
    m: Any,
    prompts: Sequence[Any],
    layer: Any = "*",
    *,
    content: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 12,
    chat: bool = False,
    system: str | None = None,
) -> pd.DataFrame:
    """What the model says when its layers behind each `layer` are skipped, greedily.

    The stream that the layer leaves goes to the final norm and the output matrix, for every token that is read or
    written; with the last layer it is the model as it is.

    Args:
        m: the model.
        prompts: texts, or rows of token ids.
        layer: a layer, several, or "*".
        content: token ids that each prompt's answer would consist of, if it was given.
        max_new_tokens: how many tokens to write.
        chat: put the prompts into the model's chat template.
        system: the template's system turn.

    Returns a Table with columns layer, prompt (number), text; and with `content` also value (log-probability of the
    content per token, nats) and said (whether the continuation begins with it).

    Raises SteeringError where `content` has another length than `prompts` or holds nothing; SiteError for a layer out
    of range.
    """
    import pandas as pd

    rows = _pairs.texts(m, prompts, chat=chat, system=system, name="prompts")
    layers = [int(Site.parse(s).layer or 0) for s in sites_at(m, layer, "resid_post")]
    if content is not None and len(content) != len(rows):
        raise SteeringError(f"content: {len(content)} answers for {len(rows)} prompts; give one for each")
    if content is not None and not all(len(c) for c in content):
        raise SteeringError("content: an answer without tokens; give the ids that would be said")
    answers = [Passage((*p.ids, *c), len(p.ids)) for p, c in zip(rows, content or (), strict=content is not None)]
    stack, lines = m.anatomy.layers, []
    with resume.forms(stack) as forms:
        m(m.tokens([list(rows[0].ids)]))
    with bar("decoding early", len(layers) * len(rows)) as advance:
        for at in layers:
            with resume.shortened(stack, at, forms):
                runs = [m.generate([list(p.ids) for p in rows[i : i + _AT_ONCE]], max_new_tokens=max_new_tokens)
                        for i in range(0, len(rows), _AT_ONCE)]  # fmt: skip
                nats = log_likelihoods(m, answers, {"": []}, share=False).nats[""] if answers else None
            made = [(text, ids) for run in runs for text, ids in zip(run.texts, run.new_ids.tolist(), strict=True)]
            for i, (text, ids) in enumerate(made):
                line: dict[str, Any] = {"layer": at, "prompt": i, "text": text}
                if nats is not None and content is not None:
                    want = list(content[i])
                    line |= {"value": float(nats[i]) / len(want), "said": ids[: len(want)] == want}
                lines.append(line)
            advance(len(rows))
    table = pd.DataFrame(lines)
    table.attrs = {"model": m.name, "metric": "log-probability of the content, nats per token",
                   "prompts": len(rows), "max_new_tokens": max_new_tokens}  # fmt: skip
    return table


@recorded
def persona_effects(
    m: Any,
    personas: Mapping[str, SteeringVector],
    direction: SteeringVector | Tensor,
    prompts: Sequence[Any],
    tokens: Sequence[str | int],
    *,
    multiplier: float = 1.0,
    controls: int = 20,
    chat: bool = False,
    system: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    batch_tokens: int = 1024,
) -> pd.DataFrame:
    """What adding each persona's direction does to refusal, beside its cosine with the refusal direction.

    Args:
        m: the model.
        personas: name -> a vector at one site, such as `caa` of texts with the persona against texts without.
        direction: of refusal, [d_model] or a vector at one site (`steering.refusal`).
        prompts: requests that neither was fitted on.
        tokens: the first tokens of a refusal, as ids or texts; the score is log P(R) - log(1 - P(R)).
        multiplier: of every persona's vector.
        controls: random vectors of the personas' mean norm at the first one's site.
        chat: put the prompts into the model's chat template.
        system: the template's system turn.
        resamples: of the bootstraps.
        seed: of controls and bootstraps.
        batch_tokens: tokens run at once.

    Returns:
        Table: persona, cosine, value (mean change of the score), low, high (95 % bootstrap over prompts), agrees (the
        signs of cosine and value are the same), random_low, random_high (the middle 95 % of the controls). ``.attrs``:
        plain (the score without any), agree (share of personas), spearman of cosine and value with spearman_low and
        spearman_high (95 % bootstrap over personas and prompts).

    Raises SteeringError for fewer than three personas, whose ranks say nothing, and for a vector at several sites.
    """
    import pandas as pd

    if len(personas) < 3:
        raise SteeringError(f"personas: {len(personas)} of them; ranks need at least three")
    several = [name for name, v in personas.items() if len(v.sites) > 1]
    if several:
        raise SteeringError(f"personas[{several[0]!r}] acts at {len(personas[several[0]].sites)} sites; fit one layer")
    rows = _pairs.texts(m, prompts, chat=chat, system=system, name="prompts")
    first = opening(m, tokens)
    r = (direction.vector if isinstance(direction, SteeringVector) else direction).detach().double().cpu()
    plain = score(last_logits(m, rows, [], batch_tokens), first)

    def change(v: SteeringMap) -> Tensor:
        return score(last_logits(m, rows, v.as_edits(m), batch_tokens), first) - plain  # [prompt]

    with bar("adding personas", len(personas) + controls) as advance:
        changes, drawn = [], []
        for v in personas.values():
            changes.append(change(v * multiplier))
            advance(1)
        one = next(iter(personas.values()))
        size = sum(v.norm for v in personas.values()) / len(personas)
        for random in random_like(one, controls, seed) if controls else []:
            drawn.append(float(change(random * (multiplier * size / one.norm)).mean()))
            advance(1)
    cosines = [float(torch.nn.functional.cosine_similarity(v.vector.double().cpu(), r, dim=0))
               for v in personas.values()]  # fmt: skip
    low, high = spread(drawn)
    lines = []
    for name, cosine, moved in zip(personas, cosines, changes, strict=True):
        value, (a, b) = float(moved.mean()), bootstrap(moved, resamples=resamples, seed=seed)
        lines.append({"persona": name, "cosine": cosine, "value": value, "low": a, "high": b,
                      "agrees": cosine * value > 0, "random_low": low, "random_high": high})  # fmt: skip
    table = pd.DataFrame(lines)
    found, ends = _ranks(np.array(cosines), torch.stack(changes).numpy(), resamples, seed)
    table.attrs = {
        "model": m.name, "metric": "change of log P(R) - log(1 - P(R))", "tokens": first, "multiplier": multiplier,
        "prompts": len(rows), "controls": controls, "seed": seed, "plain": float(plain.mean()),
        "agree": float(table.agrees.mean()), "spearman": found, "spearman_low": ends[0], "spearman_high": ends[1],
    }  # fmt: skip
    return table


def _ranks(cosines: np.ndarray, changes: np.ndarray, resamples: int, seed: int) -> tuple[float, tuple[float, float]]:
    """Spearman's correlation of cosines [persona] with mean changes [persona, prompt], and its interval.

    Draws of personas in which all cosines or all changes are equal have no ranks and are left out.
    """
    from scipy.stats import rankdata

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        a, b = rankdata(x), rankdata(y)
        return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 < b.std() else float("nan")

    rng, (n, k) = np.random.default_rng(seed), changes.shape
    draws = []
    for _ in range(resamples):
        who, which = rng.integers(n, size=n), rng.integers(k, size=k)
        draws.append(correlation(cosines[who], changes[who][:, which].mean(1)))
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return correlation(cosines, changes.mean(1)), (float(low), float(high))
