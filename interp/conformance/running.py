"""Identities of running: gradients, padding, caches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp import edits
from interp.activations import Tokens
from interp.conformance.bench import Bench, Result, close


def gradient(b: Bench) -> Iterator[Result]:
    acts = b.m.capture(b.ids, b.patterns("expert_ids"), logits=True, grad=True)
    loss = (acts.logits * b.random(*b.plain.shape)).sum()  # type: ignore[operator]
    wanted = [s for s in acts.sites if acts[s].is_floating_point() and acts[s].requires_grad]
    missing = [str(s) for s in acts.sites if s.name != "expert_ids" and s not in wanted]
    grads = torch.autograd.grad(loss, [acts[s] for s in wanted], allow_unused=True)
    missing += [str(s) for s, g in zip(wanted, grads, strict=True) if g is None or not bool(torch.isfinite(g).all())]
    yield not missing, float(len(missing)), f"no gradient at {', '.join(missing)}" if missing else "every site"
    # Slopes on short texts: where a router or sparse pattern switches within the step there is none, so try a few.
    errors: dict[str, float] = {}
    for start in range(3):
        tokens = b.ids[start % 2 : start % 2 + 1, start : start + 5]
        for site, error in _slopes(b, tokens, [s for s, e in errors.items() if e > 0.05] if errors else None).items():
            errors[site] = min(error, errors.get(site, math.inf))
        if all(e <= 0.05 for e in errors.values()):
            break
    for site, error in errors.items():
        yield error <= 0.05, error, f"slope along the gradient at {site}: off by {error:.1%}"


def _slopes(b: Bench, tokens: Tensor, only: list[str] | None) -> dict[str, float]:
    """For the last layer's site of each name: |difference quotient / gradient norm - 1|, at the best of a few steps."""
    names = only or b.patterns("expert_ids")
    acts = b.m.capture(tokens, names, logits=True, grad=True)
    assert acts.logits is not None
    weight = b.random(*acts.logits.shape)
    sites = {s.name: s for s in acts.sites if acts[s].requires_grad}
    grads = torch.autograd.grad((acts.logits * weight).sum(), [acts[s] for s in sites.values()], allow_unused=True)
    errors = {}
    for site, g in zip(sites.values(), grads, strict=True):
        if g is None or float(g.norm()) < 1e-4:
            continue
        slope, best = float(g.norm()), math.inf
        for step in (1e-2, 3e-3, 1e-3, 3e-2):
            values = []
            for sign in (1, -1):
                with b.m.intervene(edits.Edit(str(site), _Shift(sign * step * g.detach() / slope))):
                    values.append(float((b.m(tokens) * weight).double().sum()))
            best = min(best, abs((values[0] - values[1]) / (2 * step) - slope) / slope)
            if best < 0.02:
                break
        errors[str(site)] = best
    return errors


@dataclass(frozen=True, eq=False)
class _Shift:
    by: Tensor

    def __call__(self, h: Tensor, where: edits.Where) -> Tensor:
        return h + self.by


def padding(b: Bench) -> Iterator[Result]:
    m, n = b.m, b.ids.shape[1]
    names = b.patterns("pattern", "k", "v", "expert_out", "expert_hidden")
    short = b.ids[:1, : n - 4]
    mask = torch.ones_like(b.ids, dtype=torch.bool)
    mask[0, n - 4 :] = False
    right = Tokens(torch.cat([torch.nn.functional.pad(short, (0, 4), value=1), b.ids[1:]]), mask)
    alone = m.capture(short, names)
    for side in ("right", "left"):
        tokens = right.padded(side)
        acts = m.capture(tokens, names)
        real = acts.mask[0]
        worst, where = 0.0, ""
        for site in alone.sites:
            if alone[site].is_floating_point():
                error = float((acts[site][0][real] - alone[site][0]).abs().max()) / max(
                    1.0, float(alone[site].abs().max())
                )
                worst, where = max((worst, where), (error, str(site)))
        plain = m(tokens)
        inherent = float((plain[0][real] - m(short)[0]).abs().max()) > 1e-3  # the family itself minds padding
        note = f"{side} padding{f', worst at {where}' if worst > 5e-5 else ''}"
        if worst > 5e-5 and inherent:
            yield close(note + " (so does the model without us)", acts["logits"], plain)
        else:
            yield worst <= 5e-5, worst, note


def cache(b: Bench) -> Iterator[Result]:
    m, layers = b.m, b.layers("attn_out") or b.layers("resid_post")
    if not layers or not hasattr(m.hf, "generate"):
        return
    name = "resid_post" if b.layers("resid_post") else "attn_out"
    site, prompt = f"{name}[{layers[len(layers) // 2]}]", b.ids[:1, :6]
    v = 0.5 * b.random(b.acts[site].shape[-1])
    settings: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}
    plain = [m.generate(prompt, use_cache=use, **settings).new_ids.tolist() for use in (True, False)]
    inherent = plain[0] != plain[1]
    for scope in ("all", "generated", "last"):
        texts, traces = [], []
        for use_cache in (True, False):
            with m.intervene(edits.add(site, v, scope=scope)) as run:
                texts.append(m.generate(prompt, use_cache=use_cache, **settings).new_ids.tolist())
            trace = run.trace()
            traces.append(set(zip(trace.batch, trace.position, strict=True)))
        inherent = inherent or (texts[0] != texts[1] and _cache_gap(b) > 1e-3)
        same = traces[0] == traces[1] and (texts[0] == texts[1] or inherent)
        note = " (its own logits differ with and without cache)" if inherent else ""
        yield (
            same,
            float(not same),
            f"scope {scope}: text {texts[0] == texts[1]}, edited tokens {traces[0] == traces[1]}{note}",
        )


def _cache_gap(b: Bench) -> float:
    """How far the model's own logits move when the last tokens are computed one by one from a cache."""
    ids, n, gap = b.ids, b.ids.shape[1], 0.0
    with torch.no_grad():
        out = b.m.hf(input_ids=ids[:, : n - 4], attention_mask=torch.ones_like(ids[:, : n - 4]), use_cache=True)
        if getattr(out, "past_key_values", None) is None:
            return 0.0  # a family without a cache
        for t in range(n - 4, n):
            out = b.m.hf(
                input_ids=ids[:, t : t + 1],
                attention_mask=torch.ones_like(ids[:, : t + 1]),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            gap = max(gap, float((out.logits[:, -1] - b.plain[:, t]).abs().max()))
    return gap
