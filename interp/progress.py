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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Protocol

#: Seconds after which a bar appears.
PATIENCE = 2.0
VARIABLE = "INTERP_PROGRESS"
_bars: list[_Bar] = []  # those that are open, in any thread, the first to open first; it is the one on the screen
_lock = threading.RLock()


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
    with _lock:
        _bars.append(own)
    try:
        yield own.advance
    finally:
        with _lock:
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
        with _lock:
            self.done += n
            self.note = note or self.note
            for shown in _bars[:1]:  # none, if this is told after its context was left
                shown.refresh()

    def refresh(self) -> None:
        if self.live is None and not self.quiet and time.monotonic() - self.started > PATIENCE:
            if _wanted():
                self.live = _open(self.what, self.total, time.monotonic() - self.started)
            else:
                self.quiet = True
        if self.live is not None:
            self.live.show(self.done, self.note)

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
    """A bar that began `elapsed` seconds ago, as the place shows it: with ``show(done, note)`` and ``stop()``."""
    from rich.console import Console

    kind = _Cell if Console(stderr=True).is_jupyter else _Line
    return kind(what, total, elapsed)


class _Line:
    """A bar in a terminal, or in a log file."""

    def __init__(self, what: str, total: int | None, elapsed: float) -> None:
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
        self.live = Progress(*columns, console=console, transient=console.is_terminal)
        self.live.start()
        self.task = self.live.add_task(what, total=total, note="")
        self.live.tasks[0].start_time = self.live.get_time() - elapsed

    def show(self, done: int, note: str) -> None:
        self.live.update(self.task, completed=done, note=note)

    def stop(self) -> None:
        self.live.stop()


class _Cell:
    """A bar below a cell of a notebook: plain HTML that is replaced, so that it needs no widgets."""

    def __init__(self, what: str, total: int | None, elapsed: float) -> None:
        from IPython.display import HTML, display

        self.html, self.what, self.total = HTML, what, total
        self.started, self.last = time.monotonic() - elapsed, 0.0
        self.handle: Any = display(HTML(""), display_id=True)

    def show(self, done: int, note: str) -> None:
        now = time.monotonic()
        if self.handle is None or (now - self.last < 0.3 and done != self.total):
            return
        self.last = now
        self.handle.update(self.html(in_html(self.what, done, self.total, now - self.started, note)))

    def stop(self) -> None:
        if self.handle is not None:
            self.handle.update(self.html(""))


def in_html(what: str, done: int, total: int | None, seconds: float, note: str = "") -> str:
    """The bar as HTML: what is done, how much of how much, time gone and, by the pace so far, time left."""
    amount = f' value="{done}" max="{total}"' if total else ""
    left = f", {_clock(seconds * (total - done) / done)} left" if total and done else ""
    counted = f"{done:,} of {total:,}" if total else f"{done:,}"
    return f"{escape(what)} <progress{amount}></progress> {counted}, {_clock(seconds)}{left} {escape(note)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
