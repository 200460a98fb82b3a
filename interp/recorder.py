"""Recorders: the readers that keep what taps show.

Activations are kept as they are, not copied: a forward pass normally never writes into a tensor it has handed on. Some
families do (Falcon adds attention into the MLP's output in place), so each tensor's version counter is noted when it is
read. If one has moved on by the end, the site is known from then on as one whose tensor must be kept apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interp.activations import Activations, Tokens, pick
from interp.hooks.tap import Clock, warn_not_finite
from interp.sites import Site


class Recorder:
    """Collects the given sites over one forward call, or over the calls of one generation.

    Attributes:
        wanted: sites to keep, by whole site; an indexed site keeps only its part.
        fragile: whole sites whose tensor the model overwrites; shared with the model that owns it.
    """

    def __init__(self, sites: list[Site], fragile: set[Site], *, grad: bool = False, check: bool = True) -> None:
        self.wanted: dict[Site, list[Site]] = {}
        for site in sites:
            self.wanted.setdefault(site.base, []).append(site)
        self.fragile, self.grad, self.check = fragile, grad, check
        self.kept: dict[Site, list[Tensor]] = {}
        self._ids: dict[int | None, Tensor] = {}
        self._watch: list[tuple[Site, Tensor, int]] = []
        self._clock: Clock | None = None

    def __call__(self, site: Site, h: Tensor, clock: Clock) -> Tensor | None:
        self._clock = clock
        columns = clock.columns
        assert columns is not None
        kept = h if self.grad else h.detach()
        if site.name == "expert_ids":
            self._ids[site.layer] = kept
        if columns.start == 0:
            for wanted in self.wanted[site]:
                self.kept[wanted] = []
        elif site.name in ("k", "v"):
            kept = kept[:, -clock.shape[1] :]
        twin = None
        if site in self.fragile or h.is_inference():
            twin = h.clone()
        elif not any(p.index for p in self.wanted[site]) or len(self.wanted[site]) > 0:
            self._watch.append((site, h, h._version))
        for wanted in self.wanted[site]:
            part = pick(kept, wanted, self._ids.get(site.layer)) if wanted.index else kept
            self.kept[wanted].append(part)
            if self.check:
                warn_not_finite(wanted, part)
        return twin

    def missed(self) -> list[Site]:
        """Sites that the run never reached: somebody else's change stood in the way, or the layer was skipped."""
        return [site for group in self.wanted.values() for site in group if not self.kept.get(site)]

    def overwritten(self) -> set[Site]:
        """Whole sites whose tensor has been written into since it was read."""
        found = {site for site, tensor, version in self._watch if tensor._version != version}
        self._watch.clear()
        return found

    def activations(self, tokens: Tokens | None = None, **about: object) -> Activations:
        """What was kept; several calls of one sequence are joined along its positions."""
        if tokens is None:
            columns = self._clock.columns if self._clock else None
            if columns is None:
                raise RuntimeError("nothing was recorded: the model did not run inside the context")
            ids = columns.ids if columns.ids is not None else torch.zeros_like(columns.mask, dtype=torch.long)
            tokens = Tokens(ids, columns.mask)
        joined = {site: _join(site, parts) for site, parts in self.kept.items() if parts}
        return Activations(tokens, joined, **about)  # type: ignore[arg-type]


def _join(site: Site, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if "row" in site.axes:
        return torch.cat(parts)
    axis = next(i for i, a in enumerate(site.axes) if a in ("pos", "query"))
    if site.name == "pattern":  # later queries see more keys
        width = max(p.shape[-1] for p in parts)
        parts = [torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts]
    return torch.cat(parts, dim=axis)
