"""Taps: what happens at one point of the model, whichever door leads there.

A door hands a tap the activation in its site's own axes and gets back what the model should go on with. The tap runs
the edits of that point in order, then those of a sparse autoencoder's latents that stands there, then shows the result
to the readers: a reader sees what the model goes on with.

The `Clock` knows what the running forward call is about: which columns it computes and which tokens they are. It is
set by a hook on the model itself, so calls that somebody else makes (``model.hf.generate``) are understood too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.activations import narrow
from interp.edits import Edit, EditError, Where
from interp.hooks.splice import Autoencoder, Splice
from interp.scope import Columns
from interp.sites import Site


class Clock:
    """What is known of the running forward call.

    Attributes:
        columns: the batch's history up to and including this call.
        shape: (batch, columns computed in this call).
        prompt: length of the prompt, set by ``Model.generate``; None where each fresh call is a prompt of its own.
        given: mask of the prompt as the caller laid it out; None for the layout that runs.
    """

    def __init__(self) -> None:
        self.columns: Columns | None = None
        self.shape = (0, 0)
        self.prompt: int | None = None
        self.given: Tensor | None = None
        self.calls = 0
        self.cached = False

    @property
    def now(self) -> Columns:
        """The columns of the running call."""
        if self.columns is None:
            raise RuntimeError(
                "a layer ran outside a call of the model itself, so it is unknown which tokens it sees; "
                "call the model (m(...) or m.hf(...)), not a part of it"
            )
        return self.columns

    def begin(self, kwargs: dict[str, Any]) -> None:
        """Reads a forward call's arguments, by name."""
        ids = kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        if ids is None and embeds is None:
            raise ValueError("the model was called with neither input_ids nor inputs_embeds")
        given = ids if ids is not None else embeds
        assert isinstance(given, Tensor)
        batch, width = given.shape[:2]
        mask, past = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        plain = isinstance(mask, Tensor) and mask.dim() == 2
        if isinstance(mask, Tensor) and plain:
            seen = max(mask.shape[1] - width, 0)
        else:
            seen = int(past.get_seq_length()) if past is not None else 0
        self.cached = past is not None
        before = self.columns
        fresh = seen == 0 or before is None or before.mask.shape != (batch, seen)
        mask = _tokens(mask, seen + width)
        if mask is None or mask.shape[1] != seen + width:
            mask = torch.ones(batch, seen + width, dtype=torch.bool, device=given.device)
        if before is not None and not fresh and not plain:  # a window hides old columns, or the caller says nothing
            mask = torch.cat([before.mask, mask[:, seen:]], 1)
        if fresh:
            history = ids if seen == 0 else None
            prompt = self.prompt if self.prompt is not None else mask.shape[1]
        else:
            assert before is not None
            history = None if before.ids is None or ids is None else torch.cat([before.ids, ids], 1)
            prompt = before.prompt
        layout = self.given if self.given is not None else mask[:, :prompt]
        self.columns = Columns(history, mask, seen, prompt, layout)
        self.shape = (batch, width)
        self.calls += 1

    def cut(self, whole: Tensor, n: int) -> Tensor:
        """The columns of `whole` [batch, column] that a tensor with n columns holds: the newest n."""
        total = whole.shape[1]
        if n <= total:
            return whole[:, total - n :]
        if not self.cached:
            raise ValueError(
                f"an activation has {n} positions where {total} tokens have run: not one per token in this family"
            )
        return torch.nn.functional.pad(whole, (0, n - total))  # a static cache: room for columns to come


def _tokens(mask: Any, total: int) -> Tensor | None:
    """True at the columns that hold tokens [batch, column], from a plain mask or from who may attend to whom."""
    if isinstance(mask, dict):  # one for each kind of layer
        kinds = [t for t in (_tokens(m, total) for m in mask.values()) if t is not None]
        return torch.stack(kinds).any(0) if kinds else None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask.bool()
    may = mask >= 0 if mask.is_floating_point() else mask.bool()  # [batch, 1, query, key]; additive: 0 or very low
    return may.any(2).any(1)[:, :total]


