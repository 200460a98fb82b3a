"""Nodes: the units whose effect is measured.

A node is a concrete site and a token position: head 3 of layer 5 at token 12. Patterns of the site grammar are expanded
into nodes, one per layer, part and position::

    q[*]                        every layer, query head, position;  k and v: key-value heads, as they are under GQA
    resid_post[4:9], mlp_out[*] the whole vector, per layer and position
    mlp_hidden[5, neuron=*]     every neuron of layer 5
    expert_weight[3]            every expert: its weight in the layer's sum, 0 where it is not chosen
    expert_out[3, expert=17]    what expert 17 adds: weight x output, 0 where it is not chosen
    router_logits[3]            every expert's score, before anything is chosen by it
    z[5, head=3]@-1             at the last token only;  @all: at all positions together

Several sites may be patched together as one node (`window`: a run of layers). Such a node says so, ``mlp_out[3:8]``:
a joint effect is no sum or mean of single ones, and sliding windows are known to inflate peaks (Zhang & Nanda,
arXiv 2309.16042).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from interp.activations import Tokens
from interp.sites import Pattern, Site, SiteError

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

#: The index by which a site is split into nodes when its pattern names none.
PARTS = {
    **dict.fromkeys(("q", "k", "v", "z", "pattern"), "head"),
    **dict.fromkeys(("router_logits", "expert_weight", "expert_out"), "expert"),
}
_REFUSED = {
    "logits": "they are the output itself; give the metric instead",
    "expert_ids": "which experts are chosen is no quantity; patch expert_weight[l, expert=e] or router_logits[l]",
    "expert_hidden": "its rows belong to no fixed tokens; patch expert_out[l, expert=e] or expert_weight[l, expert=e]",
}


class Part(Protocol):
    """A part of an activation that no index names: a subspace, a latent of a sparse autoencoder.

    ``part(here, there)`` is `here` [..., d] with this part as it is in `there` [..., d]; ``str(part)`` names it.
    """

    def __call__(self, here: Tensor, there: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Node:
    """One unit of a patching experiment.

    Attributes:
        site: a concrete site of the model.
        position: token position, counted from 0 at the first real token; None for all positions together.
        others: further sites, at the same position, that are patched together with `site`.
        part: what of the activation is patched; None for all that the site names.
    """

    site: Site
    position: int | None = None
    others: tuple[Site, ...] = ()
    part: Part | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site, *self.others)

    @property
    def layer(self) -> int:
        """The first layer that it touches; 0 for the embedding."""
        return min(site.layer or 0 for site in self.sites)

    def __str__(self) -> str:
        text = _joined(self.sites) if self.others else str(self.site)
        return text if self.part is None else f"{self.part}[{text}]"

    def index(self, key: str) -> int | None:
        return dict(self.site.index).get(key)


def _joined(sites: tuple[Site, ...]) -> str:
    """``mlp_out[3:8]`` for a run of layers; else the sites joined by +."""
    first, layers = sites[0], [s.layer for s in sites if s.layer is not None]
    alike = all((s.name, s.index) == (first.name, first.index) for s in sites)
    if alike and len(layers) == len(sites) and layers == list(range(layers[0], layers[0] + len(layers))):
        inside = [f"{layers[0]}:{layers[-1] + 1}", *(f"{key}={value}" for key, value in first.index)]
        return f"{first.name}[{', '.join(inside)}]"
    return " + ".join(map(str, sites))


Nodes = str | Site | Node | Iterable[str | Site | Node]


def expand(m: Model, nodes: Nodes, tokens: Tokens, positions: str | int | Sequence[int] = "each") -> list[Node]:
    """The nodes that patterns mean on one model and one batch of tokens.

    Args:
        m: the model.
        nodes: site patterns, sites or nodes, or a list of them. A pattern may end in ``@position``, ``@each`` or
            ``@all``, which goes before `positions`.
        tokens: the clean or corrupt tokens [batch, pos], for the number of positions.
        positions: "each" (a node per position), "all" (all positions jointly), or the positions to take; negative ones
            count from the end.

    Raises SiteError for nodes that the family does not have, with the reason, and for positions outside the tokens.
    """
    given = [nodes] if isinstance(nodes, (str, Site, Node)) else list(nodes)
    if not given:
        raise SiteError("nodes: the list is empty; give site patterns such as 'z[*]' or 'resid_post[*]'")
    found: dict[Node, None] = {}
    for item in given:
        if isinstance(item, Node):
            _check(m, item.sites)
            for position in [None] if item.position is None else _positions([item.position], tokens, str(item)):
                found.setdefault(replace(item, position=position))
            continue
        text, _, where = str(item).partition("@")
        places = _positions(_read_positions(where, str(item)) if where else positions, tokens, str(item))
        for site in _sites(m, text):
            for position in places:
                found.setdefault(Node(site, position))
    return list(found)


def window(
    m: Model, pattern: str, tokens: Tokens, size: int, positions: str | int | Sequence[int] = "each"
) -> list[Node]:
    """Joint nodes over every run of `size` neighbouring layers: ``window(m, "mlp_out[*]", tokens, 5)``."""
    columns: dict[tuple[str, Any], list[Site]] = {}
    for site in _sites(m, pattern):
        columns.setdefault((site.name, site.index), []).append(site)
    made: list[Node] = []
    for sites in columns.values():
        if not 1 <= size <= len(sites):
            raise SiteError(f"window({pattern!r}): size={size}, expected 1..{len(sites)}, the layers that it names")
        for start in range(len(sites) - size + 1):
            run = sites[start : start + size]
            made += [Node(run[0], p, tuple(run[1:])) for p in _positions(positions, tokens, pattern)]
    return made


def _sites(m: Model, text: str) -> list[Site]:
    """The concrete sites of a pattern, split into heads or experts where it names none."""
    pattern = Pattern.parse(text.strip(), rotary=m.rotary)
    part = PARTS.get(pattern.name)
    if pattern.name in _REFUSED:
        raise SiteError(f"{text}: {pattern.name} is no node: {_REFUSED[pattern.name]}")
    if part and part not in dict(pattern.index):
        if "slot" in dict(pattern.index):
            raise SiteError(f"{text}: slots hold other experts in another run; name the expert, or leave the index out")
        pattern = replace(pattern, index=(*pattern.index, (part, "*")))
        text = f"{text.rstrip().removesuffix(']')}, {part}=*]"
    sites = m.resolve(text)
    _check(m, sites)
    return sites


def _check(m: Model, sites: Sequence[Site]) -> None:
    m.resolve([str(site) for site in sites])
    for site in sites:
        if site.name in _REFUSED:
            raise SiteError(f"{site}: {site.name} is no node: {_REFUSED[site.name]}")
        if site.kind.routed:
            if "expert" not in dict(site.index):
                raise SiteError(f"{site}: a node of a mixture of experts names its expert: {site.at(expert=0)}")
            if m.anatomy.places[site.name, site.layer].how != "experts":
                raise SiteError(
                    f"{site}: {m.name} computes its experts outside transformers' experts interface, so an expert that "
                    "was not chosen cannot be switched on; patch mlp_out or router_logits instead"
                )


def _read_positions(text: str, whole: str) -> str | int:
    text = text.strip()
    if text in ("each", "all"):
        return text
    try:
        return int(text)
    except ValueError:
        raise SiteError(f"{whole!r}: {text!r} is no position; write @each, @all or a number such as @-1") from None


def _positions(positions: str | int | Sequence[int], tokens: Tokens, what: str) -> list[int | None]:
    lengths = tokens.mask.sum(1)
    longest = int(lengths.max())
    if positions == "all":
        return [None]
    if positions == "each":
        return list(range(longest))
    if isinstance(positions, str):
        raise SiteError(f"positions={positions!r}: expected 'each', 'all', a number or a list of numbers")
    out: list[int | None] = []
    for p in [positions] if isinstance(positions, int) else positions:
        if not -longest <= p < longest:
            raise SiteError(f"{what}: position {p} is out of range; these tokens have positions 0..{longest - 1}")
        if p < 0 and int(lengths.min()) != longest:
            raise SiteError(
                f"{what}: position {p} counts from the end, and the pairs differ in length "
                f"({int(lengths.min())}..{longest} tokens); give pairs of one length, or positions from the front"
            )
        out.append(p % longest)
    return out


def frame(nodes: Sequence[Node]) -> pd.DataFrame:
    """One line per node: node (text), site, layer, head, neuron, expert, position, joint (sites patched together).

    ``position`` is missing (NA) where all positions are patched together.
    """
    import pandas as pd

    columns: dict[str, list[Any]] = {
        "node": [str(n) for n in nodes],
        "site": [n.site.name for n in nodes],
        "layer": [n.site.layer for n in nodes],
        **{key: [n.index(key) for n in nodes] for key in ("head", "neuron", "expert", "key", "dim")},
        "position": [n.position for n in nodes],
        "joint": [len(n.sites) for n in nodes],
    }
    optional = [key for key in ("key", "dim") if all(v is None for v in columns[key])]
    table = pd.DataFrame({k: v for k, v in columns.items() if k not in optional})
    whole = [c for c in table.columns if c not in ("node", "site")]
    return table.astype(dict.fromkeys(whole, "Int64"))


__all__ = ["Node", "Part", "expand", "frame", "window"]
