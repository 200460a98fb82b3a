"""Activation sparsity: how few neurons do the work, and how few would do.

    nonzero(m, texts)                       share of neurons that are not (nearly) zero, by layer
    with m.intervene(top_k(m, 32)): ...     only the 32 largest neurons of each token and layer
    top_k_curve(m, texts, [8, 32, 128])     loss and calibration against k
    thresholds(m, train, error=0.1)         magnitudes below which neurons can be dropped at a stated output error
    threshold_curve(m, held_out, table)     what that costs on other texts

In a ReLU network most neurons are exactly zero (Li et al. 2022, "The Lazy Neuron Phenomenon", arXiv:2210.06313). In
SwiGLU models none is, but most contribute next to nothing: a neuron's part of the output is h_i times column i of the
down projection, and those of least magnitude can go (Zhang et al. 2024, "ReLU^2 Wins", arXiv:2402.03804).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp import metrics
from interp.calls import recorded
from interp.edits import Edit, Where
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd

SITE = "mlp_hidden"


@recorded
def nonzero(m: Any, texts: Sequence[str] | Any, *, threshold: float = 0.0) -> pd.DataFrame:
    """Share of neurons whose size is above `threshold`, over tokens: columns layer, node, metric, value."""
    import pandas as pd

    tokens = m.tokens(texts)
    acts = m.capture(tokens, f"{SITE}[*]", check=False)
    rows = []
    for place in m.resolve(f"{SITE}[*]"):
        h = acts[str(place)][tokens.mask]
        rows.append({"layer": place.layer, "node": str(place), "metric": "share nonzero",
                     "value": float((h.abs() > threshold).double().mean())})  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "threshold": threshold}
    return table


@dataclass(frozen=True)
class KeepLargest:
    """``h -> h`` with all but the k entries of greatest size at zero, per token; ties go to the lower index."""

    k: int

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        if self.k >= h.shape[-1]:
            return h
        kept = torch.sort(h.abs(), dim=-1, descending=True, stable=True).indices[..., : self.k]
        return torch.zeros_like(h).scatter(-1, kept, h.gather(-1, kept))


def top_k(m: Any, k: int, site: str = f"{SITE}[*]") -> Edit:
    """Only the k largest neurons of each token in each layer. Li et al. 2022, section 4 (there trained in)."""
    if k < 1:
        raise ProbeError(f"k={k}: at least one neuron must stay")
    m.resolve(site)
    return Edit(site, KeepLargest(k), name=f"top {k}")


@recorded
def top_k_curve(m: Any, texts: Sequence[str] | Any, ks: Iterable[int]) -> pd.DataFrame:
    """Loss (nats per token) and calibration error of the next-token prediction with k neurons left.

    Returns:
        Table: k (-1: all), share (of neurons), metric "loss" or "ece", value.
    """
    import pandas as pd

    tokens = m.tokens(texts)
    width = m.anatomy.sizes[SITE, m.resolve(f"{SITE}[*]")[0].layer]["neuron"]
    rows = []
    for k in [-1, *ks]:
        with m.intervene(*([] if k == -1 else [top_k(m, k)])):
            logits = m(tokens)
        share = 1.0 if k == -1 else min(1.0, k / width)
        for metric, value in _quality(logits, tokens).items():
            rows.append({"k": k, "share": share, "metric": metric, "value": value})
    table = pd.DataFrame(rows)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "width": width}
    return table


def _quality(logits: Tensor, tokens: Any) -> dict[str, float]:
    """Loss, and the expected calibration error of the most likely next token."""
    from probes.scores import calibration

    loss = metrics.loss(tokens).fn(logits, tokens)
    use = tokens.mask[:, 1:] & tokens.mask[:, :-1]
    weight = use.sum(1).clamp(min=1).to(loss)
    best = logits[:, :-1].softmax(-1).max(-1)
    right = (best.indices == tokens.ids[:, 1:])[use].long().cpu().numpy()
    found = calibration(right, best.values[use].float().cpu().numpy())
    return {"loss": float((loss * weight).sum() / weight.sum()), "ece": found["ece"]}


# -- thresholds on magnitude -----------------------------------------------------------------------------------------
def _contribution(m: Any, layer: int) -> tuple[Any, Tensor]:
    """The down projection without its bias, as a function, and the norm of each neuron's column [neuron]."""
    module = m.anatomy.places[SITE, layer].module
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ProbeError(
            f"{SITE}[{layer}]: its down projection, a {type(module).__name__}, has no weight matrix to measure by"
        )
    matrix = weight if type(module).__name__ == "Conv1D" else weight.T  # [neuron, d_model]
    return (lambda h: h @ matrix.to(h)), matrix.float().norm(dim=1)


