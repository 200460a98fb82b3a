"""Running the clock over all methods of a model, and over the writers: rows for the report."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _clock import Ratio, interleave
from _methods import MODELS, Method, Subject, by_hooks, by_transformers, ours

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is measured and how long; the options of the command line have the same names."""

    model: str
    dtype: str
    rounds: int
    seconds: float
    batch: int
    length: int
    threads: int
    device: str


def say(text: str) -> None:
    """Progress goes to standard error: results alone are on standard output."""
    print(text, file=sys.stderr, flush=True)


def measured(setting: Setting, peers: list[str], cases: list[str]) -> dict[str, Any]:
    """One model: a row for every method of every case (or of those in `cases`)."""
    model = MODELS[setting.model](getattr(torch, setting.dtype), setting.device)
    subject = Subject(model, setting.batch, setting.length)
    chosen = {name: case for name, case in subject.cases.items() if not any(cases) or name in cases}
    methods, absent = collect(subject, [peer for peer in peers if peer])
    rows: list[Row] = []
    noise = 1.0
    for name, case in chosen.items():
        say(f"{setting.model} {setting.dtype}: {case.title}")
        timed, spread = one_case(subject, [m for m in methods if m.case == name], setting)
        rows += timed
        rows += [{"case": name, "method": peer, "environment": "", "note": why} for peer, why in absent.items()]
        noise = max(noise, spread)
    about = [{"name": name, "title": case.title, "target": case.target} for name, case in chosen.items()]
    return asdict(setting) | {"batch": len(subject.ids), "noise": noise, "cases": about, "rows": rows}


def collect(subject: Subject, peers: list[str]) -> tuple[list[Method], dict[str, str]]:
    """The methods that can run here, and why the other peers cannot."""
    import _peers

    methods = [*ours(subject), *by_hooks(subject), *by_transformers(subject)]
    absent = {}
    for peer in peers:
        try:
            methods += list(getattr(_peers, peer)(subject))
        except ImportError as error:
            absent[peer] = f"not installed: {error}"
    return methods, absent


def one_case(subject: Subject, methods: list[Method], setting: Setting) -> tuple[list[Row], float]:
    """Rows of one case, and how much the plain pass varied (largest / smallest wall time)."""
    errors = compare(methods)  # before the clock: it warms everything up as well
    runs: dict[str, Callable[[], Any]] = {"plain": subject.plain, "again": subject.plain}
    runs |= {m.name: m.run for m in methods}
    times = interleave(runs, setting.rounds, seconds=setting.seconds, wait=waiter(subject.m.device))
    plain = times.pop("plain")
    notes = {"again": "the plain pass a second time"} | {m.name: m.note for m in methods}
    rows = [{"case": methods[0].case, "method": name, "environment": "", "note": notes[name], "rounds": len(taken.wall),
             "ms": 1e3 * statistics.median(taken.wall), "wall": asdict(Ratio.of(taken.wall, plain.wall)),
             "cpu": asdict(Ratio.of(taken.cpu, plain.cpu)), "best": taken.best / plain.best,
             **errors.get(name, {"error": None})}
            for name, taken in times.items()]
    return rows, max(plain.wall) / min(plain.wall)


def compare(methods: list[Method]) -> dict[str, Row]:
    """Per method the largest difference from interp's values: relative to the tensor's largest, and absolute."""
    mine = dict(methods[0].read(methods[0].run()))
    found: dict[str, Row] = {}
    for method in methods:
        theirs = method.read(method.run())
        error = largest = 0.0
        for site, tensor in theirs.items():
            a, b = mine[str(site)].float(), tensor.float()
            if a.shape != b.shape:
                raise ValueError(f"{method.name}: {site} is {list(b.shape)}, ours {list(a.shape)}")
            difference = float((a - b).abs().max())
            error, largest = max(error, difference / (float(a.abs().max()) or 1.0)), max(largest, difference)
        found[method.name] = {"error": error, "largest": largest, "compared": len(theirs), "sites": len(mine)}
    return found


def waiter(device: torch.device) -> Callable[[], None]:
    """Waits until a GPU has done what it was given; a CPU has done it already."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def written(rounds: int, seconds: float, tokens: int, directory: Path | None) -> list[Row]:
    """Rates of `store.write` and of the raw writers."""
    from _write import loads

    rows = []
    for load in loads(tokens, directory):
        say(f"writing: {load.title}")
        times = interleave(load.runs, rounds, seconds=seconds)
        for name, taken in times.items():
            rows.append({"load": load.title, "method": name, "megabytes": load.bytes / 1e6, "rounds": len(taken.wall),
                         "rate": load.bytes / 1e6 / statistics.median(taken.wall),
                         "synced": asdict(Ratio.of(times["raw with fsync"].wall, taken.wall)),
                         "raw": asdict(Ratio.of(times["raw"].wall, taken.wall))})
    return rows
