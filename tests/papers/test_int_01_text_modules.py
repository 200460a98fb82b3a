"""INT-01, Singh et al. 2023 (arXiv:2305.09863, SASC): text modules explained, and the explanation scored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import interp
from interp import sae
from interp.sae import explain

WORDS = [
    "law", "court", "judge", "contract", "tenant", "code", "function", "variable", "loop", "cell", "enzyme",
    "protein", "river", "mountain", "storm", "cloud", "bread", "soup", "pepper", "table", "window", "garden",
    "music", "violin", "drum", "paint", "brush", "canvas", "train", "ticket", "station", "ship", "harbour",
    "anchor", "coin", "market", "price", "winter", "summer", "leaf", "root", "seed", "stone", "metal", "glass",
]  # fmt: skip


def corpus(n: int = 150, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=9)) for _ in range(n)]


def keyword_module(words: Sequence[str], noise: float = 0.2) -> explain.Module:
    def module(texts: Sequence[str]) -> torch.Tensor:
        hits = [sum(w in words for w in text.lower().split()) for text in texts]
        return torch.tensor([h + random.Random(text).gauss(0, noise) for h, text in zip(hits, texts, strict=True)])

    return module


class Vocabulary:
    """A tokenizer with a token per word."""

    is_fast, pad_token_id, eos_token_id = False, 0, 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + WORDS.index(w) for w in text.lower().split()] for text in texts]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(WORDS[i - 1] for i in ids)


def test_keywords_are_recovered_and_scores_tell_true_from_random() -> None:
    draw, texts = random.Random(1), corpus()
    found = wanted = 0
    true, other = [], []
    for _ in range(12):
        words = draw.sample(WORDS, 3)
        module = keyword_module(words)
        e = explain.explain(module, texts)
        found += len(set(words) & set(e.words))
        wanted += len(words)
        true.append(explain.score(module, e, texts))
        wrong = tuple(draw.sample([w for w in WORDS if w not in words], 3))
        other.append(explain.score(module, explain.Explanation("random", wrong), texts))
    auroc = sum((a > b) + 0.5 * (a == b) for a in true for b in other) / (len(true) * len(other))
    print(f"keywords recovered {found / wanted:.2f}; true against random explanations AUROC {auroc:.3f}")
    assert found / wanted >= 0.8
    assert auroc >= 0.9


def test_a_language_model_can_take_the_place_of_the_summary() -> None:
    seen: dict[str, Any] = {}

    def backend(top: Sequence[str], ngrams: Sequence[str], values: torch.Tensor) -> explain.Explanation:
        seen.update(top=list(top), n=len(ngrams))
        return explain.Explanation("about courts", ("court",))

    e = explain.explain(keyword_module(["court"]), corpus(40), backend=backend, top=7)
    assert e.text == "about courts"
    assert len(seen["top"]) == 7
    assert all("court" in ngram.split() for ngram in seen["top"])


@pytest.mark.parametrize("kind", ["neuron", "expert", "latent"])
def test_it_runs_on_a_neuron_an_expert_and_a_latent(kind: str) -> None:
    m = interp.load("tiny:olmoe" if kind == "expert" else "tiny:llama")
    m.tokenizer = Vocabulary()
    texts = corpus(12)
    if kind == "latent":
        x = m.capture(texts, "resid_post[1]")["resid_post[1]"].flatten(0, 1)
        s = sae.train(x, "resid_post[1]", arch="topk", d_sae=10, k=2, tokens=400, batch_size=36, progress=False)
        module, site = explain.of_latent(m, s, 3), None
    elif kind == "neuron":
        site = "mlp_hidden[1, neuron=3]"
        module = explain.of_site(m, site)
    else:
        module, site = explain.of_expert(m, 1, 3), None
    values = module(texts)
    assert values.shape == (12,)
    if site:
        assert torch.allclose(values, m.capture(texts, site)[site].amax(1))
    if kind == "expert":
        acts = m.capture(texts, "expert_weight[1]").experts(1)
        assert torch.allclose(values, (acts.weights * (acts.ids == 3)).sum(-1).amax(1))
    e = explain.explain(module, texts, limit=60)
    assert all(word in WORDS for word in e.words)
    with pytest.raises(sae.SAEError, match="one number per token"):
        explain.of_site(m, "resid_post[1]")


def test_nothing_to_explain_is_said() -> None:
    with pytest.raises(sae.SAEError, match="no words"):
        explain.explain(keyword_module(["law"]), ["...", "!"])
    with pytest.raises(sae.SAEError, match="a number per text"):
        explain.explain(lambda texts: torch.zeros(3, 2), corpus(3))
    quiet = explain.explain(lambda texts: torch.zeros(len(texts)), corpus(3))
    assert quiet.words == ()
    assert explain.score(keyword_module(["law"]), quiet, corpus(3)) == 0
