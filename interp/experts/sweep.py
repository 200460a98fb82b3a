"""The effect of switching off every expert of every layer, measured: one run per expert, made quick.

    exact = experts.sweep(m, {"law": texts, "code": texts})

The numbers are those of the loop ``for each expert: switch it off, run the model``. What is saved:

* the layers below are not run again: the run is resumed there, from the stream that the plain run left;
* rows of text that never use an expert are not run without it, as their change is 0 (not so in mode "reroute": an
  expert that is not chosen still has its share of a softmax);
* many experts share one batch, each row with another expert missing;
* mode "zero": where the layer only adds its experts' outputs to the stream (this is checked against the layer itself),
  the stream behind it is the plain one less the expert's term, so the layer itself is not run again either. Behind the
  last layer, only the tokens that used the expert are looked at;
* a metric that reads one token gets the logits of that token only, and the loss those of the tokens from the expert's
  first use on: before it, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.activations import Tokens
from interp.calls import recorded
from interp.edits import Edit, Where
from interp.experts.attribute import amounts, checked, effects, per_row
from interp.experts.batches import Batch, Corpus, Labelled, corpus
from interp.experts.units import ExpertError
from interp.hooks.resume import forms, narrowed, resumed
from interp.interrupted import salvaged
from interp.metrics import Metric
from interp.progress import bar

if TYPE_CHECKING:
    import pandas as pd


@recorded
@torch.no_grad()
def sweep(
    model: Any,
    texts: Labelled | Corpus,
    *,
    metric: str | Metric | Callable[..., Tensor] = "loss",
    mode: str = "zero",
    layers: Sequence[int] | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
) -> pd.DataFrame:
    """Exact change of a metric, per label, when each routed expert alone is switched off.

    Args:
        model: the model.
        texts: label -> documents.
        metric: "loss" (next-token nats per token), or a metric of logits, averaged over windows of text.
        mode: "zero", "renormalise" or "reroute", as in `experts.ablate`.
        layers: which to sweep, default all that have experts.
        max_tokens: per label.
        batch_tokens: tokens run at once.

    Returns a Table with columns layer, expert, label, value (after - before). Interrupted, it leaves the same over the
    windows of text that were done, the longest first (`interp.unfinished`; ``.attrs["tokens"]`` counts them). Raises
    ExpertError for a model without routed experts, or whose layers do not hand on one residual stream.
    """
    units = checked(model, "routed", mode)
    wanted = sorted(units.layers if layers is None else layers)
    if unknown := [layer for layer in wanted if layer not in units.layers]:
        raise ExpertError(f"layers: {unknown[0]} has no experts; {sorted(units.layers)} have")
    data = corpus(model, texts, max_tokens)
    sums = torch.zeros(len(data.labels), len(units.layers), units.size, dtype=torch.float64)
    counts = torch.zeros(len(data.labels), dtype=torch.float64)
    adds: dict[int, bool] = {}
    done = 0

    def made() -> pd.DataFrame | None:
        if not done:
            return None
        seen = data.first(done)
        table = effects(model, units, seen, {"value": sums / counts[:, None, None]}, metric, mode, "exact")
        return table[table["layer"].isin(wanted) & table["label"].isin(seen.present)].reset_index(drop=True)

    with salvaged("experts.sweep", made), bar("sweeping", len(data.windows) * len(wanted)) as advance:
        for batch in data.batches(model, batch_tokens):
            plain, own = Plain.run(model, batch, metric, mode, wanted), torch.zeros_like(sums)
            for layer in wanted:
                change = _layer(plain, layer, units.size, batch_tokens, adds)  # [row, expert]
                own[:, units.layers[layer]].index_add_(0, batch.label, change)
                advance(len(batch.label))
            sums += own
            counts.index_add_(0, batch.label, amounts(batch, metric))
            done += len(batch.label)
    found = made()
    assert found is not None
    return found


@dataclass(eq=False)
class Plain:
    """One batch as the model runs it, and what is needed to run parts of it again.

    Attributes:
        streams: layer -> the stream behind it [batch, pos, d_model]; -1 for the one entering layer 0.
        before: the metric of each row [batch].
        nats: each token's loss [batch, pos], 0 where there is none; None for other metrics.
        last: the metric reads each row's last token only.
        shapes: what each layer returns, for `resumed`.
    """

    model: Any
    batch: Batch
    metric: Any
    mode: str
    acts: Any
    streams: dict[int, Tensor]
    before: Tensor
    nats: Tensor | None
    last: bool
    shapes: list[int]

    @classmethod
    def run(cls, model: Any, batch: Batch, metric: Any, mode: str, layers: Sequence[int]) -> Plain:
        first, top = min(layers), model.n_layers
        sites = [f"resid_post[{i}]" for i in range(max(first - 1, 0), top)]
        missing = [s for s in sites if ("resid_post", int(s[11:-1])) not in model.anatomy.places]
        if missing:
            raise ExpertError(f"{missing[0]}: {model.name} has no such site, so no run can be resumed behind it")
        inside = "expert_out" if mode == "zero" else "expert_weight"
        with forms(model.anatomy.layers) as shapes:
            acts = model.capture(batch.tokens, [*sites, *(f"{inside}[{i}]" for i in layers)], logits=True, check=False)
        streams = {int(s[11:-1]): acts[s] for s in sites}
        last, nats = False, None
        if metric == "loss":
            predicted = _predicted(batch.tokens)
            nats = torch.zeros(predicted.shape, device=predicted.device)
            nats[predicted] = _cross_entropy(acts.logits[predicted], _targets(batch.tokens)[predicted])
            before = nats.sum(1)
        else:
            before = per_row(acts.logits, batch, metric)
            rows = torch.arange(len(before), device=before.device)
            short = acts.logits[rows, batch.tokens.last][:, None]
            try:
                last = bool(torch.equal(per_row(short, _ends(batch), metric), before))
            except (IndexError, RuntimeError, ValueError):
                last = False  # it reads more than one token
        return cls(model, batch, metric, mode, acts, streams, before, nats, last, shapes)

    def change(
        self, start: int, rows: Tensor, since: Tensor, stream: Tensor | None = None, edits: Sequence[Edit] = ()
    ) -> Tensor:
        """What becomes of the metric of some rows, run from layer `start` on with a stream in front of it.

        `since` [n] is each row's first token that differs. Gives what the metric rises by, [n] in float64.
        """
        tokens = _rows(self.batch.tokens, rows)
        places = None
        if self.nats is not None:
            places = _predicted(tokens) & (torch.arange(tokens.ids.shape[1], device=since.device) >= since[:, None])
        wanted = tokens.last if self.last else places
        with ExitStack() as stack:
            if stream is not None:
                stack.enter_context(resumed(self.model.anatomy.layers, start, stream, self.shapes))
            if wanted is not None:
                stack.enter_context(narrowed(self.model.hf, wanted))
            if edits:
                stack.enter_context(self.model.intervene(*edits))
            logits = self.model._forward(tokens).logits
        if places is None:
            batch = Batch(tokens, self.batch.label[rows.cpu()], self.batch.document[rows.cpu()])
            after = per_row(logits, _ends(batch) if self.last else batch, self.metric)
            return (after - self.before[rows]).double()
        assert self.nats is not None
        rise = _cross_entropy(logits.flatten(0, -2), _targets(tokens)[places]) - self.nats[rows][places]
        return rise.new_zeros(len(rows), dtype=torch.float64).index_add_(0, places.nonzero()[:, 0], rise.double())


def _layer(plain: Plain, layer: int, size: int, batch_tokens: int, adds: dict[int, bool]) -> Tensor:
    """Change of the metric of each row without each expert of a layer [row, expert], float64."""
    routed = plain.acts.experts(layer)
    first = _first_use(routed.ids, routed.mask, size)
    if plain.mode == "reroute":
        first = torch.zeros_like(first)
    used = first < routed.ids.shape[1]
    change = torch.zeros(used.shape, dtype=torch.float64)
    if plain.mode == "zero" and layer not in adds:
        adds[layer] = _adds_up(plain, layer, used)
    if adds.get(layer) and layer == plain.model.n_layers - 1 and plain.metric == "loss":
        return _behind_last(plain, layer, size, batch_tokens)
    for rows, experts in _chunks(used, max(1, batch_tokens // routed.ids.shape[1])):
        since = first[rows, experts]
        if adds.get(layer):
            rise = plain.change(layer + 1, rows, since, _without(plain, layer, rows, experts))
        else:  # in the layer itself
            stream = plain.streams[layer - 1][rows] if layer else None
            rise = plain.change(layer, rows, since, stream, [_off(layer, experts, plain.mode)])
        change[rows.cpu(), experts.cpu()] = rise.cpu()
    return change


def _first_use(ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """The first token that uses an expert, the length if none does [row, expert]; ids [batch, pos, slot]."""
    length = ids.shape[1]
    when = torch.arange(length, device=ids.device)[:, None].expand_as(ids).masked_fill(~mask[..., None], length)
    first = torch.full((len(ids), size), length, device=ids.device)
    return first.scatter_reduce_(1, ids.flatten(1), when.flatten(1), "amin")


def _chunks(used: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(row, expert) of every run that is needed, in batches: [n] each."""
    experts, rows = used.T.nonzero(as_tuple=True)
    yield from zip(rows.split(size), experts.split(size), strict=True)


