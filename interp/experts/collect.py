"""The pass that makes routing statistics: run labelled documents once, keep sums.

    stats = experts.routing(m, {"law": texts, "code": texts})                 what rules need
    stats = experts.routing(m, texts, norms=True, positions=True, together=True, examples=5)

The plain form reads the routers only and stops behind the last of them, so it costs about a forward pass without the
unembedding. Norms need the experts' outputs one by one, which costs more; so they are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.batches import Batch, Corpus, Labelled, Window, corpus
from interp.experts.kept import Documents, Examples, key_of
from interp.experts.stats import RoutingStats
from interp.experts.units import ExpertError, Listed, Units, Weights, identity, units_of
from interp.progress import bar

#: Places in a window are counted in bins 0, 1, 2-3, 4-7, ..., the last without end.
BINS = 12
#: Tables of pairs, or of documents, larger than this many bytes are refused.
ROOM = 2**30
DOCUMENTS = 200


@recorded
def routing(
    model: Any,
    texts: Labelled | Corpus,
    *,
    kind: str = "auto",
    norms: bool = False,
    positions: bool = False,
    together: bool = False,
    examples: int = 0,
    documents: int | None = None,
    max_tokens: int | None = None,
    context: int | None = None,
    batch_tokens: int = 4096,
) -> RoutingStats:
    """Routing statistics of `model` over labelled documents, in one pass.

    Args:
        model: the model.
        texts: label -> documents.
        kind: which units, see `interp.experts.units`.
        norms: measure the norms of outputs and of contributions, too.
        positions: and the mass by the token's place in its window.
        together: and which units are used by the same tokens.
        examples: keep this many strongest tokens of each unit, with 8 tokens around them.
        documents: keep up to this many documents of each label with their own means, for rules that rank documents
            (auroc, precision) and for chance levels. Default 200 for routed experts, 0 for the many units of the rest.
        max_tokens: per label.
        context: longest window in tokens, default the model's context.
        batch_tokens: tokens run at once.

    Raises ExpertError for a model without such units, no label, a label without text, or what would not fit in memory.
    """
    units = units_of(model, kind)
    data = corpus(model, texts, max_tokens, context)
    cap = documents if documents is not None else DOCUMENTS if units.kind == "routed" else 0
    sums = Sums(model, units, data, norms, positions, together, examples, cap)
    # a document's mean is complete only after its last window, so whole documents are summed at a time
    with bar("routing", len(data.windows)) as advance:
        for windows in whole_documents(data, batch_tokens):
            sums.begin(windows)
            for batch in Corpus(data.labels, windows, data.documents).batches(model, batch_tokens):
                for router, weights in units.weigh(model, batch.tokens, **({"norms": True} if norms else {})):
                    sums.add(router, weights, batch)
            sums.end()
            advance(len(windows))
    return sums.stats()


class Sums:
    """The sums while they grow."""

    def __init__(
        self, model: Any, units: Units, data: Corpus, norms: bool, positions: bool, together: bool, examples: int,
        cap: int,
    ) -> None:  # fmt: skip
        self.model, self.units, self.data, self.norms, self.cap = model, units, data, norms, cap
        labels, self.routers = len(data.labels), max(units.layers.values()) + 1
        shape = (labels, self.routers, units.size)
        self.listed = units.kind != "monet"
        if (together or examples) and not self.listed:
            raise ExpertError(
                f"together, examples: {model.name} has {units.size:,} pairs a layer, too many to list; "
                "experts.describe.top_examples shows those of a set"
            )
        size = 8 * labels * self.routers * units.size * units.size
        if together and size > ROOM:
            raise ExpertError(f"together: a table of pairs would take {size / 2**30:.1f} GiB; pass fewer labels")
        size = 4 * labels * cap * self.routers * units.size
        if size > ROOM:
            raise ExpertError(f"documents={cap}: their means would take {size / 2**30:.1f} GiB; keep fewer")
        names = ("mass", "used", "doc_sum", "doc_square", "doc_used")
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name in names}
        self.more: dict[str, Tensor] = {}
        if norms:
            self.more |= {n: torch.zeros(shape, dtype=torch.float64) for n in ("out_norm", "contribution")}
        if positions:
            self.more["positions"] = torch.zeros(*shape, BINS, dtype=torch.float64)
            self.more["position_tokens"] = torch.zeros(labels, BINS, dtype=torch.float64)
        if together:
            self.more["together"] = torch.zeros(*shape, units.size, dtype=torch.float64)
        self.examples = Examples.none(self.routers, units.size, examples, 8) if examples else None
        self.kept: Documents | None = None
        self.lengths = torch.zeros(len(data.documents), dtype=torch.float64)
        for window in data.windows:
            self.lengths[window.document] += len(window.ids)

    def begin(self, windows: list[Window]) -> None:
        """Some whole documents follow."""
        self.windows = windows
        self.present = torch.tensor(sorted({w.document for w in windows}))
        shape = (self.routers, len(self.present), self.units.size)
        self.totals, self.uses = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))

    def add(self, router: int, weights: Weights, batch: Batch) -> None:
        """The tokens of one batch at one router."""
        mask = batch.tokens.mask

        def each(of_row: Tensor) -> Tensor:
            return of_row.to(mask.device)[:, None].expand_as(mask)[mask]  # [token]

        own = each(torch.searchsorted(self.present, batch.document))
        self.totals[router] += weights.total(own, len(self.present)).cpu()
        self.uses[router] += weights.uses(own, len(self.present)).cpu()
        if not self.more and self.examples is None:
            return
        label, n = each(batch.label), len(self.data.labels)
        if "positions" in self.more:
            place = _bin(batch.tokens.position[mask])
            mass = weights.total(label * BINS + place, n * BINS).cpu().unflatten(0, (n, BINS))
            self.more["positions"][:, router] += mass.transpose(1, 2)
            if router == 0:
                counts = torch.bincount(label * BINS + place, minlength=n * BINS)
                self.more["position_tokens"] += counts.view(n, BINS).cpu()
        if self.norms:
            out, contribution = cast(Listed, weights).norms(label, n)
            self.more["out_norm"][:, router] += out.cpu()
            self.more["contribution"][:, router] += contribution.cpu()
        if "together" in self.more:
            used = cast(Listed, weights).used.float()
            for at in batch.label.unique().tolist():
                here = used[label == at]
                self.more["together"][at, router] += (here.T @ here).double().cpu()
        if self.examples is not None:
            self._show(router, cast(Listed, weights), batch)

    def _show(self, router: int, weights: Listed, batch: Batch) -> None:
        """Lets the batch's strongest tokens compete with the ones kept so far."""
        assert self.examples is not None
        k, around = self.examples.weight.shape[-1], self.examples.around
        mask = batch.tokens.mask
        row, column = (part.cpu() for part in mask.nonzero(as_tuple=True))
        best = weights.all.topk(min(k, len(row)), dim=0)
        value, place = best.values.T.float().cpu(), best.indices.T.cpu()  # [unit, k]
        shown = torch.nn.functional.pad(torch.where(mask, batch.tokens.ids, -1).cpu(), (around, around), value=-1)
        r, c = row[place], column[place]
        ids = shown[r[..., None], c[..., None] + torch.arange(2 * around + 1)]
        ids = torch.where(value[..., None] > 0, ids, -1)
        new = {"weight": value, "ids": ids.int(), "label": batch.label[r].int(), "position": c.int()}
        joined = {n: torch.cat([old[router], new[n]], 1)[None] for n, old in self.examples.tensors().items()}
        for name, best_of_both in Examples(**joined).strongest(k).tensors().items():
            getattr(self.examples, name)[router] = best_of_both[0]

    def end(self) -> None:
        """The documents are complete."""
        owner, length = self.data.documents[self.present], self.lengths[self.present]
        means, rates = self.totals / length[:, None], self.uses / length[:, None]
        parts = {"mass": self.totals, "used": self.uses, "doc_sum": means, "doc_square": means.square()}
        for name, part in (parts | {"doc_used": rates}).items():
            self.sums[name].index_add_(0, owner, part.transpose(0, 1))
        if self.cap:
            pieces: dict[int, list[list[int]]] = {}
            for window in self.windows:
                pieces.setdefault(window.document, []).append(window.ids)
            key = torch.tensor([key_of(pieces[d]) for d in self.present.tolist()])
            new = Documents(torch.tensor(self.cap), key, owner, length, means.transpose(0, 1).float())
            empty = Documents(new.cap, key[:0], owner[:0], length[:0], new.mean[:0])
            self.kept = new + (self.kept if self.kept is not None else empty)

    def stats(self) -> RoutingStats:
        n = len(self.data.labels)
        tokens = torch.zeros(n, dtype=torch.float64).index_add_(0, self.data.documents, self.lengths)
        documents = torch.bincount(self.data.documents, minlength=n)
        return RoutingStats(
            kind=self.units.kind, size=self.units.size, fingerprint=identity(self.model), name=self.model.name,
            n_layers=self.model.n_layers, layers=self.units.layers, labels=self.data.labels, tokens=tokens,
            documents=documents, **self.sums, more=self.more, sample=self.kept, examples=self.examples,
            data=[digest(self.data)],
        )  # fmt: skip


def _bin(position: Tensor) -> Tensor:
    """0, 1, 2-3, 4-7, ... -> 0, 1, 2, 3, ...; the logarithm of small whole numbers is exact enough."""
    return (position.double() + 0.5).log2().floor().long().add(1).clamp(0, BINS - 1)


def digest(data: Corpus) -> str:
    """A short hash of labels and tokens: tells whether two measurements saw the same text."""
    found = hashlib.sha256(repr(data.labels).encode())
    for window in data.windows:
        found.update(f"{window.label} {window.document}".encode())
        found.update(torch.tensor(window.ids, dtype=torch.int32).numpy().tobytes())
    return found.hexdigest()[:16]


def whole_documents(data: Corpus, batch_tokens: int) -> Iterator[list[Window]]:
    """The windows in runs of whole documents, of about `batch_tokens` tokens (or one long document)."""
    documents: dict[int, list[Window]] = {}
    for window in data.windows:
        documents.setdefault(window.document, []).append(window)
    run: list[Window] = []
    size = 0
    for windows in documents.values():
        length = sum(len(w.ids) for w in windows)
        if run and size + length > batch_tokens:
            yield run
            run, size = [], 0
        run += windows
        size += length
    if run:
        yield run
