"""A progress bar with the time left, for whatever takes more than two seconds.

    with bar("patching", total=len(rows)) as advance:
        for chunk in chunks:
            ...
            advance(len(chunk))

It writes to standard error, in a terminal and in Jupyter, and appears only once two seconds have gone by, so short
calls stay quiet. One bar is shown at a time: calls inside a call that shows one are silent. ``INTERP_PROGRESS=0``
switches all off, ``=1`` shows them where there is no terminal, too. On an interrupt the bar goes, and the exception
goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Seconds after which a bar appears.
PATIENCE = 2.0
VARIABLE = "INTERP_PROGRESS"
_shown: list[str] = []  # what the bar that is on the screen says; empty where there is none


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how much more is done.

    Args:
        what: what is done, as a participle.
        total: how much there is; None where that is unknown, and then no time left is shown.
    """
    started, done = time.monotonic(), 0
    live: Any = None
    quiet = False  # nobody would see it: asked once, since this runs for every batch

    def advance(n: int = 1) -> None:
        nonlocal done, live, quiet
        done += n
        if live is None and not quiet and not _shown and time.monotonic() - started > PATIENCE:
            if quiet := not _wanted():
                return
            live = _open(what, total, time.monotonic() - started)
            _shown.append(what)
        if live is not None:
            live.update(live.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if live is not None:
            _shown.clear()
            live.stop()


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
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    # where lines cannot be taken back (a log file), the last state is all that is written
    live = Progress(*columns, console=console, transient=console.is_terminal or console.is_jupyter)
    live.start()
    live.add_task(what, total=total)
    live.tasks[0].start_time = live.get_time() - elapsed
    return live
