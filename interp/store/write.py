"""The writer: range after range, each committed by one small record.

A range is done when its record exists. The record is written after the range's files are on the disk under their final
names, so a process killed at any moment leaves finished ranges and nothing else that counts; the next run does the
ranges that have no record. What a range contains follows from the plan and its texts alone (never from where an earlier
run stopped), so a resumed dataset has the same files as an unbroken one, and workers on many machines need no master.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cards import Card
from interp.sites import Site
from interp.store.dataset import ActivationDataset
from interp.store.disk import dump_json, explained, write_atomic, writer_lock
from interp.store.documents import Document, Documents, Range
from interp.store.errors import Mismatch, NotADataset, StoreError
from interp.store.manifest import RANGES, file_entries, finish, read_record, record_path
from interp.store.parts import FOLDERS, Workbench, split, write_part
from interp.store.plan import Plan, begin, make_plan
from interp.store.progress import Progress

if TYPE_CHECKING:
    import os

    import torch

    from interp.model import Model


def write(
    model: Model,
    texts: Any,
    sites: str | Site | Sequence[str | Site],
    dir: str | os.PathLike[str],
    *,
    labels: Any = None,
    text_column: str = "text",
    dtype: str | torch.dtype = "bfloat16",
    context: int = 128,
    batch_size: int = 8,
    shard_tokens: int | None = None,
    documents_per_range: int | None = None,
    seed: int = 0,
    empty: str = "raise",
    sources: str | Mapping[str, Any] | None = None,
    progress: bool = True,
    worker: int = 0,
    n_workers: int = 1,
) -> ActivationDataset:
    """Run `model` over `texts` and keep the activations at `sites` in a directory; resumes what is there.

        ds = store.write(m, texts, ["resid_post[*]", "expert_hidden[3]"], "acts", labels=domains)

    Texts longer than `context` tokens are cut into windows, each run on its own. Every token of every window becomes a
    row, padding never does. Memory does not grow with the number of texts, except for the records (a few hundred bytes
    per site and shard).

    **Many machines.** Every process makes the same call with its own `worker` and one `n_workers`, on a directory that
    all of them see: range i belongs to worker ``i % n_workers``. No process waits for another, and whichever comes last
    completes the dataset. When one has died, start it again, or finish alone with ``n_workers=1``::

        torchrun --nproc-per-node 8 capture.py      # worker=int(os.environ["RANK"]),
                                                    # n_workers=int(os.environ["WORLD_SIZE"])
        sbatch --array=0-63 capture.sh              # worker=int(os.environ["SLURM_ARRAY_TASK_ID"]),
                                                    # n_workers=int(os.environ["SLURM_ARRAY_TASK_COUNT"])

    Args:
        model: an `interp.Model`.
        texts: texts, token ids (lists, or a LongTensor [document, pos]), `Tokens`, a generator of these, or a Hugging
            Face dataset with a text column.
        sites: sites or patterns, as in `Model.capture`. ``expert_hidden`` is kept as a table sorted by expert;
            ``expert_out`` and ``pattern`` are refused.
        dir: where to write; a new or empty directory, or a dataset to resume.
        labels: one per document (text, number or truth value), or the name of a column of the dataset.
        text_column: the column with the text.
        dtype: of the stored floats: ``bfloat16``, ``float16`` or ``float32``. Whole numbers are stored as int32.
        context: tokens per window at most, including what the tokenizer puts before a text.
        batch_size: windows per forward pass. Part of the plan, since padding changes results in the last digits.
        shard_tokens: tokens per shard at most; by default 131,072, or 32,768 where ``expert_hidden`` is stored, because
            the expert tables of one shard are sorted in memory.
        documents_per_range: documents in one unit of work; by default as many as fill one shard at full length.
        seed: of the order in which `ActivationDataset.batches` shuffles unless told otherwise.
        empty: a document without text is an error (``"raise"``) or is left out (``"skip"``).
        sources: what the dataset card says of the data: a text on where it comes from, or a mapping of card fields
            (``sources``, ``licence``, ``collection``, ``intended_use``, ...; see `interp.cards.FIELDS`).
        progress: show a bar with the time left, where it takes over two seconds (see `interp.progress`).
        worker: which of `n_workers` this process is, from 0.
        n_workers: processes that share the work.

    Returns:
        The dataset. With several workers it may still be incomplete (``ds.complete``).

    Raises:
        StoreError: arguments that cannot be stored. `Mismatch`: the directory was begun with another model, other
            texts or settings. `Locked`: another process writes there. `NotADataset`: the directory holds other files.
        DiskError: the disk is full or read-only; finished ranges are kept and nothing half-written is.
    """
    if not 0 <= worker < n_workers:
        raise StoreError(f"worker={worker}, n_workers={n_workers}: expected 0 <= worker < n_workers")
    root = Path(dir)
    documents = Documents(texts, labels, text_column=text_column, empty=empty)
    card = {"sources": sources} if isinstance(sources, str) else dict(sources or {})
    Card("dataset", "", card)  # an unknown field is better found now than when the work is done
    plan = make_plan(model, sites, documents.count, dtype=dtype, context=context, batch_size=batch_size,
                     shard_tokens=shard_tokens, documents_per_range=documents_per_range, seed=seed, empty=empty,
                     card=card)
    _check_free(root)
    with explained(root, "opening the directory"):
        root.mkdir(parents=True, exist_ok=True)
        _check_free(root)
        for folder in (*FOLDERS, RANGES):
            (root / folder).mkdir(exist_ok=True)
    with ExitStack() as stack:
        with explained(root, "opening the dataset"):
            scratch = stack.enter_context(writer_lock(root, worker, n_workers))
            job = _Job(root, scratch, model, documents, begin(root, plan, scratch))
        with Progress(progress, documents.count) as bar:
            n_ranges = job.run(worker, n_workers, bar)
        finish(root, job.plan, n_ranges, scratch)
    return ActivationDataset(root, partial=True)


def _check_free(root: Path) -> None:
    """Refuse a directory that holds something else: it is someone's, and we would write and delete in it."""
    if root.is_dir() and not (root / "plan.json").exists():
        begun = {name for name in (*FOLDERS, RANGES) if (root / name).is_dir() and not any((root / name).iterdir())}
        others = [p.name for p in root.iterdir() if not p.name.startswith(".") and p.name not in begun]
        if others:
            raise NotADataset(f"dir={str(root)!r} holds other files ({', '.join(sorted(others)[:3])}...) and no "
                              "activation dataset; choose a new or empty directory")


