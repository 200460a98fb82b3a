"""Steering a behaviour with a latent, and what it costs: the gain is never shown without the damage.

    latent = choose(m, s, flagged_train, harmless_train)[0]
    table = steer(m, s, [latent], [2, 4, 8], flagged=..., harmless=..., neutral=..., measure=refuses)

O'Brien et al. 2024 (arXiv:2411.11296) raise refusal of harmful prompts by amplifying one latent, and find that the
model then also refuses harmless ones and loses accuracy elsewhere. So the Table has three groups at every strength:
``flagged`` (the behaviour where it is wanted), ``harmless`` (the same behaviour where it is not), and ``neutral_loss``
(nats per token of ordinary text), for the chosen latents and for random ones of the same strength.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.sae.autoencoder import SAE
from interp.sae.latents import _batches, _nats

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

#: What is measured of a model at some prompts: (model, prompts) -> a number per prompt [prompt].
Measure = Callable[[Any, Sequence[Any]], Tensor]


@torch.no_grad()
def choose(
    m: Model, s: SAE, wanted: Sequence[Any], other: Sequence[Any], *, top: int = 1, context: int = 128, run: int = 8
) -> list[int]:
    """The latents whose mean over a prompt differs most between two kinds of prompts, in pooled standard errors.

    Choose on prompts that `steer` is not scored on.
    """
    pooled = []
    for texts in (wanted, other):
        means = []
        for _, tokens, support, values in _batches(m, s, texts, context, run):
            owner = tokens.mask.nonzero(as_tuple=True)[0]
            total = torch.zeros(len(tokens), s.d_sae)
            total.index_put_((owner[support.rows], support.ids), values, accumulate=True)
            means.append(total / tokens.mask.sum(1, keepdim=True))
        pooled.append(torch.cat(means))
    a, b = pooled
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    score = (a.mean(0) - b.mean(0)) / (error + 0.1 * error.max().clamp_min(1e-9))
    return [int(i) for i in score.topk(top).indices]


@recorded
def steer(
    m: Model,
    s: SAE,
    latents: Sequence[int],
    amounts: Sequence[float],
    *,
    flagged: Sequence[Any],
    harmless: Sequence[Any],
    neutral: Sequence[Any],
    measure: Measure,
    controls: int = 3,
    scope: Any = "all",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The Table: latent, baseline (none | random), multiplier, metric, value, low, high, change.

    Args:
        m: the model.
        s: its SAE.
        latents: what to steer by, one at a time.
        amounts: in units of the decoder rows' mean norm, so that random latents are steered as strongly; 0 is added.
        flagged: held-out prompts where the behaviour is wanted.
        harmless: prompts where it is not: what rises here is over-refusal.
        neutral: ordinary text for the loss.
        measure: the behaviour, per prompt.
        controls: random latents beside.
        scope: which tokens are steered.
        resamples: of the bootstrap over prompts.
        seed: of controls and bootstrap.

    Raises:
        SAEError: without prompts to see the damage on. A gain alone is no result.
    """
    import pandas as pd

    for name, texts in (("flagged", flagged), ("harmless", harmless), ("neutral", neutral)):
        if not len(texts):
            raise SAEError(f"{name} is empty: without it the table would show a gain and hide what it costs")
    others = [i for i in range(s.d_sae) if i not in set(latents)]
    mixed = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:controls].tolist()
    unit = float(s.decoder.norm(dim=1).mean())
    rows = []
    before = _scores(m, flagged, harmless, neutral, measure)
    for baseline, group in (("none", list(latents)), ("random", [others[i] for i in mixed])):
        for latent in group:
            size = float(s.decoder[latent].norm()) or 1.0
            for amount in sorted({0.0, *map(float, amounts)}):
                edit = s.steer(latent, amount * unit / size, scope=scope)
                with m.intervene(edit) if amount else nullcontext():
                    after = before if not amount else _scores(m, flagged, harmless, neutral, measure)
                for metric, found in after.items():
                    value, low, high = _interval(found, resamples, seed)
                    rows.append({"latent": latent, "node": s.latent(latent), "baseline": baseline, "multiplier": amount,
                                 "metric": metric, "value": value, "low": low, "high": high,
                                 "change": value - _interval(before[metric], 0, seed)[0]})  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs.update({"model": m.name, "sites": list(s.sites), "unit": unit, "scope": str(scope)})
    return frame


def _scores(m: Model, flagged: Sequence[Any], harmless: Sequence[Any], neutral: Sequence[Any],
            measure: Measure) -> dict[str, Tensor]:  # fmt: skip
    """metric -> (sum, count) per prompt or text [prompt, 2]."""
    out = {}
    for name, prompts in (("flagged", flagged), ("harmless", harmless)):
        found = measure(m, prompts).double().reshape(-1)
        if len(found) != len(prompts):
            raise SAEError(f"measure: expected a number per prompt, got {len(found)} for {len(prompts)} prompts")
        out[name] = torch.stack([found, torch.ones_like(found)], 1)
    out["neutral_loss"] = _nats(m, neutral, 128, 8)
    return out


def _interval(sums: Tensor, resamples: int, seed: int) -> tuple[float, float, float]:
    value, n = float(sums[:, 0].sum() / sums[:, 1].sum()), len(sums)
    if not resamples or n < 2:
        return value, float("nan"), float("nan")
    drawn = sums[torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))].sum(1)
    low, high = (drawn[:, 0] / drawn[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high
