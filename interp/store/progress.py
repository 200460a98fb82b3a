"""A progress bar on standard error: documents done, tokens per second, time left."""

from __future__ import annotations

from typing import Any


class Progress:
    """Context manager around a rich progress bar; silent when `shown` is false.

    Args:
        shown: whether to show anything.
        total: number of documents, None where unknown (a stream): then a count and a rate, without an end.
    """

    def __init__(self, shown: bool, total: int | None) -> None:
        self.shown, self.total = shown, total
        self._bar: Any = None
        self._tokens = 0

    def __enter__(self) -> Progress:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TextColumn("documents"),
                            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"),
                            TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("writing", total=self.total, rate="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def documents(self, n: int) -> None:
        """`n` more documents are done (or were found done)."""
        if self._bar is not None:
            self._bar.advance(self._task, n)

    def tokens(self, n: int) -> None:
        """`n` more tokens went through the model."""
        if self._bar is not None:
            self._tokens += n
            elapsed = self._bar.tasks[0].elapsed or 0
            self._bar.update(self._task, rate=f"{self._tokens / elapsed:,.0f} tokens/s" if elapsed > 0 else "")
