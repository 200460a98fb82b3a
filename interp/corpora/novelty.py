"""What has been said before: exact and near duplicates, within one label.

A piece of text is new while at most half of its word 5-grams were seen earlier. Only a quarter of the 5-grams,
chosen by their hash, is remembered ("mod p" sketches: Broder 1997, On the resemblance and containment of
documents, section 3), so the memory stays small and the outcome does not depend on anything but the text.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np

_WORD = re.compile(r"\w+")
_SHINGLE = 5
_KEEP = 4  # one in four shingles
_MIX = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio in 64 bits, Knuth's multiplier


class Novelty:
    """A memory that texts are held against, in order; the same texts in the same order give the same answers."""

    def __init__(self, seen_limit: float = 0.5) -> None:
        self.seen_limit = seen_limit
        self._exact: set[bytes] = set()
        self._shingles: set[int] = set()

    def is_new(self, text: str) -> bool:
        """Whether `text` is neither a copy (white space aside) nor mostly made of what came before; it is
        remembered only if it is new."""
        exact = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=12).digest()
        if exact in self._exact:
            return False
        sketch = _sketch(text)
        known = sum(s in self._shingles for s in sketch)
        if sketch and known > self.seen_limit * len(sketch):
            return False
        self._exact.add(exact)
        self._shingles |= sketch
        return True


@lru_cache(maxsize=1 << 17)
def _code(word: str) -> int:
    """64 bits of a word; the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _sketch(text: str) -> set[int]:
    words = _WORD.findall(text.lower())
    if len(words) < 2 * _SHINGLE:
        return set()
    codes = np.fromiter(map(_code, words), np.uint64, len(words))
    hashes = np.zeros(len(words) - _SHINGLE + 1, np.uint64)
    for offset in range(_SHINGLE):
        hashes = (hashes ^ codes[offset : offset + len(hashes)]) * _MIX
        hashes ^= hashes >> np.uint64(29)
    return set(hashes[hashes % np.uint64(_KEEP) == 0].tolist())
