"""Recorders: the readers that keep what taps show.

Activations are kept as they are, not copied: a forward pass normally never writes into a tensor it has handed on. Some
families do (Falcon adds attention into the MLP's output in place), so each tensor's version counter is noted when it is
read. If one has moved on by the end, the site is known from then on as one whose tensor must be kept apart, and
``Model.capture`` runs again. What cannot run again (somebody else's call, a generation) is copied from the start.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from interp.activations import Activations, Tokens, pick, put
from interp.hooks.tap import Clock
from interp.scope import Columns
from interp.sites import Site

#: Tensors of up to so many values are summed in the end.
SMALL = 1 << 15


class Recorder:
    """Collects the given sites over one forward call, or over the calls of one generation.

    Attributes:
        wanted: sites to keep, by whole site; an indexed site keeps only its part.
        fragile: whole sites whose tensor the model overwrites; shared with the model that owns it.
        about: what every `Activations` says of the model.
    """

    def __init__(
        self,
        sites: list[Site],
        fragile: set[Site],
        about: dict[str, Any],
        *,
        grad: bool = False,
        check: bool = True,
        copy: bool = False,
    ) -> None:
        self.wanted: dict[Site, list[Site]] = {}
        for site in sites:
            self.wanted.setdefault(site.base, []).append(site)
        self.fragile, self.about, self.grad, self.check, self.copy = fragile, about, grad, check, copy
        self.kept: dict[Site, list[Tensor]] = {}
        self._ids: dict[int | None, Tensor] = {}
        self._watch: list[tuple[Site, Tensor, int]] = []
        self._sums: list[tuple[Site, Tensor, Tensor | None]] = []
        self._columns: Columns | None = None
        self._call = -1

    def __call__(self, site: Site, h: Tensor, clock: Clock) -> Tensor | None:
        columns = clock.now
        if columns.start == 0 and clock.calls != self._call:  # a new sequence begins
            self._warn()
            self.kept.clear()
        self._call, self._columns = clock.calls, columns
        kept, here = h if self.grad else h.detach(), self.wanted[site]
        if clock.cached and site.name in ("k", "v", "pattern"):
            kept = _from_cache(site, kept, columns)
        if site.name == "expert_ids":
            self._ids[site.layer] = kept
        apart = self.copy or site in self.fragile or h.is_inference()
        twin = None
        if apart and self.grad and h.requires_grad:
            twin = h.clone()  # what is kept stays in the graph: the model goes on with its twin
        elif apart:
            kept = kept.clone()
        elif site in here:  # wanted whole
            self._watch.append((site, h, h._version))
        for wanted in here:
            part = kept
            if wanted.index:
                now = kept if twin is None else twin
                mask = clock.cut(columns.mask, h.shape[1]).to(h.device) if site.kind.routed else None
                part = pick(now, wanted, self._ids.get(site.layer), mask)
                if self.grad and part.requires_grad:  # the model goes on with the part that is kept
                    twin = put(now, wanted, part, self._ids.get(site.layer), mask)
                else:
                    part = part.clone()  # so that the rest of the tensor can go
            self.kept.setdefault(wanted, []).append(part)
            if self.check and part.is_floating_point():
                # A finite sum proves every value finite. A large tensor's is taken now, while the tensor is in the
                # processor's cache; those of small ones in one go, later, which is quicker.
                self._sums.append((wanted, part, _sum(part) if part.numel() > SMALL else None))
        return twin

    def _warn(self) -> None:
        """Warns, naming the site, where an activation was not finite. A GPU is waited for once, not at every site."""
        sums, self._sums = self._sums, []
        if not sums:
            return
        device = sums[0][1].device
        total = torch.stack([(_sum(part) if s is None else s).to(device, torch.float32) for _, part, s in sums])
        for i in (~total.isfinite()).nonzero().flatten().tolist():
            site, part, _ = sums[i]
            if bad := int((~part.isfinite()).sum()):  # else only the sum has run over
                warnings.warn(
                    f"{site}: {bad} of {part.numel()} values are NaN or infinite", RuntimeWarning, stacklevel=4
                )

    def missed(self) -> list[Site]:
        """Sites that the run never reached: somebody else's change stood in the way, or the layer was skipped."""
        return [site for group in self.wanted.values() for site in group if not self.kept.get(site)]

    def overwritten(self) -> set[Site]:
        """Whole sites whose tensor has been written into since it was read."""
        found = {site for site, tensor, version in self._watch if tensor._version != version}
        self._watch.clear()
        return found

    def activations(self, tokens: Tokens | None = None) -> Activations:
        """What was kept; several calls of one sequence are joined along its positions."""
        self._warn()
        if tokens is None:
            if (columns := self._columns) is None:
                raise RuntimeError("nothing was recorded: the model did not run inside the context")
            ids = columns.ids if columns.ids is not None else torch.zeros_like(columns.mask, dtype=torch.long)
            tokens = Tokens(ids, columns.mask)
        joined = {site: _join(site, parts) for site, parts in self.kept.items() if parts}
        return Activations(tokens, joined, **self.about)


def _from_cache(site: Site, tensor: Tensor, columns: Columns) -> Tensor:
    """What a call with a cache adds: its own keys and values, and a pattern over every column so far.

    A sliding window's cache holds the newest columns only, a static one has room for columns to come.
    """
    total, axis = columns.mask.shape[1], 3 if site.name == "pattern" else 1
    gap = max(0, total - tensor.shape[axis])  # columns that have left the window
    tensor = tensor.narrow(axis, 0, total - gap)
    if site.name == "pattern":
        return torch.nn.functional.pad(tensor, (gap, 0))
    return tensor[:, columns.start - gap :]


def _sum(part: Tensor) -> Tensor:
    return part.detach().sum(dtype=torch.float32 if part.dtype == torch.float16 else None)  # half ends at 65504


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
