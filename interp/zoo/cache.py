"""Our own disk cache: whole entries or none.

An entry is a directory that was built elsewhere, under a private name beside its place, and renamed into it
in one step: whoever finds it finds it whole. Its card `source.json` lists every file with its size, so that
an entry that was damaged afterwards is noticed as well. One file lock per entry keeps two processes from
building the same thing.

The place is `$INTERP_CACHE`, else the platform's cache directory for `interp`; never Hugging Face's.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from interp.zoo.errors import LoadError, notice

CARD = "source.json"


def cache_dir() -> Path:
    """The root of the cache (not created): `$INTERP_CACHE`, else the platform's own place for caches."""
    chosen = os.environ.get("INTERP_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "interp"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "interp" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "interp"


def models_dir() -> Path:
    """Where whole models live inside the cache."""
    return cache_dir() / "models"


@dataclass(frozen=True)
class Entry:
    """One cached model: its name, directory, card and size on disk in bytes; `fault` says what is wrong, if
    anything."""

    name: str
    path: Path
    card: dict[str, Any]
    bytes: int
    fault: str | None


def read_card(path: Path) -> dict[str, Any]:
    """The card of the entry at `path`; empty when there is none or it is no JSON object."""
    try:
        card = json.loads((path / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def find(name: str) -> Path | None:
    """The directory of a whole entry, or None when there is none or it does not match its card."""
    path = models_dir() / name
    return path if path.is_dir() and _fault(path) is None else None


def entries() -> list[Entry]:
    """Everything in the cache, sorted by name, damaged entries included."""
    root = models_dir()
    if not root.is_dir():
        return []
    found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [Entry(p.name, p, read_card(p), sum(_sizes(p).values()), _fault(p)) for p in found]


@contextmanager
def locked(name: str, timeout: float = 1800) -> Iterator[None]:
    """Hold the entry's lock across processes; waits up to `timeout` seconds and says so once.

    The lock is the operating system's, so it is freed when its holder dies.
    Raises LoadError when the cache cannot be written or the wait is over.
    """
    root = models_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            notice(f"another process is preparing {name!r}; waiting for it")
            lock.acquire(timeout=timeout)
    except Timeout:
        raise LoadError(
            f"{name}: another process has held {root / f'.{name}.lock'} for {timeout:.0f} s; "
            "end that process and try again"
        ) from None
    except OSError as error:
        raise LoadError(
            f"the cache {root} cannot be written ({error.strerror or error}); set INTERP_CACHE to a directory that can"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def building(name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A fresh private directory to build an entry in, and its card to fill; it becomes the entry if the block
    ends well.

    Call it while holding `locked(name)`: whatever an interrupted build left beside is then nobody's, and is
    removed. Raises LoadError when the disk is full or cannot be written.
    """
    root, final = models_dir(), models_dir() / name
    for leftover in root.glob(f".{name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    private = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=root))
    card: dict[str, Any] = {"name": name}
    try:
        yield private, card
        card["files"] = _sizes(private)
        (private / CARD).write_text(json.dumps(card, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for file in private.rglob("*"):
            if file.is_file():
                _flush(file)
                file.chmod(0o644)
        private.chmod(0o755)  # mkdtemp and safetensors write for one user; a cache may be shared
        if final.exists():  # damaged, or we would not be building
            shutil.rmtree(final)
        private.rename(final)
    except (OSError, SafetensorError) as error:  # a full disk, as Python and as safetensors report it
        raise LoadError(
            f"{name}: could not be written to the cache {root} ({error}); free some space, or set INTERP_CACHE "
            "to a directory that has it"
        ) from error
    finally:  # after the rename there is nothing to remove; after anything else, Ctrl-C too, half an entry
        shutil.rmtree(private, ignore_errors=True)


def _sizes(path: Path) -> dict[str, int]:
    files = (f for f in path.rglob("*") if f.is_file() and f.name != CARD)
    return {f.relative_to(path).as_posix(): f.stat().st_size for f in sorted(files)}


def _fault(path: Path) -> str | None:
    promised = read_card(path).get("files")
    if not isinstance(promised, dict):
        return f"no {CARD} that lists its files"
    there = _sizes(path)
    for name, size in promised.items():
        if there.get(name) != size:
            return f"{name}: {there.get(name, 'no')} bytes, {size} expected"
    return None


def _flush(file: Path) -> None:
    """Force a file to the disk, so that the rename cannot become durable before the contents."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
