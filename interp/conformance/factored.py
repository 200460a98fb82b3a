"""Identities of factored experts (Monet): their factors, their parts, their masks.

The other sides are sums over single experts, the exact masks of `interp.monet` and surgery on the weights of parts.
They are compared at the layer's own output and by its scale, which in a young Monet is too small to show in the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from interp import edits
from interp.conformance.bench import Bench, Result, close
from interp.conformance.writing import _weights_zeroed

#: Experts computed one by one in one go, and tokens on which all that have weight are.
EXPERTS, TOKENS = 512, 4


def factors(b: Bench) -> Iterator[Result]:
    """Reading: logits to g, g to weights, weights and single experts to what the layer puts out."""
    owner = -1
    for layer in b.layers("g1"):
        owner = layer if layer in b.layers("key_logits1") else owner
        for axis in (1, 2):
            g, logits = b.acts[f"g{axis}[{layer}]"], b.acts[f"key_logits{axis}[{owner}]"]
            on = g > 0
            chosen = logits.to(g).masked_fill(~on, -torch.inf).softmax(-1)
            yield close(f"g{axis}[{layer}] = softmax of surviving key_logits{axis}[{owner}]", g, chosen)
        yield _sum(b, layer)
        yield _one_off(b, layer)


def _sum(b: Bench, layer: int) -> Result:
    """sum over experts with weight of W_ij E_ij(x) = mlp_out, on a few tokens."""
    e, x = b.acts.experts(layer), _given(b, layer).flatten(0, 1)
    out, most = b.acts[f"mlp_out[{layer}]"].flatten(0, 1)[:TOKENS], max(1, int(e.count().max()))
    ids, weights = (t.flatten(0, 1)[:TOKENS].split(EXPERTS, 1) for t in e.top(most))
    total = torch.zeros_like(out)
    for some, w in zip(ids, weights, strict=True):
        for token, row in enumerate(some):
            made = b.m.expert_output(layer, row[row >= 0], x[token])
            total[token] += w[token, row >= 0].to(made) @ made
    return _alike(b, layer, f"sum of weight x expert = mlp_out [{layer}]", total, out)


def _one_off(b: Bench, layer: int) -> Result:
    """Switching the heaviest expert of the first token off takes exactly its weighted output out of mlp_out."""
    from interp.monet import MonetMask, masked

    e, x, before = b.acts.experts(layer), _given(b, layer), b.acts[f"mlp_out[{layer}]"]
    expert = _heaviest(b, layer)
    with masked(b.m.hf, MonetMask.from_ids(b.m.hf, {layer: [expert]})):
        after = _put_out(b, layer)
    part = e.weights(expert)[..., None].to(x) * b.m.expert_output(layer, expert, x)
    return _alike(
        b, layer, f"masking expert {expert} of layer {layer} takes out its weight x output", before - part, after
    )


def parts(b: Bench) -> Iterator[Result]:
    """Writing: a key switched off, a part's neurons zeroed, a key logit pushed."""
    from interp.monet import MonetMask, masked

    m = b.m
    for layer in b.layers("g1")[-1:]:
        experts: Any = m.anatomy.places["g1", layer].module
        i, j = divmod(_heaviest(b, layer), int(experts.n))
        for name, key, off in (("g1", i, MonetMask.full_rows), ("g2", j, MonetMask.full_cols)):
            with masked(m.hf, off(m.hf, {layer: [key]})):
                by_mask = _put_out(b, layer)
            edited = _put_out(b, layer, edits.zero(f"{name}[{layer}, key={key}]"))
            yield _alike(b, layer, f"{name} of key {key} in layer {layer} = a masked {off.__name__}", edited, by_mask)
            doubled = _put_out(b, layer, edits.scale(f"{name}[{layer}]", 2.0))
            yield _alike(b, layer, f"2 {name} = 2 mlp_out [{layer}]", doubled, 2 * b.acts[f"mlp_out[{layer}]"])
        for name, key in (("z1", i), ("z2", j)):
            if layer in b.layers(name):
                with _weights_zeroed(_made_by(b, layer, name, key)):
                    by_hand = _put_out(b, layer)
                edited = _put_out(b, layer, edits.zero(f"{name}[{layer}, key={key}]"))
                yield _alike(b, layer, f"{name} of part {key} in layer {layer}", edited, by_hand)
    for layer in b.layers("key_logits1")[-1:]:
        yield from _pushed(b, layer)


def _pushed(b: Bench, layer: int) -> Iterator[Result]:
    """A key logit that towers above all others takes its head's whole weight, in every layer that shares the router."""
    last = max(la for la in b.layers("g1") if not any(layer < first <= la for first in b.layers("key_logits1")))
    for axis in (1, 2):
        site = f"g{axis}[{last}, head=0]"
        for push, want in ((1e4, 1.0), (-1e4, 0.0)):
            with b.m.intervene(edits.add(f"key_logits{axis}[{layer}, head=0, key=1]", push)):
                g = b.m.capture(b.ids, site)[site][..., 1]
            yield close(f"key_logits{axis}[{layer}] {push:+.0f} gives {site} key 1 {want:.0f}", g, g.new_full((), want))


def _put_out(b: Bench, layer: int, *changes: edits.Edit) -> Tensor:
    """mlp_out [batch, pos, d_model] under edits."""
    with b.m.intervene(*changes):
        return b.m.capture(b.ids, f"mlp_out[{layer}]")[f"mlp_out[{layer}]"]


def _alike(b: Bench, layer: int, name: str, one: Tensor, other: Tensor) -> Result:
    """`close`, in units of the largest value that the layer puts out (0 where all its experts are off)."""
    unit = b.acts[f"mlp_out[{layer}]"].abs().max()
    return close(name, one / unit, other / unit) if float(unit) else close(name, one, other)


def _heaviest(b: Bench, layer: int) -> int:
    """The heaviest expert of the first token, or 0 where all are off."""
    return max(0, int(b.acts.experts(layer).top(1).ids[0, 0, 0]))


def _given(b: Bench, layer: int) -> Tensor:
    """What the experts of a layer are given [batch, pos, d_model], by a bare hook."""
    seen: list[Tensor] = []
    module = b.m.anatomy.places["g1", layer].module
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        b.m(b.ids)
    finally:
        handle.remove()
    return seen[0]


def _made_by(b: Bench, layer: int, name: str, key: int) -> list[Tensor]:
    """The rows of weight and bias that make the neurons of one part (an activation of 0 is 0)."""
    experts: Any = b.m.anatomy.places["g1", layer].module
    linear: nn.Linear = experts.u if hasattr(experts, "u") else experts.u1 if name == "z1" else experts.u2
    width = b.m.anatomy.sizes[name, layer]["neuron"]
    rows = slice(key * width, (key + 1) * width)
    return [linear.weight[rows], linear.bias[rows]]
