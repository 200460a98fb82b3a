"""Timing by interleaved rounds.

A machine's speed drifts, by heat and by its neighbours, far more than the differences that are measured here. So the
methods run side by side: in every round each method runs once, in shuffled order, and what counts is the *ratio* to the
plain run of the same round. The median of those ratios does not care about a few disturbed rounds, and the spread is
shown beside it. CPU time, which waiting for a busy core does not lengthen, is measured in the same runs.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Times:
    """Seconds of one method, one entry per round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.wall)


@dataclass(frozen=True)
class Ratio:
    """Median and extremes over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerator: list[float], denominator: list[float]) -> Ratio:
        """Same-round ratios of two lists of seconds."""
        ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


def interleave(runs: Mapping[str, Callable[[], Any]], rounds: int, *, seconds: float = math.inf, warmups: int = 1,
               seed: int = 0, wait: Callable[[], None] = lambda: None) -> dict[str, Times]:
    """Seconds of every run in every round.

    Args:
        runs: what is measured, by name. Results are dropped after the clock has stopped.
        rounds: how many rounds count, at most.
        seconds: after so long no new round begins, if there have been three.
        warmups: rounds before them that do not.
        seed: of the order within a round.
        wait: called before each reading of the clock; on a GPU it waits for the device.
    """
    order, times, start = random.Random(seed), {name: Times() for name in runs}, time.perf_counter()
    for number in range(-warmups, rounds):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for name in order.sample(list(runs), len(runs)):
            gc.collect()  # nobody pays for another's garbage
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            result = runs[name]()
            wait()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            del result
            if number >= 0:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times
