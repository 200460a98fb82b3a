"""What a call had done when it was interrupted.

    experts.remove_each(m, stats, test)      # Ctrl-C, or a notebook's stop button, after six of nine labels
    interp.unfinished()                      # the Table of those six

An interruption goes on as it must: hooks come off the model, loops and scripts end. What had been finished by then is
put by here, until the next interruption. Datasets need none of this: what is written stays, and `store.write` goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_kept: list[Any] = []  # one thing, or nothing
_DONE, _TOLD = "_interp_done", "_interp_told"  # what an interruption carries from an inner call to the one around it


@contextmanager
def salvaged(what: str, make: Callable[[], Any]) -> Iterator[None]:
    """Puts by what `make` gives if the block is interrupted; None means that nothing was finished.

    Args:
        what: the call whose result it is, as one types it.
        make: the result as it is by then. Outer blocks come last, and theirs stays.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if (value := make()) is not None:
            _keep(what, value, stop)
        raise


@contextmanager
def carried(make: Callable[[], Any]) -> Iterator[None]:
    """Gives what `make` gives to the interruption, for the call around it (`handed_on`) to make a result of."""
    try:
        yield
    except KeyboardInterrupt as stop:
        setattr(stop, _DONE, make())
        raise


@contextmanager
def handed_on(what: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Puts by what `make` makes of what a call inside had done: numbers become a Table."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if (done := carried_by(stop)) is not None and (value := make(done)) is not None:
            _keep(what, value, stop)
        raise


def carried_by(stop: KeyboardInterrupt) -> Any:
    """What an interruption carries from the calls that it left; None where that is nothing."""
    return getattr(stop, _DONE, None)


def _keep(what: str, value: Any, stop: KeyboardInterrupt) -> None:
    if hasattr(value, "attrs"):
        value.attrs["unfinished"] = True
    if not getattr(stop, _TOLD, False):  # once, not by every call around
        sys.stderr.write(f"{what} was interrupted; interp.unfinished() gives what it had done\n")
    setattr(stop, _DONE, value)
    setattr(stop, _TOLD, True)
    _kept[:] = [value]


def unfinished() -> Any:
    """What the call that was interrupted last had done: its Table so far (``.attrs["unfinished"]``), or its SAEs.

    Raises LookupError where nothing was interrupted that had anything to keep.
    """
    if not _kept:
        raise LookupError("unfinished: no call was interrupted that had finished a part of its work")
    return _kept[0]
