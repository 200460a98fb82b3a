"""Changing an attribute of a configuration for a while.

Two models made from one configuration share the object, and a context on each may be open at once, left in any order.
So a wish is written down per config: the first one notes what was there, the last to go puts it back, and in between a
strong wish (eager attention, which alone shows patterns) outweighs the others.

Two *threads* cannot share: one forward pass builds its mask by the configuration and attends by it layers later, and
must find the same name both times. They are told so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class _Wish:
    value: Any
    strong: bool


@dataclass
class _Loan:
    """One attribute of one config: what was there, and who wants what in its place."""

    config: Any
    attribute: str
    original: Any
    thread: int
    wishes: list[_Wish] = field(default_factory=list)

    def apply(self) -> None:
        chosen = max(self.wishes, key=lambda wish: wish.strong, default=_Wish(self.original, False))
        setattr(self.config, self.attribute, chosen.value)


_loans: dict[tuple[int, str], _Loan] = {}
_lock = threading.Lock()


def original(config: Any, attribute: str) -> Any:
    """What the attribute is, or was before anybody borrowed it."""
    loan = _loans.get((id(config), attribute))
    return getattr(config, attribute, None) if loan is None else loan.original


@contextmanager
def lent(config: Any, attribute: str, value: Any, *, strong: bool = False) -> Iterator[None]:
    """Sets `attribute` of `config` to `value` until the context is left."""
    key, wish, thread = (id(config), attribute), _Wish(value, strong), threading.get_ident()
    with _lock:
        loan = _loans.setdefault(key, _Loan(config, attribute, getattr(config, attribute), thread))
        if loan.thread != thread:
            raise RuntimeError(
                f"two threads run models that share one {type(config).__name__} object; build each model from a copy "
                "of it (copy.deepcopy(config))"
            )
        loan.wishes.append(wish)
        loan.apply()
    try:
        yield
    finally:
        with _lock:
            loan.wishes.remove(wish)
            loan.apply()
            if not loan.wishes:
                del _loans[key]
