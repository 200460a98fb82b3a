"""Where activations come from: a tensor, a dataset on disk, or a model that runs now.

Every source deals the same batches for the same seed and can say where it is (`cursor`), so that a training that was
killed goes on with exactly the batches that it has not seen. A batch holds the same tokens at every site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.sites import Site

if TYPE_CHECKING:
    from interp.model import Model
    from interp.store import ActivationDataset

Batch = dict[str, Tensor]
#: What a tensor is called that comes without a site.
UNNAMED = "activations"
_ENDLESS = 1 << 30  # epochs


class Source(Protocol):
    """What a training asks of a source.

    Attributes:
        name: what it is, in a line.
        identity: tells it from other sources when a training is resumed.
        rows: tokens that there are; None where that is not known before they have been run.
    """

    name: str
    identity: str
    rows: int | None

    def peek(self, n: int) -> Batch:
        """About n tokens to estimate scales from; they are not used up."""
        ...

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches without end, from the cursor on."""
        ...

    def cursor(self) -> tuple[dict[str, Any], Batch]:
        """(numbers, tensors) from which `seek` finds back."""
        ...

    def seek(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None: ...


class Indexed:
    """A source whose rows can be had by number: a permutation of all rows per epoch, smaller last batches left out.

    Args:
        columns: site -> what gives rows [row, d] for a tensor of row numbers.
        rows: how many there are.
        seed: of the permutations.
        name: what it is.
        identity: tells it from others.
    """

    def __init__(self, columns: Mapping[str, Any], rows: int, seed: int, name: str, identity: str) -> None:
        self.columns, self.seed, self.name, self.identity = dict(columns), seed, name, identity
        self.rows: int | None = rows
        self._rows, self._dealt = rows, 0

    def _take(self, rows: Tensor) -> Batch:
        return {site: column(rows) for site, column in self.columns.items()}

    def peek(self, n: int) -> Batch:
        mixer = torch.Generator().manual_seed(self.seed + 1)
        return self._take(torch.randperm(self._rows, generator=mixer)[:n].sort().values)

    def batches(self, size: int) -> Iterator[Batch]:
        per_epoch = self._rows // size
        if not per_epoch:
            raise SAEError(f"batch_size={size}: the source has only {self._rows} tokens")
        while True:
            epoch, first = divmod(self._dealt, per_epoch)
            mixer = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self._rows, generator=mixer)
            for i in range(first, per_epoch):
                self._dealt += 1  # before it is dealt: a cursor taken meanwhile points behind it
                yield self._take(order[i * size : (i + 1) * size])

    def cursor(self) -> tuple[dict[str, Any], Batch]:
        return {"dealt": self._dealt}, {}

    def seek(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._dealt = int(numbers["dealt"])


def _flat(values: Tensor) -> Tensor:
    return values.float().flatten(1)  # heads side by side, as SAELens has them


def tensors(given: Mapping[str, Tensor], seed: int) -> Indexed:
    """Activations in memory, by site [row, ...]."""
    lengths = {site: len(x) for site, x in given.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise SAEError(f"source: sites need equally many rows, at least one; got {lengths}")
    digest = hashlib.sha256()
    for site, x in given.items():
        if x.dim() < 2 or not x.is_floating_point():
            raise SAEError(
                f"source: expected floating point activations [row, d] at {site}, got {x.dtype} {list(x.shape)}"
            )
        sample = x[:: max(1, len(x) // 64)].detach().cpu().double()
        digest.update(f"{site} {list(x.shape)} {sample.nan_to_num().sum(-1).tolist()}".encode())
    rows = next(iter(lengths.values()))
    columns = {site: (lambda i, x=x: _flat(x[i])) for site, x in given.items()}
    return Indexed(columns, rows, seed, f"{rows} tokens in memory", digest.hexdigest())


def dataset(ds: ActivationDataset, sites: Sequence[str], seed: int) -> Indexed:
    """An activation dataset on disk."""
    rows = {str(site): ds[site] for site in sites}
    for site in rows if ds.complete else ():
        if bad := ds.statistics(site).nonfinite:
            raise SAEError(
                f"{site}: {bad} of {ds.n_rows} tokens in {ds.path} hold NaN or infinity; find out which text or layer "
                "makes them, and write the dataset without it"
            )
    columns = {site: (lambda i, r=r: _flat(r.gather(i))) for site, r in rows.items()}
    return Indexed(columns, ds.n_rows, seed, f"{ds.n_rows} tokens of {ds.path.name}", ds.content_sha256)


class Live:
    """A model that runs while it is learnt from, no further than the last site.

    Tokens are mixed in a buffer: it is filled, shuffled, and dealt down to half, then filled again, so that a batch
    holds tokens of many texts. Texts are gone through in a new order per epoch.

    Args:
        model: the model.
        texts: a list of texts or of lists of ids.
        sites: what to read.
        seed: of all orders.
        context: tokens per text; the rest of a longer one is left out.
        run: texts per forward pass.
        buffer: tokens that are mixed.
    """

    rows: int | None = None

    def __init__(self, model: Model, texts: Sequence[Any], sites: Sequence[str], seed: int, *, context: int = 128,
                 run: int = 8, buffer: int = 65_536) -> None:  # fmt: skip
        if isinstance(texts, str) or not len(texts):
            raise SAEError("source: a live model needs a list of texts: sae.train((model, texts), ...)")
        self.model, self.texts, self.sites = model, texts, [str(s) for s in sites]
        self.seed, self.context, self.run, self.size = seed, context, run, buffer
        self.name = f"{model.name} on {len(texts)} texts"
        about = f"{model.fingerprint} {len(texts)} {context} {run} {buffer} {texts[0]!s:.200} {texts[-1]!s:.200}"
        self.identity = hashlib.sha256(about.encode()).hexdigest()
        self._buffer: Batch = {}
        self._next, self._fills, self._dealt = 0, 0, 0

    def _captured(self) -> Batch:
        """Rows of the next texts, padding left out."""
        epoch, first = divmod(self._next, len(self.texts))
        mixer = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.texts), generator=mixer)[first : first + self.run].tolist()
        self._next += len(order)
        tokens = self.model.tokens([self.texts[i] for i in order], max_length=self.context, truncate=True)
        acts = self.model.capture(tokens, self.sites)
        return {site: _flat(acts[site][acts.mask]) for site in self.sites}

    def _fill(self) -> None:
        left = {site: rows[self._dealt :] for site, rows in self._buffer.items()}
        parts, have = [left] if left else [], len(next(iter(left.values()))) if left else 0
        while have < self.size:
            parts.append(self._captured())
            have += len(next(iter(parts[-1].values())))
        mixer = torch.Generator().manual_seed(self.seed * 1_000_003 + self._fills + (1 << 40))
        order = torch.randperm(have, generator=mixer)
        self._buffer = {site: torch.cat([part[site] for part in parts])[order] for site in self.sites}
        self._dealt, self._fills = 0, self._fills + 1

    def peek(self, n: int) -> Batch:
        if not self._buffer:
            self._fill()
        return {site: rows[:n] for site, rows in self._buffer.items()}

    def batches(self, size: int) -> Iterator[Batch]:
        if size > self.size // 2:
            raise SAEError(f"batch_size={size}: expected at most half of the buffer of {self.size} tokens")
        while True:
            if not self._buffer or self._dealt + size > max(size, len(next(iter(self._buffer.values()))) // 2):
                self._fill()
            self._dealt += size
            yield {site: rows[self._dealt - size : self._dealt] for site, rows in self._buffer.items()}

    def cursor(self) -> tuple[dict[str, Any], Batch]:
        return {"next": self._next, "fills": self._fills, "dealt": self._dealt}, self._buffer

    def seek(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._next, self._fills, self._dealt = (int(numbers[k]) for k in ("next", "fills", "dealt"))
        self._buffer = dict(tensors)


def open_source(source: Any, sites: Sequence[str], seed: int, **live: Any) -> Source:
    """The source that a user means: a tensor, a mapping from site to tensor, a dataset, its directory, or
    (model, texts)."""
    from pathlib import Path

    from interp.activations import Activations
    from interp.store import ActivationDataset
    from interp.store import open as open_store

    if isinstance(source, str | Path):
        source = open_store(source)
    if isinstance(source, ActivationDataset):
        return dataset(source, sites, seed)
    if isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "capture"):
        return Live(*source, sites, seed, **live)
    if isinstance(source, Tensor):
        if len(sites) != 1:
            raise SAEError(f"source: one tensor for {len(sites)} sites; give a mapping from site to tensor")
        return tensors({sites[0]: source}, seed)
    if isinstance(source, Activations):
        source = {site: source[site][source.mask] for site in sites}
    if isinstance(source, Mapping):
        missing = [site for site in sites if site not in source]
        if missing:
            raise SAEError(f"site={missing[0]!r} is not in the source; it has {', '.join(map(str, source))}")
        return tensors({site: source[site] for site in sites}, seed)
    raise SAEError(
        f"source: expected a tensor [row, d], a mapping from site to tensors, an activation dataset or (model, texts), "
        f"got {type(source).__name__}"
    )


def site_name(site: str | Site) -> str:
    """A site's canonical text, so that TransformerLens's names find what was stored under ours."""
    return str(Site.parse(site))
