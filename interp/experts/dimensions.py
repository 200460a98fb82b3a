"""Which hidden dimensions all tokens use, and which only some: the analysis behind Mixture of Hidden-Dimensions.

MoHD (arXiv 2412.05644) finds that some dimensions are active over stretches of consecutive tokens and others for single
tokens, and routes the latter. Here a dimension is *active* at a token where its absolute value exceeds `threshold`
times the token's root mean square, and then

    shared     once active it stays: active on at least `stay` of the tokens that follow a token on which it was, and on
               at least `often` of all tokens
    specific   active on some tokens, but not shared
    silent     active on none

The three shares of a layer add up to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.units import ExpertError

if TYPE_CHECKING:
    import pandas as pd


@recorded
@torch.no_grad()
def dimensions(
    model: Any,
    texts: Labelled | Corpus,
    *,
    site: str = "resid_post",
    threshold: float = 1.0,
    stay: float = 0.8,
    often: float = 0.5,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
) -> pd.DataFrame:
    """Every dimension of a site in every layer, and what it is.

    Args:
        model: the model.
        texts: label -> documents; all labels are pooled.
        site: a site with one vector per token: resid_post, resid_mid, mlp_hidden, mlp_out, ...
        threshold: in root mean squares of the token's vector.
        stay: share of next tokens on which a shared dimension stays active, 0..1.
        often: share of all tokens on which it is active, 0..1.
        max_tokens: per label.
        batch_tokens: tokens run at once.

    Returns columns layer, dimension, rate (share of tokens), stays (share of next tokens, NaN if never active), role.
    `shares` sums it up.
    """
    import pandas as pd

    layers = model.anatomy.having(site)
    if not layers:
        raise ExpertError(f"site={site!r}: no layer of {model.name} has it; m.map() says why")
    data = corpus(model, texts, max_tokens)
    sums: dict[int, Tensor] = {}
    tokens = 0
    for batch in data.batches(model, batch_tokens):
        acts = model.capture(batch.tokens, [f"{site}[{layer}]" for layer in layers], check=False)
        mask = batch.tokens.mask
        tokens += int(mask.sum())
        pairs = mask[:, 1:] & mask[:, :-1]
        for layer in layers:
            on = active(acts[f"{site}[{layer}]"], threshold) & mask[..., None]
            first, both = on[:, :-1] & pairs[..., None], on[:, :-1] & on[:, 1:] & pairs[..., None]
            counts = torch.stack([x.sum((0, 1)) for x in (on, first, both)]).double().cpu()
            sums[layer] = sums[layer] + counts if layer in sums else counts
    parts = []
    for layer, (on, first, both) in sums.items():
        rate, stays = on / tokens, both / first  # 0 / 0 is NaN: it never had a chance
        role = [
            "silent" if r == 0 else "shared" if s >= stay and r >= often else "specific"
            for r, s in zip(rate.tolist(), stays.tolist(), strict=True)
        ]
        columns = {"dimension": range(len(rate)), "rate": rate.numpy(), "stays": stays.numpy(), "role": role}
        parts.append(pd.DataFrame({"layer": layer, **columns}))
    frame = pd.concat(parts, ignore_index=True)
    settings = {"site": site, "threshold": threshold, "stay": stay, "often": often}
    frame.attrs.update({"model": model.name, "tokens": tokens, **settings})
    return frame


def active(h: Tensor, threshold: float) -> Tensor:
    """True where a dimension exceeds `threshold` root mean squares of its token's vector [..., dimension]."""
    size = h.float().square().mean(-1, keepdim=True).sqrt()
    return h.float().abs() > threshold * size


@recorded
def shares(table: pd.DataFrame) -> pd.DataFrame:
    """Share of each role per layer: columns shared, specific, silent, one line per layer, adding up to 1."""
    counts = table.groupby("layer")["role"].value_counts(normalize=True).unstack(fill_value=0)
    return counts.reindex(columns=["shared", "specific", "silent"], fill_value=0.0)
