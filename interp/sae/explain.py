"""Saying in words what a number computed from text is about, and measuring whether the words are true.

Anything that turns texts into numbers can be explained: a latent, a neuron, an expert (`of_latent`, `of_site`,
`of_expert`). The way is that of SASC (Singh et al. 2023, arXiv:2305.09863): run the module on every n-gram of a corpus,
summarise those that excite it, then write texts that fit the summary and texts that do not, and see if the module tells
them apart::

    e = explain(of_latent(m, s, 17), corpus)
    e.text                                  "law, court, judge"
    score(module, e, corpus)                how many standard deviations higher on texts that fit it
    detection(module, e, held_out)          AUROC of the explanation as a predictor of where the module is active

The summary is made offline, by the words that the exciting n-grams share; a language model takes its place as
``backend``, any function from (n-grams, values) to an `Explanation`. Images are out of this first version.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.sae.autoencoder import SAE

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

#: Texts -> a number for each [text].
Module = Callable[[Sequence[str]], Tensor]
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Explanation:
    """What a module is said to be about.

    Attributes:
        text: for people.
        words: the words that a text has if it fits; what `score` and `detection` go by.
    """

    text: str
    words: tuple[str, ...]

    def fits(self, text: str) -> float:
        """How well a text fits: how many of its words are the explanation's."""
        return float(sum(word in self.words for word in _WORD.findall(text.lower())))


#: (the n-grams that excite most, all n-grams, values of all) -> an explanation.
Backend = Callable[[Sequence[str], Sequence[str], Tensor], Explanation]


def shared_words(top: Sequence[str], ngrams: Sequence[str], values: Tensor, *, words: int = 5) -> Explanation:
    """The offline summary: words whose n-grams excite the module, on average at least half as much as the best word's.

    Means are drawn towards the mean of all n-grams, as if each word had been seen twice more with it: a rare word that
    stood beside the right one by chance does not win.
    """
    mean = float(values.mean())
    total: dict[str, float] = {}
    count: dict[str, int] = {}
    for ngram, value in zip(ngrams, values.tolist(), strict=True):
        for word in set(_WORD.findall(ngram.lower())):
            total[word] = total.get(word, 0.0) + value - mean
            count[word] = count.get(word, 0) + 1
    here = {word for ngram in top for word in _WORD.findall(ngram.lower())}
    lift = {word: total[word] / (count[word] + 2) for word in sorted(here)}
    best = max(lift.values(), default=0.0)
    chosen = sorted((w for w in lift if best > 0 and lift[w] >= best / 2), key=lambda w: -lift[w])[:words]
    return Explanation(", ".join(chosen) or "nothing in particular", tuple(chosen))


def ngrams_of(corpus: Sequence[str], n: int = 3, limit: int = 5000, seed: int = 0) -> list[str]:
    """Every run of one to n words of the corpus, once; a random `limit` of them if there are more."""
    found: dict[str, None] = {}
    for text in corpus:
        words = _WORD.findall(text)
        for size in range(1, n + 1):
            found.update(dict.fromkeys(" ".join(words[i : i + size]) for i in range(len(words) - size + 1)))
    every = list(found)
    return every if len(every) <= limit else random.Random(seed).sample(every, limit)


def explain(
    module: Module, corpus: Sequence[str], *, backend: Backend = shared_words, n: int = 3, top: int = 30,
    limit: int = 5000, seed: int = 0,
) -> Explanation:  # fmt: skip
    """An explanation from the `top` n-grams of a corpus that excite the module most."""
    ngrams = ngrams_of(corpus, n, limit, seed)
    if not ngrams:
        raise SAEError("corpus: there are no words in it")
    values = module(ngrams).double()
    if values.shape != (len(ngrams),):
        raise SAEError(f"module: expected a number per text [{len(ngrams)}], got {list(values.shape)}")
    order = values.topk(min(top, len(ngrams))).indices.tolist()
    return backend([ngrams[i] for i in order], ngrams, values)


