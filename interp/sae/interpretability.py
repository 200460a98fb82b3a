"""Can it be said in words when a feature fires? The same question to every kind of feature, on the same tokens.

    near = windows(m, texts)                              for each token the words that end with its own
    table = interpretability(codes, near, documents)      method, baseline, metric (detection), value, low, high
    table.attrs["said"]["sae"][:3]                        (feature, its words, its score), the best first

An explainer sees half of the documents: each token's window and what the feature is there. It names words. On the other
half the words alone must tell the tokens at which the feature fires from the others: *detection*, an AUROC (as Paulo et
al. 2024, arXiv:2410.13928, with a count of named words in place of a judge). That is asked of a random sample of each
kind's features, not of the best. `interp.sae.explain.shared_words` explains offline; a language model can take its
place. What such an explainer cannot say (grammar, position, a mood) counts as not interpretable: scores are comparable
with each other, not with a language model's.

Baselines: ``permuted``, the same codes at other tokens, explained and scored alike; ``random words``, as many words of
the corpus in place of those named.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.progress import bar
from interp.sae.dark import halves
from interp.sae.explain import Backend, Explanation, detection, shared_words
from interp.sae.versus import cut, usual_l0

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

_WORD = re.compile(r"\w+")
_many_words = partial(shared_words, words=20)  # a feature of a domain has more than a handful


def windows(m: Model, texts: Sequence[str], *, words: int = 3, context: int = 128) -> list[str]:
    """For each real token of the texts, in the order of `versus.gather`, the `words` words that end with its own.

    A token within a word has the whole word; one between two words those before it.
    """
    out: list[str] = []
    for text in texts:
        tokens = m.tokens([text], max_length=context, truncate=True)
        if tokens.offsets is None:
            raise SAEError("windows: these tokens do not say where in the text they stand; give texts, not ids")
        found = list(_WORD.finditer(text))
        at = 0
        for _, end in tokens.offsets[0]:
            while at < len(found) and found[at].start() < end:
                at += 1
            out.append(" ".join(word.group() for word in found[max(0, at - words) : at]))
    return out


@recorded
def interpretability(
    codes: Mapping[str, Tensor],
    near: Sequence[str],
    documents: Tensor,
    *,
    l0: int | None = None,
    sample: int = 32,
    groups: Sequence[Any] | None = None,
    backend: Backend = _many_words,
    top: int = 100,
    limit: int = 8000,
    least: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How well words tell where features fire: method, baseline, metric, value, low, high, features.

    ``value`` is the mean over features of each one's AUROC, ``low`` and ``high`` its 95 % bootstrap over features.

    Args:
        codes: for each kind of feature its codes [row, feature], none negative.
        near: the window of each row.
        documents: number of each row's document [row].
        l0: features per token for all kinds, as in `versus.compare`.
        sample: features of each kind, at random among those that fire at `least` rows of the first half.
        groups: of each document; those of a group stay in one half.
        backend: the explainer; `shared_words` with up to 20 words.
        top: windows that excite most, for the explainer.
        limit: windows of each half that are looked at.
        least: see `sample`.
        resamples: of the bootstrap.
        seed: of split, samples and permutation.
    """
    import pandas as pd

    n = len(documents)
    for name, z in codes.items():
        if len(z) != n or len(near) != n:
            raise SAEError(f"codes[{name!r}]: {len(z)} rows, with {len(near)} windows and {n} documents; one per token")
    owner = documents
    if groups is not None:
        numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        owner = torch.tensor([numbers[name] for name in groups])[documents]
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randperm(n, generator=g)
    fit, score = (part[torch.randperm(len(part), generator=g)[:limit].sort().values] for part in halves(n, seed, owner))
    seen, held = ([near[i] for i in part.tolist()] for part in (fit, score))
    vocabulary = sorted({word.lower() for window in held for word in _WORD.findall(window)})
    k = l0 or usual_l0(codes)
    lines: list[dict[str, Any]] = []
    said: dict[str, list[tuple[int, str, float]]] = {}
    with bar("explaining features", total=2 * len(codes)) as advance:
        for name, z in codes.items():
            z = cut(z, k, fit)
            for baseline, used in (("none", z), ("permuted", z[mixed])):
                a, b = used[fit], used[score]
                alive = ((a > 0).sum(0) >= least).nonzero().squeeze(1)
                features = alive[torch.randperm(len(alive), generator=g)[:sample]].tolist()
                scores: dict[str, list[float]] = {baseline: []}
                for feature in features:
                    order = a[:, feature].topk(min(top, len(seen))).indices.tolist()
                    e = backend([seen[i] for i in order], seen, a[:, feature].double())
                    scores[baseline].append(_detected(b[:, feature], e, held))
                    if baseline == "none":
                        said.setdefault(name, []).append((feature, e.text, scores[baseline][-1]))
                        words = tuple(random.Random(f"{seed} {feature}").sample(vocabulary, max(1, len(e.words))))
                        other = Explanation(", ".join(words), words)
                        scores.setdefault("random words", []).append(_detected(b[:, feature], other, held))
                for which, values in scores.items():
                    lines.append({"method": name, "baseline": which, "metric": "detection",
                                  **_mean(values, resamples, seed)})  # fmt: skip
                advance(1)
    frame = pd.DataFrame(lines)
    for found in said.values():
        found.sort(key=lambda one: -one[2] if one[2] == one[2] else 1.0)
    frame.attrs.update({"l0": k, "sample": sample, "windows": [len(seen), len(held)], "least": least, "seed": seed,
                        "said": said})  # fmt: skip
    return frame


def _detected(values: Tensor, e: Explanation, held: Sequence[str]) -> float:
    return detection(lambda _: values, e, held)


def _mean(found: Sequence[float], resamples: int, seed: int) -> dict[str, float]:
    """value, low, high, features: of the scores that are numbers (a feature silent on the second half has none)."""
    scores = torch.tensor([value for value in found if value == value], dtype=torch.float64)
    n, nan = len(scores), float("nan")
    if not n:
        return {"value": nan, "low": nan, "high": nan, "features": 0}
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    low, high = (scores[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
                 if resamples and n > 1 else (nan, nan))  # fmt: skip
    return {"value": float(scores.mean()), "low": low, "high": high, "features": n}
