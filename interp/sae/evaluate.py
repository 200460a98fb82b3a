"""What an SAE is worth, in numbers that mean one thing each.

    table = sae.evaluate(s, m, texts)        reconstruction, sparsity, and what it costs the model
    table = sae.evaluate(s, acts=x)          without a model: reconstruction and sparsity only

With x an activation, x' its reconstruction (for a transcoder: y and y'), sums over tokens in float64:

    fvu        sum |x - x'|^2 / sum |x - mean x|^2, with the one mean of all tokens. 0 for the identity, 1 for a
               reconstruction that is always the mean; explained variance is 1 - fvu. (SAEBench's code at the time of
               writing measured variance from zero, which flatters every SAE of a stream with a large mean.)
    l0         latents that fire per token
    norm_ratio mean of |x'| / |x|: shrinkage where below 1
    gamma      sum |x'|^2 / sum <x, x'>: below 1 where a larger x' along the same directions would fit better
    density    share of tokens at which a latent fires: the median over latents that fire at all
    dead       latents that fire at no token
    ce, ce_sae, ce_off     loss in nats per token: as it is, with x' in place of x, with 0 (or the mean) in its place
    ce_recovered           (ce_off - ce_sae) / (ce_off - ce): 1 for the identity, 0 for the ablation
    kl_recovered           1 - KL(clean, sae) / KL(clean, off)

    outliers   share of tokens whose norm is beyond what the SAE was trained on (`SAE.limit`: attention sinks). They are
               in none of the above: their activation stays as it is in every run

Intervals are 95 % percentile bootstraps over documents: tokens of one document are not independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.progress import bar
from interp.sae.autoencoder import SAE

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

_ROWS = 4096  # tokens encoded together


@recorded
def evaluate(
    s: SAE,
    model: Model | None = None,
    texts: Sequence[Any] | None = None,
    *,
    acts: Tensor | Mapping[str, Tensor] | None = None,
    ablation: str = "zero",
    context: int = 128,
    run: int = 8,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The Table of an SAE: columns metric, value, low, high, n (documents), method.

    Args:
        s: the SAE.
        model: a model; the metrics of loss need it.
        texts: texts that the SAE was not trained on.
        acts: instead of them activations [row, d_in] (a transcoder: a mapping from its sites); each row then counts as
            a document.
        ablation: what stands for "nothing": zero (as in SAEBench) or mean.
        context: tokens per text at most.
        run: texts per forward pass.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        SAEError: neither of the two sources, or a width that is not the SAE's.
    """
    if (model is None or texts is None) == (acts is None):
        raise SAEError("evaluate: give either (model, texts) or acts=...")
    if ablation not in ("zero", "mean"):
        raise SAEError(f"ablation={ablation!r}: expected zero or mean")
    fires = torch.zeros(s.d_sae, dtype=torch.long)
    if acts is not None:
        sums = _reconstruction(s, _given(s, acts), fires)
    else:
        assert model is not None
        assert texts is not None
        batches = [list(texts[i : i + run]) for i in range(0, len(texts), run)]
        sums = _reconstruction(s, _captured(s, model, batches, context), fires)
        if s.shape == "autoencoder":
            sums |= _losses(s, model, batches, context, ablation, sums["sum_x"].sum(0) / sums["n"].sum())
    rows = _table(sums, resamples, seed)
    share = fires.double() / sums["n"].sum()
    rows.append({"metric": "density", "value": float(share[share > 0].median()) if bool(fires.any()) else 0.0})
    rows.append({"metric": "dead", "value": float((fires == 0).sum())})
    if math.isfinite(s.limit):
        rows.append({"metric": "outliers", "value": 1 - float(sums["n"].sum() / sums["all"].sum())})
    return _frame(s, rows, sums, ablation, model)


