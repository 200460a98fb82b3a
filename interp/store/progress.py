"""What a dataset's bar shows: documents done, tokens per second, time left."""

from __future__ import annotations

import time
from contextlib import ExitStack

from interp.progress import Advance, bar


class Progress:
    """Context manager around `interp.progress.bar`; silent when `shown` is false.

    Args:
        shown: whether to show anything.
        total: number of documents, None where unknown (a stream): then a count and a rate, without an end.
    """

    def __init__(self, shown: bool, total: int | None) -> None:
        self.shown, self.total = shown, total
        self._open = ExitStack()
        self._advance: Advance | None = None
        self._tokens, self._start = 0, time.monotonic()

    def __enter__(self) -> Progress:
        if self.shown:
            self._advance = self._open.enter_context(bar("writing documents", self.total))
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def documents(self, n: int) -> None:
        """`n` more documents are done (or were found done)."""
        if self._advance is not None:
            self._advance(n)

    def tokens(self, n: int) -> None:
        """`n` more tokens went through the model."""
        if self._advance is not None:
            self._tokens += n
            self._advance(0, f"{self._tokens / max(time.monotonic() - self._start, 1e-9):,.0f} tokens/s")
