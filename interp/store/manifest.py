"""Records and manifest: from the ranges that many workers committed to one description of the dataset.

``plan.json`` says what was asked for, ``ranges/NNN.json`` what each range holds, and ``manifest.json`` puts them
together once all ranges are there. Putting together is a function of the records alone, so any worker may do it, twice
does no harm, and the last thing written is the manifest: a dataset is complete when it exists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.store.disk import FileRef, dump_json, explained, file_sha256, remove_strays, write_atomic
from interp.store.errors import Corrupt, StoreError
from interp.store.moments import Moments
from interp.store.parts import FOLDERS
from interp.store.plan import Plan
from interp.store.tensors import header, open_tensors, raw

RANGES = "ranges"
STATISTICS = "statistics.safetensors"


def record_path(root: Path, index: int) -> Path:
    return root / RANGES / f"{index:08d}.json"


def read_record(root: Path, index: int) -> dict[str, Any] | None:
    """The record of a range, or None where it is not done."""
    path = record_path(root, index)
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Corrupt(f"{path}: the record is damaged ({error}); store.repair(dir) drops it, then store.write fills "
                      "the gap") from error
    return record


def read_records(root: Path) -> list[dict[str, Any]]:
    """All records, in the order of their ranges."""
    found = (read_record(root, int(path.stem)) for path in sorted((root / RANGES).glob("*.json")))
    return [record for record in found if record is not None]


def file_entries(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every file that a record answers for: ``{"file", "bytes", "sha256"}`` and what else is known of it."""
    for part in record["parts"]:
        yield part["tokens"]
        yield part["statistics"]
        yield from part["sites"].values()


def finish(root: Path, plan: Plan, n_ranges: int, scratch: Path) -> bool:
    """Write statistics, card, Croissant metadata and manifest if all ranges are done; says whether they are.

    A second call finds everything as it is and changes nothing.
    """
    if any(not record_path(root, i).exists() for i in range(n_ranges)):
        return False
    records = read_records(root)
    manifest = assemble(plan, records)
    path = root / "manifest.json"
    if path.exists():
        there = json.loads(path.read_bytes())
        if there.get("content_sha256") == manifest["content_sha256"] and (root / STATISTICS).exists():
            return True
    from interp.store.card import dataset_card
    from interp.store.croissant import dataset_croissant

    with explained(root, "completing the dataset"):
        manifest["statistics"] = _write_statistics(root, plan, records, manifest, scratch)
        known = {entry["file"] for record in records for entry in file_entries(record)}
        remove_strays(root, FOLDERS, known)
        write_atomic(root / "README.md", dataset_card(plan, manifest).to_markdown().encode(), scratch=scratch)
        write_atomic(root / "croissant.json", dump_json(dataset_croissant(plan, manifest)), scratch=scratch)
        write_atomic(path, dump_json(manifest), scratch=scratch)
    return True


def assemble(plan: Plan, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest, as far as the records give it."""
    parts = [part for record in records for part in record["parts"]]
    if not parts:
        raise StoreError("texts: every document is empty; there is nothing to store")
    sites = {}
    for site in plan.sites:
        entries = [part["sites"][str(site)] for part in parts]
        shapes = {tuple(e["shape"]) for e in entries}
        if len(shapes) > 1:
            raise Corrupt(f"{site}: its rows have different shapes in different shards: {sorted(shapes)}")
        sites[str(site)] = {
            "transformer_lens": site.tl_name,
            "axes": _row_axes(site.axes),
            "shape": entries[0]["shape"],
            "dtype": entries[0]["dtype"],
            "layout": "experts" if "experts" in entries[0] else "rows",
            "rows": sum(e.get("assignments", part["rows"]) for e, part in zip(entries, parts, strict=True)),
            "nonfinite_rows": sum(e["nonfinite_rows"] for e in entries),
        }
        if "experts" in entries[0]:
            sites[str(site)]["experts"] = entries[0]["experts"]
    texts = hashlib.sha256("".join(r["text_sha256"] for r in records).encode()).hexdigest()
    data = {
        **plan.as_json(),
        "documents": sum(r["documents"] for r in records),
        "windows": sum(p["windows"] for p in parts),
        "rows": sum(p["rows"] for p in parts),
        "bytes": sum(e["bytes"] for r in records for e in file_entries(r)),
        "ranges": len(records),
        "label_type": _label_type(records),
        "text_sha256": texts,
        "sites": sites,
        "masks": {
            "padding": "left out: every row is a real token",
            "special": "column `special` of the token table marks tokens that are no part of the text",
            "nonfinite": "rows with NaN or infinity are kept; `nonfinite_rows` of each site counts them",
        },
        "parts": parts,
    }
    return {**data, "content_sha256": content_sha256(plan, records)}


def _row_axes(axes: tuple[str, ...]) -> list[str]:
    """Axes of the stored rows: batch and position (and, for experts, the slot) have become the row."""
    return ["row", *axes[3 if axes[2:3] == ("slot",) and len(axes) > 3 else 2 :]]


def content_sha256(plan: Plan, records: list[dict[str, Any]]) -> str:
    """One checksum over all that matters: the plan, the texts and every file's checksum, but no dates or versions."""
    content = {k: v for k, v in plan.content.items() if k != "documents"}  # unknown in advance for a stream
    files = [[e["file"], e["sha256"]] for r in records for e in file_entries(r)]
    data = [content, [r["text_sha256"] for r in records], files]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _label_type(records: list[dict[str, Any]]) -> str | None:
    kinds = {r["label_type"]: r for r in records if r["label_type"]}
    if len(kinds) > 1:
        where = " and ".join(f"{k} from document {r['first_document']} on" for k, r in kinds.items())
        raise StoreError(f"labels: of different types ({where}); all labels need one type")
    return next(iter(kinds), None)


def _write_statistics(root: Path, plan: Plan, records: list[dict[str, Any]], manifest: dict[str, Any],
                      scratch: Path) -> dict[str, Any]:
    """Merge the sums of all parts, in their order, into means and second moments; also a summary into the manifest."""
    sums = {str(site): Moments() for site in plan.sites}
    counts: dict[str, Tensor] = {}
    for record in records:
        for part in record["parts"]:
            tensors = open_tensors(root / part["statistics"]["file"])
            for site, moments in sums.items():
                moments.merge(Moments.load(tensors, site))
                if (key := f"{site}/expert_counts") in tensors:
                    counts[key] = counts.get(key, torch.zeros_like(tensors[key])) + tensors[key]
    out: dict[str, Tensor] = {}
    for site, moments in sums.items():
        entry = manifest["sites"][site]
        mean, second = (t / max(1, moments.count) for t in (moments.total, moments.squares))
        if mean.numel():  # whole numbers have no mean worth keeping
            out |= {f"{site}/mean": mean.view(entry["shape"]), f"{site}/second_moment": second.view(entry["shape"])}
            entry["rms"] = float(second.mean().sqrt())
            entry["mean_norm"] = float(mean.norm())
        out[f"{site}/counts"] = torch.tensor([moments.count, moments.nonfinite])
    out |= counts
    data = header({k: (t.dtype, tuple(t.shape)) for k, t in out.items()}, {"format": "pt"})
    data += b"".join(bytes(raw(t)) for t in out.values())
    write_atomic(root / STATISTICS, data, scratch=scratch)
    return FileRef(STATISTICS, len(data), file_sha256(root / STATISTICS)).as_json()
