"""Activations: what a run left at the sites that were asked for.

Tensors keep the axes of their site (``acts.axes("z[5]")`` says which). Expert activations stay sparse: one row per
(token, slot), never tokens x experts x d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.factored import FactoredExperts
from interp.sites import Pattern, Site, SiteError, written

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of token ids.

    Attributes:
        ids: [batch, pos].
        mask: True at real tokens [batch, pos].
        texts: the texts they came from, if they came from texts.
        offsets: per row the character span (start, end) of each token in its text, without padding.
    """

    ids: Tensor
    mask: Tensor
    texts: list[str] | None = None
    offsets: list[list[tuple[int, int]]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def position(self) -> Tensor:
        """Place of each token among its row's real tokens [batch, pos]."""
        return (self.mask.long().cumsum(1) - 1).clamp_(min=0)

    @property
    def last(self) -> Tensor:
        """Column of each row's last real token [batch]."""
        width = self.mask.shape[1]
        return width - 1 - self.mask.long().flip(1).argmax(1)

    def padded(self, side: str) -> Tokens:
        """The same batch with its padding on the other side ('left' or 'right')."""
        order = self.mask.long().argsort(dim=1, descending=side == "right", stable=True)
        return Tokens(self.ids.gather(1, order), self.mask.gather(1, order), self.texts, self.offsets)

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device), self.texts, self.offsets)

    def row(self, i: int) -> Tensor:
        """Ids of row i without padding [pos]."""
        return self.ids[i][self.mask[i]]

    def __repr__(self) -> str:
        return f"Tokens({self.ids.shape[0]} rows x {self.ids.shape[1]} columns, {int(self.mask.sum())} tokens)"


