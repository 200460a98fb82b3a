"""Activation datasets on disk.

Capturing costs far more than anything one does with the result, so do it once:

    from interp import store
    ds = store.write(m, texts, ["resid_post[*]", "expert_hidden[3]"], "acts", labels=domains)    # resumes after a kill
    ds = store.open("acts")
    ds["resid_post[5]"][:100]                                  # [row, d_model], by memory map
    for x in ds.batches("resid_post[5]", 4096): ...            # one shuffle over everything
    ds.expert(3, 17).out(m)                                    # all an expert said, recomputed from its neurons
    store.verify("acts")                                       # every flipped, cut or missing byte

A dataset is one directory::

    plan.json                  what was asked for; decides which runs may resume it
    shards/RANGE.PART.SITE-SHA256.safetensors     rows of one site; beside them the sums of each part
    tokens/RANGE.PART-SHA256.parquet              token id, document, position, characters, label of each row
    ranges/RANGE.json          one record per finished unit of work
    manifest.json, statistics.safetensors         the whole, once all ranges are there
    README.md, croissant.json  the card for people, the metadata for machines

How it is made, from the bottom: `disk` (whole files or none, checksums, locks), `tensors` (safetensors as a stream),
`documents` (texts to windows), `plan` (settings), `moments` and `experts` (what is summed, what is sorted), `parts`
(one shard of every site), `manifest` (records to one dataset), `write` (the loop), `rows` and `dataset` (reading),
`verify`, `export`, `card` and `croissant`.
"""

from __future__ import annotations

import os

from interp.store.dataset import ActivationDataset
from interp.store.errors import Corrupt, DiskError, Locked, Mismatch, NotADataset, StoreError
from interp.store.experts import ExpertRows
from interp.store.moments import Statistics
from interp.store.rows import SiteRows
from interp.store.verify import repair, verify
from interp.store.write import write

__all__ = [
    "ActivationDataset", "Corrupt", "DiskError", "ExpertRows", "Locked", "Mismatch", "NotADataset", "SiteRows",
    "Statistics", "StoreError", "open", "repair", "verify", "write",
]


def open(dir: str | os.PathLike[str], *, partial: bool = False) -> ActivationDataset:
    """Open a dataset for reading; with `partial` also one that is not finished.

    Raises NotADataset where there is none, Corrupt where its manifest is damaged.
    """
    return ActivationDataset(dir, partial=partial)
