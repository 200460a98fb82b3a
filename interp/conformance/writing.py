"""Identities of writing: surgery on the weights, twins, the router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp import edits
from interp.conformance.bench import Bench, Result, close, fit
from interp.hooks import undecorated


def surgery(b: Bench) -> Iterator[Result]:
    """Zeroing at a site against zeroing the weights that read it."""
    m = b.m
    for layer in b.layers("z")[-1:]:
        out, d = _output_projection(b, layer), m.anatomy.sizes["z", layer]["d_head"]
        if out is not None:
            with _zeroed(out, columns=slice(d, 2 * d)):
                by_hand = m(b.ids)
            yield close(f"head 1 of layer {layer}", b.logits(edits.zero(f"z[{layer}, head=1]")), by_hand)
            if layer in b.layers("pattern"):
                yield close(
                    f"pattern of head 1 of layer {layer}", b.logits(edits.zero(f"pattern[{layer}, head=1]")), by_hand
                )
    for layer in b.layers("mlp_hidden")[-1:]:
        with _zeroed(m.anatomy.places["mlp_hidden", layer].module, columns=slice(3, 4)):
            by_hand = m(b.ids)
        yield close(f"neuron 3 of layer {layer}", b.logits(edits.zero(f"mlp_hidden[{layer}, neuron=3]")), by_hand)
    for layer in b.layers("expert_out")[-1:]:
        place, expert = m.anatomy.places["expert_out", layer], int(b.acts[f"expert_ids[{layer}]"].flatten()[0])
        with _weights_zeroed(undecorated.output_weights(place.module, expert)):
            by_hand = m(b.ids)
        for name in ("expert_out", "expert_weight"):
            yield close(
                f"{name} of expert {expert} in layer {layer}",
                b.logits(edits.zero(f"{name}[{layer}, expert={expert}]")),
                by_hand,
            )
    for layer in b.layers("shared_out")[-1:]:
        module = m.anatomy.places["shared_out", layer].module
        weights = [p for p in module.parameters() if p.dim() >= 2 and p.shape[-2 if p.dim() == 3 else 0] == m.d_model]
        if weights:
            with _weights_zeroed(
                [weights[-1], *(p for p in module.parameters() if p.dim() == 1 and p.shape[0] == m.d_model)]
            ):
                by_hand = m(b.ids)
            yield close(f"shared expert of layer {layer}", b.logits(edits.zero(f"shared_out[{layer}]")), by_hand)


def _output_projection(b: Bench, layer: int) -> nn.Module | None:
    """The linear that reads z, all heads side by side; None where something stands between, or layers share it."""
    shared = [p.data_ptr() for mod in b.m.hf.modules() for p in mod.parameters(recurse=False)]
    module, z = b.m.anatomy.places["z", layer].module, b.acts[f"z[{layer}]"].flatten(2)
    found: list[nn.Module] = []

    def note(mod: Any, args: Any, out: Any) -> None:
        if shared.count(mod.weight.data_ptr()) > 1:
            return
        if args and args[0].numel() == z.numel() and torch.allclose(args[0].reshape(z.shape), z, atol=1e-4):
            found.append(mod)

    inside = [mod for mod in module.modules() if getattr(getattr(mod, "weight", None), "ndim", 0) == 2]
    handles = [mod.register_forward_hook(note) for mod in inside]
    try:
        b.m(b.ids)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None


@contextmanager
def _zeroed(linear: Any, columns: slice = slice(None)) -> Iterator[None]:
    """A linear whose given input columns (all: and its bias) are zero for a while."""
    weight, bias = linear.weight, getattr(linear, "bias", None)
    transposed = type(linear).__name__ == "Conv1D"  # GPT-2 keeps [in, out]
    kept, kept_bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
    with torch.no_grad():
        (weight.T if not transposed else weight)[columns] = 0
        if columns == slice(None) and bias is not None:
            bias.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)
            if bias is not None:
                bias.copy_(kept_bias)


@contextmanager
def _weights_zeroed(weights: list[Tensor]) -> Iterator[None]:
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w in weights:
            w.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for w, old in zip(weights, kept, strict=True):
                w.copy_(old)


def twins(b: Bench) -> Iterator[Result]:
    for layer in sorted(set(b.layers("q")) & set(b.layers("k")))[-1:]:
        yield close(
            f"2 q = 2 k [{layer}]",
            b.logits(edits.scale(f"q[{layer}]", 1.5)),
            b.logits(edits.scale(f"k[{layer}]", 1.5)),
            2e-5,
        )
        yield close(
            f"2 v = 2 z [{layer}]",
            b.logits(edits.scale(f"v[{layer}]", 2.0)),
            b.logits(edits.scale(f"z[{layer}]", 2.0)),
            2e-5,
        )
    for layer in b.layers("resid_pre")[-1:]:
        v = b.random(b.acts[f"resid_pre[{layer}]"].shape[-1])
        after = b.logits(edits.add(f"resid_pre[{layer}]", v))
        if layer - 1 in b.layers("resid_post"):
            yield close(
                f"resid_pre[{layer}] = resid_post[{layer - 1}]",
                b.logits(edits.add(f"resid_post[{layer - 1}]", v)),
                after,
            )
        yield close(f"resid_pre[{layer}] = a bare hook", _bare_hook(b, layer, v), after)
    for layer in b.layers("resid_mid")[-1:]:
        if layer not in b.layers("mlp_out"):
            continue
        v, mid, post = b.random(b.m.d_model), b.acts[f"resid_mid[{layer}]"], b.acts[f"resid_post[{layer}]"]
        with b.m.intervene(edits.add(f"resid_mid[{layer}]", v), edits.freeze(f"mlp_out[{layer}]", b.acts)):
            moved = b.m.capture(b.ids, f"resid_post[{layer}]")[f"resid_post[{layer}]"]
        shift = moved - post
        yield bool(shift.abs().max() > 1e-3), 0.0, f"resid_mid[{layer}] is written to"
        if close("", fit(post, mid, b.acts[f"mlp_out[{layer}]"]), post, 1e-4)[0]:  # the layer ends in a plain sum
            yield close(
                f"resid_mid[{layer}] passes on along the residual path",
                shift.mean((0, 1)).expand_as(shift),
                shift,
                1e-4,
            )


def _bare_hook(b: Bench, layer: int, v: Tensor) -> Tensor:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (
            ((args[0] + v, *args[1:]), kwargs)
            if args
            else (args, {**kwargs, "hidden_states": kwargs["hidden_states"] + v})
        )

    handle = b.m.anatomy.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return b.m(b.ids)
    finally:
        handle.remove()


def router(b: Bench) -> Iterator[Result]:
    for layer in b.layers("router_logits")[-1:]:
        site, changed = f"expert_ids[{layer}]", False
        for expert in range(b.m.n_experts):
            before = float((b.acts[site] == expert).any(-1).float().mean())
            for push in (30.0, -30.0):
                with b.m.intervene(edits.add(f"router_logits[{layer}, expert={expert}]", push)):
                    ids = b.m.capture(b.ids, site)[site]
                share = float((ids == expert).any(-1).float().mean())
                changed |= share != before
                yield (
                    (share >= before if push > 0 else share <= before),
                    abs(share - before),
                    (
                        f"logit {push:+.0f} on expert {expert} of layer {layer}: chosen by {before:.0%} -> {share:.0%}"
                    ),
                )
        yield changed, 0.0, f"router_logits[{layer}] decides"
        for word, share in ((-torch.inf, 0.0), (torch.inf, 1.0)):  # not there; chosen for sure
            expert = int(b.acts[site].flatten()[0])
            with b.m.intervene(edits.replace(f"router_logits[{layer}, expert={expert}]", word)):
                ids = b.m.capture(b.ids, site)[site]
            found = float((ids == expert).any(-1).float().mean())
            note = f"logit {word} on expert {expert} of layer {layer}: chosen by {found:.0%}"
            yield found == share, abs(found - share), note
