"""Timing generations token by token.

Whole generations take seconds each, in which a shared machine changes its speed by more than what is to be measured.
Here several of them run in threads of their own, one token of each at a time in shuffled order, so that plain and
steered tokens lie a tenth of a second apart and whatever slows the machine slows both.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

Spent = tuple[float, float]  # seconds by the clock on the wall, and of this thread's processor


class Turn:
    """One generation's place among the others; transformers tells it of each token, as its streamer."""

    def __init__(self, name: str, table: Table) -> None:
        self.name, self.table, self.spent = name, table, list[Spent]()

    def begin(self) -> None:
        self.table.wait_for(self.name)
        self.wall, self.cpu = time.perf_counter(), time.thread_time()

    def stop(self) -> None:
        self.spent.append((time.perf_counter() - self.wall, time.thread_time() - self.cpu))
        self.table.passed()

    def put(self, ids: torch.Tensor) -> None:
        self.stop()
        self.begin()

    def end(self) -> None:
        """The call goes on for a moment after its last token."""


class Table:
    """Whose turn it is."""

    def __init__(self, names: list[str], seed: int) -> None:
        self.names, self.random, self.changed = names, random.Random(seed), threading.Condition()
        self.order = self.random.sample(names, len(names))

    def wait_for(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.order[:1] == [name])

    def passed(self) -> None:
        with self.changed:
            del self.order[0]
            if not self.order:
                self.order = self.random.sample(self.names, len(self.names))
            self.changed.notify_all()

    def left(self, name: str) -> None:
        with self.changed:
            self.names = [n for n in self.names if n != name]
            self.order = [n for n in self.order if n != name] or list(self.names)
            self.changed.notify_all()


def by_turns(runs: Mapping[str, Callable[[Turn], Any]], seed: int = 0) -> dict[str, list[Spent]]:
    """What each stretch of each run took, from its start to its first token, to the next, ..., and to its end.

    A run is a function of its turn, which it hands to generate as `streamer`. An error in any of them is raised.
    """
    table, threads = Table(list(runs), seed), torch.get_num_threads()

    def one(name: str) -> list[Spent]:
        torch.set_num_threads(threads)  # a setting of the thread
        turn = Turn(name, table)
        turn.begin()
        try:
            runs[name](turn)
            turn.stop()
        finally:
            table.left(name)
        return turn.spent

    with ThreadPoolExecutor(len(runs)) as pool:
        jobs = {name: pool.submit(one, name) for name in runs}
    return {name: job.result() for name, job in jobs.items()}
