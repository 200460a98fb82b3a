"""What steering damages: neutral text, the model's own output, and answers to questions.

Three tables with one form, columns multiplier, baseline, metric, position, value, low, high, n:

    neutral   KL(unsteered || steered) on ordinary text, by position, and that text's perplexity
    fluency   perplexity of what the steered model writes, under another model, and how much it repeats itself
    choices   accuracy in multiple choice, by the likelihood of each option

A first-token KL misses what builds up in the cache, and the perplexity of fixed text misses a model that has fallen
into a loop; so all are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.calls import recorded
from interp.edits import Edit
from interp.progress import bar
from steering import pairs as _pairs
from steering.baselines import random_like
from steering.continuation import divergences, log_likelihoods
from steering.errors import SteeringError
from steering.intervals import bootstrap, spread
from steering.pairs import Passage
from steering.propensity import MULTIPLIERS, check_multipliers
from steering.vector import SteeringMap

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("multiplier", "baseline", "metric", "position", "value", "low", "high", "n")


@recorded
def neutral(
    m: Any,
    v: SteeringMap,
    texts: Any,
    multipliers: Sequence[float] = MULTIPLIERS,
    *,
    controls: int = 0,
    max_tokens: int = 64,
    prompt_tokens: int = 1,
    seed: int = 0,
    batch_tokens: int = 512,
) -> pd.DataFrame:
    """KL(unsteered || steered) in nats per token on neutral texts, and their perplexity under the steered model.

    Args:
        m: the model.
        v: the vector or map.
        texts: ordinary texts that have nothing to do with the behaviour.
        multipliers: strengths.
        controls: random controls (`random_like`), whose spread is given as baseline "random".
        max_tokens: of each text.
        prompt_tokens: how many of them count as prompt; what follows is scored as if the model had written it.
        seed: of the controls and the bootstrap.
        batch_tokens: tokens run at once.

    Metric "kl" has one row over all positions (position NaN) and one per power of two: position p stands for the
    predictions p .. 2p-1 (0 alone for the first). Intervals are bootstrapped over texts.
    """
    ks = check_multipliers(multipliers)
    passages = neutral_passages(m, texts, max_tokens, prompt_tokens)
    maps = [
        ("none", 0, v),
        *(("random", i, r) for i, r in enumerate(random_like(v, controls, seed) if controls else [])),
    ]
    runs: dict[Any, list[Edit]] = {0.0: []}
    runs |= {(name, i, k): (one * k).as_edits(m) for name, i, one in maps for k in ks if k}
    kl, nats, mask = token_kl(m, passages, runs, batch_tokens)
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for name, _, _ in maps):
        draws = [i for n, i, _ in maps if n == name]
        for k in ks:
            keys: list[Any] = [(name, i, k) if k else 0.0 for i in draws]
            rows += _positions(k, name, [kl[key] for key in keys], mask, seed)
            rows.append(_perplexity(k, name, [nats[key] for key in keys], mask, seed))
    return _table(rows, m, v, {"texts": len(passages), "max_tokens": max_tokens, "prompt_tokens": prompt_tokens})


def token_kl(
    m: Any, passages: Sequence[Passage], runs: Mapping[Any, list[Edit]], batch_tokens: int = 512
) -> tuple[dict[Any, Tensor], dict[Any, Tensor], Tensor]:
    """(run -> KL(unsteered || run), run -> log-probability of the token, mask), each [passage, answer token]; float64.

    `runs` must hold the unsteered model under the key 0.0, first.
    """
    width = max(len(p.ids) - p.answer for p in passages)
    kl, nats = ({key: torch.zeros(len(passages), width, dtype=torch.float64) for key in runs} for _ in range(2))
    mask = torch.zeros(len(passages), width, dtype=torch.bool)
    with bar("measuring damage", len(passages) * len(runs)) as advance:
        for part, logp, each in divergences(m, passages, runs, batch_tokens=batch_tokens):
            rows, n = torch.tensor(part.rows), part.mask.shape[1]
            kl[part.run][rows, :n] = each.double().cpu()
            token = logp.gather(-1, part.targets[..., None])[..., 0]
            nats[part.run][rows, :n] = token.masked_fill(~part.mask, 0).double().cpu()
            mask[rows, :n] = part.mask.cpu()
            advance(len(rows))
    return kl, nats, mask


def neutral_passages(m: Any, texts: Any, max_tokens: int, prompt_tokens: int = 1) -> list[Passage]:
    """Texts cut to `max_tokens`, their first tokens as prompt. SteeringError where none is long enough."""
    if not 0 < prompt_tokens < max_tokens:
        raise SteeringError(f"prompt_tokens={prompt_tokens}: expected 1..{max_tokens - 1}, below max_tokens")
    found = [p.ids[:max_tokens] for p in _pairs.texts(m, texts)]
    long = [Passage(ids, prompt_tokens) for ids in found if len(ids) > prompt_tokens]
    if not long:
        raise SteeringError(f"texts: none has more than {prompt_tokens} tokens")
    return long


@recorded
def fluency(
    m: Any,
    v: SteeringMap,
    prompts: Sequence[str],
    multipliers: Sequence[float] = MULTIPLIERS,
    *,
    judge: Any = None,
    max_new_tokens: int = 40,
    chat: bool = False,
    seed: int = 0,
    **how: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Continues prompts under steering: (table, generations).

    Args:
        m: the model.
        v: the vector or map.
        prompts: what to continue.
        multipliers: strengths.
        judge: another model, under which the continuations' perplexity is taken; default `m` itself, unsteered.
        max_new_tokens: of each continuation.
        chat: put the prompts into the model's chat template.
        seed: of the bootstrap, and of sampling where it is asked for.
        **how: passed on to the generation, such as ``do_sample=True``; greedy otherwise.

    Metrics: "output_perplexity" (of the continuation given its prompt, under the judge) and "distinct" (share of
    distinct pairs of neighbouring tokens, 1 without repetition). The generations have columns multiplier, prompt,
    text.
    """
    import pandas as pd

    judge = judge or m
    given = [_pairs.chat_text(m, p) if chat else p for p in prompts]
    if not given:
        raise SteeringError("prompts: the list is empty; give at least one")
    rows, texts, ks = [], [], check_multipliers(multipliers)
    with bar("writing", len(ks)) as advance:
        for k in ks:
            torch.manual_seed(seed)
            with m.intervene(*((v * k).as_edits(m) if k else [])):
                # the template's text brings its special tokens with it
                tokens = m.tokens(given, special=not chat)
                out = m.generate(tokens, max_new_tokens=max_new_tokens, **how)
            passages = []
            for row, text in enumerate(out.texts):
                if judge is not m:  # which cuts text into tokens of its own
                    passages.append(_pairs.passage(judge, given[row], text or " "))
                    continue
                new = [i for i in out.new_ids[row].tolist() if i != getattr(m.tokenizer, "pad_token_id", None)]
                passages.append(
                    Passage((*tokens.row(row).tolist(), *(new or [out.new_ids[row, 0].item()])), len(tokens.row(row)))
                )
            scores = log_likelihoods(judge, passages, {0.0: []})
            loss = -scores.nats[0.0] / scores.tokens
            rows.append(_row(k, "none", "output_perplexity", nan, float(loss.mean().exp()),
                             tuple(np.exp(bootstrap(loss.numpy(), seed=seed))), len(loss)))  # fmt: skip
            distinct = [_distinct(p.ids[p.answer :]) for p in passages]
            rows.append(
                _row(k, "none", "distinct", nan, float(np.mean(distinct)), bootstrap(distinct, seed=seed), len(loss))
            )
            texts += [{"multiplier": k, "prompt": p, "text": t} for p, t in zip(prompts, out.texts, strict=True)]
            advance(1)
    about = {"judge": judge.name, "max_new_tokens": max_new_tokens, "chat": chat}
    return _table(rows, m, v, about), pd.DataFrame(texts)


