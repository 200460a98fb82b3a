"""Asking in words: a prompt probe whose score does not hang on one prompt, one name or one answer word.

    facts = [("Paris", "France"), (("the Hague", "Den Haag"), "Netherlands"), ...]
    table = prompt_probe(m, facts, ["{} is a town in", "{} lies in"], {"France": [" France"], ...})

A cloze such as "Paris is a town in" asks for knowledge, and gets the prompt's taste too. Cao et al. 2022, "Can Prompt
Probe Pretrained Language Models?" (arXiv:2203.12258), name three biases: prompts prefer some answers; instances and
answers are known by some names and not by others; and samples hold some answers more often. Each is cut by averaging
over what it hangs on, the backdoor adjustment: over paraphrases, over verbalisers, and over labels with equal weight.

    score[i, p, l]      log P(label l | prompt p, instance i), averaged over names of i and words for l
    preference[p, l]    its mean over instances, each label weighing the same, less that over labels: what the prompt
                        would say of nobody in particular. If the prompt knew all and had no taste, it would be 0.

Rows of the result: `prompt` for each prompt alone; `averaged` over prompts (right where their tastes cancel); and
`centred`, averaged after each prompt's preference is taken off (right where they do not). Each as accuracy over the
sample as it is and over balanced labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.calls import recorded
from interp.metrics import last_logits
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd

Names = str | Sequence[str]


@recorded
def prompt_probe(
    m: Any, facts: Sequence[tuple[Names, str]], prompts: Sequence[str], verbalisers: Mapping[str, Sequence[str]], *,
    batch_size: int = 32, draws: int = 1000, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Accuracy of the model's answers, prompt by prompt and debiased.

    Args:
        m: the model, with a tokenizer.
        facts: (name or names of the instance, label).
        prompts: paraphrases, each with one {} for the name; the answer follows.
        verbalisers: label -> next words that say it, with their leading space. Only the first token of each is read.
        batch_size: prompts per forward pass.
        draws: of the bootstrap over facts.
        seed: of it.

    Returns:
        Table: method ("prompt" | "averaged" | "centred"), prompt, label, sample ("raw" | "balanced"), metric
        ("accuracy", and for each prompt and label "preference" in nats), value, low, high. `.attrs`: `biased`, the
        prompts whose preference for some label leaves out 0; `spread`, best less worst prompt's balanced accuracy.

    Raises ProbeError for labels without a verbaliser, words of two labels with the same first token, a prompt without
    its place.
    """
    _check(facts, prompts, verbalisers)
    scores = cloze_scores(m, facts, prompts, verbalisers, batch_size)
    truth = np.array([list(verbalisers).index(label) for _, label in facts])
    table = from_scores(scores, truth, list(prompts), list(verbalisers), draws=draws, seed=seed)
    table.attrs |= {"model": m.name, "fingerprint": m.fingerprint}
    return table


def cloze_scores(
    m: Any, facts: Sequence[tuple[Names, str]], prompts: Sequence[str], verbalisers: Mapping[str, Sequence[str]],
    batch_size: int = 32,
) -> np.ndarray:  # fmt: skip
    """log P of each label [fact, prompt, label], nats, averaged over the fact's names and the label's words."""
    words = _first_tokens(m, verbalisers)
    texts, where = [], []
    for i, (names, _) in enumerate(facts):
        for name in [names] if isinstance(names, str) else names:
            for p, prompt in enumerate(prompts):
                texts.append(prompt.format(name))
                where.append((i, p))
    total, count = np.zeros((len(facts), len(prompts), len(words))), np.zeros((len(facts), len(prompts), 1))
    for start in range(0, len(texts), batch_size):
        tokens = m.tokens(texts[start : start + batch_size])
        logp = last_logits(m(tokens), tokens).float().log_softmax(-1).cpu()
        each = torch.stack([logp[:, ids].mean(1) for ids in words], 1).numpy()
        for row, (i, p) in zip(each, where[start : start + batch_size], strict=True):
            total[i, p] += row
            count[i, p] += 1
    return total / count


