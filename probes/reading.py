"""From texts to features: what a model holds at its sites, one row per text, all sites in one pass over the data.

    f = features(m, texts, ["resid_post[*]", "z[*, head=*]", "routing[*]"], at="last")
    f["resid_post[5]"]          [text, d_model]
    f["routing[3]"]             [text, expert]: how the router spreads each text over the experts

`at` says which tokens: "last", "mean" (of all but a leading special token), "max", or "all" (a row for every token, and
`f.text` says which text it is of). Heads and neurons are features of their layer, so ``z[5]`` is [text, head * d_head].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.errors import ProbeError

AT = ("last", "mean", "max", "all")


@dataclass(frozen=True, eq=False)
class Features:
    """Activations as features.

    Attributes:
        values: site -> [row, feature], float32.
        text: which text each row comes from [row].
        position: token position of each row, -1 where tokens were pooled [row].
        at: how tokens were taken.
        model, fingerprint: of what.
    """

    values: dict[str, np.ndarray]
    text: np.ndarray
    position: np.ndarray
    at: str
    model: str
    fingerprint: str

    def __getitem__(self, site: str) -> np.ndarray:
        if site not in self.values:
            raise ProbeError(f"{site}: not among the features; there are {', '.join(self.values)}")
        return self.values[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.text)

    def __repr__(self) -> str:
        widths = sorted({v.shape[1] for v in self.values.values()})
        return f"Features({len(self)} rows at={self.at!r}, {len(self.values)} sites of {self.model}, widths {widths})"


def features(
    m: Any, texts: Sequence[str] | Any, sites: str | Iterable[str], *, at: str = "last", batch_size: int = 16,
    max_length: int | None = None, skip_first: bool = True,
) -> Features:  # fmt: skip
    """Reads every site in one pass.

    Args:
        m: the model.
        texts: texts, or Tokens.
        sites: site patterns; also ``routing[l]`` (expert weights as [row, expert], of any MoE; for Monet its two
            factors [row, 2 * key], summed over heads).
        at: "last", "mean", "max" or "all".
        batch_size: texts per forward pass.
        max_length: longer texts are cut.
        skip_first: with "mean" and "max", leave out the first token, whose massive activations drown the rest.

    Raises ProbeError for an unknown `at` or a text without tokens; SiteError for what the model does not have.
    """
    if at not in AT:
        raise ProbeError(f"at={at!r}: expected one of {', '.join(AT)}")
    wanted = [sites] if isinstance(sites, str) else list(sites)
    plain = [s for s in wanted if not s.startswith("routing[")]
    routed = [s for s in wanted if s.startswith("routing[")]
    layers = {str(s): s.layer for s in m.resolve(plain)} if plain else {}
    routing = _routing_sites(m, routed)
    read = [*layers, *(site for needed in routing.values() for site in needed)]
    collected: dict[str, list[Tensor]] = {s: [] for s in [*layers, *routing]}
    owner: list[np.ndarray] = []
    position: list[np.ndarray] = []
    for start, tokens in _batches(m, texts, batch_size, max_length):
        acts = m.capture(tokens, read, check=False)
        mask = tokens.mask.cpu()
        for site in layers:
            collected[site].append(_take(_flat(acts[site]).float().cpu(), mask, at, skip_first))
        for site, needed in routing.items():
            collected[site].append(_take(_dispersal(m, acts, needed, mask), mask, at, skip_first))
        if at == "all":
            row, _ = mask.nonzero(as_tuple=True)
            owner.append(row.numpy() + start)
            position.append(tokens.position.cpu()[mask].numpy())
        else:
            owner.append(np.arange(len(mask)) + start)
            position.append(np.full(len(mask), -1))
    values = {site: torch.cat(parts).numpy() for site, parts in collected.items()}
    for site, value in values.items():
        if not np.isfinite(value).all():
            raise ProbeError(
                f"{site}: {int((~np.isfinite(value)).any(1).sum())} rows are not finite; a probe cannot use them"
            )
    return Features(values, np.concatenate(owner), np.concatenate(position), at, m.name, m.fingerprint)


def _batches(m: Any, texts: Any, size: int, max_length: int | None) -> Iterator[tuple[int, Any]]:
    if isinstance(texts, str):
        texts = [texts]
    if hasattr(texts, "mask"):
        for start in range(0, len(texts.ids), size):
            yield start, type(texts)(texts.ids[start : start + size], texts.mask[start : start + size])
        return
    if not len(texts):
        raise ProbeError("texts: empty; give at least one")
    for start in range(0, len(texts), size):
        yield start, m.tokens(list(texts[start : start + size]), max_length=max_length, truncate=max_length is not None)


def _flat(value: Tensor) -> Tensor:
    """[batch, pos, ...] -> [batch, pos, feature]."""
    return value.reshape(*value.shape[:2], -1)


def _take(value: Tensor, mask: Tensor, at: str, skip_first: bool) -> Tensor:
    """[batch, pos, feature] -> [row, feature]."""
    if at == "all":
        return value[mask]
    index = torch.arange(mask.shape[1]).expand_as(mask)
    if at == "last":
        last = index.masked_fill(~mask, -1).max(1).values
        return value[torch.arange(len(value)), last]
    use = mask.clone()
    if skip_first:
        first = index.masked_fill(~mask, mask.shape[1]).min(1).values
        use[torch.arange(len(use)), first] &= mask.sum(1) == 1  # a lone token is all there is
    if at == "max":
        return value.masked_fill(~use[..., None], -torch.inf).max(1).values
    weight = use.to(value)
    return (value.masked_fill(~use[..., None], 0)).sum(1) / weight.sum(1, keepdim=True)


def _routing_sites(m: Any, patterns: list[str]) -> dict[str, list[str]]:
    """routing[l] -> the sites that it is made of."""
    if not patterns:
        return {}
    names = ("g1", "g2") if m.anatomy.having("g1") else ("expert_weight",)
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        index = pattern.removeprefix("routing")
        sites = [m.resolve(name + index) for name in names]
        for group in zip(*sites, strict=True):
            found[f"routing[{group[0].layer}]"] = [str(s) for s in group]
    return found


def _dispersal(m: Any, acts: Any, needed: list[str], mask: Tensor) -> Tensor:
    """[batch, pos, expert] of a routed layer, or [batch, pos, 2 * key] of a Monet layer, summed over heads."""
    if len(needed) == 2:
        return torch.cat([acts[s].float().sum(2) for s in needed], -1).cpu()
    layer = int(needed[0].partition("[")[2].rstrip("]"))
    chosen = acts.experts(layer)
    out = torch.zeros(*mask.shape, m.n_experts)
    return out.scatter_add_(-1, chosen.ids.cpu().long(), chosen.weights.float().cpu())