@recorded
def choices(
    m: Any,
    v: SteeringMap,
    questions: Sequence[tuple[str, Sequence[str], int]],
    multipliers: Sequence[float] = MULTIPLIERS,
    *,
    chat: bool = False,
    seed: int = 0,
    batch_tokens: int = 1024,
) -> pd.DataFrame:
    """Multiple choice kept: accuracy, an answer being the option of largest log-likelihood per token.

    Args:
        m: the model.
        v: the vector or map.
        questions: (prompt, options, index of the right one).
        multipliers: strengths.
        chat: put the prompts into the model's chat template.
        seed: of the bootstrap over questions.
        batch_tokens: answer tokens run at once.
    """
    if not questions:
        raise SteeringError("questions: the list is empty; give at least one (prompt, options, index)")
    for i, (_, options, right) in enumerate(questions):
        if len(options) < 2 or not 0 <= right < len(options):
            raise SteeringError(f"questions[{i}]: {len(options)} options and right={right}; expected two or more")
    ks = check_multipliers(multipliers)
    passages = [_pairs.passage(m, q, option, chat=chat) for q, options, _ in questions for option in options]
    runs = {k: (v * k).as_edits(m) if k else [] for k in ks}
    scores = log_likelihoods(m, passages, runs, batch_tokens=batch_tokens)
    rows = []
    for k in ks:
        each, start = scores.per_token(k), 0
        hits = []
        for _, options, index in questions:
            hits.append(float(each[start : start + len(options)].argmax() == index))
            start += len(options)
        rows.append(_row(k, "none", "accuracy", nan, float(np.mean(hits)), bootstrap(hits, seed=seed), len(hits)))
    return _table(rows, m, v, {"questions": len(questions), "chat": chat})


