"""Labelled documents as batches of windows: what statistics and losses are computed over.

A document is cut into windows of at most `context` tokens. Windows of like length share a batch, so little is padded.
Every result is kept per document, because documents, not tokens, are what was drawn: tokens of one document are alike,
and an interval that took them for independent would be too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.activations import Tokens
from interp.experts.units import ExpertError
from interp.progress import bar

Labelled = Mapping[str, Sequence[str]]

#: Documents that a bounded number of tokens is spread over, where there are so many.
SPREAD = 20

#: Tokens in a batch on a processor: with more, activations and logits go through memory (a quarter slower at 4,096).
ON_PROCESSOR = 1024

#: Characters that a token has at most, in all but odd texts; those give fewer tokens than their share.
LONGEST = 40


@dataclass(frozen=True)
class Window:
    """A run of tokens of one document; `document` counts through all labels."""

    label: int
    document: int
    ids: list[int]


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows padded to one length, with the label and document of each row."""

    tokens: Tokens
    label: Tensor  # [batch]
    document: Tensor  # [batch]


@dataclass(frozen=True)
class Corpus:
    """Labelled texts as windows of token ids, made once and run many times."""

    labels: list[str]
    windows: list[Window]
    documents: Tensor  # label of each document [document]

    @property
    def n_tokens(self) -> int:
        return sum(len(w.ids) for w in self.windows)

    @property
    def present(self) -> list[str]:
        """The labels that have windows: all, unless this is what `only` left."""
        there = {w.label for w in self.windows}
        return [label for number, label in enumerate(self.labels) if number in there]

    def only(self, labels: Sequence[str]) -> Corpus:
        """The windows of some labels; labels and documents keep their numbers."""
        wanted = {self.labels.index(label) for label in labels}
        return Corpus(self.labels, [w for w in self.windows if w.label in wanted], self.documents)

    def order(self) -> list[Window]:
        """The windows as batches take them: longest first."""
        return sorted(self.windows, key=lambda w: -len(w.ids))

    def first(self, windows: int) -> Corpus:
        """The windows that batches take first; all of them in their own order where that is all."""
        return self if windows >= len(self.windows) else Corpus(self.labels, self.order()[:windows], self.documents)

    def batches(self, model: Any, batch_tokens: int = 4096, what: str = "running texts") -> Iterator[Batch]:
        """All windows, longest first, in batches of about `batch_tokens` tokens with padding; under a bar that says
        `what`. On a processor batches are of at most `ON_PROCESSOR` tokens."""
        if model.device.type == "cpu":
            batch_tokens = min(batch_tokens, ON_PROCESSOR)
        order = self.order()
        start = 0
        with bar(what, len(order)) as advance:
            while start < len(order):
                width = len(order[start].ids)
                rows = order[start : start + max(1, batch_tokens // width)]
                start += len(rows)
                ids = torch.zeros(len(rows), width, dtype=torch.long)
                mask = torch.zeros(len(rows), width, dtype=torch.bool)
                for i, window in enumerate(rows):
                    ids[i, : len(window.ids)] = torch.tensor(window.ids)
                    mask[i, : len(window.ids)] = True
                tokens = Tokens(ids, mask).to(model.device)
                yield Batch(tokens, torch.tensor([w.label for w in rows]), torch.tensor([w.document for w in rows]))
                advance(len(rows))


def corpus(model: Any, texts: Labelled | Corpus, max_tokens: int | None = None, context: int | None = None) -> Corpus:
    """Tokenises labelled texts: label -> documents.

    Args:
        model: whose tokenizer and context are used.
        texts: label -> documents; a Corpus is returned as it is.
        max_tokens: per label; documents are taken in order until it is reached. None gives more than its share of
            twenty, or of all there are, so that an interval over documents has some to go by.
        context: longest window; default the model's context, at most 1,024.

    Raises ExpertError for no label, a label without text, or a model without tokenizer.
    """
    if isinstance(texts, Corpus):
        return texts
    if not texts:
        raise ExpertError("texts: no label given; expected {label: [text, ...]}")
    if model.tokenizer is None:
        raise ExpertError(f"{model.name} has no tokenizer; load it with interp.load(model, tokenizer=...)")
    context = context or min(model.n_ctx or 1024, 1024)
    windows: list[Window] = []
    owners: list[int] = []
    for number, (label, documents) in enumerate(texts.items()):
        if isinstance(documents, str):
            raise ExpertError(f"texts[{label!r}]: a single text; expected a list of texts")
        room = max_tokens
        share = None if room is None else max(2, -(-room // min(SPREAD, max(1, len(documents)))))
        for text in documents:
            if not text.strip() or room == 0:
                continue
            start = (
                text if share is None else text[: LONGEST * share]
            )  # a novel need not be tokenised for its first page
            ids = model.tokenizer(start, verbose=False)["input_ids"][:share][:room]
            room = None if room is None else room - len(ids)
            pieces = [ids[i : i + context] for i in range(0, len(ids), context)]
            pieces = [p for p in pieces if len(p) > 1]  # a lone token predicts nothing
            windows += [Window(number, len(owners), p) for p in pieces]
            if pieces:
                owners.append(number)
        if number not in owners:
            raise ExpertError(f"texts[{label!r}]: no text of two tokens or more among {len(documents)} documents")
    return Corpus(list(texts), windows, torch.tensor(owners))
