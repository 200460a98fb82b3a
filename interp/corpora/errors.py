"""The one error of the corpora."""

from __future__ import annotations


class CorpusError(ValueError):
    """A corpus could not be fetched, built or read. The message names what, what was expected and the mend."""