def score(module: Module, e: Explanation, corpus: Sequence[str], *, texts: int = 40, length: int = 8, seed: int = 0
          ) -> float:  # fmt: skip
    """SASC's score: mean over texts that fit less mean over texts that do not, in standard deviations of the latter.

    Texts are `length` random words of the corpus; in those that fit, two of the words are the explanation's.
    """
    draw = random.Random(seed)
    vocabulary = sorted({w.lower() for text in corpus for w in _WORD.findall(text)} - set(e.words))
    if not vocabulary:
        raise SAEError("corpus: it has no words beside the explanation's")
    if not e.words:
        return 0.0
    without = [[draw.choice(vocabulary) for _ in range(length)] for _ in range(texts)]
    fitting = [list(words) for words in without]
    for words in fitting:
        for place in draw.sample(range(length), min(2, length)):
            words[place] = draw.choice(e.words)
    a, b = (module([" ".join(words) for words in group]).double() for group in (fitting, without))
    spread = torch.cat([a - a.mean(), b - b.mean()]).std()
    return float((a.mean() - b.mean()) / spread.clamp_min(1e-9))


def detection(module: Module, e: Explanation, held_out: Sequence[str], *, threshold: float = 0.0) -> float:
    """AUROC of the explanation's fit as a predictor of the texts at which the module exceeds the threshold.

    NaN where the module is active at all of these texts or at none.
    """
    active = module(list(held_out)) > threshold
    fit = torch.tensor([e.fits(text) for text in held_out])
    yes, no = fit[active], fit[~active]
    if not len(yes) or not len(no):
        return float("nan")
    above = (yes[:, None] > no).double() + 0.5 * (yes[:, None] == no).double()
    return float(above.mean())


# -- modules ---------------------------------------------------------------------------------------------------
def _largest(m: Model, texts: Sequence[str], sites: list[str], read: Callable[..., Tensor], run: int) -> Tensor:
    out = []
    for first in range(0, len(texts), run):
        tokens = m.tokens(list(texts[first : first + run]), truncate=True)
        acts = m.capture(tokens, sites)
        with torch.no_grad():
            out.append(read(acts).float().masked_fill(~acts.mask, -torch.inf).amax(1).cpu())
    return torch.cat(out)


def of_latent(m: Model, s: SAE, latent: int, *, run: int = 32) -> Module:
    """The largest value of a latent over a text's tokens."""
    s.latent(latent)
    return lambda texts: _largest(m, texts, list(s.sites), lambda acts: s.encode(s.read(acts))[..., latent], run)


def of_site(m: Model, site: str, *, run: int = 32) -> Module:
    """The largest value of one number of a site, such as ``mlp_hidden[5, neuron=17]``."""
    axes = m.resolve(site)[0].axes
    if axes != ("batch", "pos"):
        raise SAEError(
            f"site={site!r} has the axes {axes}; name one number per token, such as mlp_hidden[5, neuron=17]"
        )
    return lambda texts: _largest(m, texts, [site], lambda acts: acts[site], run)


def of_expert(m: Model, layer: int, expert: int, *, run: int = 32) -> Module:
    """The largest weight with which a text's tokens use an expert; on Monet expert i * n + j."""
    monet = bool(m.anatomy.having("g1"))
    sites = [f"g1[{layer}]", f"g2[{layer}]"] if monet else [f"expert_weight[{layer}]"]

    def read(acts: Any) -> Tensor:
        found = acts.experts(layer)
        return found.weights(expert) if monet else (found.weights * (found.ids == expert)).sum(-1)

    return lambda texts: _largest(m, texts, sites, read, run)


# -- latents, labelled and held to it --------------------------------------------------------------------------
@recorded
def label(
    m: Model, s: SAE, latents: Sequence[int], fit: Sequence[str], held_out: Sequence[str], *,
    backend: Backend = shared_words, limit: int = 5000, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Labels of latents, scored on texts that made no label: latent, label, metric, value, baseline.

    ``detection`` is the AUROC of the label on held-out texts, ``score`` SASC's; ``baseline="random"`` is as many random
    words of those texts in place of the label's. At most `limit` n-grams of `fit` are tried on each latent.
    """
    import pandas as pd

    vocabulary = sorted({w.lower() for text in held_out for w in _WORD.findall(text)})
    draw = random.Random(seed)
    rows = []
    for latent in latents:
        module = of_latent(m, s, latent)
        e = explain(module, fit, backend=backend, limit=limit, seed=seed)
        others = [w for w in vocabulary if w not in e.words]
        words = tuple(draw.sample(others, min(len(others), max(1, len(e.words)))))
        for baseline, said in (("none", e), ("random", Explanation(", ".join(words), words))):
            values = {"detection": detection(module, said, held_out), "score": score(module, said, held_out, seed=seed)}
            rows += [{"latent": latent, "label": said.text, "metric": k, "value": v, "baseline": baseline}
                     for k, v in values.items()]  # fmt: skip
    return pd.DataFrame(rows)
