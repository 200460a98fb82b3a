"""How bytes reach the disk: all or nothing, with their checksum, one writer at a time.

A file is written under a temporary name, flushed to the disk (fsync), renamed, and its directory flushed too. A reader,
or a run after a crash, therefore sees a whole file or none. The checksum is taken from the same buffers that are
written, so no file is read again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.store.errors import DiskError, Locked

TEMPORARY = ".tmp"
_OURS = re.compile(r"\A\d{8}\.\d{4}\b.*-[0-9a-f]{64}\.(safetensors|parquet)\Z")  # as `Staged.publish` names files
_PUSH = 1 << 20  # bytes after which the disk is told to get going
_PAGE = 1 << 12


@dataclass(frozen=True)
class FileRef:
    """A file of the dataset as the manifest knows it: path relative to the dataset, size in bytes, sha256 in hex."""

    file: str
    bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FileRef:
        return cls(data["file"], int(data["bytes"]), data["sha256"])


class Staged:
    """A file being written under a temporary name.

    `put` and `digest` the same bytes, in the same order, then `close` and `publish`. The two are apart because they
    cost about the same and may run in two threads.
    """

    def __init__(self, folder: Path, stem: str, suffix: str) -> None:
        self.stem, self.suffix = stem, suffix
        self.path = folder / f"{stem}{suffix}"
        self.bytes = self._pushed = 0
        self._hash = hashlib.sha256()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes to the file."""
        view = memoryview(data)
        done = 0
        while done < len(view):  # write may take less than it was given
            done += os.write(self._fd, view[done:])
        self.bytes += len(view)
        ready = self.bytes - self.bytes % _PAGE  # the last page is not full yet
        if ready - self._pushed >= _PUSH and hasattr(os, "posix_fadvise"):
            # Linux takes this as a hint to begin writing these pages to the disk. Else it would begin at the fsync, and
            # everything would wait for it there.
            os.posix_fadvise(self._fd, self._pushed, ready - self._pushed, os.POSIX_FADV_DONTNEED)
            self._pushed = ready

    def digest(self, data: bytes | memoryview) -> None:
        """Take the same bytes into the checksum."""
        self._hash.update(data)

    def write(self, data: bytes | memoryview) -> None:
        self.digest(data)
        self.put(data)

    def close(self) -> None:
        """Flush to the disk. After this the content survives a power cut, though under its temporary name."""
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def publish(self, root: Path, folder: str) -> FileRef:
        """Give the file its real name, which carries the checksum of its content."""
        digest = self._hash.hexdigest()
        name = f"{folder}/{self.stem}-{digest}{self.suffix}"
        os.replace(self.path, root / name)
        return FileRef(name, self.bytes, digest)

    def discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:  # some network file systems cannot; the rename itself is still atomic there
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, exclusive: bool = False, scratch: Path | None = None) -> bool:
    """Write a small file whole or not at all; it grows in `scratch` (on the same disk) or beside its place.

    With `exclusive` an existing file is left as it is and False is returned; of several processes exactly one wins.
    """
    temporary = (scratch or path.parent) / f".{path.name}.{socket.gethostname()}.{os.getpid()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        if exclusive:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links: the race stays open for a moment, no worse
                if path.exists():
                    return False
                os.replace(temporary, path)
        else:
            os.replace(temporary, path)
        sync_folder(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def dump_json(data: Any, *, indent: int | None = None) -> bytes:
    """JSON with sorted keys, so that equal content is equal bytes. Indented, it takes ten times as long."""
    return (json.dumps(data, indent=indent, sort_keys=True, ensure_ascii=False) + "\n").encode()


def file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def explained(root: Path, doing: str) -> Iterator[None]:
    """Turn the system's bare error about the disk into one that says what was being done and what to do next."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        go_on = "free some space and run the same command again; finished ranges are kept"
        advice = {
            errno.ENOSPC: f"the disk is full: {go_on}",
            errno.EDQUOT: f"your quota is used up: {go_on}",
            errno.EROFS: "the file system is read-only: choose another directory",
            errno.EACCES: "you may not write here: choose another directory or change its permissions",
            errno.EPERM: "you may not write here: choose another directory or change its permissions",
            errno.ENOTDIR: "part of the path is a file: choose another directory",
            errno.EEXIST: "there is a file of this name: choose another directory",
            errno.EFBIG: "the file would be larger than allowed here: lower shard_tokens",
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise DiskError(error.errno, f"dir={str(root)!r}: {doing} failed ({error.strerror}); {advice}") from error


@contextmanager
def writer_lock(root: Path, worker: int, n_workers: int) -> Iterator[Path]:
    """Hold the right to write, and give the folder for temporary files (empty at the start, gone at the end).

    A writer that works alone locks the dataset; workers that share the work lock only their own share of it. The locks
    are the kernel's (flock): they vanish with their process, however it dies.
    """
    alone = n_workers == 1
    whole = _lock(root / ".lock", exclusive=alone, waits_for="another writer")
    share = None
    try:
        if not alone:
            name = f".lock.{worker}-of-{n_workers}"
            share = _lock(root / name, exclusive=True, waits_for=f"another worker {worker} of {n_workers}")
        folder = root / TEMPORARY / f"{worker}-of-{n_workers}"
        # What an earlier run of this very share left behind is nobody's: we hold its lock. Alone, everything is ours.
        shutil.rmtree(root / TEMPORARY if alone else folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                (root / TEMPORARY).rmdir()  # stays while another worker has its folder in it
    finally:
        for fd in (share, whole):
            if fd is not None:
                os.close(fd)


def _lock(path: Path, *, exclusive: bool, waits_for: str) -> int | None:
    """A locked file descriptor; None where the file system knows no locks."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "unknown process"
        os.close(fd)
        raise Locked(
            f"dir={str(path.parent)!r}: {waits_for} is at work here ({holder}). Wait for it, or share the work: "
            "store.write(..., worker=i, n_workers=n) in each process"
        ) from error
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        warnings.warn(f"{path.parent}: this file system has no locks; nothing stops a second writer", stacklevel=4)
        return None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return fd


def remove_strays(root: Path, folders: tuple[str, ...], known: set[str]) -> list[str]:
    """Delete files in `folders` that no record names: what a crash left between a rename and its record."""
    gone = []
    for folder in folders:
        for path in sorted((root / folder).iterdir()):
            name = f"{folder}/{path.name}"
            if name not in known and _OURS.search(path.name):
                path.unlink(missing_ok=True)
                gone.append(name)
    return gone