@dataclass(frozen=True, eq=False)
class ExpertActivations:
    """The routed experts of one MoE layer, one row per (token, slot).

    The layer's output is ``(weights[..., None] * out).sum(slot) + shared``.

    Attributes:
        ids: experts chosen [batch, pos, slot].
        weights: with what weight each output is added [batch, pos, slot].
        hidden: the experts' neurons [batch, pos, slot, neuron], if captured.
        out: the experts' outputs before the weight [batch, pos, slot, d_model], if captured.
    """

    layer: int
    ids: Tensor
    weights: Tensor
    mask: Tensor
    hidden: Tensor | None = None
    out: Tensor | None = None
    n_experts: int = 0

    def rows(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, pos, slot) of every real token routed to `expert`, each [row]."""
        batch, pos, slot = ((self.ids == expert) & self.mask[..., None]).nonzero(as_tuple=True)
        return batch, pos, slot

    def load(self) -> Tensor:
        """Tokens routed to each expert [expert]; padding is not counted."""
        return torch.bincount(self.ids[self.mask].flatten(), minlength=self.n_experts)

    @recorded
    def frame(self) -> pd.DataFrame:
        """One line per (token, slot): batch, position, slot, layer, expert, weight and, if captured, norms.

        ``position`` counts real tokens, as in a trace, whatever the padding.
        """
        import pandas as pd

        batch, pos, slot = torch.broadcast_to(self.mask[..., None], self.ids.shape).nonzero(as_tuple=True)
        columns: dict[str, Any] = {
            "batch": batch,
            "position": (self.mask.long().cumsum(1) - 1)[batch, pos],
            "slot": slot,
            "layer": self.layer,
            "expert": self.ids[batch, pos, slot],
            "weight": self.weights[batch, pos, slot].float(),
        }
        for name, tensor in (("hidden_norm", self.hidden), ("out_norm", self.out)):
            if tensor is not None:
                columns[name] = tensor[batch, pos, slot].float().norm(dim=-1)
        frame = pd.DataFrame({k: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()})
        frame.attrs = {"layer": self.layer, "n_experts": self.n_experts, "tokens": int(self.mask.sum())}
        return frame


@dataclass(eq=False)
class Activations(Mapping[str, Tensor]):
    """A mapping from site to tensor: ``acts["resid_post[5]"]``, ``acts["z[5, head=3]"]``, ``acts["resid_post[*]"]``.

    A pattern over layers gives them stacked [layer, batch, pos, ...].

    Attributes:
        tokens: the tokens that were run.
        logits: the model's output [batch, pos, vocab], if asked for.
        keep: Monet: layer -> bool [key, key], True = expert (i, j) was on; only layers that had some off.
    """

    tokens: Tokens
    tensors: dict[Site, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    model: str = ""
    n_experts: int = 0
    rotary: bool = True
    keep: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        """True at real tokens [batch, pos]."""
        return self.tokens.mask

    @property
    def sites(self) -> list[Site]:
        return sorted(self.tensors)

    def axes(self, site: str | Site) -> tuple[str, ...]:
        return Site.parse(site).axes

    def __getitem__(self, key: str | Site) -> Tensor:
        if not isinstance(key, Site):
            pattern = Pattern.parse(key, rotary=self.rotary)
            if not pattern.concrete:
                return self._stack(pattern)
            key = Site.parse(key, rotary=self.rotary)
        key = self._absolute(key)
        if key in self.tensors:
            return self.tensors[key]
        if key.base in self.tensors:
            return pick(self.tensors[key.base], key, self._ids(key), self.mask)
        raise KeyError(f"{key} was not captured; there are {self._summary()}")

    def _repr_html_(self) -> str:
        from interp.display import html

        return html(self)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def _absolute(self, site: Site) -> Site:
        """The site with its layer and indices counted from the front."""
        layer = site.layer
        if layer is not None and layer < 0:
            layer += 1 + max((s.layer for s in self.tensors if s.name == site.name and s.layer is not None), default=-1)
        index = []
        for key, value in site.index:
            n = self._size(site.name, layer, key) if Site(site.name, layer) in self.tensors else 0
            if n and not -n <= value < n:
                raise KeyError(f"{site}: {key}={value} is out of range; there are {key} 0..{n - 1}")
            index.append((key, value % n if n else value))
        return Site(site.name, layer, tuple(index))

    def _ids(self, site: Site) -> Tensor | None:
        return self.tensors.get(Site("expert_ids", site.layer)) if site.kind.routed else None

    def _stack(self, pattern: Pattern) -> Tensor:
        layers = sorted({s.layer for s in self.tensors if s.name == pattern.name and s.layer is not None})
        sites = pattern.expand(layers, lambda name, layer, key: self._size(name, layer, key))
        if not sites:
            raise KeyError(f"{pattern.text}: no such site was captured; there are {self._summary()}")
        parts = [self[s] for s in sites]
        if len({p.shape for p in parts}) > 1:
            raise SiteError(
                f"{pattern.text}: these sites differ in shape ({', '.join(str(list(p.shape)) for p in parts)}); "
                "read them one by one"
            )
        return torch.stack(parts)

    def _size(self, name: str, layer: int | None, key: str) -> int:
        """How many indices `key` has at a site: all of them, or up to the highest that was captured."""
        site = Site(name, layer)
        if site.kind.routed and key == "expert":
            return self.n_experts
        if site in self.tensors:
            return self.tensors[site].shape[site.kind.axes.index(site.kind.index[key])]
        kept = (dict(s.index).get(key, -1) for s in self.tensors if s.base == site)
        return 1 + max(kept, default=-1)

    def __iter__(self) -> Iterator[str]:
        return (str(site) for site in self.sites)

    def __len__(self) -> int:
        return len(self.tensors)

    def experts(self, layer: int) -> Any:
        """The experts of one layer: `ExpertActivations`, one row per (token, slot); for Monet `FactoredExperts`.

        KeyError where none of its expert sites was captured; Monet needs both g1 and g2.
        """
        if factored := self._factored(layer):
            return factored
        layer = self._absolute(Site("expert_ids", layer)).layer  # type: ignore[assignment]

        def get(name: str) -> Tensor | None:
            return self.tensors.get(Site(name, layer))

        ids, weights = get("expert_ids"), get("expert_weight")
        if ids is None or weights is None:
            raise KeyError(
                f"no experts of layer {layer} were captured; capture 'expert_weight[{layer}]' or "
                f"'expert_out[{layer}]'. There are {self._summary()}"
            )
        return ExpertActivations(
            layer, ids, weights, self.mask, get("expert_hidden"), get("expert_out"), self.n_experts
        )

    def _factored(self, layer: int) -> FactoredExperts | None:
        """Monet's experts, from g1 and g2; None where neither is here."""
        layer = self._absolute(Site("g1", layer)).layer  # type: ignore[assignment]
        g1, g2 = (self.tensors.get(Site(name, layer)) for name in ("g1", "g2"))
        if g1 is None and g2 is None:
            return None
        if g1 is None or g2 is None:
            missing = f"g{1 if g1 is None else 2}[{layer}]"
            raise KeyError(f"the experts of layer {layer} have two factors; capture {missing!r} too")
        return FactoredExperts(layer, g1, g2, self.mask, self.keep.get(layer))

    def mean(self, site: str | Site) -> Tensor:
        """Mean over real tokens; what mean ablation puts back."""
        tensor, axes = self[site], self.axes(site)
        if axes[:1] == ("row",):  # one expert's rows are real tokens already
            return tensor.mean(0)
        if axes[:2] != ("batch", "pos"):
            raise SiteError(f"{site}: its axes are {axes}, so it has no mean over tokens")
        return tensor[self.mask].mean(0)

    def to(self, *args: Any, **kwargs: Any) -> Activations:
        """Activations moved or converted as ``Tensor.to`` does, tokens with them; integer tensors keep their dtype."""

        def move(t: Tensor) -> Tensor:
            return t.to(*args, **kwargs) if t.is_floating_point() else t.to(*args, **kwargs).to(t.dtype)

        moved = {site: move(t) for site, t in self.tensors.items()}
        logits = None if self.logits is None else move(self.logits)
        tokens = self.tokens.to(self.mask.to(*args, **kwargs).device)
        keep = {layer: matrix.to(tokens.mask.device) for layer, matrix in self.keep.items()}
        return replace(self, tokens=tokens, tensors=moved, logits=logits, keep=keep)

    def detach(self) -> Activations:
        moved = {site: t.detach() for site, t in self.tensors.items()}
        logits = None if self.logits is None else self.logits.detach()
        return replace(self, tensors=moved, logits=logits)

    def to_transformer_lens(self, model: Any = None) -> Any:
        """The same activations as a TransformerLens ActivationCache, under its names.

        `model`, our Model or a TransformerBridge, is what its methods ask for sizes and weights: see
        `interp.bridges.transformer_lens.to_cache`.
        """
        from interp.bridges.transformer_lens import to_cache

        return to_cache(self, model)

    def _summary(self) -> str:
        layers: dict[tuple[str, str], list[str]] = {}  # (name, index) -> layers
        for site in self.sites:
            index = ", ".join(f"{key}={value}" for key, value in site.index)
            layers.setdefault((site.name, index), []).append("" if site.layer is None else str(site.layer))
        parts = (written(name, _ranges(of) if of != [""] else "", index) for (name, index), of in layers.items())
        return ", ".join(parts) or "none"

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.tokens.ids.shape))
        size = sum(t.numel() * t.element_size() for t in self.tensors.values())
        return f"Activations({self.model or 'model'}, {shape} tokens, {size / 2**20:.1f} MiB: {self._summary()})"


