"""Routing statistics: how much of each kind of text each expert handles.

One pass over labelled documents keeps sums only, so memory does not grow with the text and results of several workers
add up (``a + b``). Per label, router and unit:

    mass          sum over tokens of the unit's routing weight; divided by the tokens, its routing probability there
    used          tokens that used it at all
    doc_sum       sum over documents of the document's mean weight, and
    doc_square    of its square: enough for correlations over documents
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.experts.batches import Corpus, Labelled, Window, corpus
from interp.experts.units import ExpertError, identity, units_of

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "interp.experts.routing/1"
_SUMS = ("tokens", "documents", "mass", "used", "doc_sum", "doc_square")


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """Sums over labelled text, in the order of `labels`.

    Attributes:
        layers: layer -> router; layers that share a router share its row.
        tokens, documents: [label].
        mass, used, doc_sum, doc_square: [label, router, unit], float64.
    """

    kind: str
    size: int
    fingerprint: str
    name: str
    n_layers: int
    layers: dict[int, int]
    labels: list[str]
    tokens: Tensor
    documents: Tensor
    mass: Tensor
    used: Tensor
    doc_sum: Tensor
    doc_square: Tensor

    @property
    def probability(self) -> Tensor:
        """Mean weight per token [label, router, unit]: Monet's routing probability, summed over heads."""
        return self.mass / self.tokens[:, None, None]

    def index(self, label: str) -> int:
        if label not in self.labels:
            raise ExpertError(f"label {label!r}: the statistics have {', '.join(self.labels)}")
        return self.labels.index(label)

    def only(self, labels: Sequence[str]) -> RoutingStats:
        """The statistics of some labels, in the given order: what 'the second-highest domain' is taken among."""
        rows = torch.tensor([self.index(label) for label in labels])
        return self._like(list(labels), *(getattr(self, name)[rows] for name in _SUMS))

    def _like(self, labels: list[str], *sums: Tensor) -> RoutingStats:
        return RoutingStats(
            self.kind, self.size, self.fingerprint, self.name, self.n_layers, self.layers, labels, *sums
        )

    def __add__(self, other: RoutingStats) -> RoutingStats:
        """Statistics over both texts; labels need not be the same."""
        if (self.fingerprint, self.kind) != (other.fingerprint, other.kind):
            raise ExpertError(f"statistics of different models: {self.name} and {other.name}")
        labels = list(dict.fromkeys([*self.labels, *other.labels]))
        sums = []
        for name in _SUMS:
            mine = getattr(self, name)
            total = mine.new_zeros(len(labels), *mine.shape[1:])
            for stats in (self, other):
                rows = torch.tensor([labels.index(label) for label in stats.labels])
                total.index_add_(0, rows, getattr(stats, name))
            sums.append(total)
        return self._like(labels, *sums)

    def frame(self, labels: Sequence[str] | None = None) -> pd.DataFrame:
        """One line per layer, expert and label: layer, router, expert, label, mass (per token), used (share of tokens).

        A line per pair and label is much for a Monet of 262,144 experts a layer: pass `labels`, or read the tensors.
        """
        import pandas as pd

        parts = []
        for label in labels or self.labels:
            at = self.index(label)
            for layer, router in self.layers.items():
                columns = {
                    "layer": layer,
                    "router": router,
                    "expert": range(self.size),
                    "label": label,
                    "mass": self.probability[at, router].numpy(),
                    "used": (self.used[at, router] / self.tokens[at]).numpy(),
                }
                parts.append(pd.DataFrame(columns))
        frame = pd.concat(parts, ignore_index=True)
        frame.attrs = {"model": self.name, "fingerprint": self.fingerprint, "tokens": self.tokens.tolist()}
        return frame

    def save(self, path: str | os.PathLike[str]) -> Path:
        """One safetensors file."""
        from safetensors.torch import save_file

        path = Path(path)
        about = {name: getattr(self, name) for name in ("kind", "size", "fingerprint", "name", "n_layers", "labels")}
        about["layers"] = list(self.layers.items())
        partial = path.with_name(f".{path.name}.partial")
        tensors = {name: getattr(self, name).contiguous() for name in _SUMS}
        save_file(tensors, partial, {"format": FORMAT, "about": json.dumps(about)})
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingStats:
        """Reads what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise ExpertError(f"{os.fspath(path)}: format {meta.get('format')!r}; expected {FORMAT!r}")
            about = json.loads(meta["about"])
            sums = {name: file.get_tensor(name) for name in _SUMS}
        return cls(**{**about, "layers": {int(k): v for k, v in about["layers"]}}, **sums)


def routing(
    model: Any,
    texts: Labelled | Corpus,
    *,
    kind: str = "auto",
    max_tokens: int | None = None,
    context: int | None = None,
    batch_tokens: int = 4096,
) -> RoutingStats:
    """Routing statistics of `model` over labelled documents, in one pass.

    Args:
        model: the model.
        texts: label -> documents.
        kind: which units, see `interp.experts.units`.
        max_tokens: per label.
        context: longest window in tokens, default the model's context.
        batch_tokens: tokens run at once.

    Raises ExpertError for a model without such units, no label, or a label without text.
    """
    units = units_of(model, kind)
    data = corpus(model, texts, max_tokens, context)
    n_labels, n_docs = len(data.labels), len(data.documents)
    routers = max(units.layers.values()) + 1
    shape = (n_labels, routers, units.size)
    mass, used, doc_sum, doc_square = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    lengths = torch.zeros(n_docs, dtype=torch.float64)
    for window in data.windows:
        lengths[window.document] += len(window.ids)
    # a document's mean is complete only after its last window, so whole documents are summed at a time
    for windows in _whole_documents(data, batch_tokens):
        present = torch.tensor(sorted({w.document for w in windows}))
        totals, uses = (torch.zeros(routers, len(present), units.size, dtype=torch.float64) for _ in range(2))
        for batch in Corpus(data.labels, windows, data.documents).batches(model, batch_tokens):
            mask = batch.tokens.mask
            own = torch.searchsorted(present, batch.document).to(mask.device)[:, None].expand_as(mask)[mask]  # [token]
            for router, weights in units.weigh(model, batch.tokens):
                totals[router] += weights.total(own, len(present)).cpu()
                uses[router] += weights.uses(own, len(present)).cpu()
        owner = data.documents[present]  # label of each document
        means = totals / lengths[present, None]
        for sums, part in ((mass, totals), (used, uses), (doc_sum, means), (doc_square, means.square())):
            sums.index_add_(0, owner, part.transpose(0, 1))
    tokens = torch.zeros(n_labels, dtype=torch.float64).index_add_(0, data.documents, lengths)
    documents = torch.bincount(data.documents, minlength=n_labels)
    return RoutingStats(
        units.kind, units.size, identity(model), model.name, model.n_layers, units.layers, data.labels,
        tokens, documents, mass, used, doc_sum, doc_square,
    )  # fmt: skip


def _whole_documents(data: Corpus, batch_tokens: int) -> Iterator[list[Window]]:
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
