"""How far a run must go, and which sites a pattern means on one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from interp.sites import KINDS, Pattern, Site, SiteError

if TYPE_CHECKING:
    from interp.model import Model


class Reached(Exception):
    """Everything that was asked for has been read; the rest of the forward pass is not needed."""


@contextmanager
def stopping(m: Model, sites: list[Site], logits: bool) -> Iterator[None]:
    """Ends the forward pass at the first module behind the last wanted site."""
    if logits or any(s.name == "logits" for s in sites):
        yield
        return
    layers = m.anatomy.layers
    outside = [s for s in sites if s.layer is None and s.name != "embed"]
    last = max((s.layer for s in sites if s.layer is not None), default=-1)
    behind = layers[last + 1] if not outside and last + 1 < len(layers) else m.hf.get_output_embeddings()
    if behind is None:
        yield
        return

    def stop(module: nn.Module, args: Any) -> None:
        raise Reached

    handle = behind.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def rooted(m: Model, grad: bool) -> Iterator[None]:
    """Makes the embedding's output require a gradient, so that every site has one even with frozen weights."""
    if not grad:
        yield
        return

    def root(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_(True)

    handle = m.hf.get_input_embeddings().register_forward_hook(root, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def expand(m: Model, pattern: Pattern) -> list[Site]:
    kind, anatomy = KINDS[pattern.name], m.anatomy
    if kind.layered and isinstance(pattern.layers, int):
        n, given = m.n_layers, pattern.layers
        layer = given + n if given < 0 else given
        if not 0 <= layer < n:
            raise SiteError(f"{pattern.text}: {m.name} has layers 0..{n - 1}")
        pattern = Pattern(pattern.name, layer, pattern.index, pattern.text)
    having = anatomy.having(pattern.name) if kind.layered else []
    layers = pattern.layers
    if isinstance(layers, slice):
        span = range(m.n_layers)[layers]  # counted in the model's layers, whichever of them have the site
        if not span:
            raise SiteError(f"{pattern.text}: the slice is empty; {m.name} has layers 0..{m.n_layers - 1}")
        every = Pattern(pattern.name, slice(None), pattern.index, pattern.text)
        sites = every.expand([i for i in having if i in span], partial(size, m))
        if not sites:
            why = next(
                (anatomy.absent.get((pattern.name, i)) for i in span if (pattern.name, i) in anatomy.absent), None
            )
            raise SiteError(f"{pattern.text}: {m.name} has no such site{f': {why}' if why else ''}")
    else:
        if (pattern.name, layers) not in anatomy.places:
            why = anatomy.absent.get((pattern.name, layers), "this family does not have it")
            others = f"; layers that have it: {having}" if having else ""
            raise SiteError(f"{pattern.text}: {m.name} has no such site: {why}{others}")
        sites = pattern.expand(having, partial(size, m))
    return [_in_range(m, site, pattern.text) for site in sites]


def size(m: Model, name: str, layer: int | None, key: str) -> int:
    axis = "expert" if key == "expert" else KINDS[name].index[key]
    size = m.anatomy.sizes.get((name, layer), {}).get(axis)
    return size or {"d_model": m.d_model, "vocab": m.d_vocab}.get(axis, 0)


def _in_range(m: Model, site: Site, text: str) -> Site:
    index = []
    for key, value in site.index:
        n = size(m, site.name, site.layer, key)
        if not -n <= value < n:
            here = m.name if site.layer is None else f"layer {site.layer}"
            raise SiteError(f"{text}: {key}={value} is out of range; {here} has {key} 0..{n - 1}")
        index.append((key, value % n))
    return Site(site.name, site.layer, tuple(index))
