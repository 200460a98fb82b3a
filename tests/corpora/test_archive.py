from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from interp.corpora import CorpusError, archive


@pytest.mark.parametrize("filename", ["p.whl", "p.tgz", "p.deb"])
def test_members_of_every_kind(pack, filename):
    path = pack(filename, {"usr/a.txt": "alpha", "usr/b.txt.gz": gzip.compress(b"beta"), "usr/c.bin": b"no"})
    found = dict(archive.members(path, lambda name: ".txt" in name))
    assert found == {"usr/a.txt": b"alpha", "usr/b.txt.gz": b"beta"}


def test_names_are_only_names(pack, tmp_path):
    """A name that climbs out of the archive is a string like any other: nothing is written anywhere."""
    path = pack("p.tgz", {"../../escaped.txt": "x"})
    before = set(tmp_path.parent.rglob("*"))
    assert [name for name, _ in archive.members(path, lambda name: True)] == ["../../escaped.txt"]
    assert set(tmp_path.parent.rglob("*")) == before


def test_links_are_skipped(tmp_path):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        link = tarfile.TarInfo("passwd")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    path = tmp_path / "p.tgz"
    path.write_bytes(gzip.compress(raw.getvalue()))
    assert list(archive.members(path, lambda name: True)) == []


def test_a_member_that_claims_too_much(pack, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBER", 10)
    for filename in ("p.whl", "p.deb"):
        with pytest.raises(CorpusError, match="claims 11 bytes"):
            list(archive.members(pack(filename, {"a": "x" * 11}), lambda name: True))


@pytest.mark.parametrize("filename", ["p.whl", "p.tgz", "p.deb"])
def test_damaged_packages(pack, filename):
    path: Path = pack(filename, {"a.txt": "alpha" * 1000})
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a package at all, but long enough to be one"):
        path.write_bytes(broken)
        with pytest.raises(CorpusError, match=r"p\.(whl|tgz|deb)"):
            list(archive.members(path, lambda name: True))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "p.rar").write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"expected a \.whl, \.tgz or \.deb"):
        list(archive.members(tmp_path / "p.rar", lambda name: True))
