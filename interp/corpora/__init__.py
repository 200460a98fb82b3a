"""Labelled text: domains, programming languages, natural languages, and a rude and a friendly register.

    from interp import corpora
    texts = corpora.load("test", group="domain")        # {"law": [...], "biology": [...], ...}
    corpora.build(out="corpus")                         # train.parquet, validation.parquet, test.parquet, corpus.json

The texts come from published packages that are fetched once, pinned by checksum and never installed; without a
network there is a small fallback tier made from Python itself. data/corpora/README.md lists sources and licences.
"""

from __future__ import annotations

from interp.corpora.building import build
from interp.corpora.catalogue import labels
from interp.corpora.errors import CorpusError, UnavailableError
from interp.corpora.reading import load, natural

__all__ = ["CorpusError", "UnavailableError", "build", "labels", "load", "natural"]
