"""Massive activations: a few values, at a few tokens, thousands of times larger than the rest.

    found = massive(m, texts)                     which layer, token, dimension, how large beside the median
    massive_effect(m, texts, found)               the loss without them, and with them held at their mean
    massive_attention(m, texts, found)            how much attention goes to the tokens they sit on

They hardly depend on the input, work as biases, and draw attention to their tokens. Whoever trains an SAE, a probe or a
steering vector there should know: they swamp every mean and every norm. A value counts as massive if it is above 100 in
size and above 1,000 times the median size of its layer. Source: Sun et al. 2024 (arXiv:2402.17762), sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from interp import metrics
from interp.calls import recorded
from interp.edits import Edit, Where
from probes.errors import ProbeError

if TYPE_CHECKING:
    import pandas as pd


@recorded
def massive(m: Any, texts: Sequence[str] | Any, site: str = "resid_post[*]", *, floor: float = 100.0,
            factor: float = 1000.0) -> pd.DataFrame:  # fmt: skip
    """Every massive value in some texts.

    Args:
        m: the model.
        texts: texts or Tokens.
        site: where to look; the residual stream is where they live.
        floor: least size, in the activation's units.
        factor: least size as a multiple of the layer's median size.

    Returns:
        Table: node, layer, row, position, token (id), dimension, value, median, ratio; largest first. Empty if there is
            none.
    """
    import pandas as pd

    tokens = m.tokens(texts)
    rows = []
    acts = m.capture(tokens, site, check=False)
    position = tokens.position
    for place in m.resolve(site):
        h = acts[str(place)].float()
        size = h.abs()
        median = float(size[tokens.mask].median())
        large = (size > max(floor, factor * median)) & tokens.mask[..., None]
        for batch, column, dimension in large.nonzero().tolist():
            value = float(h[batch, column, dimension])
            rows.append({"node": str(place), "layer": place.layer, "row": batch,
                         "position": int(position[batch, column]),
                         "token": int(tokens.ids[batch, column]), "dimension": dimension, "value": value,
                         "median": median, "ratio": abs(value) / max(median, 1e-30)})  # fmt: skip
    columns = ["node", "layer", "row", "position", "token", "dimension", "value", "median", "ratio"]
    table = pd.DataFrame(rows, columns=columns).sort_values("ratio", ascending=False, ignore_index=True)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint, "site": site, "floor": floor, "factor": factor}
    return table


@dataclass(frozen=True, eq=False)
class Put:
    """``h -> h`` with `values` [n] at (row, position, dimension) `where` [n, 3]."""

    at: Tensor
    values: Tensor

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        out = h.clone()
        for (row, position, dimension), value in zip(self.at.tolist(), self.values.tolist(), strict=True):
            column = (where.position[row] == position) & where.mask[row]
            out[row, column, dimension] = value
        return out


@recorded
def massive_effect(m: Any, texts: Sequence[str] | Any, found: pd.DataFrame) -> pd.DataFrame:
    """The loss (nats per token) as it is, with the massive values at zero, and with each at its mean over the texts.

    Only the first layer where a (row, position, dimension) is massive is edited; the residual stream carries it on. If
    they are biases, holding them at their mean changes little and zeroing them a lot (Sun et al. 2024, table 3).

    Raises ProbeError for an empty table.
    """
    import pandas as pd

    tokens = m.tokens(texts)
    first = _first(found)
    rows = []
    for name in ("none", "zero", "mean"):
        with m.intervene(_puts(first, name)):
            value = metrics.loss(tokens).fn(m(tokens), tokens)
        rows.append({"baseline": name, "metric": "loss", "value": float(value.mean())})
    table = pd.DataFrame(rows)
    table.attrs = dict(found.attrs)
    return table


def _first(found: pd.DataFrame) -> pd.DataFrame:
    if not len(found):
        raise ProbeError("found: the table is empty; there is no massive activation to edit")
    return found.sort_values("layer").drop_duplicates(["row", "position", "dimension"])


def _puts(first: pd.DataFrame, how: Literal["none", "zero", "mean"] | str) -> list[Edit]:
    if how == "none":
        return []
    edits = []
    means = first.groupby(["node", "position", "dimension"])["value"].transform("mean")
    for node, group in first.groupby("node"):
        at = torch.tensor(group[["row", "position", "dimension"]].to_numpy())
        values = torch.zeros(len(group)) if how == "zero" else torch.tensor(means[group.index].to_numpy()).float()
        edits.append(Edit(str(node), Put(at, values), name=f"massive to {how}"))
    return edits


@recorded
def massive_attention(m: Any, texts: Sequence[str] | Any, found: pd.DataFrame) -> pd.DataFrame:
    """Share of each layer's attention that goes to tokens with massive values, beside their share of what is visible.

    Returns:
        Table: layer, metric "attention", value (mean over queries behind the token, and heads), baseline "uniform"
            value
        in column `uniform`: the share if attention were spread evenly.
    """
    import pandas as pd

    tokens = m.tokens(texts)
    first = _first(found)
    marked = torch.zeros_like(tokens.mask)
    for row, position in first[["row", "position"]].to_numpy().tolist():
        marked[row] |= (tokens.position[row] == position) & tokens.mask[row]
    marked = marked.cpu()
    acts = m.capture(tokens, "pattern[*]", check=False)
    n = tokens.ids.shape[1]
    causal = torch.ones(n, n).tril() * tokens.mask.cpu()[:, None, :].float()
    # Queries strictly behind the first marked token of their row: before it nothing can be drawn.
    behind = (marked.float().cumsum(1) - marked.float() > 0) & tokens.mask.cpu()
    uniform = (causal / causal.sum(-1, keepdim=True).clamp(min=1) * marked[:, None, :].float()).sum(-1)[behind].mean()
    rows = []
    for place in m.resolve("pattern[*]"):
        pattern = acts[str(place)].float().cpu()  # [batch, head, query, key]
        share = (pattern * marked[:, None, None, :].float()).sum(-1).mean(1)
        rows.append({"layer": place.layer, "node": str(place), "metric": "attention",
                     "value": float(share[behind].mean()),
                     "uniform": float(uniform)})  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs = dict(found.attrs)
    return table
