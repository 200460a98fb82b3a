"""Reading a corpus back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from interp.corpora import catalogue
from interp.corpora.archive import members
from interp.corpora.building import build, find, read_card
from interp.corpora.documents import decode
from interp.corpora.errors import CorpusError, UnavailableError
from interp.corpora.fallback import fallback_labels
from interp.corpora.fetch import obtain
from interp.corpora.sources import SOURCES
from interp.corpora.split import SPLITS, size
from interp.zoo.errors import notice


def load(
    split: str,
    labels: Sequence[str] | None = None,
    group: str | None = None,
    max_bytes: int | None = None,
    path: str | Path | None = None,
) -> dict[str, list[str]]:
    """The documents of a split ("train", "validation", "test"), by label, in the order of the corpus.

    `labels` or `group` choose what is read (default: every label that has documents in this split). `max_bytes`
    bounds the UTF-8 bytes per label; the document that crosses it is cut between words, later ones are left out.
    `path` is the directory of a corpus; without it the one in the cache is used, and built on first use. Where only the
    small fallback tier is there, a warning says so.

    Documents of the parallel labels are in the same order in every language, and so are their paragraphs.
    Raises CorpusError for an unknown split, label or group.
    """
    if split not in SPLITS:
        raise CorpusError(f"split={split!r}: expected {', '.join(SPLITS)}")
    if labels is not None and group is not None:
        raise CorpusError("labels and group were both given; name the labels, or the group, not both")
    if isinstance(labels, str):
        raise CorpusError(f"labels={labels!r}: expected a list of labels, such as [{labels!r}]")
    if max_bytes is not None and max_bytes <= 0:
        raise CorpusError(f"max_bytes={max_bytes}: expected a positive number of bytes per label")
    place = _default(labels, group) if path is None else Path(path).expanduser()
    card = read_card(place)
    wanted = _wanted(card["labels"], card.get("groups", {}), labels, group, place)
    wanted = [label for label in wanted if labels is not None or card["labels"][label][split]["documents"]]
    return _read(place / f"{split}.parquet", wanted, max_bytes)


def _default(labels: Sequence[str] | None, group: str | None) -> Path:
    """The whole corpus if it is in the cache, else one of just the labels that are asked for, built if need be."""
    if (full := find("full")) is not None:
        return full
    asked = labels if labels is not None else catalogue.labels(group) if group is not None else catalogue.ALL
    if known := set(asked) <= set(catalogue.ALL):
        asked = [label for label in catalogue.ALL if label in asked]  # in the catalogue's order
        if (part := find("full", asked)) is not None:
            return part
    if (small := find("fallback")) is not None:
        warnings.warn(
            "interp.corpora: the full tier is not built, the small fallback tier is read; "
            'corpora.build(tier="full") fetches and builds the full one',
            stacklevel=3,
        )
        return small
    if not known or len(asked) == len(catalogue.ALL):
        notice("building the labelled corpus, once: 210 MB of packages are fetched, then a few minutes")
        return build(tier="auto")
    notice(f"building the labelled corpus, once, for {', '.join(asked)}: a minute or more")
    try:
        return build(labels=asked, tier="full")
    except UnavailableError as error:
        if not set(asked) <= set(fallback_labels()):
            raise
        warnings.warn(
            f"interp.corpora: the full tier cannot be had, the small fallback tier is used instead. {error}",
            stacklevel=3,
        )
        return build(tier="fallback")


def _wanted(
    known: dict[str, object],
    groups: dict[str, list[str]],
    labels: Sequence[str] | None,
    group: str | None,
    place: Path,
) -> list[str]:
    if group is not None:
        if group not in groups:
            raise CorpusError(f"group={group!r}: {place.name} has {', '.join(groups)}")
        return [label for label in groups[group] if label in known]
    if labels is None:
        return list(known)
    if missing := [label for label in labels if label not in known]:
        raise CorpusError(f"labels={missing}: {place.name} has {', '.join(known)}")
    return list(labels)


def _read(file: Path, wanted: list[str], max_bytes: int | None) -> dict[str, list[str]]:
    import pyarrow.parquet as pq

    found: dict[str, list[str]] = {label: [] for label in wanted}
    if not wanted:
        return found
    room = dict.fromkeys(wanted, max_bytes)
    table = pq.read_table(file, columns=["text", "label"], filters=[("label", "in", wanted)])
    for batch in table.to_batches():
        for text, label in zip(batch["text"].to_pylist(), batch["label"].to_pylist(), strict=True):
            left = room[label]
            if left is not None:
                whole = size(text) <= left
                room[label] = left - size(text) if whole else 0
                text = text if whole else _beginning(text, left)
            if text:
                found[label].append(text)
    return found


def _beginning(text: str, room: int) -> str:
    """At most `room` bytes of a longer text, cut between words where there are two."""
    piece = text.encode()[:room].decode(errors="ignore")
    end = max(piece.rfind("\n"), piece.rfind(" "))
    return piece[:end] if end > 0 else piece


def natural(most: int | None = None) -> list[str]:
    """Natural English sentences of every kind (dialogue, reviews, messages) without labels: the package nlp-corpus,
    some 100,000 sentences, fetched on first use and read from the package every time.

    Its README claims no more than fair use for them: use them to check what was found on generated text, do not
    republish them. `most` keeps the first so many. Raises CorpusError when the package cannot be fetched.
    """
    if most is not None and most <= 0:
        raise CorpusError(f"most={most}: expected a positive number of sentences")
    sentences: dict[str, None] = {}  # a set that keeps the order
    files = members(obtain(SOURCES["nlp-corpus"]), lambda name: "/builds/doc-" in name and name.endswith(".json"))
    for _, data in sorted(files):
        sentences.update(dict.fromkeys(" ".join(s.split()) for s in json.loads(decode(data)) if isinstance(s, str)))
    sentences.pop("", None)
    return list(sentences)[:most]
