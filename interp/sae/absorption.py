"""Absorption: a general latent that is silent where a special one speaks for it.

    x, letters = first_letters(m, s)          activations at words, and which letter each word begins with
    table = absorption(s, x, letters)

A latent for "begins with S" may not fire on *short*, because the latent for *short* carries the S too: sparsity pays
for that, and whoever trusts the S latent is misled (Chanin et al. 2024, arXiv:2409.14507). With p the direction of a
linear probe for the label, and z_i d_i what latent i adds to an activation:

* the **main** latents are those by which a sparse probe gets better: the first, and each next one as long as F1 rises
  by `JUMP`;
* a token of the label that the probe recognises is **absorbed** where no main latent fires, and one other latent, with
  a cosine to p of at least `ALIGNED`, carries at least `SHARE` of the activation's projection on p;
* the **fraction** counts what the `MOST` strongest others (cosine at least .1) carry, of what they and the main ones
  carry together: it also sees absorption that is partial.

Probe and main latents are found on one half of the words, absorption is counted on the other. Beside it stands the same
with the decoder rows of all other latents exchanged at random: what unrelated latents carry by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.progress import bar
from interp.sae.autoencoder import SAE
from interp.sae.dark import halves

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

JUMP = 0.03  # of F1
ALIGNED, SHARE = 0.025, 0.4
MOST, LEAST_COSINE = 3, 0.1
_AT_MOST = 10  # main latents


def first_letters(
    m: Model, s: SAE, *, words: int = 4000, seed: int = 0, run: int = 64
) -> tuple[Tensor, dict[str, Tensor]]:
    """Activations [word, d_in] at words of one token, and per letter which words begin with it [word].

    The words are tokens of the vocabulary that are a space and letters; each stands alone, behind "The word".
    """
    if m.tokenizer is None:
        raise SAEError("first_letters: this model has no tokenizer, so its words are unknown")
    texts = ((i, m.tokenizer.decode([i])) for i in range(m.d_vocab))
    found = [(i, t[1].lower()) for i, t in texts if len(t) > 3 and t[0] == " " and t[1:].isascii() and t[1:].isalpha()]
    if len(found) < 100:
        raise SAEError(f"first_letters: {m.name}'s vocabulary has {len(found)} words of one token; 100 are needed")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:words].tolist()
    ids = torch.tensor([found[i][0] for i in order])
    before = m.tokens("The word").ids[0].cpu()
    rows = []
    for part in ids.split(run):
        batch = torch.cat([before.expand(len(part), -1), part[:, None]], 1)
        rows.append(s._flat(s.read(m.capture(batch, list(s.sites))).float()[:, -1]))
    letters = [found[i][1] for i in order]
    return torch.cat(rows), {a: torch.tensor([b == a for b in letters]) for a in sorted(set(letters))}


@recorded
@torch.no_grad()
def absorption(
    s: SAE, x: Tensor, labels: Mapping[str, Tensor], *, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How often, and how much, other latents carry a label in the place of its main latents.

    Args:
        s: an autoencoder.
        x: activations [row, d_in].
        labels: label -> True at its rows [row]; one with fewer than 20 rows is left out.
        resamples: bootstraps over the scored rows.
        seed: of the halves, the bootstrap and the exchange.

    Returns columns label, metric (absorbed | fraction), baseline (none | exchanged), value, low, high, rows (scored),
    main (the latents), f1 (of the sparse probe with them), probe_f1. A label that the probe itself does not recognise
    (probe_f1) says nothing about the SAE.
    """
    import pandas as pd

    if s.shape != "autoencoder":
        raise SAEError(f"absorption: it is defined for an autoencoder, not for a {s.shape}")
    fit, score = halves(len(x), seed)
    z, draw = s.encode(x), torch.Generator().manual_seed(seed)
    lines: list[dict[str, Any]] = []
    with bar("looking for absorption", total=len(labels)) as advance:
        for label, truth in labels.items():
            if len(truth) != len(x):
                raise SAEError(f"labels[{label!r}] has {len(truth)} rows, and there are {len(x)} activations")
            if int(truth[fit].sum()) >= 10 and int(truth[score].sum()) >= 10:
                lines += [{"label": label, **line} for line in _label(s, x, z, truth, fit, score, resamples, draw)]
            advance(1)
    if not lines:
        raise SAEError("labels: none has 10 rows in each half that a linear probe recognises; give more rows")
    table = pd.DataFrame(lines)
    table.attrs.update({"sites": list(s.sites), "seed": seed, "share": SHARE, "jump": JUMP})
    return table


