"""How far a run must go, and which sites a pattern means on one model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from interp.calls import recorded
from interp.hooks.splice import Autoencoder
from interp.sites import KINDS, SPLICED, Pattern, Site, SiteError, kind_of, written

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model


class Reached(Exception):
    """Everything that was asked for has been read; the rest of the forward pass is not needed."""


@contextmanager
def stopping(m: Model, sites: list[Site], logits: bool) -> Iterator[None]:
    """Ends the forward pass at the first module behind the last wanted site."""
    if logits or any((s.host or s).name == "logits" for s in sites):
        yield
        return
    layers = m.anatomy.layers
    outside = [s for s in sites if s.layer is None and (s.host or s).name != "embed"]
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
    kind, anatomy = kind_of(pattern.name), m.anatomy
    if kind.layered and isinstance(pattern.layers, int):
        n, given = m.n_layers, pattern.layers
        layer = given + n if given < 0 else given
        if not 0 <= layer < n:
            raise SiteError(f"{pattern.text}: {m.name} has layers 0..{n - 1}")
        pattern = Pattern(pattern.name, layer, pattern.index, pattern.text)
    word, _, host = pattern.name.rpartition(".")
    having = anatomy.having(pattern.name) if kind.layered else []
    missing = "this family does not have it"
    if word:  # what a sparse autoencoder makes of a place is there where one is attached
        having = sorted(s.layer for s in m.saes if s.name == host and s.layer is not None)
        missing = "no sparse autoencoder is attached there; m.attach(s) attaches one"
    layers = pattern.layers
    if isinstance(layers, slice):
        span = range(m.n_layers)[layers]  # counted in the model's layers, whichever of them have the site
        if not span:
            raise SiteError(f"{pattern.text}: the slice is empty; {m.name} has layers 0..{m.n_layers - 1}")
        every = Pattern(pattern.name, slice(None), pattern.index, pattern.text)
        sites = every.expand([i for i in having if i in span], partial(size, m))
        if not sites:
            why = next((anatomy.absent.get((pattern.name, i)) for i in span if (pattern.name, i) in anatomy.absent),
                       missing if word else None)  # fmt: skip
            raise SiteError(f"{pattern.text}: {m.name} has no such site{f': {why}' if why else ''}")
    else:
        if Site(host, layers) not in m.saes if word else (pattern.name, layers) not in anatomy.places:
            why = anatomy.absent.get((pattern.name, layers), missing)
            others = f"; layers that have it: {having}" if having else ""
            raise SiteError(f"{pattern.text}: {m.name} has no such site: {why}{others}")
        sites = pattern.expand(having, partial(size, m))
    return [_in_range(m, site, pattern.text) for site in sites]


def size(m: Model, name: str, layer: int | None, key: str) -> int:
    axis = "expert" if key == "expert" else kind_of(name).index[key]
    word, _, name = name.rpartition(".")
    if word and axis == "latent":
        return m.saes[Site(name, layer)].d_sae
    size = m.anatomy.sizes.get((name, layer), {}).get(axis)
    return size or {"d_model": m.d_model, "vocab": m.d_vocab}.get(axis, 0)


def _in_range(m: Model, site: Site, text: str) -> Site:
    if not site.index:
        return site
    index = []
    for key, value in site.index:
        n = size(m, site.name, site.layer, key)
        if not -n <= value < n:
            here = m.name if site.layer is None else f"layer {site.layer}"
            raise SiteError(f"{text}: {key}={value} is out of range; {here} has {key} 0..{n - 1}")
        index.append((key, value % n))
    return Site(site.name, site.layer, tuple(index))


@recorded
def site_table(m: Model) -> pd.DataFrame:
    """`Model.map`: a line per site name, those of attached autoencoders last."""
    import pandas as pd

    rows = []
    spliced = dict.fromkeys(f"{word}.{site.name}" for word in SPLICED for site in m.saes)
    for name in (*KINDS, *spliced):
        kind, (word, _, host) = kind_of(name), name.rpartition(".")
        places = {(n, i): p for (n, i), p in m.anatomy.places.items() if n == host}
        if word:
            places = {at: p for at, p in places.items() if Site(*at) in m.saes}
        why = sorted({w for (n, _), w in m.anatomy.absent.items() if n == name})
        rows.append({
            "site": written(name, "*" if word and kind.layered else "", ""), "present": bool(places),
            "layers": sorted(i for _, i in places if i is not None), "axes": kind.axes,
            "door": ", ".join(sorted({p.how for p in places.values()})), "what": kind.what,
            "absent": "; ".join(why[:2]),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    table.attrs = {"model": m.name, "fingerprint": m.fingerprint}
    return table


def fitting(m: Model, s: Autoencoder) -> Site:
    """The site of `m` that a sparse autoencoder reads and writes. SiteError where it does not fit there."""
    if s.shape != "autoencoder":
        raise SiteError(f"attach: a {s.shape} does not write what it reads, so its latents are no part of one place")
    site = m.resolve(s.site)[0]
    Pattern.parse(f"sae[{site}]")  # one vector per token, or it says so
    sizes = m.anatomy.sizes.get((site.name, site.layer), {})
    width = math.prod(sizes.get(axis) or size(m, site.name, site.layer, "dim") for axis in site.kind.axes[2:])
    if width != s.d_in:
        raise SiteError(f"attach: the autoencoder reads {s.d_in} numbers, and {site} of {m.name} has {width}")
    if site in m.saes:
        raise SiteError(f"attach: {site} has an autoencoder already; m.detach('{site}') takes it off")
    return site
