"""Features with and without a word of their own, explained on one half of the documents and held to the other."""

from __future__ import annotations

import random

import pytest
import torch

import interp
from interp import sae
from interp.sae.interpretability import interpretability, windows

WORDS = ["river", "stone", "court", "judge", "apple", "green", "wind", "seven", "music", "paper", "lamp", "horse"]


def corpus(documents: int = 60, length: int = 40) -> tuple[list[str], torch.Tensor, list[str]]:
    """Windows of three random words [row], documents [row], the last word of each window."""
    draw = random.Random(0)
    texts = [draw.choices(WORDS, k=length) for _ in range(documents)]
    near = [" ".join(text[max(0, i - 2) : i + 1]) for text in texts for i in range(length)]
    return near, torch.arange(documents).repeat_interleave(length), [word for text in texts for word in text]


def test_a_feature_of_a_word_is_named_and_noise_is_not() -> None:
    near, documents, last = corpus()
    g = torch.Generator().manual_seed(0)
    meant = torch.tensor([[word in ("court", "judge"), word == "river"] for word in last]).float()
    meant = meant * (1 + torch.rand(meant.shape, generator=g))
    noise = (torch.rand(len(last), 8, generator=g) < 0.1).float()
    table = interpretability({"meant": meant, "noise": noise}, near, documents, l0=2, sample=8, resamples=100)
    at = table.set_index(["method", "baseline"])
    # the words name every firing token, and few others: a window also has the two words before
    assert at.value["meant", "none"] > 0.9
    assert at.low["meant", "none"] <= at.value["meant", "none"] <= at.high["meant", "none"]
    for control in (("meant", "permuted"), ("meant", "random words"), ("noise", "none"), ("noise", "permuted")):
        assert abs(at.value[control] - 0.5) < 0.1, control
    said = {feature: text for feature, text, _ in table.attrs["said"]["meant"]}
    assert set(said[0].split(", ")) == {"court", "judge"}
    assert said[1] == "river"
    assert at.features["noise", "none"] == 8


def test_passages_of_one_text_stay_in_one_half() -> None:
    """A feature that marks one text's own word looks interpretable only where the text is torn apart."""
    near, documents, _ = corpus(20)
    owner = documents // 2  # two passages each
    near = [f"{window} text{o}" for window, o in zip(near, owner.tolist(), strict=True)]
    z = torch.nn.functional.one_hot(owner, 10).float()
    torn = interpretability({"z": z}, near, documents, l0=1, sample=10)
    whole = interpretability({"z": z}, near, documents, l0=1, sample=10, groups=[i // 2 for i in range(20)])
    assert torn.value[0] == pytest.approx(1)
    assert whole.features[0] == 0  # on the other half it never fires
    assert torch.tensor(whole.value[0]).isnan()


def test_windows_end_with_each_tokens_word() -> None:
    m = interp.load("monet-mini")
    text = "The defendant's unreasonableness, he said, was plain."
    near = windows(m, [text, "One two"], words=2)
    tokens = m.tokens([text, "One two"])
    assert len(near) == int(tokens.mask.sum())
    spans = tokens.offsets[0]
    for window, (a, b) in zip(near, spans, strict=False):
        token = text[a:b].strip(" ,.'")
        assert not token or token in window
        assert len(window.split()) <= 2
    assert near[len(spans) - 1] == "was plain"
    assert near[-1] == "One two"
    with pytest.raises(sae.SAEError, match="not ids"):
        windows(m, [[1, 2, 3]])


def test_rows_must_fit() -> None:
    near, documents, _ = corpus(4)
    with pytest.raises(sae.SAEError, match="one per token"):
        interpretability({"z": torch.ones(3, 2)}, near, documents)
