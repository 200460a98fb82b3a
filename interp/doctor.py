"""What this machine has, what is cached, and what will not work here and why.

`report()` looks, `problems()` judges, `show()` prints. Looking imports neither transformer_lens nor sae_lens:
their versions are read from their metadata, and their known clashes are stated from versions alone.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30


def report() -> dict[str, Any]:
    """Everything that `interp doctor --json` prints: plain values, sizes in bytes.

    Keys: interp, python, platform, packages, devices, memory, cache, hub, problems.
    """
    from interp.zoo import hub, smollm2

    found: dict[str, Any] = {
        "interp": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "devices": devices(),
        "memory": memory(),
        "cache": cached(),
        "hub": {"endpoint": hub.endpoint(), "unreachable": hub.unreachable(smollm2.HUB_ID)},
    }
    found["problems"] = problems(found)
    return found


def packages() -> list[dict[str, Any]]:
    """Every package that pyproject.toml names: installed version or None, what we ask of it, which extra
    needs it."""
    from packaging.requirements import Requirement

    rows = []
    for text in requires("interp") or []:
        need = Requirement(text)
        extra = str(need.marker).partition("extra == ")[2].strip("\"'") if need.marker else ""
        have = _version(need.name)
        fits = have is not None and need.specifier.contains(have.partition("+")[0], prereleases=True)
        rows.append(
            {
                "package": need.name,
                "version": have,
                "needed": str(need.specifier),
                "extra": extra,
                "fits": fits,
            }
        )
    return rows


def devices() -> list[dict[str, Any]]:
    """The processor and every accelerator that torch sees, with what it computes natively."""
    import torch

    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = [name for name in ("amx_bf16", "avx512_bf16") if features.get(name)]
    if platform.machine() == "arm64" and sys.platform == "darwin":
        native.append("arm_bf16")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": features.get("cpu_name") or platform.processor() or platform.machine(),
            "cores": cores,
            "threads": torch.get_num_threads(),
            "vector": torch.backends.cpu.get_cpu_capability(),
            "bfloat16": native,
        }
    ]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        rows.append(
            {
                "device": f"cuda:{i}",
                "name": card.name,
                "memory": card.total_memory,
                "bfloat16": ["native"] if card.major >= 8 else [],
            }
        )
    if torch.backends.mps.is_available():
        rows.append({"device": "mps", "name": platform.processor(), "bfloat16": ["native"]})
    return rows


def memory() -> dict[str, int | None]:
    """Main memory in bytes: total and available (what a program can still take), None where the system won't
    say."""
    try:
        import psutil
    except ImportError:
        pass
    else:
        now = psutil.virtual_memory()
        return {"total": int(now.total), "available": int(now.available)}
    try:  # Linux without psutil
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {key: int(lines[name].split()[0]) for key, name in (("total", "MemTotal"), ("available", "MemAvailable"))}
        return {key: value * 1024 for key, value in kib.items()}
    except (OSError, KeyError, ValueError):
        return {"total": None, "available": None}


def cached() -> dict[str, Any]:
    """Our cache: its directory, free space there in bytes, and each model in it with its size and origin."""
    from interp.zoo import cache

    root = cache.cache_dir()
    there = next(p for p in (root, *root.parents) if p.exists())
    rows = [
        {
            "name": entry.name,
            "bytes": entry.bytes,
            "source": entry.card.get("source"),
            "weights": entry.card.get("weights"),
            "fault": entry.fault,
        }
        for entry in cache.entries()
    ]
    return {"directory": str(root), "free": shutil.disk_usage(there).free, "models": rows}


def problems(found: dict[str, Any]) -> list[dict[str, str]]:
    """What will not work here, why, and the mend, judged from a report's other keys."""
    out: list[dict[str, str]] = []

    def add(what: str, why: str, mend: str) -> None:
        out.append({"what": what, "why": why, "mend": mend})

    have = {row["package"]: row["version"] for row in found["packages"]}
    for row in found["packages"]:
        if row["fits"] or (row["extra"] in ("test", "dev") and row["version"] is None):
            continue  # tools for working on the project are no user's problem when absent
        target = f"'interp[{row['extra']}]'" if row["extra"] else "interp"
        state = "not installed" if row["version"] is None else f"version {row['version']}, needs {row['needed']}"
        what = {
            "transformer-lens": "TransformerLens bridge",
            "sae-lens": "SAELens bridge",
            "nnsight": "nnsight bridge",
        }
        add(what.get(row["package"], row["package"]), f"{row['package']}: {state}", f"pip install {target}")

    lens = _release(have.get("transformer-lens"))
    if lens and lens < (4,):
        add(
            "TransformerBridge of DeepSeek V2 and V3",
            f"transformer-lens {have['transformer-lens']} gives wrong logits there (off by more than 2); 4.x is right",
            "use interp.load on the Hugging Face model: it does not go through TransformerLens",
        )
    if lens and lens >= (4,) and have.get("sae-lens") and _caps_lens():
        add(
            "import sae_lens",
            f"sae-lens {have['sae-lens']} requires transformer-lens below 4, {have['transformer-lens']} is installed",
            "pip install 'transformer-lens<4'; our own SAE code reads and writes its format without it",
        )

    elif lens and have.get("sae-lens") and _caps_lens():
        add(
            "transformer-lens 4",
            f"sae-lens {have['sae-lens']} requires transformer-lens below 4",
            "a second environment without sae-lens; our bridge works with both",
        )

    cpu = found["devices"][0]
    if not cpu["bfloat16"]:
        add(
            "fast bfloat16 on the processor",
            f"{cpu['name']} ({cpu['vector']}) has no bfloat16 arithmetic; emulated, it is up to ten times slower",
            'keep dtype="float32" for computing; bfloat16 is still half the size on disk',
        )
    if len(found["devices"]) == 1:
        import torch

        why = f"torch {torch.__version__} " + (
            "is built without" if torch.version.cuda is None else "sees no such device"
        )
        add("CUDA and MPS", why, "everything runs on the processor, in float32 by default")

    if found["hub"]["unreachable"]:
        add(
            "models by hub id",
            found["hub"]["unreachable"],
            "pass local directories; smollm2 also comes from a package index, tiny:<family> from nowhere",
        )
    models = {row["name"]: row for row in found["cache"]["models"]}
    for row in models.values():
        if row["fault"]:
            add(f"cached {row['name']}", row["fault"], f'interp.load("{row["name"]}") makes it again')
    if "smollm2" not in models and found["cache"]["free"] < GIB:
        add(
            "smollm2",
            f"{found['cache']['free'] / GIB:.1f} GiB free at the cache, 1 needed",
            "set INTERP_CACHE elsewhere",
        )
    return out


