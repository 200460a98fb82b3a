"""Absorption and isolation, where what is absorbed and what is entangled is planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import interp
from interp import sae
from interp.sae.absorption import absorption, first_letters
from interp.sae.isolation import isolation

WORDS, EACH = 100, 6


def planted(absorbed: int) -> tuple[sae.SAE, torch.Tensor, torch.Tensor]:
    """Activations: a direction of the word, and u where the word has the property (half of them). The SAE has a latent
    for u and one per word; the first is silent on `absorbed` words of the property, whose own latents carry u."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=g)).Q
    u, w = basis[0], basis[1 : WORDS + 1]
    word = torch.arange(WORDS).repeat_interleave(EACH)
    has = word < WORDS // 2
    x = 4 * w[word] + 2 * has[:, None] * u + 0.05 * torch.randn(len(word), 128, generator=g)
    decoder = torch.cat([u[None], w])
    decoder[1 : absorbed + 1] += u / 2
    encoder = torch.cat([(u - w[:absorbed].sum(0))[None], w])
    at = ("resid_post[1]",)
    bias = torch.full((WORDS + 1,), -0.5)
    return sae.SAE(decoder, torch.zeros(128), encoder, bias, "standard", sites=at, targets=at), x, has


@pytest.mark.parametrize("absorbed", [0, 15, 30])
def test_the_planted_share_is_found(absorbed: int) -> None:
    s, x, has = planted(absorbed)
    table = absorption(s, x, {"property": has}, resamples=200).set_index(["metric", "baseline"])
    share = absorbed / (WORDS // 2)
    row = table.loc["absorbed", "none"]
    assert row.value == pytest.approx(share, abs=0.08)
    assert row.low <= row.value <= row.high
    assert row.main[0] == 0
    assert row.probe_f1 > 0.99
    assert table.loc["fraction", "none"].value == pytest.approx(share, abs=0.1)
    assert table.loc["absorbed", "exchanged"].value <= share / 2


def identity(m: interp.Model) -> sae.SAE:
    return dictionary(torch.eye(m.d_model), 0.0)


def test_words_of_a_vocabulary_and_their_letters(smollm2) -> None:
    m = interp.load("tiny:llama", smollm2.tokenizer, vocab_size=smollm2.d_vocab)
    x, letters = first_letters(m, identity(m), words=150)
    assert x.shape == (150, m.d_model)
    assert torch.stack(list(letters.values())).sum(0).eq(1).all()  # each word begins with one letter
    shown = x[letters["s"]]
    words = [t for i in range(m.d_vocab) if (t := m.tokenizer.decode([i])).lower().startswith(" s") and t[1:].isalpha()]
    rows = m.capture([f"The word{w}" for w in words[:400]], "resid_post[1]")
    last = rows["resid_post[1]"][torch.arange(len(rows.mask)), rows.tokens.last]
    near = torch.cdist(shown, last, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert (near < 1e-4).any()  # those among the first 400 are the very activations behind "The word"


def test_bad_input_of_absorption() -> None:
    m = interp.load("tiny:llama")
    with pytest.raises(sae.SAEError, match="has no tokenizer"):
        first_letters(m, identity(m))
    with pytest.raises(sae.SAEError, match="has 3 rows, and there are 5"):
        absorption(identity(m), torch.zeros(5, m.d_model), {"a": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(sae.SAEError, match="none has 10 rows"):
        absorption(identity(m), torch.zeros(5, m.d_model), {"a": torch.ones(5, dtype=torch.bool)})


def entities() -> tuple[torch.Tensor, dict[str, list[int]], torch.Tensor, torch.Tensor]:
    """Activations with two attributes of four values, each a direction of its own."""
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=g)).Q
    first, second = (torch.randint(0, 4, (400,), generator=g) for _ in range(2))
    x = 3 * basis[first] + 3 * basis[4 + second] + 0.1 * torch.randn(400, 24, generator=g)
    return x, {"first": first.tolist(), "second": second.tolist()}, basis[:4], basis[4:8]


def dictionary(rows: torch.Tensor, bias: float) -> sae.SAE:
    n, d = rows.shape
    return sae.SAE(rows, torch.zeros(d), rows, torch.full((n,), bias), "standard", sites=("resid_post[1]",),
                   targets=("resid_post[1]",))  # fmt: skip


def test_separate_latents_isolate_and_mixed_ones_do_not() -> None:
    x, attributes, a, b = entities()
    apart = isolation(dictionary(torch.cat([a, b]), -0.5), x, attributes, k=4, resamples=100)
    value = apart.set_index(["attribute", "metric", "baseline"]).value
    for name, latents in (("first", {0, 1, 2, 3}), ("second", {4, 5, 6, 7})):
        assert value[name, "score", "none"] > 0.98
        assert set(apart[(apart.attribute == name) & (apart.baseline == "none")].latents.iloc[0]) == latents
        assert value[name, "cause", "activation"] > 0.98
        assert value[name, "isolation", "activation"] < 0.05
        assert value[name, "score", "random"] < value[name, "score", "none"]
    mixed = torch.cat([(a[i] + b[j])[None] for i in range(4) for j in range(4)]) / 2**0.5
    entangled = replace(dictionary(mixed, -3.0), decoder=mixed * 18**0.5 / (18**0.5 - 3))  # rebuilds x as well
    both = isolation(entangled, x, attributes, k=16, resamples=100)
    value = both.set_index(["attribute", "metric", "baseline"]).value
    assert value["first", "cause", "none"] > 0.9
    assert value["first", "isolation", "none"] < 0.2


def test_what_cannot_be_isolated_is_refused() -> None:
    x, attributes, a, b = entities()
    s = dictionary(torch.cat([a, b]), -0.5)
    with pytest.raises(sae.SAEError, match="at least two"):
        isolation(s, x, {"first": attributes["first"]})
    with pytest.raises(sae.SAEError, match=r"attributes\['second'\] has 3 values"):
        isolation(s, x, {**attributes, "second": [1, 2, 3]})
    with pytest.raises(sae.SAEError, match="does not vary"):
        isolation(s, x, {**attributes, "second": [1] * 400})
    with pytest.raises(sae.SAEError, match="k=9: only 8 latents fire"):
        isolation(s, x, attributes, k=9)
    with pytest.raises(sae.SAEError, match="one value only"):
        isolation(s, x, {**attributes, "second": [0] * 399 + [1]}, k=4)
    with pytest.raises(sae.SAEError, match="5 pairs of rows"):
        isolation(s, x, attributes, k=4, pairs=5)
