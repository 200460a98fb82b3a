"""What it costs to read activations: interp, bare hooks and the libraries, side by side.

    python benchmarks/capture.py                                         # SmolLM2, float32
    python benchmarks/capture.py --model olmoe --dtype bfloat16 --json
    python benchmarks/capture.py --all --markdown benchmarks/README.md   # everything, about ten minutes

How the ratios come about is told in `_clock.py`; what is read, and how each library is asked for it, in `_methods.py`
and `_peers.py`. Needs the extra `bridges` for the peers; a peer that is not installed is reported as that.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

PEERS = ("transformer_lens", "nnsight")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="smollm2 or olmoe (random, of that shape)")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="rounds that count")] = 9,
    batch: int = 8,
    length: Annotated[int, typer.Option(help="tokens per row")] = 64,
    threads: Annotated[int, typer.Option(help="torch threads; 0: torch's own choice")] = 0,
    device: str = "cpu",
    peers: Annotated[str, typer.Option(help="some of transformer_lens,nnsight,nnterp; or none")] = ",".join(PEERS),
    cases: Annotated[str, typer.Option(help="some of residual,attention,routing,experts; default: all")] = "",
    others: Annotated[bool, typer.Option("--others", help="also peers that need other versions, in processes "
                                         "of their own")] = False,
    write: Annotated[bool, typer.Option("--write", help="measure writing a dataset instead")] = False,
    tokens: Annotated[int, typer.Option(help="with --write: tokens to write")] = 8192,
    directory: Annotated[Path | None, typer.Option(help="with --write: where")] = None,
    everything: Annotated[bool, typer.Option("--all", help="both models, both dtypes, all peers, writing")] = False,
    markdown: Annotated[Path | None, typer.Option(help="write the tables to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """Time `capture` against the plain forward pass, and against everybody else."""
    quiet_libraries()
    import torch

    if threads:
        torch.set_num_threads(threads)
    shared = {"rounds": rounds, "batch": batch, "length": length, "threads": threads, "device": device}
    document: dict[str, Any] = {"machine": machine(), "runs": []}
    if everything:
        for name in ("smollm2", "olmoe"):
            for kind in ("float32", "bfloat16"):  # each in its own process, so that none inherits another's memory
                document["runs"] += again({**shared, "model": name, "dtype": kind, "others": True})["runs"]
        writing = {"write": True, "rounds": rounds, "tokens": tokens, "directory": directory}
        document["write"] = again(writing)["write"]
    elif write:
        document["write"] = written(rounds, tokens, directory)
    else:
        run = measured(model, dtype, rounds, batch, length, device,
                       peers=[p for p in peers.split(",") if p not in ("", "none")],
                       cases=[c for c in cases.split(",") if c])
        if others:
            from _peers import ENVIRONMENTS

            for environment in ENVIRONMENTS:
                offered = [case["name"] for case in run["cases"] if case["name"] in environment.cases]
                run["rows"] += elsewhere(environment, {**shared, "model": model, "dtype": dtype,
                                                       "cases": ",".join(offered)}) if offered else []
        document["runs"] = [run]
    if markdown:
        from _report import page

        markdown.write_text(page(document), encoding="utf-8")
        say(f"wrote {markdown}")
    if as_json:
        print(json.dumps(document, indent=1))
    elif not markdown:
        show(document)


def quiet_libraries() -> None:
    """Warnings of other libraries about themselves are no result."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- one model ---------------------------------------------------------------------------------------------------------
def measured(model: str, dtype: str, rounds: int, batch: int, length: int, device: str, *,
             peers: list[str], cases: list[str]) -> dict[str, Any]:
    """All methods of all cases on one model, as a run of the report."""
    import torch
    from _methods import MODELS, Subject

    subject = Subject(MODELS[model](getattr(torch, dtype), device), batch, length)
    chosen = {name: case for name, case in subject.cases.items() if not cases or name in cases}
    methods, absent = collect(subject, peers)
    rows: list[dict[str, Any]] = []
    noise = 1.0
    for name, case in chosen.items():
        say(f"{model} {dtype}: {case.title}")
        timed, spread = one_case(subject, [m for m in methods if m.case == name], rounds)
        rows += timed
        rows += [{"case": name, "method": peer, "environment": "", "note": why} for peer, why in absent.items()]
        noise = max(noise, spread)
    return {"model": model, "dtype": dtype, "rounds": rounds, "batch": batch, "length": length, "device": device,
            "noise": noise, "rows": rows,
            "cases": [{"name": n, "title": c.title, "target": c.target} for n, c in chosen.items()]}