def from_scores(
    scores: np.ndarray, truth: np.ndarray, prompts: Sequence[str], labels: Sequence[str], *, draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """The table from log-probabilities [fact, prompt, label] and right labels [fact] as numbers."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    kinds = np.unique(truth)
    members = [np.flatnonzero(truth == k) for k in kinds]
    # Resampled within labels: how often each occurs is the sample's, not the prompt's.
    resampled = [np.concatenate([rng.choice(own, len(own)) for own in members]) for _ in range(draws)]
    raw = np.full(len(truth), 1 / len(truth))
    balanced = np.zeros(len(truth))
    for own in members:
        balanced[own] = 1 / (len(own) * len(members))

    def mean(values: np.ndarray, weight: np.ndarray) -> tuple[float, float, float]:
        draws_of = [float(weight[i] @ values[i] / weight[i].sum()) for i in resampled]
        low, high = np.quantile(draws_of, [0.025, 0.975])
        return float(weight @ values), float(low), float(high)

    taste = np.tensordot(balanced, scores, 1)  # [prompt, label]
    taste -= taste.mean(1, keepdims=True)
    ways = [("prompt", prompt, scores[:, p]) for p, prompt in enumerate(prompts)]
    ways += [("averaged", "all", scores.mean(1)), ("centred", "all", (scores - taste).mean(1))]
    rows: list[dict[str, Any]] = []
    for method, prompt, score in ways:
        right = (score.argmax(1) == truth).astype(float)
        for sample, weight in (("raw", raw), ("balanced", balanced)):
            value, low, high = mean(right, weight)
            rows.append({"method": method, "prompt": prompt, "label": "all", "sample": sample, "metric": "accuracy",
                         "value": value, "low": low, "high": high})  # fmt: skip
    for p, prompt in enumerate(prompts):
        centred = scores[:, p] - scores[:, p].mean(1, keepdims=True)
        for k, label in enumerate(labels):
            value, low, high = mean(centred[:, k], balanced)
            rows.append({"method": "prompt", "prompt": prompt, "label": label, "sample": "balanced",
                         "metric": "preference", "value": value, "low": low, "high": high})  # fmt: skip
    table = pd.DataFrame(rows)
    taste_rows = table[table.metric == "preference"]
    single = table[(table.method == "prompt") & (table.metric == "accuracy") & (table["sample"] == "balanced")].value
    table.attrs = {
        "biased": sorted(set(taste_rows[(taste_rows.low > 0) | (taste_rows.high < 0)].prompt)),
        "spread": float(single.max() - single.min()), "facts": len(truth), "seed": seed,
    }  # fmt: skip
    return table


def _first_tokens(m: Any, verbalisers: Mapping[str, Sequence[str]]) -> list[list[int]]:
    found: list[list[int]] = []
    owner: dict[int, str] = {}
    for label, words in verbalisers.items():
        ids = sorted({m.tokens(w, special=False).row(0)[0].item() for w in words})
        for i in ids:
            if i in owner:
                raise ProbeError(
                    f"verbalisers: words of {owner[i]!r} and {label!r} begin with the same token "
                    f"{m.tokenizer.decode([i])!r}; choose others"
                )
            owner[i] = label
        found.append(ids)
    return found


def _check(facts: Any, prompts: Sequence[str], verbalisers: Mapping[str, Sequence[str]]) -> None:
    if not facts or not prompts or len(verbalisers) < 2:
        raise ProbeError("prompt_probe: give facts, prompts, and verbalisers of at least two labels")
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise ProbeError(f"prompts: {prompt!r}; expected {{}} once, in the name's place")
    for names, label in facts:
        if label not in verbalisers or not verbalisers[label]:
            raise ProbeError(f"facts: label {label!r} has no verbaliser; there are {', '.join(verbalisers)}")
        if not names:
            raise ProbeError(f"facts: a fact of {label!r} has no name")
