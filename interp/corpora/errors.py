"""What can go wrong with corpora."""

from __future__ import annotations


class CorpusError(ValueError):
    """A corpus could not be fetched, built or read. The message names what, what was expected and the mend."""


class UnavailableError(CorpusError):
    """A label or a package cannot be had here; another tier may still do."""