def show(found: dict[str, Any], console: Console) -> None:
    """Print a report as tables."""
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]interp {found['interp']}[/]  python {found['python']}  {escape(found['platform'])}\n")

    table = Table(title="Packages", title_justify="left")
    for column in ("package", "version", "needed", "for"):
        table.add_column(column)
    for row in found["packages"]:
        colour = "green" if row["fits"] else "red" if not row["extra"] else "yellow"
        table.add_row(
            row["package"],
            f"[{colour}]{row['version'] or 'missing'}[/]",
            row["needed"],
            row["extra"] or "interp",
        )
    console.print(table)

    table = Table(title="Devices", title_justify="left")
    for column in ("device", "name", "", "bfloat16"):
        table.add_column(column)
    for row in found["devices"]:
        detail = (
            f"{row['cores']} cores, {row['threads']} threads, {row['vector']}"
            if row["device"] == "cpu"
            else size(row.get("memory"))
        )
        table.add_row(row["device"], escape(str(row["name"])), detail, ", ".join(row["bfloat16"]) or "emulated")
    console.print(table)

    free = found["memory"]["available"]
    if free:
        # four bytes a weight, and as much again for activations and a copy while loading
        console.print(
            f"Memory: {size(free)} of {size(found['memory']['total'])} available, enough for about "
            f"{free / 8 / 1e9:.1f} billion weights in float32 with room to work\n"
        )

    table = Table(title=f"Cache: {escape(found['cache']['directory'])}", title_justify="left")
    for column in ("model", "size", "weights", "state"):
        table.add_column(column)
    for row in found["cache"]["models"]:
        weights = f"{row['weights']} (from the {row['source']})" if row["source"] else "unknown"
        state = f"[red]{escape(row['fault'])}[/]" if row["fault"] else "[green]whole[/]"
        table.add_row(escape(row["name"]), size(row["bytes"]), escape(weights), state)
    console.print(table if found["cache"]["models"] else f"Cache: {escape(found['cache']['directory'])} is empty")
    console.print(f"{size(found['cache']['free'])} free there\n")

    if not found["problems"]:
        console.print("[green]Everything works here.[/]")
        return
    table = Table(title="What will not work here", title_justify="left")
    for column in ("what", "why", "instead"):
        table.add_column(column, overflow="fold")
    for row in found["problems"]:
        table.add_row(*(escape(row[key]) for key in ("what", "why", "mend")))
    console.print(table)


def size(n: int | None) -> str:
    """Bytes as people read them."""
    if n is None:
        return "unknown"
    return f"{n / GIB:.1f} GiB" if n >= GIB else f"{n / 2**20:.0f} MiB"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _release(text: str | None) -> tuple[int, ...] | None:
    from packaging.version import Version

    return Version(text).release if text else None


def _caps_lens() -> bool:
    """Does the installed sae-lens still refuse transformer-lens 4? Newer ones may not."""
    from packaging.requirements import Requirement

    needs = [Requirement(text) for text in requires("sae-lens") or []]
    return any(need.name == "transformer-lens" and not need.specifier.contains("4.3.0") for need in needs)
