"""One part of a dataset: run the model over some windows and lay the rows out on disk.

A part is at most `shard_tokens` tokens. Its number of rows is known from its tokens before the model runs, so each
site's file is begun at once and grows batch by batch: memory holds a few batches, however large the dataset. Summing,
hashing and writing happen in other threads while the model works on the next batch. (Routed experts are the exception:
they are collected for one part, to be sorted by expert.)
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.activations import Activations
from interp.sites import Site
from interp.store.disk import Staged, sync_folder
from interp.store.documents import Window, to_tokens
from interp.store.errors import StoreError
from interp.store.experts import ExpertTable
from interp.store.moments import Moments
from interp.store.plan import Plan
from interp.store.tensors import header, raw, real_tokens, rows_in, save

FOLDERS = ("tokens", "shards")
_LANES = min(8, 2 * (os.cpu_count() or 1))  # more than cores: a lane may be waiting for the disk
_SYNCS = 8  # files flushed at once: each waits for the disk, and the disk takes their requests together
_IN_FLIGHT = 1 << 27  # bytes that may wait to be written before the model has to
_BLOCK = 1 << 20  # bytes that are summed, hashed and written together: they stay in the cache meanwhile


class Workbench:
    """The threads and the folder in which the files of one range grow; `publish` makes them part of the dataset."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.files: list[Staged] = []
        # A lane is one thread, which works in the order in which it was asked, and a file has one lane: its bytes stay
        # in order. Summing, hashing and writing are arithmetic and the kernel's copying; none needs the interpreter.
        self._lanes = [ThreadPoolExecutor(1, thread_name_prefix="store-lane") for _ in range(_LANES)]
        self._syncing = ThreadPoolExecutor(_SYNCS, thread_name_prefix="store-sync")
        self._lane: dict[Staged, ThreadPoolExecutor] = {}
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0

    def stage(self, stem: str, suffix: str) -> Staged:
        staged = Staged(self.scratch, stem, suffix)
        self.files.append(staged)
        self._lane[staged] = self._lanes[len(self._lane) % _LANES]
        return staged

    def append(self, staged: Staged, size: int, job: Callable[[], None]) -> None:
        """Queue the writing of `size` bytes to a file; waits when too much is queued. Errors of earlier jobs come out
        here.
        """
        self._waiting.append((self._lane[staged].submit(job), size))
        self._bytes += size
        while self._bytes > _IN_FLIGHT:
            self._settle()

    def settle(self) -> None:
        """Wait until everything is written and summed, though it may not be on the disk yet."""
        while self._waiting:
            self._settle()

    def flush(self) -> None:
        """Wait until everything is on the disk, and let go of the descriptors of files that are done."""
        self.settle()
        for _ in self._syncing.map(Staged.close, self.files):
            pass

    def _settle(self) -> None:
        job, size = self._waiting.popleft()
        self._bytes -= size
        job.result()

    def publish(self, root: Path) -> dict[str, dict[str, Any]]:
        """Move the finished files to their places; gives each file's entry for the manifest by its stem."""
        self.flush()
        out = {s.stem: s.publish(root, "tokens" if s.suffix == ".parquet" else "shards").as_json() for s in self.files}
        self.files = []
        for folder in FOLDERS:
            sync_folder(root / folder)
        return out

    def close(self) -> None:
        """Stop the threads and remove what was not published."""
        for pool in (*self._lanes, self._syncing):
            pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()
        for staged in self.files:
            staged.discard()


def absorb(staged: Staged, rows: Tensor, moments: Moments | None = None) -> None:
    """Append rows to a file, its checksum and the sums, a block at a time."""
    for block in rows.split(rows_in(_BLOCK, rows)):
        if moments is not None:
            moments.add(block)
        staged.write(raw(block))


def slug(site: Site) -> str:
    """A site as part of a file name: ``z[5, head=3]`` becomes ``z.5.head.3``."""
    return re.sub(r"[^a-z0-9_]+", ".", str(site)).strip(".")


def split(windows: Iterable[Window], shard_tokens: int) -> Iterator[list[Window]]:
    """Windows in groups of at most `shard_tokens` tokens (one window at least)."""
    group: list[Window] = []
    size = 0
    for window in windows:
        if group and size + len(window) > shard_tokens:
            yield group
            group, size = [], 0
        group.append(window)
        size += len(window)
    if group:
        yield group


