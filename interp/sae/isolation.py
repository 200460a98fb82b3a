"""Isolation: can one attribute of a thing be exchanged through its latents, and the others left alone?

    table = isolation(s, x, {"continent": [...], "language": [...]}, k=8)

After RAVEL (Huang et al. 2024, arXiv:2402.17700): for two entities, base and source, that differ in every attribute,
the latents that stand for attribute A in the base are given the values that they have in the source::

    x' = x_base + D_A (z_source - z_base)_A

**cause** is how often x' then has the source's A, **isolation** how often every other attribute is still the base's,
and the score is the mean of both. What x' "has" is what linear probes read from it. RAVEL asks the model itself, and so
can you (``m.intervene(s.clamp(latents, values))``); probes need no prompts, and keep what the latents hold apart from
what the model does with it.

Latents and probes are found on one half of the rows, pairs are drawn from the other. Beside it: as many random latents
that fire, and the whole activation exchanged, which causes everything and isolates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.sae.autoencoder import SAE
from interp.sae.dark import halves

if TYPE_CHECKING:
    import pandas as pd


@recorded
@torch.no_grad()
def isolation(
    s: SAE,
    x: Tensor,
    attributes: Mapping[str, Sequence[Any]],
    *,
    k: int = 8,
    pairs: int = 500,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Cause, isolation and their mean for each attribute.

    Args:
        s: an autoencoder.
        x: activations [row, d_in], one row per entity (or per mention of one).
        attributes: name -> the value of each row; at least two attributes, whose values vary independently enough that
            pairs differ in both.
        k: latents that are exchanged: those whose class means differ most, in units of their own spread.
        pairs: of rows.
        resamples: bootstraps over pairs.
        seed: of halves, pairs and random latents.

    Returns columns attribute, metric (cause | isolation | score), baseline (none | random | activation), value, low,
    high, latents, probe (held-out accuracy of the attribute's probe: cause cannot exceed it by much).
    """
    import pandas as pd

    if len(attributes) < 2:
        raise SAEError("attributes: give at least two, one to exchange and one to leave alone")
    if s.shape != "autoencoder":
        raise SAEError(f"isolation: it is defined for an autoencoder, not for a {s.shape}")
    if wrong := next((n for n, values in attributes.items() if len(values) != len(x)), None):
        raise SAEError(f"attributes[{wrong!r}] has {len(attributes[wrong])} values, and there are {len(x)} activations")
    fit, score = halves(len(x), seed)
    codes = {name: _codes(values) for name, values in attributes.items()}
    if poor := next((name for name, code in codes.items() if len(code[fit].unique()) < 2), None):
        raise SAEError(f"attributes[{poor!r}]: one value only in the half that probes are fitted on; give more rows")
    probes = {name: _Probe(x[fit], code[fit]) for name, code in codes.items()}
    z, draw = s.encode(x), torch.Generator().manual_seed(seed)
    alive = (z[fit] > 0).any(0).nonzero().squeeze(1)
    if len(alive) < k:
        raise SAEError(f"k={k}: only {len(alive)} latents fire on these activations")
    lines: list[dict[str, Any]] = []
    for name, code in codes.items():
        others = [other for other in codes if other != name]
        base, source = _pairs(code, [codes[other] for other in others], score, pairs, draw)
        if len(base) < 20:
            raise SAEError(f"pairs={pairs}: {len(base)} pairs of rows that differ in every attribute; 20 are needed")
        latents = _telling(z[fit], code[fit])[:k]
        random = alive[torch.randperm(len(alive), generator=draw)[:k]]
        accuracy = float((probes[name](x[score]) == code[score]).double().mean())
        for baseline, ids in (("none", latents), ("random", random), ("activation", None)):
            moved = x[source] if ids is None else x[base] + s.shift(z[source][:, ids] - z[base][:, ids], x[base], ids)
            cause = (probes[name](moved) == code[source]).double()
            kept = torch.stack([probes[other](moved) == codes[other][base] for other in others]).all(0).double()
            for metric, values in (("cause", cause), ("isolation", kept), ("score", (cause + kept) / 2)):
                drawn = values[torch.randint(len(values), (resamples, len(values)), generator=draw)].mean(1)
                low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
                lines.append({
                    "attribute": name, "metric": metric, "baseline": baseline, "value": float(values.mean()),
                    "low": low, "high": high, "latents": [] if ids is None else ids.tolist(), "probe": accuracy,
                })  # fmt: skip
    table = pd.DataFrame(lines)
    table.attrs.update({"sites": list(s.sites), "k": k, "pairs": pairs, "seed": seed})
    return table


def _codes(values: Sequence[Any]) -> Tensor:
    """Values as numbers from 0 [row]."""
    known = {value: i for i, value in enumerate(dict.fromkeys(values))}
    if len(known) < 2:
        raise SAEError(f"attributes: all values are {values[0]!r}; an attribute that does not vary cannot be exchanged")
    return torch.tensor([known[value] for value in values])


def _telling(z: Tensor, code: Tensor) -> Tensor:
    """Latents by how much their class means differ, in units of their spread, largest first."""
    means = torch.stack([z[code == c].mean(0) for c in code.unique()])
    return (means.var(0) / z.var(0).clamp_min(1e-12)).argsort(descending=True)


def _pairs(code: Tensor, others: list[Tensor], rows: Tensor, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to n (base, source) among `rows` that differ in this attribute and in all others [pair]."""
    a, b = (rows[torch.randint(len(rows), (20 * n,), generator=draw)] for _ in range(2))
    differ = torch.stack([values[a] != values[b] for values in (code, *others)]).all(0)
    return a[differ][:n], b[differ][:n]


class _Probe:
    """A multinomial logistic regression on standardised activations."""

    def __init__(self, x: Tensor, code: Tensor) -> None:
        from sklearn.linear_model import LogisticRegression

        self.mean, self.spread = x.mean(0), x.std(0).clamp_min(1e-9)
        self.model = LogisticRegression(max_iter=2000).fit(self._seen(x), code.numpy())

    def _seen(self, x: Tensor) -> Any:
        return ((x - self.mean) / self.spread).double().numpy()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.model.predict(self._seen(x)))