@dataclass(frozen=True, eq=False)
class DropBelow:
    """``h -> h`` without neurons whose output magnitude |h_i| |column_i| is at most `threshold`."""

    norms: Tensor
    threshold: float

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        return h.masked_fill(h.abs() * self.norms.to(h) <= self.threshold, 0)


@recorded
def thresholds(m: Any, texts: Sequence[str] | Any, error: float = 0.1) -> pd.DataFrame:
    """The largest magnitude threshold per layer whose dropped neurons cost at most `error` of the output.

    The error is the mean over tokens of |sum of dropped parts| / |MLP output| ("CETT", Zhang et al. 2024, eq. 4), found
    by bisection on these texts; score it on others with `threshold_curve`.

    Returns:
        Table: layer, node, threshold, error (reached), value (share of neurons kept), metric "share kept".
    """
    import pandas as pd

    if not 0 <= error < 1:
        raise ProbeError(f"error={error}: expected a share in [0, 1)")
    tokens = m.tokens(texts)
    acts = m.capture(tokens, f"{SITE}[*]", check=False)
    rows = []
    for place in m.resolve(f"{SITE}[*]"):
        down, norms = _contribution(m, place.layer)
        h = acts[str(place)][tokens.mask].float()
        low, high = 0.0, float((h.abs() * norms).max())
        if _cett(down, h, norms, 0.0) > error:  # cannot be: what is exactly zero adds nothing
            high = 0.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if _cett(down, h, norms, middle) <= error else (low, middle)
        rows.append({"layer": place.layer, "node": str(place), "threshold": low, "error": _cett(down, h, norms, low),
                     "metric": "share kept", "value": float((h.abs() * norms > low).double().mean())})  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "asked": error}
    return table


def _cett(down: Any, h: Tensor, norms: Tensor, threshold: float) -> float:
    dropped = h.masked_fill(h.abs() * norms > threshold, 0)
    return float((down(dropped).norm(dim=-1) / down(h).norm(dim=-1).clamp(min=1e-30)).mean())


def threshold_edits(m: Any, table: pd.DataFrame) -> list[Edit]:
    """The thresholds of a table as Edits."""
    if m.fingerprint != table.attrs.get("fingerprint"):
        raise ProbeError(f"these thresholds are {table.attrs.get('model')}'s, not {m.name}'s; find them on this model")
    return [
        Edit(
            str(row["node"]),
            DropBelow(_contribution(m, int(row["layer"]))[1], float(row["threshold"])),
            name="drop below",
        )
        for row in table.to_dict("records")
    ]


@recorded
def threshold_curve(m: Any, texts: Sequence[str] | Any, table: pd.DataFrame) -> pd.DataFrame:
    """What the thresholds give on other texts: per layer the error and the share kept, and the loss with and without.

    Returns:
        Table: layer (missing for the loss), metric ("error" | "share kept" | "loss"), baseline, value. `recall` in
            `.attrs`: of
        the neurons kept, the share that a fixed set of as many (the most often kept) would have held: how predictable
        they are without looking.
    """
    import pandas as pd

    tokens = m.tokens(texts)
    acts = m.capture(tokens, f"{SITE}[*]", check=False)
    rows: list[dict[str, Any]] = []
    hits = total = 0.0
    for row in table.to_dict("records"):
        down, norms = _contribution(m, int(row["layer"]))
        h = acts[str(row["node"])][tokens.mask].float()
        kept = h.abs() * norms > float(row["threshold"])
        base = {"layer": row["layer"], "baseline": "none"}
        rows.append({**base, "metric": "error", "value": _cett(down, h, norms, float(row["threshold"]))})
        rows.append({**base, "metric": "share kept", "value": float(kept.double().mean())})
        size = max(1, round(float(kept.double().mean()) * h.shape[-1]))
        half = kept[: len(kept) // 2].double().mean(0).topk(size).indices
        rest = kept[len(kept) // 2 :]
        hits, total = hits + float(rest[:, half].sum()), total + float(rest.sum())
    for name, edits in (("none", []), ("drop below", threshold_edits(m, table))):
        with m.intervene(*edits):
            value = _quality(m(tokens), tokens)["loss"]
        rows.append({"layer": pd.NA, "metric": "loss", "baseline": name, "value": value})
    out = pd.DataFrame(rows).astype({"layer": "Int64"})
    out.attrs = {**table.attrs, "recall": hits / max(total, 1.0)}
    return out
