"""INT-03, Zhang et al. 2024 (arXiv:2411.14982), the text path: a latent is labelled from its top contexts, the label is
held to texts that it was not made from, and the latent then steers. Images are out of the first version."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import sae
from interp.sae import edits, explain, latents
from tests.papers.test_int_01_text_modules import WORDS, Vocabulary, corpus

SITE = "resid_post[1]"


@pytest.fixture(scope="module")
def planted() -> tuple[interp.Model, sae.SAE, int]:
    """A model in which 'court' carries a direction of its own, and the latent that has found it."""
    m = interp.load("tiny:llama")
    m.tokenizer = Vocabulary()
    direction = torch.nn.functional.normalize(torch.randn(m.d_model, generator=torch.Generator().manual_seed(0)), dim=0)
    with torch.no_grad():
        embedding = m.hf.get_input_embeddings().weight
        embedding[1 + WORDS.index("court")] += 6 * float(embedding.norm(dim=1).mean()) * direction
    x = m.capture(corpus(200), SITE)[SITE].flatten(0, 1)
    s = sae.train(x, SITE, arch="topk", d_sae=32, k=3, tokens=8000, batch_size=100, lr=5e-3, progress=False)
    court = m.tokens(corpus(60, 9)).ids == 1 + WORDS.index("court")
    fires = edits.capture(m, s, corpus(60, 9))[0] > 0
    return m, s, int((fires[court].float().mean(0) - fires[~court].float().mean(0)).argmax())


def test_the_planted_latent_gets_its_planted_label(planted: tuple[interp.Model, sae.SAE, int]) -> None:
    m, s, latent = planted
    table = explain.label(m, s, [latent], corpus(30, 5), corpus(60, 6))
    print(table.round(3).to_string())
    mine = table[(table.latent == latent) & (table.baseline == "none")].set_index("metric")
    assert mine.label.iloc[0].split(", ")[0] == "court"
    assert mine.value["score"] > 1
    random = table[(table.latent == latent) & (table.baseline == "random")].set_index("metric")
    assert mine.value["score"] > random.value["score"]
    contexts = latents.contexts(m, s, corpus(40, 7), [latent], top=5)
    assert contexts.token[0] == "court"
    near = contexts.token.eq("court") | contexts.before.str.contains("court")  # attention carries it to later tokens
    assert near.mean() >= 0.8


def test_and_it_steers(planted: tuple[interp.Model, sae.SAE, int]) -> None:
    """Where the latent is turned up, the stream moves towards what 'court' leaves there."""
    m, s, latent = planted
    plain = m.capture(["river stone"], SITE)[SITE][0, 0]
    court = m.capture(["court stone"], SITE)[SITE][0, 0]
    towards = torch.nn.functional.normalize(court - plain, dim=0)

    def along(i: int) -> float:
        with m.intervene(s.steer(i, 5.0)):
            moved = m.capture(["river stone"], SITE)[SITE][0, 0] - plain
        return float(torch.nn.functional.cosine_similarity(moved, towards, dim=0))

    others = sorted(along(i) for i in range(s.d_sae) if i != latent)
    print(f"cosine {along(latent):.2f}; the other latents' median {others[len(others) // 2]:.2f}")
    assert along(latent) > 0.1
    assert along(latent) > others[len(others) // 2]
