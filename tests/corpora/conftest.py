"""Packages in miniature, and a corpus of the fallback tier; nothing here reaches for the network."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

Packer = Callable[[str, dict[str, str | bytes]], Path]


def tar_of(files: dict[str, str | bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def ar_of(entries: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, data in entries.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


@pytest.fixture
def pack(tmp_path: Path) -> Packer:
    """`pack("x.deb", {name: text})`: a package file of the kind that its ending says."""

    def make(filename: str, files: dict[str, str | bytes]) -> Path:
        path = tmp_path / filename
        if path.suffix == ".whl":
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        elif path.suffix == ".tgz":
            path.write_bytes(gzip.compress(tar_of(files)))
        else:
            data = lzma.compress(tar_of({f"./{name}": content for name, content in files.items()}))
            path.write_bytes(ar_of({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data}))
        return path

    return make


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of the fallback tier, built once."""
    from interp import corpora

    return corpora.build(tmp_path_factory.mktemp("corpora") / "fallback", tier="fallback")