def _without(plain: Plain, layer: int, rows: Tensor, experts: Tensor) -> Tensor:
    """The stream behind the layer less the term of one expert per row [n, pos, d_model]."""
    routed = plain.acts.experts(layer)
    stream = plain.streams[layer][rows].clone()
    for slot in range(routed.ids.shape[-1]):
        share = routed.weights[rows, :, slot] * (routed.ids[rows, :, slot] == experts[:, None])
        stream -= (share[..., None] * routed.out[rows, :, slot]).to(stream.dtype)
    return stream


def _off(layer: int, experts: Tensor, mode: str) -> Edit:
    """An edit that switches off another expert in every row of the batch; `experts` [batch]."""
    if mode == "reroute":

        def ban(h: Tensor, where: Where) -> Tensor:
            return h.scatter(-1, experts[:, None, None].expand(-1, h.shape[1], 1), -torch.inf)

        return Edit(f"router_logits[{layer}]", ban, name="sweep")

    def weigh(h: Tensor, where: Where) -> Tensor:
        gone = where.inputs[0] == experts[:, None, None]
        kept = h.masked_fill(gone, 0.0)
        if mode == "zero":
            return kept
        total, left = h.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        return kept * torch.where(left == 0, torch.zeros_like(left), total / left)

    return Edit(f"expert_weight[{layer}]", weigh, name="sweep")