def _positions(k: float, name: str, draws: list[Tensor], mask: Tensor, seed: int) -> list[dict[str, Any]]:
    """Mean KL over all predictions, and over those of each power of two."""
    width, edges = mask.shape[1], [0, 1]
    while edges[-1] < width:
        edges.append(2 * edges[-1])
    spans = [(nan, 0, width), *((float(a), a, b) for a, b in pairwise(edges) if a < width)]
    rows = []
    for position, a, b in spans:
        here = mask[:, a:b].sum(1)
        has = here > 0
        if not bool(has.any()):
            continue
        texts = [(kl[:, a:b].sum(1)[has] / here[has]).numpy() for kl in draws]
        interval = spread([t.mean() for t in texts]) if len(draws) > 1 else bootstrap(texts[0], seed=seed)
        value = float(np.mean([t.mean() for t in texts]))
        rows.append(_row(k, name, "kl", position, value, interval, len(draws) if len(draws) > 1 else int(has.sum())))
    return rows


def _perplexity(k: float, name: str, draws: list[Tensor], mask: Tensor, seed: int) -> dict[str, Any]:
    losses = [(-nats.sum(1) / mask.sum(1)).numpy() for nats in draws]
    ends = [float(np.exp(loss.mean())) for loss in losses]
    interval = spread(ends) if len(draws) > 1 else tuple(np.exp(bootstrap(losses[0], seed=seed)))
    return _row(k, name, "perplexity", nan, float(np.mean(ends)), interval, len(draws) if len(draws) > 1 else len(mask))


def _distinct(ids: Sequence[int]) -> float:
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _row(k: float, name: str, metric: str, position: float, value: float, interval: Any, n: int) -> dict[str, Any]:
    low, high = (float(x) for x in interval)
    return dict(zip(COLUMNS, (k, name, metric, position, value, low, high, n), strict=True))


def _table(rows: list[dict[str, Any]], m: Any, v: SteeringMap, about: dict[str, Any]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs.update({"model": m.name, "method": v.method, "sites": v.sites, "scope": v.scope.text, **about})
    return table
