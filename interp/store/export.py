"""The dataset in other people's formats: Hugging Face datasets, parquet, and SAELens's cached activations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.sites import Site
from interp.store.croissant import parquet_croissant
from interp.store.disk import FileRef, dump_json, explained, file_sha256, sync_folder, write_atomic
from interp.store.errors import StoreError

if TYPE_CHECKING:
    import os

    from interp.store.dataset import ActivationDataset

_ROWS = 4096  # rows turned to another format at once


def _names(ds: ActivationDataset, sites: str | Site | Sequence[str | Site] | None) -> list[str]:
    """The stored names of the sites asked for; by default all that have one row per token."""
    if sites is None:
        return [name for name in ds.sites if ds.manifest["sites"][name]["layout"] == "rows"]
    return [str(ds[s].site) for s in ([sites] if isinstance(sites, str | Site) else sites)]


def _wide(rows: Tensor) -> Tensor:
    """Rows [row, ...] as [row, value] in float32, which holds bfloat16 and float16 exactly (Arrow has no bfloat16)."""
    flat = rows.flatten(1)
    return flat.float() if flat.is_floating_point() else flat


def hf_rows(path: str, sites: tuple[str, ...], parts: list[int]) -> Iterator[dict[str, Any]]:
    """Rows of some parts of a dataset one by one: the token columns, and each site as a float32 array."""
    from interp.store.dataset import ActivationDataset

    ds = ActivationDataset(path)
    for first, end in (ds.part_rows(part) for part in parts):
        for start in range(first, end, _ROWS):
            stop = min(start + _ROWS, end)
            values = {site: ds[site][start:stop] for site in sites}
            arrays = {site: (v.float() if v.is_floating_point() else v).numpy() for site, v in values.items()}
            for i, row in enumerate(ds.tokens(start=start, stop=stop).to_pylist()):
                yield {**row, **{site: array[i] for site, array in arrays.items()}}


def to_hf(ds: ActivationDataset, sites: str | Site | Sequence[str | Site] | None = None, *,
          streaming: bool = True) -> Any:
    """The dataset as a Hugging Face dataset with the token columns and one float32 column per site.

    Args:
        ds: the dataset.
        sites: which sites; by default all that have one row per token.
        streaming: give an IterableDataset that reads from our shards as it goes (workers of a DataLoader share the
            shards); else a Dataset, for which `datasets` copies everything into its own cache in float32.
    """
    import datasets

    names = _names(ds, sites)
    kinds = {"str": "string", "int": "int64", "float": "float64", "bool": "bool", None: "null"}
    features: dict[str, Any] = {
        "document": datasets.Value("int64"), "window": datasets.Value("int32"), "position": datasets.Value("int32"),
        "token_id": datasets.Value("int32"), "char_start": datasets.Value("int64"), "char_end": datasets.Value("int64"),
        "special": datasets.Value("bool"), "label": datasets.Value(kinds[ds.manifest["label_type"]]),
    }
    for name in names:
        shape = ds.manifest["sites"][name]["shape"]
        features[name] = datasets.Value("int32" if ds[name].dtype == torch.int32 else "float32")
        for n in reversed(shape):
            features[name] = datasets.List(features[name], length=n)
    # `datasets` deals a list among its workers and hands anything else to all: each part becomes one of its shards.
    source = {"path": str(ds.path), "sites": tuple(names), "parts": list(range(ds.n_parts))}
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(hf_rows, features=datasets.Features(features), gen_kwargs=source)


def to_parquet(ds: ActivationDataset, dir: str | os.PathLike[str], sites: Sequence[str | Site] | None = None) -> Path:
    """Write parquet files with the token columns and one column of float32 lists per site, and Croissant metadata.

    A site with several axes is flattened; its shape stands in the metadata. The tables of experts, if stored and asked
    for or if `sites` is None, become ``experts/SITE/*.parquet``: row, expert, slot, weight, hidden.

    Returns:
        The directory. Raises StoreError where it exists and is not empty.
    """
    import pyarrow.parquet as pq

    stored = ds.manifest["sites"]
    asked = ds.sites if sites is None else [str(ds.site(s)) for s in sites]
    names = [n for n in asked if stored[n]["layout"] == "rows"]
    tables = [n for n in asked if stored[n]["layout"] == "experts"]
    with _staged(dir) as staging:
        files: list[str] = []
        for part in range(ds.n_parts):
            file = f"data/{part:08d}.parquet"
            _parquet(ds, part, names, staging / file)
            files.append(file)
        for name in tables:
            for part in range(ds.n_parts):
                file = f"experts/{name.replace('[', '.').rstrip(']')}/{part:08d}.parquet"
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                table = _expert_arrow(ds.part_rows(part)[0], ds.tensors(part, ds.site(name)))
                pq.write_table(table, staging / file)
                files.append(file)
        refs = [FileRef(f, (staging / f).stat().st_size, file_sha256(staging / f)).as_json() for f in files]
        shapes = {n: stored[n]["shape"] for n in names}
        write_atomic(staging / "croissant.json", dump_json(parquet_croissant(ds.plan, ds.manifest, refs, shapes)))
        if (ds.path / "README.md").exists():
            shutil.copy(ds.path / "README.md", staging)
    return Path(dir)


def _parquet(ds: ActivationDataset, part: int, names: list[str], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    start, end = ds.part_rows(part)
    shapes = json.dumps({n: ds.manifest["sites"][n]["shape"] for n in names})
    writer = None
    for a in range(start, end, _ROWS):
        b = min(a + _ROWS, end)
        table = ds.tokens(start=a, stop=b)
        for name in names:
            flat = _wide(ds[name][a:b])
            values = pa.array(flat.numpy().ravel())
            table = table.append_column(name, pa.FixedSizeListArray.from_arrays(values, flat.shape[1]))
        table = table.replace_schema_metadata({"shapes": shapes, "content_sha256": ds.content_sha256})
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()


def _expert_arrow(start: int, tensors: dict[str, Tensor]) -> Any:
    import pyarrow as pa

    counts = tensors["offsets"].diff()
    hidden = _wide(tensors["hidden"])
    return pa.table({
        "row": pa.array((tensors["token_row"].long() + start).numpy()),
        "expert": pa.array(torch.arange(len(counts)).repeat_interleave(counts).int().numpy()),
        "slot": pa.array(tensors["slot"].numpy()),
        "weight": pa.array(tensors["weight"].numpy()),
        "hidden": pa.FixedSizeListArray.from_arrays(pa.array(hidden.numpy().ravel()), hidden.shape[1]),
    })


def to_sae_lens(ds: ActivationDataset, dir: str | os.PathLike[str], site: str | Site, *, context: int | None = None,
                hook_name: str | None = None, shuffle: bool = False, seed: int | None = None) -> Path:
    """Write one site as the cached activations that SAELens trains from (``use_cached_activations=True``).

    SAELens wants rows of exactly `context` tokens in float32 and flattens them again before it mixes them. So our rows
    are dealt without regard to where a text ends, and fewer than `context` rows at the very end are left out.
    The columns are `hook_name` [context, d_in] and token_ids [context].

    Args:
        ds: the dataset.
        dir: a new or empty directory.
        site: the site; its row is flattened to d_in values.
        context: tokens per row there (its `context_size`); by default that of the dataset.
        hook_name: name of the column (its `hook_name`); by default TransformerLens's name of the site, else ours.
        shuffle: deal the rows in one random order over the whole dataset. SAELens itself only mixes neighbours in a
            buffer, so this is what makes its training see the data in random order.
        seed: of that order; by default the seed of the dataset.

    Returns:
        The directory, for `cached_activations_path`.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    rows = ds[site]
    size = context or ds.plan.context
    name = hook_name or rows.site.tl_name or str(rows.site)
    n = len(rows) // size
    if n == 0:
        raise StoreError(f"context={size}: the dataset has only {len(rows)} rows; choose a smaller context")
    d_in = rows.shape[1:].numel()
    features = datasets.Features({
        name: datasets.Array2D(shape=(size, d_in), dtype="float32"),
        "token_ids": datasets.List(datasets.Value("int32"), length=size),
    })
    ids = torch.tensor(ds.tokens(["token_id"])["token_id"].to_numpy())
    order = torch.arange(n * size)
    if shuffle:
        mixer = torch.Generator().manual_seed(ds.plan.seed if seed is None else seed)
        order = torch.randperm(len(rows), generator=mixer)[: n * size]
    with _staged(dir) as staging:
        step = max(1, _ROWS // size)
        file = "data-00000-of-00001.arrow"
        with ArrowWriter(path=str(staging / file), features=features) as writer:
            for a in range(0, n, step):
                b = min(a + step, n)
                index = order[a * size : b * size]
                values = _wide(rows[index]).float().view(b - a, size, d_in)
                writer.write_batch({name: values.numpy(), "token_ids": ids[index].view(b - a, size).numpy()})
            writer.finalize()
        datasets.DatasetInfo(features=features).write_to_directory(str(staging))
        state: dict[str, Any] = {
            "_data_files": [{"filename": file}], "_fingerprint": ds.content_sha256[:16], "_split": None,
            "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
        write_atomic(staging / "state.json", dump_json(state))
    return Path(dir)


@contextmanager
def _staged(dir: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write in; on success its content moves to the new or empty directory `dir`, else it is removed."""
    root = Path(dir)
    with explained(root, "exporting"):
        root.mkdir(parents=True, exist_ok=True)
        staging = root / ".tmp"
        shutil.rmtree(staging, ignore_errors=True)
        if any(root.iterdir()):
            raise StoreError(f"dir={str(root)!r} is not empty; an export needs a new directory")
        try:
            staging.mkdir()
            yield staging
            for path in staging.iterdir():
                path.rename(root / path.name)
            sync_folder(root)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
