"""STR-03. Activation Addition: Steering Language Models Without Optimization (Turner et al. 2023, arXiv:2308.10248).

Check: the pair is padded to equal tokens and its difference added at the first T positions only; c = 0 leaves every
bit; the probability of target words over c beats random additions of the same norms; perplexity on another topic is
printed. The model is a small writer trained here, whose words depend on a title that stands at the front of its text,
as the words of a large model depend on what its prompt is about. (What SmolLM2 shows: benchmarks/README.md.)
"""

from __future__ import annotations

import pytest
import torch

import interp
import steering
from steering.intervals import bootstrap
from steering.maps import PerToken

SPACE, TITLES, PLAIN, TOPICAL, EACH = 5, 10, 20, 50, 8  # titles 10..13, plain words 20..49, 8 words of each topic
WEDDINGS, OTHER = 0, 1
STRENGTHS = (0.5, 1.0, 2.0, 4.0)


def documents(n: int, g: torch.Generator, topic: int | None = None, length: int = 14) -> torch.Tensor:
    """Texts [text, pos]: behind a title, which stands among the first three words, six in ten words are its topic's."""
    ids = torch.randint(PLAIN, PLAIN + 30, (n, length), generator=g)
    ids[torch.rand(n, length, generator=g) < 0.1] = SPACE
    about = torch.randint(0, 4, (n,), generator=g) if topic is None else torch.full((n,), topic)
    place = torch.randint(0, 3, (n,), generator=g)
    word = TOPICAL + EACH * about[:, None] + torch.randint(0, EACH, (n, length), generator=g)
    told = (torch.arange(length) > place[:, None]) & (torch.rand(n, 1, generator=g) < 0.8)
    ids = torch.where(told & (torch.rand(n, length, generator=g) < 0.6), word, ids)
    titled = told.any(1)
    ids[titled, place[titled]] = TITLES + about[titled]
    return ids


@pytest.fixture(scope="module")
def writer() -> interp.Model:
    m, g = interp.load("tiny:llama"), torch.Generator().manual_seed(0)
    step = torch.optim.Adam(m.hf.parameters(), lr=5e-3)
    for _ in range(180):
        ids = documents(64, g)
        loss = torch.nn.functional.cross_entropy(m.hf(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        step.zero_grad()
        loss.backward()
        step.step()
    m.hf.eval().requires_grad_(False)
    return interp.Model(m.hf, name="writer")


def test_the_pair_is_padded_and_added_at_the_front_only(writer):
    v = steering.actadd(writer, [SPACE, TITLES + WEDDINGS], [SPACE], layer=1, pad=SPACE)
    assert v.record["tokens"] == 2
    prompt = torch.tensor([[21, 33, 40, 27, 35]])
    plain = writer.capture(prompt, "resid_pre[1]")["resid_pre[1]"][0]
    with writer.intervene(v * 3.0):
        steered = writer.capture(prompt, "resid_pre[1]")["resid_pre[1]"][0]
    a, b = (writer.capture([ids], "resid_pre[1]")["resid_pre[1]"][0] for ids in ([SPACE, TITLES], [SPACE, SPACE]))
    torch.testing.assert_close(steered[:2], plain[:2] + 3 * (a - b), atol=1e-5, rtol=0)
    assert torch.equal(steered[2:], plain[2:])
    with writer.intervene(v * 0.0):
        assert torch.equal(writer(prompt), writer(prompt))
    # where the text begins as the pair's second side does, the addition turns it into the first side
    with writer.intervene(v):
        there = writer.capture([[SPACE, SPACE, 40]], "resid_pre[1]")["resid_pre[1]"][0]
    torch.testing.assert_close(there[:2], a, atol=1e-5, rtol=0)


def test_words_of_the_topic_rise_with_c_beyond_random_additions(writer):
    v = steering.actadd(writer, [SPACE, TITLES + WEDDINGS], [SPACE], layer=1, pad=SPACE)
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(PLAIN, PLAIN + 30, (40, 6), generator=g)
    words = slice(TOPICAL + EACH * WEDDINGS, TOPICAL + EACH * (WEDDINGS + 1))
    elsewhere = documents(40, g, OTHER)

    def target(*edits):
        with writer.intervene(*edits):
            return writer(prompts)[:, -1].softmax(-1)[:, words].sum(-1)

    def perplexity(*edits):
        with writer.intervene(*edits):
            logp = writer(elsewhere)[:, :-1].log_softmax(-1)
        return float(logp.gather(-1, elsewhere[:, 1:, None]).mean().neg().exp())

    b = v.parts[0].map.tensors()["b"]
    controls = []
    for _ in range(20):
        random = torch.randn(b.shape, generator=g)
        random = random * (b.norm(dim=1) / random.norm(dim=1))[:, None]
        controls.append(steering.SteeringMap.of(writer, {v.sites[0]: PerToken(random)}, scope=v.scope))
    plain = target()
    print(f"\nc=0: P(topic's words) {plain.mean():.3f}; another topic's perplexity {perplexity():.1f}")
    own = {}
    for c in STRENGTHS:
        own[c] = target(v * c)
        low, high = bootstrap(own[c] - torch.stack([target(x * c) for x in controls]).mean(0))
        print(
            f"c={c}: {own[c].mean():.3f}, beyond random additions {low:.3f} .. {high:.3f}; "
            f"another topic's perplexity {perplexity(v * c):.1f}"
        )
        assert low > 0
    assert plain.mean() < own[0.5].mean() < own[1.0].mean()