def _label(
    s: SAE, x: Tensor, z: Tensor, truth: Tensor, fit: Tensor, score: Tensor, resamples: int, draw: torch.Generator
) -> Iterator[dict[str, Any]]:
    """The lines of one label; none where the probe recognises none of its rows."""
    probe, slope = _regression(x, truth, fit)
    direction = slope / slope.norm()
    main, f1 = _main(z, truth, fit)
    rows = score[truth[score] & probe[score]]
    if not len(rows):
        return
    about = {"rows": len(rows), "main": main, "f1": f1, "probe_f1": _f1(probe[score], truth[score])}
    others = torch.ones(s.d_sae, dtype=torch.bool)
    others[main] = False
    mixed = s.decoder.clone()
    places = others.nonzero().squeeze(1)
    mixed[places] = s.decoder[places[torch.randperm(len(places), generator=draw)]]
    for baseline, decoder in (("none", s.decoder), ("exchanged", mixed)):
        for metric, values in _counted(s, decoder, x[rows], z[rows], main, others, direction).items():
            drawn = values[torch.randint(len(values), (resamples, len(values)), generator=draw)].mean(1)
            low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
            yield {**about, "metric": metric, "baseline": baseline, "value": float(values.mean()), "low": low,
                   "high": high}  # fmt: skip


def _counted(
    s: SAE, decoder: Tensor, x: Tensor, z: Tensor, main: list[int], others: Tensor, direction: Tensor
) -> dict[str, Tensor]:
    """Per row: whether it is absorbed, and the fraction that others carry [row], float64."""
    along = decoder @ direction
    cosine = along / decoder.norm(dim=1).clamp_min(1e-12)
    carried = z * along  # [row, latent]
    silent = ~(z[:, main] > 0).any(1)
    best = carried.masked_fill(~(others & (cosine >= ALIGNED)), -torch.inf).amax(1)
    whole = (x - s.b_dec) @ direction
    absorbed = silent & (whole > 0) & (best >= SHARE * whole)
    helpers = carried.masked_fill(~(others & (cosine >= LEAST_COSINE)), 0.0).clamp_min(0)
    theirs = helpers.topk(min(MOST, helpers.shape[1]), 1).values.sum(1)
    own = carried[:, main].sum(1).clamp_min(0)
    return {"absorbed": absorbed.double(), "fraction": (theirs / (theirs + own).clamp_min(1e-12)).double()}


def _main(z: Tensor, truth: Tensor, fit: Tensor) -> tuple[list[int], float]:
    """The main latents, and the F1 of a sparse probe on them, both on the rows to fit on."""
    gap = z[fit][truth[fit]].mean(0) - z[fit][~truth[fit]].mean(0)
    order = gap.argsort(descending=True)[:_AT_MOST].tolist()
    f1 = _f1(_regression(z[:, order[:1]], truth, fit)[0][fit], truth[fit])
    for k in range(2, len(order) + 1):
        next_f1 = _f1(_regression(z[:, order[:k]], truth, fit)[0][fit], truth[fit])
        if next_f1 < f1 + JUMP:
            return order[: k - 1], f1
        f1 = next_f1
    return order, f1


def _regression(x: Tensor, truth: Tensor, fit: Tensor) -> tuple[Tensor, Tensor]:
    """A logistic regression fitted on some rows: what it says of every row [row], and its slope in x [d]."""
    from sklearn.linear_model import LogisticRegression

    spread = x[fit].std(0).clamp_min(1e-9)
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    model.fit((x[fit] / spread).double().numpy(), truth[fit].numpy())
    said = torch.from_numpy(model.predict((x / spread).double().numpy()))
    return said, torch.from_numpy(model.coef_[0]).to(x) / spread


def _f1(said: Tensor, truth: Tensor) -> float:
    hits = float((said & truth).sum())
    return 2 * hits / max(1.0, float(said.sum() + truth.sum()))