def _frame(s: SAE, rows: list[dict[str, Any]], sums: dict[str, Tensor], ablation: str, model: Any) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(rows, columns=["metric", "value", "low", "high"])
    frame["n"] = len(sums["n"])
    frame["method"] = str(s.metadata.get("trained_as", s.arch))
    frame.attrs.update({
        "sites": list(s.sites), "targets": list(s.targets), "d_sae": s.d_sae, "tokens": int(sums["n"].sum()),
        "ablation": ablation, "model": getattr(model, "name", None), "interval": "95 % bootstrap over documents",
    })  # fmt: skip
    return frame


# -- sums per document -----------------------------------------------------------------------------------------
def _given(s: SAE, acts: Tensor | Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(inputs, targets, document) of activations, each row a document."""
    x = acts if isinstance(acts, Tensor) else s.read(acts)
    y = x if isinstance(acts, Tensor) or s.targets == s.sites else s.read(acts, target=True)
    if s.shape == "transcoder" and isinstance(acts, Tensor):
        raise SAEError(f"acts: this SAE predicts {', '.join(s.targets)}; give a mapping from its sites to activations")
    x, y = x.reshape(-1, s.d_in) if x.shape[-1] == s.d_in else s._flat(x), y.reshape(-1, s.d_out)
    for i in range(0, len(x), _ROWS):
        yield x[i : i + _ROWS], y[i : i + _ROWS], torch.arange(i, min(i + _ROWS, len(x)))


def _captured(s: SAE, model: Model, batches: list[list[Any]], context: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    sites, first = list(dict.fromkeys((*s.sites, *s.targets))), 0
    with bar("reconstructing", total=sum(map(len, batches))) as advance:
        for batch in batches:
            tokens = model.tokens(batch, max_length=context, truncate=True)
            acts = model.capture(tokens, sites)
            document = torch.arange(first, first + len(batch))[:, None].expand(tokens.mask.shape)[tokens.mask.cpu()]
            mask = tokens.mask
            yield s.read(acts)[mask].cpu(), s.read(acts, target=True)[mask].cpu(), document
            first += len(batch)
            advance(len(batch))


@torch.no_grad()
def _reconstruction(s: SAE, rows: Iterator[tuple[Tensor, Tensor, Tensor]], fires: Tensor) -> dict[str, Tensor]:
    """Per document: all (tokens), n (those of the kind it was trained on), and of the latter sum_x [d], xx, ee, rr
    (reconstruction squared), xr, ratio, active."""
    parts: dict[str, list[Tensor]] = {}
    for x, y, document in rows:
        x, y = x.float(), y.double()
        support, values = s.codes(x)
        fires += torch.bincount(support.ids[values > 0], minlength=s.d_sae)
        out = s.reconstruct(x).reshape(y.shape).double()
        known = s.inside(x)
        counts = torch.ones(len(y), dtype=torch.float64) if known is None else known.double()
        if known is not None:
            y, out = y * counts[:, None], out * counts[:, None]
        per_token = {
            "all": torch.ones(len(y), dtype=torch.float64),
            "n": counts,
            "sum_x": y,
            "xx": y.square().sum(1),
            "ee": (y - out).square().sum(1),
            "rr": out.square().sum(1),
            "xr": (y * out).sum(1),
            "ratio": out.norm(dim=1) / y.norm(dim=1).clamp_min(1e-12),
            "active": torch.bincount(support.rows[values > 0], minlength=len(y)).double(),
        }
        n = int(document.max()) - int(document.min()) + 1
        for name, value in per_token.items():
            total = torch.zeros(n, *value.shape[1:], dtype=torch.float64)
            parts.setdefault(name, []).append(total.index_add_(0, document - document.min(), value))
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


def _losses(s: SAE, model: Model, batches: list[list[Any]], context: int, ablation: str,
            mean: Tensor) -> dict[str, Tensor]:  # fmt: skip
    """Per document: predicted tokens, and sums of loss and KL as it is, with the SAE, and with the site ablated."""
    from interp import edits
    from interp.sae.edits import known, reconstruction

    site = str(s.site)
    off = edits.zero(site, gate=known(s))
    if ablation == "mean":
        shape = model.capture(batches[0][:1], site)[site].shape[2:]
        off = edits.mean(site, mean.to(model.dtype).reshape(shape), gate=known(s))
    parts: dict[str, list[Tensor]] = {}
    with bar("measuring the loss", total=sum(map(len, batches))) as advance:
        for batch in batches:
            tokens = model.tokens(batch, max_length=context, truncate=True)
            real, target = tokens.mask[:, 1:], tokens.ids[:, 1:]
            runs = {"ce": model(tokens)}
            for name, edit in (("ce_sae", reconstruction(s)), ("ce_off", off)):
                with model.intervene(edit):
                    runs[name] = model(tokens)
            logs = {name: logits[:, :-1].float().log_softmax(-1) for name, logits in runs.items()}
            values = {"predicted": real.double()}
            for name, log in logs.items():
                values[name] = -log.gather(-1, target[..., None])[..., 0].double() * real
            for name in ("sae", "off"):
                kl = (logs["ce"].exp() * (logs["ce"] - logs[f"ce_{name}"])).sum(-1)
                values[f"kl_{name}"] = kl.double() * real
            for name, value in values.items():
                parts.setdefault(name, []).append(value.sum(1).cpu())
            advance(len(batch))
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


# -- from sums to metrics --------------------------------------------------------------------------------------
def _metrics(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics of sums [...] over some documents."""
    out = {
        "fvu": t["ee"] / (t["xx"] - t["sum_x"].square().sum(-1) / t["n"]),
        "l0": t["active"] / t["n"],
        "norm_ratio": t["ratio"] / t["n"],
        "gamma": t["rr"] / t["xr"],
    }
    if "ce" in t:
        out |= {name: t[name] / t["predicted"] for name in ("ce", "ce_sae", "ce_off")}
        out["ce_recovered"] = (t["ce_off"] - t["ce_sae"]) / (t["ce_off"] - t["ce"])
        out["kl"] = t["kl_sae"] / t["predicted"]
        out["kl_recovered"] = 1 - t["kl_sae"] / t["kl_off"]
    out["explained_variance"] = 1 - out["fvu"]
    return out


def _table(sums: dict[str, Tensor], resamples: int, seed: int) -> list[dict[str, Any]]:
    point = _metrics({name: value.sum(0) for name, value in sums.items()})
    n = len(sums["n"])
    generator = torch.Generator().manual_seed(seed)
    draws: dict[str, list[Tensor]] = {}
    for _ in range(resamples if n > 1 else 0):
        times = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double()
        drawn = _metrics({name: times @ value for name, value in sums.items()})
        for name, value in drawn.items():
            draws.setdefault(name, []).append(value)
    rows = []
    for name, value in point.items():
        low = high = math.nan
        if name in draws:
            low, high = torch.stack(draws[name]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        rows.append({"metric": name, "value": float(value), "low": low, "high": high})
    return rows


# -- several SAEs ----------------------------------------------------------------------------------------------
@recorded
def pareto(saes: Mapping[str, SAE], model: Model | None = None, texts: Sequence[Any] | None = None,
           **options: Any) -> pd.DataFrame:  # fmt: skip
    """One line per SAE and metric: the columns of `evaluate`, ``name``, and ``best`` where no
    other SAE has both a smaller l0 and a smaller fvu."""
    import pandas as pd

    tables = []
    for name, s in saes.items():
        table = evaluate(s, model, texts, **options)
        table.insert(0, "name", name)
        tables.append(table)
    frame = pd.concat(tables, ignore_index=True)
    wide = frame.pivot_table(index="name", columns="metric", values="value")
    beaten = {name: bool(((wide.l0 < row.l0) & (wide.fvu < row.fvu)).any()) for name, row in wide.iterrows()}
    frame["best"] = [not beaten[name] for name in frame["name"]]
    frame.attrs.update(tables[0].attrs)
    return frame