def _adds_up(plain: Plain, layer: int, used: Tensor) -> bool:
    """Whether the layer's output is its experts' terms plus what does not depend on them: measured on one expert."""
    expert = int(used.sum(0).argmax())
    row = used[:, expert].nonzero()[:1, 0]
    one = torch.full_like(row, expert)
    site = f"resid_post[{layer}]"
    tokens = _rows(plain.batch.tokens, row)
    with ExitStack() as stack:
        if layer:
            stream = plain.streams[layer - 1][row]
            stack.enter_context(resumed(plain.model.anatomy.layers, layer, stream, plain.shapes))
        stack.enter_context(plain.model.intervene(_off(layer, one, "zero")))
        real = plain.model.capture(tokens, site, check=False)[site]
    guess = _without(plain, layer, row, one)
    mask = tokens.mask
    moved = (real - plain.streams[layer][row])[mask].norm()
    return float((real - guess)[mask].norm()) <= 1e-3 * float(moved) + 1e-5 * float(real[mask].norm())


def _behind_last(plain: Plain, layer: int, size: int, batch_tokens: int) -> Tensor:
    """Change of the summed loss of each row without each expert of the last layer: only tokens that used it change."""
    routed, tokens = plain.acts.experts(layer), plain.batch.tokens
    assert plain.nats is not None
    row, pos, slot = _predicted(tokens)[..., None].expand_as(routed.ids).nonzero(as_tuple=True)
    expert, target = routed.ids[row, pos, slot], _targets(tokens)[row, pos]
    width = tokens.ids.shape[1]
    change = torch.zeros(len(tokens.ids), size, dtype=torch.float64)
    for part in torch.arange(len(row), device=row.device).split(max(width, batch_tokens // width * width)):
        r, p, s = row[part], pos[part], slot[part]
        term = routed.weights[r, p, s, None] * routed.out[r, p, s]
        stream = plain.streams[layer][r, p] - term.to(plain.streams[layer].dtype)
        missing = -len(part) % width  # laid out as rows of the usual length; nothing mixes tokens any more
        grid = torch.nn.functional.pad(stream, (0, 0, 0, missing)).view(-1, width, stream.shape[-1])
        some = Tokens(tokens.ids[:1].expand(len(grid), -1), torch.ones_like(tokens.mask[:1]).expand(len(grid), -1))
        with resumed(plain.model.anatomy.layers, layer + 1, grid, plain.shapes):
            logits = plain.model._forward(some).logits.flatten(0, 1)[: len(part)]
        rise = (_cross_entropy(logits, target[part]) - plain.nats[r, p]).double().cpu()
        change.index_put_((r.cpu(), expert[part].cpu()), rise, accumulate=True)
    return change


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each token [token], from logits [token, vocab]."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _predicted(tokens: Tokens) -> Tensor:
    """True at tokens that another one follows [batch, pos]: they predict it."""
    return tokens.mask & torch.nn.functional.pad(tokens.mask[:, 1:], (0, 1))


def _targets(tokens: Tokens) -> Tensor:
    """The token behind each one [batch, pos]."""
    return tokens.ids.roll(-1, 1)


def _rows(tokens: Tokens, rows: Tensor) -> Tokens:
    return Tokens(tokens.ids[rows], tokens.mask[rows])


def _ends(batch: Batch) -> Batch:
    """The batch as a metric sees it that is given the last token's logits only."""
    rows = torch.arange(len(batch.tokens.ids), device=batch.tokens.ids.device)
    last = batch.tokens.last
    ends = Tokens(batch.tokens.ids[rows, last][:, None], batch.tokens.mask[rows, last][:, None])
    return Batch(ends, batch.label, batch.document)