def write_part(bench: Workbench, model: Any, plan: Plan, stem: str, windows: list[Window],
               warned: set[Site], advance: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Capture `windows` and stage their files; gives the part's entry with stems in place of file entries.

    `advance` is told the number of tokens after each batch; sites in `warned` are not warned about again.
    """
    rows = sum(map(len, windows))
    writers: dict[Site, _RowWriter | _ExpertWriter] = {
        site: (_ExpertWriter if site.name == "expert_hidden" else _RowWriter)(
            bench, plan, site, f"{stem}.{slug(site)}", rows) for site in plan.sites}
    for start in range(0, len(windows), plan.batch_size):
        batch = windows[start : start + plan.batch_size]
        acts = model.capture(to_tokens(batch), list(plan.sites), check=False)  # we check what is stored, below
        for writer in writers.values():
            writer.append(acts)
        if advance:
            advance(sum(map(len, batch)))
    for writer in writers.values():
        writer.finish()
    bench.stage(stem, ".parquet").write(token_table(windows))
    bench.settle()  # from here on the sums are whole
    statistics: dict[str, Tensor] = {}
    for site, writer in writers.items():
        statistics |= writer.statistics()
        if writer.moments.nonfinite and site not in warned:
            warned.add(site)
            _warn_nonfinite(writer, plan, windows)
    save(bench.stage(f"{stem}.statistics", ".safetensors"), statistics, {"format": "pt", "part": stem})
    bench.flush()
    return {"rows": rows, "windows": len(windows), "documents": [windows[0].document, windows[-1].document + 1],
            "tokens": stem, "statistics": f"{stem}.statistics",
            "sites": {str(site): writer.entry() for site, writer in writers.items()}}


def _warn_nonfinite(writer: _RowWriter | _ExpertWriter, plan: Plan, windows: list[Window]) -> None:
    row = writer.first_nonfinite_row
    window = next(w for w, end in zip(windows, accumulate(map(len, windows)), strict=True) if row < end)
    hint = "; float16 ends at 65504, bfloat16 does not" if plan.dtype == "float16" else ""
    warnings.warn(f"{writer.site}: NaN or infinity in the activations, first in document {window.document}. The rows "
                  f"are kept, the statistics leave them out, and the manifest counts them{hint}", stacklevel=2)


class _RowWriter:
    """One row per token: [row, ...], in the order of the tokens. Floats take the dataset's dtype, numbers int32."""

    def __init__(self, bench: Workbench, plan: Plan, site: Site, stem: str, rows: int) -> None:
        self.bench, self.plan, self.site, self.rows = bench, plan, site, rows
        self.stem = stem
        self.file: Staged | None = None
        self.moments = Moments()
        self.shape: tuple[int, ...] = ()
        self.dtype = plan.torch_dtype

    def append(self, acts: Activations) -> None:
        tensor, mask = acts[self.site], acts.mask
        if tensor.shape[:2] != mask.shape:
            raise StoreError(f"{self.site}: shape {list(tensor.shape)} has no row per token {list(mask.shape)}; "
                             "such a site cannot be stored")
        kept = real_tokens(tensor, mask)
        if self.file is None:
            self.dtype = self.plan.torch_dtype if tensor.is_floating_point() else torch.int32
            self.shape = tuple(kept.shape[1:])
            self.file = self.bench.stage(self.stem, ".safetensors")
            about = {"format": "pt", "site": str(self.site)}
            self.file.write(header({"rows": (self.dtype, (self.rows, *self.shape))}, about))
        kept = kept.to(self.dtype)
        # Sums are of the values as stored, so that a reader finds the same.
        sums = self.moments if kept.is_floating_point() else None
        self.bench.append(self.file, kept.nbytes, partial(absorb, self.file, kept, sums))

    @property
    def first_nonfinite_row(self) -> int:
        return self.moments.first_nonfinite or 0

    def finish(self) -> None:
        """Nothing is left to do: the rows are on their way."""

    def statistics(self) -> dict[str, Tensor]:
        return self.moments.tensors(str(self.site))

    def entry(self) -> dict[str, Any]:
        return {"file": self.stem, "shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch."),
                "nonfinite_rows": self.moments.nonfinite}


class _ExpertWriter:
    """One row per (token, slot), sorted by expert; see `interp.store.experts`."""

    def __init__(self, bench: Workbench, plan: Plan, site: Site, stem: str, rows: int) -> None:
        assert site.layer is not None
        self.bench, self.site, self.layer, self.stem = bench, site, site.layer, stem
        self.table = ExpertTable(plan.n_experts, plan.torch_dtype)
        self.moments = Moments()

    def append(self, acts: Activations) -> None:
        self.table.append(acts.experts(self.layer), acts.mask)

    def finish(self) -> None:
        file = self.bench.stage(self.stem, ".safetensors")
        self.bench.append(file, self.table.nbytes, partial(self._write, file))

    def _write(self, file: Staged) -> None:
        self.table.sort()
        file.write(header(self.table.shapes, {"format": "pt", "site": str(self.site), "sorted_by": "expert"}))
        for column, piece in self.table.pieces(_BLOCK):
            absorb(file, piece, self.moments if column == "hidden" else None)

    @property
    def first_nonfinite_row(self) -> int:
        """The token of the first bad row of the table."""
        return int(self.table.order[self.moments.first_nonfinite or 0]) // self.table.slots

    def statistics(self) -> dict[str, Tensor]:
        return self.moments.tensors(str(self.site)) | {f"{self.site}/expert_counts": self.table.counts}

    def entry(self) -> dict[str, Any]:
        return {"file": self.stem, "shape": [self.table.neurons], "experts": self.table.n_experts,
                "dtype": str(self.table.dtype).removeprefix("torch."), "assignments": len(self.table.order),
                "nonfinite_rows": self.moments.nonfinite}


def token_table(windows: list[Window]) -> memoryview:
    """The tokens of a part as a parquet file: one line per row of its shards, in the same order.

    Columns: document, window (its number within the document), position (within the window), token_id, char_start and
    char_end (in the document, -1 where unknown), special, label.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = [len(w) for w in windows]
    rows = sum(lengths)
    owner = np.repeat(np.arange(len(windows)), lengths)  # the window of each row
    start = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)

    def flat(values: Iterable[Iterable[Any]], width: int = 1) -> Any:
        return np.fromiter(chain.from_iterable(values), np.int64, rows * width)

    spans = flat(chain.from_iterable(w.spans for w in windows), 2).reshape(rows, 2)
    columns = {
        "document": pa.array(np.array([w.document for w in windows])[owner]),
        "window": pa.array(np.array([w.number for w in windows], np.int32)[owner]),
        "position": pa.array((np.arange(rows) - start).astype(np.int32)),
        "token_id": pa.array(flat(w.ids for w in windows).astype(np.int32)),
        "char_start": pa.array(spans[:, 0].copy()),
        "char_end": pa.array(spans[:, 1].copy()),
        "special": pa.array(flat(w.special for w in windows).astype(bool)),
        "label": pa.array([w.label for w in windows]).take(pa.array(owner)),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getbuffer()
