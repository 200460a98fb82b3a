"""The unit of a corpus: one document, and the cleaning that every document gets."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text and where it comes from.

    `family` names the documents that must stay together when a corpus is split: the versions of one licence,
    the mails of one thread, one page in several languages.
    """

    id: str
    text: str
    family: str
    source: str


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\u00ad\u200b\ufeff]")  # and soft hyphens, zero-width marks
_TRAILING = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
_GAPS = re.compile(r"\n{3,}")


def tidy(text: str) -> str:
    """Unix line ends, composed characters, no control or zero-width characters, no trailing spaces, at most one
    blank line in a row, no blank at either end; other white space is kept, since code needs it.

    >>> tidy("a  \\r\\n\\n\\n\\nb\\x00 ")
    'a\\n\\nb'
    """
    text = _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = unicodedata.normalize("NFC", text)
    return _GAPS.sub("\n\n", _TRAILING.sub("", text)).strip("\n")


def paragraphs(text: str) -> list[str]:
    """The blocks between blank lines."""
    return [block for block in text.split("\n\n") if block.strip()]


def decode(data: bytes) -> str:
    """UTF-8 where it is, Latin-1 where it is not (old mails, old sources)."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def rank(family: str) -> float:
    """Where a family of documents stands in the order of splitting, in [0, 1): a hash of its name."""
    return int.from_bytes(hashlib.sha256(family.encode()).digest()[:6], "big") / 2**48
