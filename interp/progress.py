"""A progress bar with the time left, for whatever takes more than two seconds.

    with bar("patching", total=len(rows)) as advance:
        for chunk in chunks:
            ...
            advance(len(chunk))

It writes to standard error, in a terminal and in Jupyter, and appears only once two seconds have gone by, so short
calls stay quiet. One bar is shown at a time, the outermost: calls inside a call that has one are silent, and only tell
it that time goes by. ``INTERP_PROGRESS=0`` switches all off, ``=1`` shows them where there is no terminal, too. On an
interrupt the bar goes, and the exception goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

#: Seconds after which a bar appears.
PATIENCE = 2.0
VARIABLE = "INTERP_PROGRESS"
_bars: list[_Bar] = []  # those that are open, the outermost first; it is the one on the screen


class Advance(Protocol):
    """What `bar` gives: tell it how much more is done, and perhaps a word to stand behind the bar."""

    def __call__(self, n: int = 1, note: str = "") -> None: ...


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Advance]:
    """Gives a function that is told how much more is done.

    Args:
        what: what is done, as a participle.
        total: how much there is; None where that is unknown, and then no time left is shown.
    """
    own = _Bar(what, total)
    _bars.append(own)
    try:
        yield own.advance
    finally:
        _bars.remove(own)
        own.close()


class _Bar:
    """One loop: how much of it is done, and its line on the screen once there is one."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.started = what, total, time.monotonic()
        self.done, self.note = 0, ""
        self.live: Any = None
        self.quiet = False  # nobody would see it: asked once, since this runs for every batch

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        _bars[0].refresh()

    def refresh(self) -> None:
        if self.live is None and not self.quiet and time.monotonic() - self.started > PATIENCE:
            if _wanted():
                self.live = _open(self.what, self.total, time.monotonic() - self.started)
            else:
                self.quiet = True
        if self.live is not None:
            self.live.update(self.live.task_ids[0], completed=self.done, note=self.note)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def _wanted() -> bool:
    """Whether anybody would see a bar, and wants one."""
    from rich.console import Console

    wish = os.environ.get(VARIABLE, "")
    console = Console(stderr=True)
    return wish == "1" or (wish != "0" and (console.is_terminal or console.is_jupyter))


def _open(what: str, total: int | None, elapsed: float) -> Any:
    """A running bar that began `elapsed` seconds ago."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
    console = Console(stderr=True)
    # where lines cannot be taken back (a log file), the last state is all that is written
    live = Progress(*columns, console=console, transient=console.is_terminal or console.is_jupyter)
    live.start()
    live.add_task(what, total=total, note="")
    live.tasks[0].start_time = live.get_time() - elapsed
    return live