class _Job:
    def __init__(self, root: Path, scratch: Path, model: Any, documents: Documents, plan: Plan) -> None:
        self.root, self.scratch, self.model = root, scratch, model
        self.documents, self.plan = documents, plan
        self.warned: set[Site] = set()

    def run(self, worker: int, n_workers: int, bar: Progress) -> int:
        """Do this worker's ranges that have no record; gives the number of ranges there are in all."""
        n_ranges = 0
        complete = (self.root / "manifest.json").exists()
        for span in self.documents.ranges(self.plan.documents_per_range, lambda i: i % n_workers != worker):
            n_ranges += 1
            if span.documents:
                record = read_record(self.root, span.index)
                if record is None:
                    if complete:
                        raise Mismatch(f"dir={str(self.root)!r} is complete and has fewer documents than texts now has "
                                       f"(more than {span.first}); write to a new directory")
                    with explained(self.root, "writing"):
                        self.write_range(span, bar)
                elif record["text_sha256"] != span.sha256:
                    raise Mismatch(f"dir={str(self.root)!r}: documents {span.first} to {span.first + span.count - 1} "
                                   "of texts, or their labels, are not those that the dataset holds; give the same "
                                   "texts to resume it, or write to a new directory")
            bar.documents(span.count)
        if record_path(self.root, n_ranges).exists():
            raise Mismatch(f"dir={str(self.root)!r}: the dataset holds more documents than texts now has; give the "
                           "same texts to resume it, or write to a new directory")
        return n_ranges

    def write_range(self, span: Range, bar: Progress) -> None:
        label_type = _label_type(span.documents)
        bench = Workbench(self.scratch)
        try:
            windows = self.documents.windows(span, self.model.tokenizer, self.plan.context)
            parts = [write_part(bench, self.model, self.plan, f"{span.index:08d}.{number:04d}", group, self.warned,
                                bar.tokens)
                     for number, group in enumerate(split(windows, self.plan.shard_tokens))]
            files = bench.publish(self.root)
        finally:
            bench.close()
        for part in parts:
            part["tokens"], part["statistics"] = files[part["tokens"]], files[part["statistics"]]
            for site in part["sites"].values():
                site |= files[site["file"]]
        record = {"range": span.index, "first_document": span.first, "documents": span.count, "parts": parts,
                  "text_sha256": span.sha256, "label_type": label_type}
        path = record_path(self.root, span.index)
        if not write_atomic(path, dump_json(record), exclusive=True, scratch=self.scratch):
            self.withdraw(record)

    def withdraw(self, record: dict[str, Any]) -> None:
        """Remove the files of a range that someone else, with another division of the work, has committed meanwhile."""
        theirs = {entry["file"] for entry in file_entries(read_record(self.root, record["range"]) or record)}
        for entry in file_entries(record):
            if entry["file"] not in theirs:
                (self.root / entry["file"]).unlink(missing_ok=True)


def _label_type(documents: Sequence[Document]) -> str | None:
    """The one type of the labels in a range; None without labels."""
    kinds = {type(d.label).__name__: d for d in documents if d.label is not None}
    if len(kinds) > 1:
        raise StoreError("labels: " + " and ".join(f"labels[{d.index}]={d.label!r} is {k}" for k, d in kinds.items())
                         + "; all labels need one type")
    return next(iter(kinds), None)
