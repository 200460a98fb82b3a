"""Understanding a latent: where it fires, what it writes, how often, with whom, and what the model loses without it.

    table = latents.contexts(m, s, texts, [3, 17])       the tokens at which each fires most, with their surroundings
    table = latents.logit_effects(m, s, [3, 17])         the tokens that its direction makes more and less likely
    table = latents.statistics(m, s, texts)              density, mean, and the latents that fire together with it
    table = latents.ablation_effects(m, s, texts, [3])   change of the loss with it off, beside random latents

Each is a Table; `interp.sae.page` puts them on one page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.sae.autoencoder import SAE
from interp.sae.kernels import Support

if TYPE_CHECKING:
    import pandas as pd

    from interp.activations import Tokens
    from interp.model import Model


def _batches(
    m: Model, s: SAE, texts: Sequence[Any], context: int, run: int
) -> Iterator[tuple[int, Tokens, Support, Tensor]]:
    """(number of the first text, tokens, codes of the real tokens as entries, their amounts), batch by batch."""
    for first in range(0, len(texts), run):
        tokens = m.tokens(list(texts[first : first + run]), max_length=context, truncate=True)
        acts = m.capture(tokens, list(s.sites))
        support, values = s.codes(s.read(acts)[tokens.mask].float())
        yield first, tokens, support, values


def _checked(s: SAE, chosen: Sequence[int] | None) -> Tensor:
    ids = torch.arange(s.d_sae) if chosen is None else torch.tensor(list(chosen), dtype=torch.long)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= s.d_sae:
        raise SAEError(f"latents: expected numbers in 0..{s.d_sae - 1}, at least one")
    return ids


def _pieces(m: Model, ids: Tensor) -> list[str]:
    """Each token as text; its id where there is no tokenizer."""
    if m.tokenizer is None:
        return [f"<{i}>" for i in ids.tolist()]
    return [m.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids.tolist()]


@recorded
def contexts(
    m: Model, s: SAE, texts: Sequence[Any], latents: Sequence[int], *, top: int = 10, around: int = 8,
    context: int = 128, run: int = 8,
) -> pd.DataFrame:  # fmt: skip
    """The tokens at which each latent is largest: latent, rank, value, text, position, before, token, after.

    One token per text, the one with the largest value, so that one repetitive text does not fill the list. A latent
    that never fires has no lines.
    """
    import pandas as pd

    ids = _checked(s, latents)
    best: dict[int, list[tuple[float, int, int, Tensor]]] = {int(i): [] for i in ids}
    for first, tokens, support, values in _batches(m, s, texts, context, run):
        row, column = tokens.mask.nonzero(as_tuple=True)
        for latent, found in best.items():
            here = (support.ids == latent).nonzero().squeeze(1)
            per_text: dict[int, tuple[float, int, int, Tensor]] = {}
            for entry in here.tolist():
                token = int(support.rows[entry])
                r, value = int(row[token]), float(values[entry])
                if r not in per_text or value > per_text[r][0]:
                    at = int(column[token] - tokens.mask[r].long().argmax())
                    per_text[r] = (value, first + r, at, tokens.row(r))
            found += per_text.values()
            found.sort(key=lambda f: (-f[0], f[1]))
            del found[top:]
    rows = []
    for latent, found in best.items():
        for rank, (value, text, at, window) in enumerate(found):
            near = _pieces(m, window[max(0, at - around) : at + around + 1])
            middle = min(at, around)
            rows.append({
                "latent": latent, "rank": rank, "value": value, "text": text, "position": at,
                "before": "".join(near[:middle]), "token": near[middle], "after": "".join(near[middle + 1 :]),
            })  # fmt: skip
    columns = ["latent", "rank", "value", "text", "position", "before", "token", "after"]
    return pd.DataFrame(rows, columns=columns)


@recorded
def logit_effects(m: Model, s: SAE, latents: Sequence[int], *, top: int = 10) -> pd.DataFrame:
    """The tokens whose logits a latent's direction raises and lowers most: latent, rank, sign, token, value.

    The direction times the final norm's gain, read by the unembedding, less its mean over the vocabulary: the direct
    path alone, with the norm's divisor left out (it is one number per token of text). The site must be in the residual
    stream, as wide as the unembedding.
    """
    import pandas as pd

    unembed: Tensor = m.hf.get_output_embeddings().weight.detach().float()
    if s.d_out != unembed.shape[1]:
        raise SAEError(
            f"logit_effects: the decoder writes {s.d_out} dimensions, the unembedding reads {unembed.shape[1]}"
        )
    place = m.anatomy.places.get(("ln_final_scale", None))
    gain = getattr(place.module, "weight", None) if place is not None else None
    rows = []
    for latent in _checked(s, latents).tolist():
        direction = s.decoder[latent].to(unembed)
        if gain is not None:
            direction = direction * gain.detach().float()
        effect = unembed @ direction
        effect -= effect.mean()
        for sign, found in (("+", effect.topk(top)), ("-", (-effect).topk(top))):
            for rank, (value, token) in enumerate(zip(found.values, found.indices, strict=True)):
                text = _pieces(m, token[None])[0]
                amount = float(value) if sign == "+" else -float(value)
                rows.append({"latent": latent, "rank": rank, "sign": sign, "token": text, "value": amount})
    return pd.DataFrame(rows)


@recorded
def statistics(
    m: Model, s: SAE, texts: Sequence[Any], *, latents: Sequence[int] | None = None, partners: int = 3,
    context: int = 128, run: int = 8,
) -> pd.DataFrame:  # fmt: skip
    """How often and how strongly: latent, density, mean (where it fires), max, partners, jaccard.

    ``density`` is the share of tokens at which it fires. ``partners`` are the latents whose firing overlaps most with
    its own, ``jaccard`` by how much: tokens at which both fire over tokens at which either does.
    """
    import pandas as pd

    ids = _checked(s, latents)
    n, offset, rows, columns, amounts = 0, 0, [], [], []
    for _, _, support, values in _batches(m, s, texts, context, run):
        rows.append(support.rows + offset)
        columns.append(support.ids)
        amounts.append(values)
        offset += support.n_rows
        n = offset
    row, column, amount = torch.cat(rows), torch.cat(columns), torch.cat(amounts)
    fires = torch.bincount(column, minlength=s.d_sae)
    total = torch.zeros(s.d_sae).index_add_(0, column, amount)
    largest = torch.zeros(s.d_sae).scatter_reduce_(0, column, amount, "amax", include_self=True)
    order = row.argsort(stable=True)
    starts = torch.searchsorted(row[order], torch.arange(n + 1))
    table = []
    for latent in ids.tolist():
        tokens = row[column == latent]
        together = torch.zeros(s.d_sae, dtype=torch.long)
        for token in tokens.tolist():
            together[column[order[starts[token] : starts[token + 1]]]] += 1
        union = fires + fires[latent] - together
        jaccard = together / union.clamp_min(1)
        jaccard[latent] = -1
        near = jaccard.topk(min(partners, s.d_sae - 1))
        table.append({
            "latent": latent, "node": s.latent(latent), "density": float(fires[latent]) / max(1, n),
            "mean": float(total[latent] / fires[latent].clamp_min(1)), "max": float(largest[latent]),
            "partners": near.indices.tolist(), "jaccard": [round(v, 4) for v in near.values.tolist()],
        })  # fmt: skip
    frame = pd.DataFrame(table)
    frame.attrs.update({"tokens": n, "sites": list(s.sites)})
    return frame


@recorded
def ablation_effects(
    m: Model, s: SAE, texts: Sequence[Any], latents: Sequence[int], *, controls: int = 5, context: int = 128,
    run: int = 8, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Change of the loss (nats per predicted token) with each latent off: latent, value, low, high, baseline.

    With a latent off, the residual changes by its own part alone; the error stays. Random latents that fire on these
    texts stand beside them (``baseline="random"``). Intervals are 95 % bootstraps over texts.
    """
    import pandas as pd

    ids = _checked(s, latents).tolist()
    stats = statistics(m, s, texts, partners=1, context=context, run=run)
    alive = [i for i in stats.latent[stats.density > 0].tolist() if i not in ids]
    mixed = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:controls].tolist()
    clean = _nats(m, texts, context, run)
    rows = []
    for baseline, group in (("none", ids), ("random", [alive[i] for i in mixed])):
        for latent in group:
            with m.intervene(s.ablate(latent)):
                off = _nats(m, texts, context, run)
            value, low, high = _difference(clean, off, seed)
            rows.append({"latent": latent, "node": s.latent(latent), "metric": "ce", "value": value, "low": low,
                         "high": high, "baseline": baseline})  # fmt: skip
    return pd.DataFrame(rows)


def _nats(m: Model, texts: Sequence[Any], context: int, run: int) -> Tensor:
    """Per text (nats, predicted tokens) [text, 2]."""
    out = []
    for first in range(0, len(texts), run):
        tokens = m.tokens(list(texts[first : first + run]), max_length=context, truncate=True)
        log = m(tokens)[:, :-1].float().log_softmax(-1)
        real = tokens.mask[:, 1:]
        nats = -log.gather(-1, tokens.ids[:, 1:, None])[..., 0] * real
        out.append(torch.stack([nats.sum(1), real.sum(1).float()], 1).double().cpu())
    return torch.cat(out)


def _difference(clean: Tensor, off: Tensor, seed: int, resamples: int = 1000) -> tuple[float, float, float]:
    n = len(clean)
    value = float(off[:, 0].sum() / off[:, 1].sum() - clean[:, 0].sum() / clean[:, 1].sum())
    if n < 2:
        return value, float("nan"), float("nan")
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    spread = (off[draws, 0].sum(1) - clean[draws, 0].sum(1)) / clean[draws, 1].sum(1)
    low, high = spread.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high
