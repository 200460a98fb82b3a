"""Finding damage, and dropping what is damaged so that the writer can make it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.store.disk import FileRef, explained, file_sha256, writer_lock
from interp.store.errors import Corrupt, StoreError
from interp.store.manifest import RANGES, content_sha256, file_entries, read_record
from interp.store.plan import Plan, read_plan

if TYPE_CHECKING:
    import os

    import pandas as pd

Fault = dict[str, Any]
COLUMNS = ["file", "range", "fault", "expected", "found"]


def verify(dir: str | os.PathLike[str], *, strict: bool = False) -> pd.DataFrame:
    """Read every byte of a dataset and compare it with the checksums taken when it was written.

    Args:
        dir: the dataset, finished or not.
        strict: raise Corrupt if anything is wrong, in place of returning it.

    Returns:
        One line per fault, so an empty table means a sound dataset. Columns: file; range (the unit of work it belongs
        to, -1 for files of the whole); fault (missing, truncated, too long, changed, unreadable); expected and found
        (bytes or sha256).

    Raises:
        NotADataset: there is no dataset. Corrupt: with `strict`, naming the faults.
    """
    import pandas as pd

    root = Path(dir)
    faults = list(_faults(root, read_plan(root), file_fault))
    if strict and faults:
        lines = "; ".join(f"{f['file']}: {f['fault']}" for f in faults[:5])
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise Corrupt(f"dir={str(dir)!r}: {len(faults)} faults: {lines}{more}. store.repair(dir) drops the damaged "
                      "ranges, and store.write with the same arguments makes them again")
    return pd.DataFrame(faults, columns=COLUMNS)


def file_fault(root: Path, ref: FileRef) -> tuple[str, Any, Any] | None:
    """What is wrong with one file: (fault, expected, found), or None."""
    path = root / ref.file
    try:
        size = path.stat().st_size
        if size != ref.bytes:
            return ("truncated" if size < ref.bytes else "too long"), ref.bytes, size
        digest = file_sha256(path)
    except FileNotFoundError:
        return "missing", ref.bytes, None
    except OSError as error:  # a bad sector
        return f"unreadable ({error.strerror})", ref.sha256, None
    return None if digest == ref.sha256 else ("changed", ref.sha256, digest)


def _faults(root: Path, plan: Plan, check: Callable[[Path, FileRef], tuple[str, Any, Any] | None]) -> Iterator[Fault]:
    records, damaged = {}, False
    for path in sorted((root / RANGES).glob("*.json")):
        index = int(path.stem)
        try:
            record = read_record(root, index)
            assert record is not None
            entries = [FileRef.from_json(entry) for entry in file_entries(record)]
            records[index] = record
        except (Corrupt, KeyError, TypeError) as error:
            damaged = True
            yield _fault(f"{RANGES}/{path.name}", index, f"unreadable ({error})", None, None)
            continue
        for ref in entries:
            if wrong := check(root, ref):
                yield _fault(ref.file, index, *wrong)
    manifest_path = root / "manifest.json"
    if not manifest_path.exists():
        return
    try:
        manifest = json.loads(manifest_path.read_bytes())
        promised, n_ranges = manifest["content_sha256"], manifest["ranges"]
        statistics, parts = FileRef.from_json(manifest["statistics"]), manifest["parts"]
    except (ValueError, KeyError, TypeError) as error:
        yield _fault("manifest.json", -1, f"unreadable ({error})", None, None)
        return
    for index in range(n_ranges):
        if index not in records and not (root / RANGES / f"{index:08d}.json").exists():
            damaged = True
            yield _fault(f"{RANGES}/{index:08d}.json", index, "missing", None, None)
    if wrong := check(root, statistics):
        yield _fault(statistics.file, -1, *wrong)
    ordered = [records[i] for i in sorted(records)]
    if not damaged:  # else the difference is explained already
        found = content_sha256(plan, ordered)
        if found != promised or parts != [part for record in ordered for part in record["parts"]]:
            yield _fault("manifest.json", -1, "changed", promised, found)


def _fault(file: str, index: int, fault: str, expected: Any, found: Any) -> Fault:
    return {"file": file, "range": index, "fault": fault, "expected": expected, "found": found}


def repair(dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Drop every damaged range (its record and files) and the manifest if anything is damaged; gives the faults found.

    Nothing is made again here: ``store.write`` with the arguments of the dataset then fills exactly the gaps.
    """
    root = Path(dir)
    read_plan(root)
    with explained(root, "repairing"), writer_lock(root, 0, 1):
        faults = verify(root)
        if faults.empty:
            return faults
        (root / "manifest.json").unlink(missing_ok=True)  # first: from here on the dataset counts as unfinished
        for index in sorted(set(faults["range"]) - {-1}):
            _drop(root, int(index))
    return faults


def _drop(root: Path, index: int) -> None:
    entries: list[dict[str, Any]] = []
    with suppress(StoreError, KeyError, TypeError):  # its files are strays then, which the writer removes at the end
        entries = list(file_entries(read_record(root, index) or {"parts": []}))
    (root / RANGES / f"{index:08d}.json").unlink(missing_ok=True)
    for entry in entries:
        (root / entry["file"]).unlink(missing_ok=True)
