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
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

PEERS = "transformer_lens,nnsight"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="smollm2 or olmoe (random, of that shape)")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="rounds that count, at most")] = 9,
    seconds: Annotated[float, typer.Option(help="per case; no new round begins after it, if there were three")] = 30,
    batch: Annotated[int, typer.Option(help="rows; 0: the largest of 8, 4, 2, 1 that run in half a second")] = 0,
    length: Annotated[int, typer.Option(help="tokens per row")] = 64,
    threads: Annotated[int, typer.Option(help="torch threads; 0: torch's own choice")] = 0,
    device: str = "cpu",
    peers: Annotated[str, typer.Option(help="some of transformer_lens,nnsight,nnterp; or none")] = PEERS,
    cases: Annotated[str, typer.Option(help="some of residual,attention,routing,experts; default: all")] = "",
    others: Annotated[bool, typer.Option("--others", help="also peers that need other versions")] = False,
    write: Annotated[bool, typer.Option("--write", help="measure writing a dataset instead")] = False,
    tokens: Annotated[int, typer.Option(help="with --write: tokens to write")] = 8192,
    directory: Annotated[Path | None, typer.Option(help="with --write: where")] = None,
    everything: Annotated[bool, typer.Option("--all", help="both models, both dtypes, all peers, writing")] = False,
    markdown: Annotated[Path | None, typer.Option(help="write the tables to this page; others' sections stay")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """Time `capture` against the plain forward pass, and against everybody else."""
    quiet_libraries()
    import torch
    from _measure import Setting, measured, say, written
    from _report import merged, page, tables

    if threads:
        torch.set_num_threads(threads)
    document: dict[str, Any] = {"machine": machine(), "runs": []}
    setting = Setting(model, dtype, rounds, seconds, batch, length, threads, device)
    if everything:
        document |= all_of_it(vars(setting), tokens, directory)
    elif write:
        document["write"] = written(rounds, seconds, tokens, directory)
    else:
        run = measured(setting, peers.removeprefix("none").split(","), cases.split(","))
        if others:
            run["rows"] += elsewhere(run, vars(setting))
        document["runs"] = [run]
    if markdown:
        old = markdown.read_text(encoding="utf-8") if markdown.exists() else ""
        markdown.write_text(merged(page(document), old), encoding="utf-8")
        say(f"wrote {markdown}")
    if as_json:
        print(json.dumps(document, indent=1))
    elif not markdown:
        print("\n".join(tables(document)))


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


# -- processes ---------------------------------------------------------------------------------------------------------
def all_of_it(options: dict[str, Any], tokens: int, directory: Path | None) -> dict[str, Any]:
    """Every model and dtype, and the writers: each in a process of its own, so that none inherits another's memory."""
    runs: list[dict[str, Any]] = []
    for model in ("smollm2", "olmoe"):
        for dtype in ("float32", "bfloat16"):
            runs += again(options | {"model": model, "dtype": dtype, "others": dtype == "float32"})["runs"]
    writing = {"write": True, "tokens": tokens, "directory": directory}
    return {"runs": runs, "write": again(options | writing)["write"]}


def elsewhere(run: dict[str, Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the peers that need other versions, with interp beside each in its process; or one that says why not."""
    from _peers import ENVIRONMENTS

    for environment in ENVIRONMENTS:
        cases = [case["name"] for case in run["cases"] if case["name"] in environment.cases]
        if not cases:
            continue
        own = {"batch": run["batch"], "peers": environment.method, "cases": ",".join(cases)}
        try:
            found = again(options | own, environment.folder())["runs"][0]["rows"]
        except RuntimeError as error:
            yield {"case": cases[0], "method": environment.title, "environment": "", "note": f"not run: {error}"}
            continue
        for row in found:
            if row["method"] == "interp" or row["method"].startswith(environment.shown):
                yield row | {"environment": environment.title}


def again(options: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    """This script in another process, with `path` in front of the packages; its JSON document."""
    command = [sys.executable, str(Path(__file__)), "--json"]
    for name, value in options.items():
        if value is True:
            command.append(f"--{name}")
        elif value:
            command += [f"--{name}", str(value)]
    paths = [str(path or ""), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} of {Path(__file__).name} {' '.join(command[2:])}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


# -- facts -------------------------------------------------------------------------------------------------------------
def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, threads, versions."""
    import torch

    packages = ("interp", "torch", "transformers", "transformer-lens", "nnsight", "safetensors")
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {"cpu": processor(), "cores": len(mine), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
            "versions": {name: found for name in packages if (found := installed(name))}}


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def installed(name: str) -> str | None:
    """The version of a package, None without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    app()
