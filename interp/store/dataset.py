"""The reader: activations on disk as if they were tensors in memory.

    ds = store.open("acts")
    ds["resid_post[5]"][1000:1010]                       rows, read by memory map
    for x in ds.batches("resid_post[5]", 4096): ...      a real shuffle over all shards
    ds.expert(3, 17).hidden                              everything one expert saw

Row i is the same token at every site and in `frame`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.sites import Site, SiteError
from interp.store.errors import Corrupt, NotADataset, StoreError
from interp.store.experts import ExpertRows
from interp.store.manifest import STATISTICS, assemble, read_records
from interp.store.moments import Statistics
from interp.store.plan import read_plan
from interp.store.rows import SiteRows
from interp.store.tensors import MEND, open_tensors

if TYPE_CHECKING:
    import os

    import pandas as pd
    import pyarrow as pa

_GATHER_ROWS = 1 << 15  # rows fetched together, in the order of the disk, before they are dealt into batches


class ActivationDataset:
    """An activation dataset on disk, opened for reading. Made by `store.open` and `store.write`.

    Args:
        dir: the directory.
        partial: open an unfinished dataset too, with the ranges that are there.

    Attributes:
        path: the directory.
        manifest: everything known about the dataset (the content of ``manifest.json``).
        complete: False while ranges are missing.
        starts: number of the first row of each part [part].
    """

    def __init__(self, dir: str | os.PathLike[str], partial: bool = False) -> None:
        self.path = Path(dir)
        self.plan = read_plan(self.path)
        self.complete = (self.path / "manifest.json").exists()
        if self.complete:
            try:
                self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_bytes())
                parts = self.manifest["parts"]
            except (ValueError, KeyError) as error:
                raise Corrupt(
                    f"{self.path / 'manifest.json'}: damaged ({error}); store.repair(dir) drops it, then "
                    "store.write makes it again from the records"
                ) from error
        else:
            records = read_records(self.path)
            if not partial or not records:
                so_far = ", or store.open(dir, partial=True)" if records else ""
                raise NotADataset(
                    f"dir={str(dir)!r} holds an unfinished dataset ({len(records)} ranges are done): run "
                    f"store.write with the same arguments to resume it{so_far}"
                )
            self.manifest = assemble(self.plan, records)
            parts = self.manifest["parts"]
        self._starts: list[int] = [0, *accumulate(p["rows"] for p in parts)][:-1]
        self.starts = torch.tensor(self._starts)
        self._open: dict[str, dict[str, Tensor]] = {}

    def recipe(self) -> dict[str, str]:
        """Where it lies and what it holds, for `from_recipe`."""
        return {"path": str(self.path), "content_sha256": self.content_sha256}

    @classmethod
    def from_recipe(cls, data: dict[str, str]) -> ActivationDataset:
        """The dataset at that path. StoreError where it holds something else by now."""
        found = cls(data["path"])
        if found.content_sha256 != data["content_sha256"]:
            raise StoreError(f"{data['path']}: another dataset than the one recorded ({data['content_sha256'][:12]})")
        return found

    # -- what it is --------------------------------------------------------------------------------------------
    @property
    def sites(self) -> list[str]:
        """The sites that were stored, in the order in which they were asked for."""
        return [str(site) for site in self.plan.sites]

    @property
    def n_rows(self) -> int:
        """Tokens in the dataset, which is rows at each site."""
        return int(self.manifest["rows"])

    def __len__(self) -> int:
        return self.n_rows

    @property
    def n_parts(self) -> int:
        """Shards per site."""
        return len(self._starts)

    def part_rows(self, part: int) -> tuple[int, int]:
        """First row of a part and one past its last."""
        return self._starts[part], self._starts[part] + self.manifest["parts"][part]["rows"]

    @property
    def content_sha256(self) -> str:
        """One checksum of everything stored; equal for a resumed and an unbroken run."""
        return str(self.manifest["content_sha256"])

    def site(self, site: str | Site) -> Site:
        """The stored site that a text (ours or TransformerLens's) names. SiteError where it was not stored."""
        found = Site.parse(site)
        if found.layer is not None and found.layer < 0:
            layers = [s.layer for s in map(Site.parse, self.sites) if s.name == found.name and s.layer is not None]
            found = Site(found.name, max(layers, default=-1) + 1 + found.layer, found.index)
        if str(found) not in self.manifest["sites"]:
            raise SiteError(f"{found} is not in this dataset; it has {', '.join(self.sites)}")
        return found

    def __getitem__(self, site: str | Site) -> SiteRows:
        """The rows of a site as a lazy array."""
        found = self.site(site)
        if self.manifest["sites"][str(found)]["layout"] == "experts":
            raise SiteError(
                f"{found} is a table sorted by expert; read ds.expert({found.layer}, e) for one expert, "
                f"ds.routing({found.layer}) for the chosen experts of every token"
            )
        return SiteRows(self, found)

    def statistics(self, site: str | Site) -> Statistics:
        """Mean and second moment of a site over all rows, in float64."""
        if not self.complete:
            raise StoreError("statistics are merged when the dataset is complete; run store.write to the end")
        name = str(self.site(site))
        if f"{name}/mean" not in self._statistics:
            raise SiteError(f"{name} holds whole numbers, which have no statistics")
        count, nonfinite = self._statistics[f"{name}/counts"].tolist()
        mean, second = (self._statistics[f"{name}/{k}"].clone() for k in ("mean", "second_moment"))
        return Statistics(count, nonfinite, mean, second)

    @cached_property
    def _statistics(self) -> dict[str, Tensor]:
        return open_tensors(self.path / STATISTICS)

    # -- tokens ------------------------------------------------------------------------------------------------
    def tokens(self, columns: Sequence[str] | None = None, *, start: int = 0, stop: int | None = None) -> pa.Table:
        """The token table as an Arrow table, rows `start` to `stop`.

        Columns: document, window, position, token_id, char_start, char_end, special, label.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        pieces = []
        for part, a, b in self.spans(start, self.n_rows if stop is None else min(stop, self.n_rows)):
            path = self.path / self.manifest["parts"][part]["tokens"]["file"]
            try:
                pieces.append(pq.read_table(path, columns=list(columns) if columns else None).slice(a, b - a))
            except (OSError, pa.ArrowException) as error:
                raise Corrupt(f"{path}: missing or damaged ({error}); {MEND}") from error
        if not pieces:
            return self.tokens(columns, start=0, stop=1).slice(0, 0)
        return pa.concat_tables(pieces, promote_options="default")

    @recorded
    def frame(
        self, sites: str | Site | Sequence[str | Site] = (), *, start: int = 0, limit: int | None = None
    ) -> pd.DataFrame:
        """The tokens as a DataFrame, one line per row; with `sites`, each row's values as a float32 array too.

        With sites a `limit` is needed, since a table of arrays takes far more memory than the dataset does on disk.
        """
        names = [sites] if isinstance(sites, str | Site) else list(sites)
        if names and limit is None:
            raise StoreError("frame: give limit=... when sites are asked for; ds[site] reads rows without copying all")
        stop = self.n_rows if limit is None else min(self.n_rows, start + limit)
        frame = self.tokens(start=start, stop=stop).to_pandas()
        frame.insert(0, "row", range(start, start + len(frame)))
        for name in names:
            frame[str(self.site(name))] = list(self[name][start:stop].float().numpy())
        frame.attrs = {"dataset": str(self.path), "content_sha256": self.content_sha256, "model": self.plan.model}
        return frame

    # -- batches -----------------------------------------------------------------------------------------------
    def batches(
        self,
        sites: str | Site | Sequence[str | Site],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int | None = None,
        epochs: int = 1,
        where: Tensor | None = None,
        dtype: torch.dtype | None = None,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[Any]:
        """Batches of rows, each row once per epoch, in one random order over all shards.

        Args:
            sites: one site gives tensors [batch, ...]; a list gives dictionaries by site, the same rows in each, and
                ``"row"``, their numbers [batch].
            batch_size: rows per batch; the last batch of an epoch may be smaller.
            shuffle: a new permutation of all rows in each epoch (it takes 8 bytes of memory per row); False keeps the
                order of the disk.
            seed: of the permutations; by default the seed of the dataset.
            epochs: how often to go over the data.
            where: only these rows [row], bool; for instance ``~torch.tensor(ds.frame().special)``.
            dtype: of the batches; by default as stored.
            drop_last: leave out a smaller last batch.
            start: batches to pass over at the beginning, without reading them; to go on where a training stopped.
        """
        if batch_size < 1 or epochs < 0:
            raise StoreError(f"batch_size={batch_size}, epochs={epochs}: expected at least 1 and at least 0")
        if where is not None and (where.dtype != torch.bool or tuple(where.shape) != (self.n_rows,)):
            raise StoreError(
                f"where: expected {self.n_rows} truth values, one per row, got {where.dtype} {list(where.shape)}"
            )
        single = isinstance(sites, str | Site)
        names = [sites] if isinstance(sites, str | Site) else list(sites)
        columns = {str(self.site(name)): self[name] for name in names}
        seed = self.plan.seed if seed is None else seed
        orders = self._orders(batch_size, shuffle, seed, epochs, where, drop_last, start)
        return self._batches(columns, single, batch_size, orders, dtype)

    def _orders(
        self, batch_size: int, shuffle: bool, seed: int, epochs: int, where: Tensor | None, drop_last: bool, start: int
    ) -> Iterator[Tensor]:
        """Row numbers of several batches at a time, so that the disk is read in its own order."""
        for epoch in range(epochs):
            rows = torch.arange(self.n_rows) if where is None else where.nonzero().flatten()
            n_batches = len(rows) // batch_size if drop_last else -(-len(rows) // batch_size)
            if start >= n_batches:
                start -= n_batches
                continue
            if shuffle:  # a generator per epoch: any epoch can be begun without going through the earlier ones
                mixer = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                rows = rows[torch.randperm(len(rows), generator=mixer)]
            rows = rows[start * batch_size : n_batches * batch_size]
            start = 0
            yield from rows.split(max(1, _GATHER_ROWS // batch_size) * batch_size)

    @staticmethod
    def _batches(
        columns: dict[str, SiteRows], single: bool, batch_size: int, orders: Iterator[Tensor], dtype: torch.dtype | None
    ) -> Iterator[Any]:
        for rows in orders:
            got = {name: column.gather(rows) for name, column in columns.items()}
            for a in range(0, len(rows), batch_size):
                batch = {k: v[a : a + batch_size] for k, v in got.items()}
                batch = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in batch.items()}
                yield next(iter(batch.values())) if single else {**batch, "row": rows[a : a + batch_size]}

    # -- experts -----------------------------------------------------------------------------------------------
    def _expert_site(self, layer: int) -> str:
        return str(self.site(Site("expert_hidden", layer)))

    def expert(self, layer: int, expert: int) -> ExpertRows:
        """Everything stored of one expert. Reads its contiguous piece of each shard and nothing else."""
        site = self._expert_site(layer)
        n = self.manifest["sites"][site]["experts"]
        if not 0 <= expert < n:
            raise SiteError(f"expert={expert}: layer {layer} has experts 0..{n - 1}")
        columns: dict[str, list[Tensor]] = {"hidden": [], "weight": [], "token_row": [], "slot": []}
        for part, start in enumerate(self._starts):
            table = self.tensors(part, Site.parse(site))
            a, b = table["offsets"][expert : expert + 2].tolist()
            for name, pieces in columns.items():
                pieces.append(table[name][a:b].long() + start if name == "token_row" else table[name][a:b])
        hidden, weight, token_row, slot = (torch.cat(pieces) for pieces in columns.values())
        return ExpertRows(layer, expert, hidden, weight, token_row, slot)

    def expert_counts(self, layer: int) -> Tensor:
        """Rows of each expert [expert]: how many tokens were routed to it. Rare experts show here."""
        site = Site.parse(self._expert_site(layer))
        return torch.stack([self.tensors(p, site)["offsets"].diff() for p in range(len(self._starts))]).sum(0)

    def routing(self, layer: int) -> tuple[Tensor, Tensor]:
        """Ids and weights of the chosen experts of every token, both [row, slot]; -1 and 0 where a slot was dropped."""
        site = Site.parse(self._expert_site(layer))
        tables = [self.tensors(part, site) for part in range(len(self._starts))]
        slots = 1 + max((int(t["slot"].max()) for t in tables if len(t["slot"])), default=0)
        ids = torch.full((self.n_rows, slots), -1)
        weights = torch.zeros(self.n_rows, slots)
        for start, table in zip(self._starts, tables, strict=True):
            row, slot = table["token_row"].long() + start, table["slot"].long()
            counts = table["offsets"].diff()
            ids[row, slot] = torch.arange(len(counts)).repeat_interleave(counts)
            weights[row, slot] = table["weight"]
        return ids, weights

    # -- adaptors ----------------------------------------------------------------------------------------------
    def to_hf(self, sites: str | Site | Sequence[str | Site] | None = None, *, streaming: bool = True) -> Any:
        """As a Hugging Face dataset; see `interp.store.export.to_hf`."""
        from interp.store import export

        return export.to_hf(self, sites, streaming=streaming)

    def to_parquet(self, dir: str | os.PathLike[str], sites: Sequence[str | Site] | None = None) -> Path:
        """As parquet files with Croissant metadata; see `interp.store.export.to_parquet`."""
        from interp.store import export

        return export.to_parquet(self, dir, sites)

    def to_sae_lens(self, dir: str | os.PathLike[str], site: str | Site, **options: Any) -> Path:
        """As activations that SAELens trains from; see `interp.store.export.to_sae_lens`."""
        from interp.store import export

        return export.to_sae_lens(self, dir, site, **options)

    # -- shards ------------------------------------------------------------------------------------------------
    def tensors(self, part: int, site: Site) -> dict[str, Tensor]:
        """What one file of one site holds, memory-mapped."""
        file = self.manifest["parts"][part]["sites"][str(site)]["file"]
        if file not in self._open:
            self._open[file] = open_tensors(self.path / file)
        return self._open[file]

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(part, first row in it, last + 1) of the parts that hold rows `start` to `stop`."""
        for part in range(max(0, bisect_right(self._starts, start) - 1), len(self._starts)):
            first = self._starts[part]
            if first >= stop:
                break
            rows = self.manifest["parts"][part]["rows"]
            a, b = max(start - first, 0), min(stop - first, rows)
            if a < b:
                yield part, a, b

    def __reduce__(self) -> Any:
        """A copy, also in another process (the worker of a DataLoader), opens the files for itself."""
        return ActivationDataset, (str(self.path), not self.complete)

    def __repr__(self) -> str:
        size = self.manifest["bytes"] / 2**20
        return (
            f"ActivationDataset({str(self.path)!r}: {self.n_rows} tokens of {self.manifest['documents']} "
            f"documents, {len(self.sites)} sites, {size:.1f} MiB{'' if self.complete else ', unfinished'})"
        )
