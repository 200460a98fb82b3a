"""Identities of reading: logits, attention, stream, experts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from interp.conformance.bench import Bench, Result, close, fit
from interp.hooks import attention as attention_door
from interp.hooks import undecorated


def logits(b: Bench) -> Iterator[Result]:
    yield close("all sites", b.acts.logits, b.plain)  # type: ignore[arg-type]
    light = b.m.capture(b.ids, b.patterns("pattern", "expert_hidden", "expert_out"), logits=True)
    yield close("all sites but pattern and expert insides", light.logits, b.plain)  # type: ignore[arg-type]


def attention(b: Bench) -> Iterator[Result]:
    if not b.layers("pattern"):
        return
    with attention_door.observed(b.m.hf, eager=True) as notes:
        b.m(b.ids)
    for layer in b.layers("pattern"):
        if layer not in b.layers("v") or layer not in b.layers("k"):
            continue
        pattern, q, k, v, z = (b.acts[f"{n}[{layer}]"] for n in ("pattern", "q", "k", "v", "z"))
        heads = pattern.shape[1]
        product = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(heads // v.shape[2], 2))
        exact = close(f"pattern x v = z [{layer}]", product, z)
        if not exact[0]:  # a sink may scale each query's output (GraniteMoeSwa): then z is parallel to the product
            factor = (product * z).sum(-1, keepdim=True) / product.pow(2).sum(-1, keepdim=True)
            exact = close(f"pattern x v = z up to a factor per query [{layer}]", product * factor, z)
        yield exact
        keys = k.repeat_interleave(heads // k.shape[2], 2)
        raw = torch.einsum("bqhd,bkhd->bhqk", q, keys).double()
        known = b.m.anatomy.scores.get(layer)
        factors = (
            [known] if known else [(q.shape[-1] ** -0.5, None), (1.0, None)]
        )  # written out: scaled before or after
        note = notes.get(id(b.m.anatomy.places["pattern", layer].module), {})
        added = sum(
            (t[..., -raw.shape[-1] :].double().clamp_min(-1e30) for t in note.get("added", ())), torch.zeros_like(raw)
        )
        gaps = [_content_gap(pattern.double(), raw, added, *f) for f in factors]
        error = min(gaps)
        yield error < 1e-3, error, f"q.k and positions give the pattern [{layer}]"


def _content_gap(pattern: Tensor, raw: Tensor, added: Tensor, factor: float, cap: float | None) -> float:
    """What log pattern - scores holds besides a normaliser per query and a bias per position: nothing, if right."""
    scores = raw * factor
    scores = (cap * (scores / cap).tanh() if cap else scores) + added
    seen = (pattern > 1e-5).all(0)  # the bias is the same in both texts, so it cancels between them
    rest = torch.where(seen, pattern.clamp_min(1e-30).log() - scores, math.nan)
    rest = rest - rest.nanmean(-1, keepdim=True)
    gap = (rest[0] - rest[1])[seen]
    return float(gap.abs().max()) if gap.numel() else 0.0


def stream(b: Bench) -> Iterator[Result]:
    for layer in range(b.m.n_layers - 1):
        if layer in b.layers("resid_post") and layer + 1 in b.layers("resid_pre"):
            yield close(
                f"resid_post[{layer}] = resid_pre[{layer + 1}]",
                b.acts[f"resid_post[{layer}]"],
                b.acts[f"resid_pre[{layer + 1}]"],
            )
    for layer in b.layers("resid_mid"):
        if layer in b.layers("attn_out"):
            mid, attn, pre = (b.acts[f"{n}[{layer}]"] for n in ("resid_mid", "attn_out", "resid_pre"))
            result = close(f"resid_mid = a resid_pre + b attn_out + c [{layer}]", fit(mid, pre, attn), mid, 1e-4)
            if not result[0] and layer in b.layers("ln1_scale"):  # MiniMax: the normalised stream is what goes on
                normed = pre / b.acts[f"ln1_scale[{layer}]"]
                result = close(
                    f"resid_mid = a norm(resid_pre) + b attn_out + c [{layer}]", fit(mid, normed, attn), mid, 1e-4
                )
            yield result
            alone = close("", fit(mid, pre), mid, 1e-4)[0]
            yield not alone, float(alone), f"attn_out takes part in resid_mid [{layer}]"


def experts(b: Bench) -> Iterator[Result]:
    for layer in b.layers("expert_out"):
        place = b.m.anatomy.places["expert_out", layer]
        returned = returned_by(b, place.module)
        e = b.acts.experts(layer)
        assert e.out is not None
        assert e.hidden is not None
        total = (e.weights[..., None] * e.out).sum(2)
        bias = getattr(place.module, "bias", None)  # JetMoE's block adds one behind its experts
        whole = returned.reshape(total.shape) - (bias if isinstance(bias, Tensor) else 0)
        yield close(f"sum of weight x out = experts [{layer}]", total, whole)
        n = undecorated.computing(place.module)
        rows = [r for r, i in enumerate(e.ids.flatten().tolist()) if i < n][:6]
        again = torch.stack(
            [b.m.expert_output(layer, int(e.ids.flatten()[r]), e.hidden.flatten(0, 2)[r : r + 1])[0] for r in rows]
        )
        yield close(f"out recomputed from hidden [{layer}]", again, e.out.flatten(0, 2)[rows])


def returned_by(b: Bench, module: torch.nn.Module) -> Tensor:
    """What a module returns in a plain run, by a bare hook."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        b.m(b.ids)
    finally:
        handle.remove()
    return seen[0]
