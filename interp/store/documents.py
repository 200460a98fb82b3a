"""From texts to windows: what the model is run on, and in which order.

A *document* is one text (or one list of token ids). Documents are dealt in *ranges* of a fixed number, the unit of work
and of resumption. Within a range each document is tokenised and cut into *windows* of at most `context` tokens; a
window starts as the tokenizer starts a text (with its BOS, say), so that the model never sees a start it does not know.
Nothing here looks beyond the current range, so a stream of any length passes in constant memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.activations import Tokens
from interp.store.errors import StoreError

Label = str | int | float | bool | None
_TOKENISE_AT_ONCE = 64
_MISSING = object()


@dataclass(frozen=True)
class Document:
    """One text or one list of token ids, with its place in the input and its label."""

    index: int
    content: str | list[int]
    label: Label = None


@dataclass(frozen=True)
class Window:
    """A run of tokens that goes through the model as one row.

    Attributes:
        ids: token ids.
        spans: start and end character of each token in its document, -1 where unknown.
        special: True for tokens that mark structure (BOS, EOS, ...), which are no part of the text.
    """

    document: int
    number: int
    label: Label
    ids: list[int]
    spans: list[tuple[int, int]]
    special: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Range:
    """Documents `first` to ``first + count``, the unit of work. `documents` is empty when another worker does it."""

    index: int
    first: int
    count: int
    documents: list[Document]

    @property
    def sha256(self) -> str:
        """Fingerprint of the texts and labels, independent of the model."""
        digest = hashlib.sha256()
        for doc in self.documents:
            if isinstance(doc.content, str):
                data = b"text" + doc.content.encode("utf-8", "surrogatepass")
            else:
                data = b"ids" + array("q", doc.content).tobytes()
            for part in (data, repr(doc.label).encode("utf-8", "surrogatepass")):
                digest.update(len(part).to_bytes(8, "little") + part)  # the length keeps "a","bc" apart from "ab","c"
        return digest.hexdigest()


class Documents:
    """The input of a write as a sequence of ranges.

    Args:
        texts: a list of texts, a generator, `Tokens`, a LongTensor [document, pos], lists of token ids, or a Hugging
            Face dataset (rows with a `text_column`, or with ``input_ids``).
        labels: one per document, or the name of a column of the dataset.
        text_column: where a dataset keeps its text.
        empty: what to do with a document without text: ``"raise"`` or ``"skip"``.
    """

    def __init__(self, texts: Any, labels: Any = None, *, text_column: str = "text", empty: str = "raise") -> None:
        if empty not in ("raise", "skip"):
            raise StoreError(f"empty={empty!r}: expected 'raise' or 'skip'")
        self.texts: Any = [texts] if isinstance(texts, str) else _plain(texts)
        self.text_column, self.empty = text_column, empty
        self.label_column = labels if isinstance(labels, str) else None
        self.labels: Any = None if isinstance(labels, str) else _plain(labels)
        if isinstance(texts, Mapping):  # a DatasetDict, say: going through it would take its keys for texts
            raise StoreError(f"texts has the parts {', '.join(map(str, texts))}; give one of them, or their texts as "
                             "one list with labels=...")
        if not isinstance(self.texts, Iterable):
            raise StoreError(f"texts={texts!r}: expected texts, token ids or a dataset, not {type(texts).__name__}")
        self.count = _length(self.texts)
        if self.count == 0:
            raise StoreError("texts is empty: there is nothing to run the model on")
        n_labels = _length(self.labels)
        if self.count is not None and n_labels is not None and self.count != n_labels:
            raise StoreError(f"labels: {n_labels} labels for {self.count} texts; each text needs exactly one")

    def ranges(self, size: int, skip: Callable[[int], bool] | None = None) -> Iterator[Range]:
        """Every range of `size` documents in order; one for which ``skip(index)`` is true comes without documents.

        A list or a dataset is not even read for a skipped range; a stream has to be, to get past it.
        """
        step = 0
        stream = self._stream()
        while True:
            skipped = skip is not None and skip(step)
            if self._random_access:
                assert self.count is not None
                first, stop = step * size, min((step + 1) * size, self.count)
                if first >= stop:
                    return
                documents = [] if skipped else [self._document(i, *self._at(i)) for i in range(first, stop)]
            else:
                documents = [self._document(i, item, label) for i, item, label in islice(stream, size)]
                if not documents:
                    if step == 0:
                        raise StoreError("texts is empty: there is nothing to run the model on")
                    return
                first, stop = documents[0].index, documents[-1].index + 1
            yield Range(step, first, stop - first, [] if skipped else documents)
            step += 1

    @property
    def _random_access(self) -> bool:
        indexable = self.labels is None or hasattr(self.labels, "__getitem__")
        return self.count is not None and hasattr(self.texts, "__getitem__") and indexable

    def _at(self, i: int) -> tuple[Any, Label]:
        return self.texts[i], None if self.labels is None else self.labels[i]

    def _stream(self) -> Iterator[tuple[int, Any, Label]]:
        labels = iter(self.labels) if self.labels is not None else None
        n = 0
        for n, item in enumerate(self.texts, start=1):
            label = None if labels is None else next(labels, _MISSING)
            if label is _MISSING:
                raise StoreError(f"labels: they end after {n - 1}, but there is a text {n - 1}; each text needs one")
            yield n - 1, item, label  # type: ignore[misc]
        if labels is not None and next(labels, _MISSING) is not _MISSING:
            raise StoreError(f"labels: more than {n} labels for {n} texts; each text needs exactly one")

    def _document(self, i: int, item: Any, label: Label) -> Document:
        if isinstance(item, Mapping):
            if self.label_column is not None:
                label = self._column(item, self.label_column, "labels")
            item = item["input_ids"] if self.text_column not in item and "input_ids" in item else (
                self._column(item, self.text_column, "text_column"))
        elif self.label_column is not None:
            raise StoreError(f"labels={self.label_column!r} names a column, but texts is no dataset with columns")
        if isinstance(item, str):
            content: str | list[int] = item
        elif isinstance(item, Tensor) and item.dim() == 1 and not item.is_floating_point():
            content = item.tolist()
        elif isinstance(item, Sequence) and all(isinstance(x, int) for x in item):
            content = list(item)
        else:
            raise StoreError(f"texts[{i}] is {type(item).__name__}; expected a text or a list of token ids")
        number: Any = label
        if isinstance(number, np.generic | Tensor):
            label = number.item()
        if not isinstance(label, Label):
            raise StoreError(f"labels[{i}]={label!r}: a label is a text, a number or a truth value")
        return Document(i, content, label)

    def _column(self, row: Mapping[str, Any], name: str, argument: str) -> Any:
        if name not in row:
            raise StoreError(f"{argument}={name!r}: the dataset has the columns {', '.join(map(str, row))}")
        return row[name]

    def windows(self, span: Range, tokenizer: Any, context: int) -> Iterator[Window]:
        """The windows of a range in order; a document with n tokens of text gives about n / context of them."""
        documents = iter(span.documents)
        while block := list(islice(documents, _TOKENISE_AT_ONCE)):
            kept = [doc for doc in block if self._has_text(doc)]
            encoded = _encode([d.content for d in kept if isinstance(d.content, str)], tokenizer)
            for doc in kept:
                if isinstance(doc.content, str):
                    pieces = next(encoded)
                    if not pieces[0]:
                        raise StoreError(f"texts[{doc.index}]={doc.content[:40]!r}: the tokenizer makes no token of it")
                else:
                    pieces = doc.content, [(-1, -1)] * len(doc.content), [False] * len(doc.content), 0
                yield from _cut(doc, *pieces, context)

    def _has_text(self, doc: Document) -> bool:
        if doc.content.strip() if isinstance(doc.content, str) else doc.content:
            return True
        if self.empty == "skip":
            return False
        raise StoreError(f"texts[{doc.index}] is empty: remove it, or pass empty='skip' to leave such texts out")


def _encode(texts: list[str], tokenizer: Any) -> Iterator[tuple[list[int], list[tuple[int, int]], list[bool], int]]:
    """For each text: ids, character spans, which tokens are special, and how many the tokenizer put before the text."""
    if not texts:
        return
    if tokenizer is None:
        raise StoreError("texts: this model has no tokenizer; give token ids, or load the model with tokenizer=...")
    fast = bool(getattr(tokenizer, "is_fast", False))
    got = tokenizer(texts, add_special_tokens=True, return_special_tokens_mask=True, return_offsets_mapping=fast,
                    return_attention_mask=False, truncation=False, padding=False, verbose=False)
    marks = set(tokenizer.all_special_ids)
    for i, ids in enumerate(got["input_ids"]):
        added = got["special_tokens_mask"][i]
        prefix = next((k for k, a in enumerate(added) if not a), 0)
        spans = [tuple(s) for s in got["offset_mapping"][i]] if fast else [(-1, -1)] * len(ids)
        special = [bool(a) or t in marks for t, a in zip(ids, added, strict=True)]
        yield list(ids), spans, special, prefix


def _cut(doc: Document, ids: list[int], spans: list[tuple[int, int]], special: list[bool], prefix: int,
         context: int) -> Iterator[Window]:
    room = context - prefix
    if room < 1:
        raise StoreError(f"context={context}: the tokenizer starts every text with {prefix} tokens; nothing is left")
    for number, start in enumerate(range(prefix, max(len(ids), prefix + 1), room)):
        part = slice(start, start + room)
        yield Window(doc.index, number, doc.label, ids[:prefix] + ids[part], spans[:prefix] + spans[part],
                     special[:prefix] + special[part])


def _length(values: Any) -> int | None:
    return len(values) if hasattr(values, "__len__") else None


def _plain(values: Any) -> Any:
    """Tokens as their rows, numpy arrays and pandas columns (which index in their own ways) as lists; else as it is."""
    if isinstance(values, Tokens):
        return [values.row(i) for i in range(len(values))]
    return values.tolist() if hasattr(values, "tolist") and not isinstance(values, Tensor) else values


def to_tokens(windows: Sequence[Window]) -> Tokens:
    """A batch of windows, padded on the right [batch, pos]. What stands in the padding is never looked at."""
    lengths = np.array([len(w) for w in windows])
    width = int(lengths.max())
    ids = np.array([w.ids + [0] * (width - len(w)) for w in windows], dtype=np.int64)
    return Tokens(torch.from_numpy(ids), torch.from_numpy(np.arange(width) < lengths[:, None]))
