"""The effect of switching off every expert of every layer, estimated from one forward and one backward pass.

    table = experts.attribute(m, {"law": texts, "code": texts})
    law   = experts.select(table, "law", rule="attribution", total=10)

At one token let y = sum_s w_s E_s be the routed sum, M the metric, g = dM/dy. Without expert e the layer itself is
known exactly (`interp.experts.removal`): its term goes, the other weights become w', and a runner-up may come in. What
comes after it is taken as linear. So

    content   - w_e g.E_e                              the term that is gone
    routing   sum over j != e of (w'_j - w_j) g.E_j    how the others are weighed instead, the runner-up among them
    value     content + routing

summed over the tokens that use e (and, where weights are an unnormalised softmax, over the others, whose weights rise a
little). All of g.E_j is the gradient at a weight, dM/dw_j; for the runner-up it is the
gradient at the weight 0 of a further slot. The weights w' are exact, not linear in the logits: where a router is
saturated its slope is 0, and a gradient through it would say that nothing happens (attribution patching has the same
trouble with attention, and AtP* [arXiv 2403.00745, section 3.1.1] mends it in the same way).

Check it with `agreement` against `experts.sweep`, which measures what is estimated here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.batches import Batch, Corpus, Labelled, corpus
from interp.experts.collect import digest
from interp.experts.removal import Formula, formula, renormalised, zeroed
from interp.experts.units import ExpertError, Units, identity, units_of
from interp.interrupted import salvaged
from interp.metrics import Metric

if TYPE_CHECKING:
    import pandas as pd

MODES = ("zero", "renormalise", "reroute")


@recorded
def attribute(
    model: Any,
    texts: Labelled | Corpus,
    *,
    metric: str | Metric | Callable[..., Tensor] = "loss",
    mode: str = "zero",
    kind: str = "auto",
    max_tokens: int | None = None,
    batch_tokens: int = 1024,
) -> pd.DataFrame:
    """Estimated change of a metric, per label, when each unit alone is switched off.

    Args:
        model: the model.
        texts: label -> documents.
        metric: "loss" (next-token nats per token), or a metric of logits, averaged over windows of text.
        mode: what becomes of the other weights: "zero" nothing, "renormalise" they share what is left, "reroute" the
            runner-up takes the slot and the router's formula does the rest (`interp.experts.modes`).
        kind: "routed", or "neurons" (mode "zero"): the activation is set to 0.
        max_tokens: per label.
        batch_tokens: tokens run at once; the backward pass keeps all of their activations.

    Returns a Table with columns layer, expert, label, value (what the metric would rise by), content, routing.
    Interrupted, it leaves the same over the windows of text that were done, the longest first (`interp.unfinished`).

    Raises ExpertError for Monet, an unknown mode, and for mode "reroute" where the router's formula is not known.
    """
    units = checked(model, kind, mode)
    if units.kind == "neurons" and mode != "zero":
        raise ExpertError(f"mode={mode!r}: neurons have no router; expected zero")
    data = corpus(model, texts, max_tokens)
    shape = (len(data.labels), max(units.layers.values()) + 1, units.size)
    content, routing = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    formulas: dict[int, Formula] = {}
    counts, done = torch.zeros(len(data.labels), dtype=torch.float64), 0

    def made() -> pd.DataFrame | None:
        if not done:
            return None
        columns = {"value": content + routing, "content": content, "routing": routing}
        each, seen = {name: column / counts[:, None, None] for name, column in columns.items()}, data.first(done)
        table = effects(model, units, seen, each, metric, mode, "attribution")
        return table[table["label"].isin(seen.present)].reset_index(drop=True)

    with salvaged("experts.attribute", made):
        for batch in data.batches(model, batch_tokens):
            own = torch.zeros_like(content), torch.zeros_like(routing)  # a batch counts whole or not at all
            if units.kind == "neurons":
                _neurons(model, units, batch, metric, own[0])
            else:
                _routed(model, units, batch, metric, mode, formulas, *own)
            content += own[0]
            routing += own[1]
            counts.index_add_(0, batch.label, amounts(batch, metric))
            done += len(batch.label)
    found = made()
    assert found is not None
    return found


def checked(model: Any, kind: str, mode: str) -> Units:
    """The units, where single ones can be switched off this way."""
    units = units_of(model, kind)
    if units.kind == "monet":
        raise ExpertError(
            f"{model.name}: Monet's {units.size:,} pairs a layer are too many to remove one by one; select them by "
            "their routing, or patch g1 and g2"
        )
    if mode not in MODES:
        raise ExpertError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    return units


def per_row(logits: Tensor, batch: Batch, metric: Any) -> Tensor:
    """The metric of each row, or for "loss" its summed nats [batch]."""
    if isinstance(metric, str):
        if metric != "loss":
            raise ExpertError(f"metric={metric!r}: expected loss, or a metric of logits")
        tokens = batch.tokens
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens.ids[:, 1:].flatten(), reduction="none"
        )
        return (each.view_as(tokens.ids[:, 1:]) * tokens.mask[:, 1:]).sum(1)
    value: Tensor = metric(logits, batch.tokens) if isinstance(metric, Metric) else metric(logits)
    if value.shape != logits.shape[:1]:
        raise ExpertError(f"metric: one number per row is wanted, [{len(logits)}]; got {list(value.shape)}")
    return value


def amounts(batch: Batch, metric: Any) -> Tensor:
    """What each row counts for: its predicted tokens, or 1 [batch], float64."""
    tokens = batch.tokens.mask[:, 1:].sum(1).double().cpu()
    return tokens if isinstance(metric, str) else torch.ones_like(tokens)


def effects(
    model: Any, units: Units, data: Corpus, columns: dict[str, Tensor], metric: Any, mode: str, method: str
) -> pd.DataFrame:
    """Values [label, router, unit] as a Table that `experts.select` can cut."""
    import pandas as pd

    parts = []
    for at, label in enumerate(data.labels):
        for layer, router in units.layers.items():
            values = {name: v[at, router].numpy() for name, v in columns.items()}
            parts.append(pd.DataFrame({"layer": layer, "expert": range(units.size), "label": label, **values}))
    table = pd.concat(parts, ignore_index=True)
    name = metric if isinstance(metric, str) else getattr(metric, "name", getattr(metric, "__name__", "custom"))
    table.attrs.update({
        "model": model.name, "fingerprint": identity(model), "kind": units.kind, "size": units.size,
        "n_layers": model.n_layers, "labels": data.labels, "tokens": data.n_tokens, "data": [digest(data)],
        "metric": name, "mode": mode, "method": method,
    })  # fmt: skip
    return table


def _neurons(model: Any, units: Units, batch: Batch, metric: Any, content: Tensor) -> None:
    """Adds - h dM/dh of every neuron."""
    sites = [f"mlp_hidden[{layer}]" for layer in units.layers]
    acts = model.capture(batch.tokens, sites, logits=True, grad=True, check=False)
    hidden = [acts[site] for site in sites]
    with torch.enable_grad():
        slopes = torch.autograd.grad(per_row(acts.logits, batch, metric).sum(), hidden)
    mask, label = batch.tokens.mask, batch.label
    for router, h, slope in zip(units.layers.values(), hidden, slopes, strict=True):
        rows = (-(h * slope).detach().double() * mask[..., None]).sum(1).cpu()
        content[:, router].index_add_(0, label, rows)


def _routed(
    model: Any, units: Units, batch: Batch, metric: Any, mode: str, formulas: dict[int, Formula], content: Tensor,
    routing: Tensor,
) -> None:  # fmt: skip
    """Adds content and routing of every expert: one forward, one backward."""
    from interp.hooks.slots import shown
    from interp.model import Use
    from interp.reach import rooted
    from interp.recorder import Recorder
    from interp.sites import Site

    layers = list(units.layers)
    recorder = None
    if mode == "reroute":
        sites = model.resolve([f"router_logits[{layer}]" for layer in layers])
        recorder = Recorder(sites, model.fragile, model.about(), check=False)
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # layer -> experts [token, slot + 1], weights, weights without
    shares: dict[int, Tensor] = {}  # layer -> what weights rise by without an expert that was not chosen

    def see(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        # one more slot, of weight 0: the gradient there is what the runner-up would bring
        w, runner = weights.detach().double(), ids[:, 0]
        if mode == "reroute":
            assert recorder is not None
            logits = recorder.kept[Site("router_logits", layer)][-1].flatten(0, 1)[..., : units.size]
            if layer not in formulas:
                biases = _biases(model, layer, units.size)
                formulas[layer] = formula(logits, ids, w.to(weights.dtype), biases, f"layer {layer} of {model.name}")
            runner, without = formulas[layer].without(logits.double(), ids)
            if (rise := formulas[layer].share(logits.double(), ids)) is not None:
                shares[layer] = rise
        else:
            without = renormalised(w) if mode == "renormalise" else zeroed(w)
        wide = torch.cat([weights, torch.zeros_like(weights[:, :1])], -1)
        wide = wide if wide.requires_grad else wide.requires_grad_(True)
        kept[layer] = (torch.cat([ids, runner[:, None]], -1), wide, without)
        return kept[layer][0], wide

    try:
        with model.using(Use(recorder=recorder)), rooted(model, True), torch.enable_grad(), shown(
            model.anatomy, layers, see
        ):  # fmt: skip
            logits = model._forward(batch.tokens).logits
            total = per_row(logits, batch, metric).sum()
            slopes = torch.autograd.grad(total, [kept[layer][1] for layer in layers])
    except ValueError as error:
        if isinstance(error, ExpertError):
            raise
        raise ExpertError(f"{model.name}: {error}") from error
    mask = batch.tokens.mask.flatten()
    label = batch.label.to(mask.device)[:, None].expand_as(batch.tokens.mask).flatten()[mask]
    for layer, slope in zip(layers, slopes, strict=True):
        ids, wide, without = (part.detach()[mask] for part in kept[layer])
        w, g, k = wide.double(), slope.double()[mask], ids.shape[-1] - 1
        gone = -(w * g)[:, :k]
        rest = ((without - w[:, None]) * g[:, None]).sum(-1) - gone  # what of the whole change is not the term itself
        bins = (label[:, None] * units.size + ids[:, :k]).flatten()
        for into, values in ((content, gone), (routing, rest)):
            sums = torch.zeros(into.shape[0] * units.size, dtype=torch.float64, device=w.device)
            sums.index_add_(0, bins, values.flatten())
            into[:, units.layers[layer]] += sums.view(-1, units.size).cpu()
        if layer in shares:
            more = shares[layer][mask] * (w * g)[:, :k].sum(-1, keepdim=True)  # [token, expert]
            routing[:, units.layers[layer]].index_add_(0, label.cpu(), more.cpu())


def _biases(model: Any, layer: int, size: int) -> list[Tensor]:
    """Vectors of one number per expert beside the router: perhaps added to scores for choosing."""
    named = [*model.anatomy.layers[layer].named_parameters(), *model.anatomy.layers[layer].named_buffers()]
    return [t.detach().flatten().double() for name, t in named if "bias" in name and t.numel() == size]


@recorded
def agreement(estimate: pd.DataFrame, exact: pd.DataFrame, top: float = 0.1) -> pd.DataFrame:
    """How well an estimate ranks units as the exact effects do.

    Args:
        estimate: Table of `attribute`.
        exact: Table of `sweep`, on the same texts and mode.
        top: share of units that recall is asked for.

    Returns columns label, layer ("all" for all layers together), units, spearman, recall (of the `top` units of largest
    exact effect, by absolute value, the part that is among the `top` of the estimate), sign (share of those on whose
    direction both agree), ratio (sum of absolute estimates over that of exact effects).
    """
    import pandas as pd
    from scipy.stats import spearmanr

    for name in ("fingerprint", "mode", "metric", "data"):
        if estimate.attrs.get(name) != exact.attrs.get(name):
            raise ExpertError(
                f"{name}: the estimate has {estimate.attrs.get(name)!r}, the exact effects {exact.attrs.get(name)!r}"
            )
    both = estimate.merge(exact, on=["layer", "expert", "label"], suffixes=("_estimate", "_exact"))
    groups: list[tuple[Any, Any, pd.DataFrame]] = []
    for label, part in both.groupby("label", sort=False):
        groups.append((label, "all", part))
        groups += [(label, layer, here) for layer, here in part.groupby("layer")]
    rows = []
    for label, layer, part in groups:
        guess, truth = part["value_estimate"].to_numpy(), part["value_exact"].to_numpy()
        n = max(1, round(top * len(part)))
        best, found = set(abs(truth).argsort()[-n:].tolist()), set(abs(guess).argsort()[-n:].tolist())
        agree = [guess[i] * truth[i] > 0 for i in best]
        varies = len({*guess.tolist()}) > 1 and len({*truth.tolist()}) > 1
        rho = float(spearmanr(guess, truth).statistic) if varies else float("nan")
        rows.append({
            "label": label, "layer": layer, "units": len(part), "spearman": rho, "recall": len(best & found) / n,
            "sign": sum(agree) / n, "ratio": float(abs(guess).sum() / max(abs(truth).sum(), 1e-300)),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs.update({**exact.attrs, "method": "agreement", "top": top})
    return frame