@dataclass
class Bound:
    """An edit at one concrete site of one model, and the tokens it has touched."""

    edit: Edit
    site: Site
    touched: list[tuple[int, Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    _cache: tuple[int, Tensor] | None = None

    def scope(self, clock: Clock) -> Tensor:
        if self._cache is None or self._cache[0] != clock.calls:
            self._cache = (clock.calls, self.edit.scope(clock.now))
        return self._cache[1]

    def __call__(self, h: Tensor, clock: Clock, ids: Tensor | None, inputs: tuple[Any, ...] = ()) -> Tensor:
        """`h` with this edit done to it; `ids` [batch, pos, slot] are the chosen experts at routed sites."""
        kind, index = self.site.kind, dict(self.site.index)
        columns = clock.now
        n = h.shape[kind.pos_axis]
        mask = clock.cut(self.scope(clock), n).to(h.device)
        if not bool(mask.any()):
            return h
        expert = index.pop("expert", None) if kind.routed else None
        part, gone = narrow(h, self.site), {kind.index[key] for key in index}
        pos_axis = [a for a in kind.axes if a not in gone].index(kind.axes[kind.pos_axis])
        position = clock.cut(columns.position, n).to(h.device)
        where = Where(str(self.site), position, mask, pos_axis, inputs)
        new = self.edit.map(part, where)
        if new.shape != part.shape or new.dtype != part.dtype or new.device != part.device:
            raise EditError(
                f"{self.site}: the edit gave {list(new.shape)} {new.dtype} on {new.device}; the site holds "
                f"{list(part.shape)} {part.dtype} on {part.device}"
            )
        if self.edit.gate is not None:
            new = part + _per_token(self.edit.gate(part, where), part, pos_axis).to(part.dtype) * (new - part)
        keep = _per_token(mask, part, pos_axis)
        if expert is not None:
            assert ids is not None
            hit = ids == expert
            keep = keep & hit.reshape(*hit.shape, *[1] * (part.dim() - 3))
            mask = mask & hit.any(-1)
        ids_here = None if columns.ids is None else clock.cut(columns.ids, n)
        self.touched.append((clock.calls, position, mask, ids_here))
        if not bool(keep.all()):
            new = torch.where(keep, new, part)
        if not index:
            return new
        out = h.clone()
        narrow(out, self.site).copy_(new)
        return out


def _per_token(value: Tensor, like: Tensor, pos_axis: int) -> Tensor:
    """[batch] or [batch, pos] spread over the axes of `like`."""
    if value.dim() == 1:
        return value.view(-1, *[1] * (like.dim() - 1))
    view = [1] * like.dim()
    view[0], view[pos_axis] = value.shape[0], value.shape[1]
    return value.reshape(view)


Reader = Callable[[Site, Tensor, Clock], Tensor | None]


@dataclass
class Tap:
    """One point of the model. A reader may return a tensor for the model to go on with instead (its twin in memory)."""

    site: Site
    clock: Clock
    edits: list[Bound] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    splice: Splice | None = None  # a sparse autoencoder that stands here, behind the edits and before the readers
    inputs: tuple[Any, ...] = ()  # of the module at whose output the tap stands, while it runs

    def __call__(self, h: Tensor, ids: Tensor | None = None) -> Tensor:
        for bound in self.edits:
            h = bound(h, self.clock, ids, self.inputs)
        if self.splice is not None:
            h = self.splice(h)
        for reader in self.readers:
            twin = reader(self.site, h, self.clock)
            h = h if twin is None else twin
        return h

    def inner(self, site: Site, autoencoder: Autoencoder) -> Tap:
        """The tap of `site`, a part of what a sparse autoencoder makes of this place."""
        if self.splice is None:
            self.splice = Splice.at(self, autoencoder)
        return self.splice.tap(site)

    def framed(self, h: Tensor) -> Tensor:
        """The same for modules that see tokens flattened [batch * pos, ...]."""
        batch, width = self.clock.shape
        if h.dim() == 2 and h.shape[0] == batch * width and len(self.site.kind.axes) == 3:
            seen = h.unflatten(0, (batch, width))
            given = self(seen)  # under gradients the model goes on from the view that was read, so that they reach it
            return h if given is seen and not given.requires_grad else given.flatten(0, 1)
        return self(h)
