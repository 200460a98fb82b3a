"""From texts to features: what a model holds at its sites, one row per text, all sites in one pass over the data.

    f = features(m, texts, ["resid_post[*]", "z[*, head=*]", "routing[*]", "expert_out[3, expert=*]", s], at="last")
    f["resid_post[5]"]              [text, d_model]
    f["z[5, head=3]"]               [text, d_head]; ``z[5]`` has all heads side by side, ``mlp_hidden[5]`` all neurons
    f["routing[3]"]                 [text, expert]: how the router spreads each text over the experts
    f["expert_out[3, expert=17]"]   [text, d_model]: what expert 17 said, 0 where it was not chosen
    f["sae[resid_post[5]]"]         [text, latent]: the codes of the SAE `s`

`at` says which tokens: "last", "mean" (of all but a leading special token), "max", or "all" (a row for every token, and
`f.text` says which text it is of). Codes and routing are made per token and pooled afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.progress import bar
from interp.sites import Site
from probes.errors import ProbeError

Reader = Callable[[Any, Tensor], Tensor]  # activations and mask [batch, pos] -> [batch, pos, feature]

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
    m: Any, texts: Sequence[str] | Any, sites: Any, *, at: str = "last", batch_size: int = 16,
    max_length: int | None = None, skip_first: bool = True,
) -> Features:  # fmt: skip
    """Reads every site in one pass.

    Args:
        m: the model.
        texts: texts, or Tokens.
        sites: one or several of: site patterns; ``routing[l]`` (expert weights as [row, expert], of any MoE; for Monet
            its two factors [row, 2 * key], summed over heads); SAEs (`interp.sae`), for their codes.
        at: "last", "mean", "max" or "all".
        batch_size: texts per forward pass.
        max_length: longer texts are cut.
        skip_first: with "mean" and "max", leave out the first token, whose massive activations drown the rest.

    Raises ProbeError for an unknown `at`, a text without tokens, a site with a row per slot and no expert named;
    SiteError for what the model does not have.
    """
    if at not in AT:
        raise ProbeError(f"at={at!r}: expected one of {', '.join(AT)}")
    read, readers = _readers(m, [sites] if isinstance(sites, str) or hasattr(sites, "encode") else list(sites))
    collected: dict[str, list[Tensor]] = {name: [] for name in readers}
    owner: list[np.ndarray] = []
    position: list[np.ndarray] = []
    with bar("reading", 1 if isinstance(texts, str) else len(texts)) as advance:
        for start, tokens in _batches(m, texts, batch_size, max_length):
            acts = m.capture(tokens, read, check=False)
            mask = tokens.mask.cpu()
            for name, reader in readers.items():
                collected[name].append(_take(reader(acts, mask).float().cpu(), mask, at, skip_first))
            if at == "all":
                row, _ = mask.nonzero(as_tuple=True)
                owner.append(row.numpy() + start)
                position.append(tokens.position.cpu()[mask].numpy())
            else:
                owner.append(np.arange(len(mask)) + start)
                position.append(np.full(len(mask), -1))
            advance(len(mask))
    values = {site: torch.cat(parts).numpy() for site, parts in collected.items()}
    for site, value in values.items():
        if not np.isfinite(value).all():
            raise ProbeError(
                f"{site}: {int((~np.isfinite(value)).any(1).sum())} rows are not finite; a probe cannot use them"
            )
    return Features(values, np.concatenate(owner), np.concatenate(position), at, m.name, m.fingerprint)


def _readers(m: Any, wanted: list[Any]) -> tuple[list[str], dict[str, Reader]]:
    """What to capture, and for every feature how it is made of that. Indexed sites are cut from whole ones, read
    once."""
    read: dict[str, None] = {}
    readers: dict[str, Reader] = {}
    for one in wanted:
        if hasattr(one, "encode") and not isinstance(one, str):
            read |= dict.fromkeys(one.sites)
            readers[f"sae[{'+'.join(one.sites)}]"] = partial(_encoded, one)
        elif one.startswith("routing["):
            for name, needed in _routing_sites(m, one).items():
                read |= dict.fromkeys(needed)
                readers[name] = partial(_dispersal, m, needed)
        else:
            for site in m.resolve(one):
                read[str(site.base)] = None
                readers[str(site)] = partial(_at_site, site)
    return list(read), readers


def _encoded(s: Any, acts: Any, mask: Tensor) -> Tensor:
    codes: Tensor = s.encode(s.read(acts))
    return codes


def _at_site(site: Site, acts: Any, mask: Tensor) -> Tensor:
    """[batch, pos, feature] of any site; of a routed one its expert's rows, 0 at tokens that did not choose it."""
    if not site.kind.routed:
        value = acts[site]
        return value.reshape(*value.shape[:2], -1)
    index = dict(site.index)
    if "expert" not in index and "slot" not in index:
        raise ProbeError(
            f"{site}: it has a row per chosen expert. Probe one expert ({site.name}[{site.layer}, expert=*]), which "
            f"were chosen (routing[{site.layer}]), or their sum (mlp_out[{site.layer}])"
        )
    if "expert" not in index:
        value = acts[site]
        return value.reshape(*value.shape[:2], -1)
    whole = acts[Site(site.name, site.layer, tuple((k, v) for k, v in site.index if k != "expert"))]
    chosen = acts.experts(site.layer).ids == index["expert"]  # [batch, pos, slot], at most one True a token
    value = whole.reshape(*chosen.shape, -1)
    return (value * chosen[..., None]).sum(2)


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


def _routing_sites(m: Any, pattern: str) -> dict[str, list[str]]:
    """routing[l] -> the sites that it is made of."""
    names = ("g1", "g2") if m.anatomy.having("g1") else ("expert_weight",)
    index = pattern.removeprefix("routing")
    sites = [m.resolve(name + index) for name in names]
    return {f"routing[{group[0].layer}]": [str(s) for s in group] for group in zip(*sites, strict=True)}


def _dispersal(m: Any, needed: list[str], acts: Any, mask: Tensor) -> Tensor:
    """[batch, pos, expert] of a routed layer, or [batch, pos, 2 * key] of a Monet layer, summed over heads."""
    if len(needed) == 2:
        return torch.cat([acts[s].float().sum(2) for s in needed], -1).cpu()
    layer = int(needed[0].partition("[")[2].rstrip("]"))
    chosen = acts.experts(layer)
    out = torch.zeros(*mask.shape, m.n_experts)
    return out.scatter_add_(-1, chosen.ids.cpu().long(), chosen.weights.float().cpu())