def collect(subject: Any, peers: list[str]) -> tuple[list[Any], dict[str, str]]:
    """The methods that can run here, and why the other peers cannot."""
    import _methods
    import _peers

    methods = [*_methods.ours(subject), *_methods.by_hooks(subject), *_methods.by_transformers(subject)]
    absent = {}
    for peer in peers:
        try:
            methods += list(getattr(_peers, peer)(subject))
        except ImportError as error:
            absent[peer] = f"not installed: {error}"
    return methods, absent


def one_case(subject: Any, methods: list[Any], rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Rows of one case, and how much the plain pass varied (largest / smallest wall time)."""
    from _clock import Ratio, interleave

    errors = compare(methods)  # before the clock: it warms everything up as well
    runs: dict[str, Callable[[], Any]] = {"plain": subject.plain, "again": subject.plain}
    times = interleave(runs | {m.name: m.run for m in methods}, rounds, wait=waiter(subject.m.device))
    plain = times.pop("plain")
    notes = {"again": "the plain pass a second time"} | {m.name: m.note for m in methods}
    rows = [{"case": methods[0].case, "method": name, "environment": "", "note": notes[name],
             "ms": 1e3 * statistics.median(taken.wall), "wall": asdict(Ratio.of(taken.wall, plain.wall)),
             "cpu": asdict(Ratio.of(taken.cpu, plain.cpu)), **errors.get(name, {"error": None})}
            for name, taken in times.items()]
    return rows, max(plain.wall) / min(plain.wall)


def compare(methods: list[Any]) -> dict[str, dict[str, Any]]:
    """Per method the largest difference from interp's values: relative to the tensor's largest, and absolute."""
    ours = dict(methods[0].read(methods[0].run()))
    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        theirs = method.read(method.run())
        error = largest = 0.0
        for site, tensor in theirs.items():
            a, b = ours[str(site)].float(), tensor.float()
            if a.shape != b.shape:
                raise ValueError(f"{method.name}: {site} is {list(b.shape)}, ours {list(a.shape)}")
            difference = float((a - b).abs().max())
            error, largest = max(error, difference / (float(a.abs().max()) or 1.0)), max(largest, difference)
        found[method.name] = {"error": error, "largest": largest, "compared": len(theirs), "sites": len(ours)}
    return found


def waiter(device: Any) -> Callable[[], None]:
    """Waits until a GPU has done what it was given; a CPU has done it already."""
    import torch

    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


# -- writing -----------------------------------------------------------------------------------------------------------
def written(rounds: int, tokens: int, directory: Path | None) -> list[dict[str, Any]]:
    """Rates of `store.write` and of the raw writer."""
    from _clock import Ratio, interleave
    from _write import loads

    rows = []
    for load in loads(tokens, directory):
        say(f"writing: {load.title}")
        times = interleave(load.runs, rounds)
        for name, taken in times.items():
            rows.append({"load": load.title, "method": name, "megabytes": load.bytes / 1e6,
                         "rate": load.bytes / 1e6 / statistics.median(taken.wall),
                         "synced": asdict(Ratio.of(times["raw with fsync"].wall, taken.wall)),
                         "raw": asdict(Ratio.of(times["raw"].wall, taken.wall))})
    return rows


# -- other processes ---------------------------------------------------------------------------------------------------
def again(options: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    """This script in a process of its own, with `path` in front of the packages; its JSON document."""
    command = [sys.executable, str(Path(__file__)), "--json"]
    for name, value in options.items():
        if value is True:
            command.append(f"--{name}")
        elif value:
            command += [f"--{name}", str(value)]
    front = [str(path)] if path else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*front, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} of {Path(__file__).name} {' '.join(command[2:])}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def elsewhere(environment: Any, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a peer that needs its own environment, with interp's beside them; or one row that says why not."""
    try:
        found = again({**options, "peers": environment.method}, environment.folder())
    except RuntimeError as error:
        case = options["cases"].partition(",")[0]
        yield {"case": case, "method": environment.title, "environment": "", "note": f"not run: {error}"}
        return
    for row in found["runs"][0]["rows"]:
        if row["method"] == "interp" or row["method"].startswith(("TransformerLens", "nnterp")):
            yield row | {"environment": environment.title}


# -- facts -------------------------------------------------------------------------------------------------------------
def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, threads, versions."""
    import torch

    packages = ("interp", "torch", "transformers", "transformer-lens", "nnsight", "safetensors")
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {"cpu": processor(), "cores": len(mine), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "versions": {name: found for name in packages if (found := _version(name))}}


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def show(document: dict[str, Any]) -> None:
    """The tables on the terminal."""
    from _report import table, written_table

    for run in document["runs"]:
        print("\n".join(table(run)))
    if document.get("write"):
        print("\n".join(written_table(document["write"])))


if __name__ == "__main__":
    app()
