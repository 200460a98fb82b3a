"""Differences of means: Contrastive Activation Addition, and mean-centring.

Both say: the direction of a behaviour is where the activations of texts with it lie, less where those of other texts
lie. They differ in what the other texts are (the same questions answered the other way; ordinary text) and in which
tokens count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from interp.calls import recorded
from steering import pairs as _pairs
from steering.reading import At, read_pairs, sites_at, token_mean
from steering.vector import AFTER_PROMPT, SteeringVector


@recorded
def caa(
    m: Any,
    pairs: Iterable[Any],
    layer: Any,
    *,
    site: str = "resid_post",
    at: At = "answer",
    scope: Any = AFTER_PROMPT,
    chat: bool = False,
    system: str | None = None,
    batch_tokens: int = 4096,
) -> SteeringVector:
    """Contrastive Activation Addition: the mean over pairs of a(prompt, positive) - a(prompt, negative).

    v_l = 1/n sum_i (a_l(p_i, c_i+) - a_l(p_i, c_i-)) in R^d, after block l, added with a multiplier from the token on
    that predicts the answer's first token. Source: Rimsky et al. 2024 (arXiv:2312.06681), eq. 1.

    Args:
        m: the model.
        pairs: (prompt, positive_text, negative_text) triples.
        layer: a layer; several, or "*", give one vector each, read in the same pass.
        site: where, with `layer` put in.
        at: which token is read (`steering.reading`). The paper's answers are "(A)" and "(B)" and it reads the letter,
            which is at=-2; whole answers have no such token, and the mean over their tokens is the default.
        scope: to which tokens the vector is added.
        chat: put the prompts into the model's chat template.
        system: the template's system turn.
        batch_tokens: tokens run at once.

    Raises SteeringError for malformed pairs and for pairs with equal sides; SiteError for a layer out of range.
    """
    triples = _pairs.check(pairs)
    sites = sites_at(m, layer, site)
    both = read_pairs(m, triples, sites, at, chat=chat, system=system, batch_tokens=batch_tokens)
    record = {"at": at, "chat": chat, "system": system, "pairs": len(triples)}
    return SteeringVector.of(
        m,
        {s: positive.mean(0) - negative.mean(0) for s, (positive, negative) in both.items()},
        method="caa",
        scope=scope,
        record=record,
    )


@recorded
def mean_centre(
    m: Any,
    target_texts: Any,
    background_texts: Any,
    layer: Any,
    *,
    skip: int = 0,
    site: str = "resid_post",
    scope: Any = AFTER_PROMPT,
    batch_tokens: int = 4096,
) -> SteeringVector:
    """Mean-centring: mean activation of target texts less the mean of texts like those of training, over all tokens.

    Activations have a large mean of their own, so the mean of a target set points mostly along it; what is left
    after taking it off is the target. Source: Jorgensen et al. 2023 (arXiv:2312.03813), eq. 2; there the background
    is 200 OpenWebText texts under 500 tokens, and the vector is added at the final token of one layer (here: from the
    prompt's last token on, each of which is the final one as it is read).

    Args:
        m: the model.
        target_texts: texts that show the behaviour.
        background_texts: ordinary texts; with None nothing is taken off, which is the paper's uncentred control.
        layer: a layer, several, or "*".
        skip: leave out so many tokens at the start of each text. 0 is the paper; 1 leaves out first tokens, whose
            activations in many models are a hundred times as large as all others and differ from text to text.
        site: where, with `layer` put in.
        scope: to which tokens the vector is added.
        batch_tokens: tokens run at once.
    """
    sites = sites_at(m, layer, site)
    target = _pairs.texts(m, target_texts, name="target_texts")
    mean = token_mean(m, target, sites, batch_tokens, skip)
    record: dict[str, Any] = {"target_texts": len(target), "background_texts": 0, "skip": skip}
    if background_texts is not None:
        background = _pairs.texts(m, background_texts, name="background_texts")
        base = token_mean(m, background, sites, batch_tokens, skip)
        mean = {s: mean[s] - base[s] for s in sites}
        record["background_texts"] = len(background)
    return SteeringVector.of(m, mean, method="mean_centre", scope=scope, record=record)