def narrow(tensor: Tensor, site: Site) -> Tensor:
    """The view of a whole site's tensor that the site's index names, a chosen expert aside (it picks rows)."""
    axes = list(site.kind.axes)
    for key, value in site.index:
        if key == "expert" and site.kind.routed:
            continue
        axis = axes.index(site.kind.index[key])
        tensor = tensor.select(axis, value)
        axes.pop(axis)
    return tensor


def pick(tensor: Tensor, site: Site, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The part of a whole site's tensor that an indexed site names.

    ``expert=`` at a routed site picks rows by the `ids` [batch, pos, slot] chosen, giving [row, ...]; padding, where
    `mask` [batch, pos] is False, is left out.
    """
    rows = _rows(site, ids, mask)
    part = narrow(tensor, site)
    return part if rows is None else part[rows]


def put(tensor: Tensor, site: Site, part: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """A copy of `tensor` in which `part` stands where `pick` would take it from."""
    out = tensor.clone()
    rows, target = _rows(site, ids, mask), narrow(out, site)
    if rows is None:
        target.copy_(part)
    else:
        target[rows] = part
    return out


def _rows(site: Site, ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """True where the chosen expert is the site's [batch, pos, slot]; None for a site that names no expert."""
    expert = dict(site.index).get("expert") if site.kind.routed else None
    if expert is None:
        return None
    if ids is None:
        raise SiteError(f"{site}: the chosen experts are unknown; capture 'expert_ids[{site.layer}]' too")
    return ids == expert if mask is None else (ids == expert) & mask[..., None]


def _ranges(layers: list[str]) -> str:
    """'0, 1, 2, 5' as '0..2, 5'."""
    runs: list[list[int]] = []
    for n in map(int, dict.fromkeys(layers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
