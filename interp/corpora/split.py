"""From documents to train, validation and test: whole families, no duplicates, capped, the same every time."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from interp.corpora.documents import Document, paragraphs
from interp.corpora.novelty import Novelty

SPLITS = ("train", "validation", "test")

#: Bytes of UTF-8 per label.
TRAIN_CAP = 3_500_000
HELD_OUT_SHARE = 0.05
HELD_OUT_FLOOR, HELD_OUT_CAP = 48_000, 200_000

#: Paragraphs of fewer words are headings or idioms; they may come again.
_SHORT = 10


@dataclass(frozen=True)
class Limits:
    """How much of a label is taken (bytes): at most `train`, and per held-out split a share of the label within
    `floor` and `cap`."""

    train: int = TRAIN_CAP
    share: float = HELD_OUT_SHARE
    floor: int = HELD_OUT_FLOOR
    cap: int = HELD_OUT_CAP


def size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text.encode())


def split_documents(
    documents: Iterable[Document], *, by_paragraph: bool = True, shortest: int = 200, limits: Limits | None = None
) -> Iterator[tuple[str, Document]]:
    """(split, document) for the documents that are kept.

    Families come in the order of a hash of their name, so the outcome depends neither on the order of files in a
    package nor on a random state. Test is filled first, then validation, then train up to its cap. A family goes
    into one split as a whole; one that is bigger than a held-out split goes to train. What an earlier document
    said, exactly or nearly, is dropped, so nothing of the test text comes again in train.
    """
    limits = limits or Limits()
    families: defaultdict[str, list[Document]] = defaultdict(list)
    total = 0
    for document in documents:
        families[document.family].append(document)
        total += size(document.text)
    held_out = min(limits.cap, max(limits.floor, int(limits.share * min(total, limits.train / (1 - 2 * limits.share)))))
    room = {"test": held_out, "validation": held_out, "train": limits.train}
    novelty = Novelty()
    ordered = sorted(families, key=lambda name: hashlib.sha256(name.encode()).digest())
    for name in ordered:
        big = sum(size(d.text) for d in families[name]) > held_out
        where = next((s for s in ("test", "validation", "train") if room[s] > 0 and not (big and s != "train")), None)
        if where is None:
            return
        for document in sorted(families.pop(name), key=lambda d: hashlib.sha256(d.id.encode()).digest()):
            if where == "train" and room["train"] <= 0:
                break
            kept = _novel(document, novelty, by_paragraph)
            if len(kept) >= shortest:
                room[where] -= size(kept)
                yield where, replace(document, text=kept)


def _novel(document: Document, novelty: Novelty, by_paragraph: bool) -> str:
    """What the document says that has not been said; empty when that is nothing."""
    if not by_paragraph:
        return document.text if novelty.is_new(document.text) else ""
    kept = [p for p in paragraphs(document.text) if len(p.split()) < _SHORT or novelty.is_new(p)]
    if not any(len(p.split()) >= _SHORT for p in kept):
        return ""  # only headings are left
    return "\n\n".join(kept)
