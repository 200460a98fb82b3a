"""Conformance: does interp read and write this model rightly? Identities that must hold, whatever the family.

    interp.conformance.check(model)            a list of `Finding`s: one per identity, with its error
    interp.conformance.table(["olmoe", ...])   the same over tiny random models of transformers families

Each identity is an oracle that does not go through the code it tests:

    logits      a run under full capture gives the plain run's logits
    attention   pattern x v = z;   log pattern - scaled q.k depends on positions only (softmax, masks and biases do)
    stream      resid_mid = a resid_pre + b attn_out;   the next layer starts where this one ended
    experts     sum over slots of weight x out = what the experts module returned
    surgery     zeroing a head, neuron, expert or shared expert = zeroing the weights that read it
    twins       scaling q = scaling k;  scaling v = scaling z;  adding to resid_pre[l+1] = adding to resid_post[l]
    router      pushing one expert's logit up puts it into every token's choice; pushing it down takes it out
    gradient    the derivative of an edit, by differences, = the gradient that reaches the site
    padding     left, right or no padding: the same activations at the same tokens
    cache       generating with and without KV cache: the same edited tokens, the same text
    restored    afterwards: the same hooks, implementations, weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp import edits
from interp.activations import Activations, Tokens
from interp.model import Model
from interp.sites import KINDS, Site

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Finding:
    """One identity on one model: the largest absolute error, and whether that is within tolerance."""

    check: str
    ok: bool
    error: float
    note: str = ""


def check(m: Model, ids: Tensor | None = None, seed: int = 0) -> list[Finding]:
    """Runs every identity that applies to this model. `ids` [batch, pos] defaults to random tokens, 2 x 10."""
    generator = torch.Generator().manual_seed(seed)
    if ids is None:
        ids = torch.randint(3, min(m.d_vocab, 1000), (2, 10), generator=generator).to(m.device)
    bench = _Bench(m, ids, generator)
    before = bench.state()
    findings: list[Finding] = []
    for name, run in _CHECKS.items():
        try:
            findings += [Finding(name, *f) for f in run(bench)]
        except Exception as error:  # a crash of one identity is a finding; the others still count
            findings.append(Finding(name, False, math.inf, f"{type(error).__name__}: {error}"))
    after = bench.state()
    wrong = [key for key in before if before[key] != after[key]]
    findings.append(Finding("restored", not wrong, 0.0 if not wrong else math.inf, ", ".join(wrong)))
    return findings


Result = tuple[bool, float, str]


def _close(name: str, a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> Result:
    """Largest absolute difference, against a tolerance that grows with the size of what is compared."""
    error = float((a.float() - b.float()).abs().max()) if a.numel() else 0.0
    return error <= tolerance * max(1.0, float(b.float().abs().max())), error, name


class _Bench:
    """One model on one batch, with its plain logits and its activations at every site."""

    def __init__(self, m: Model, ids: Tensor, generator: torch.Generator) -> None:
        self.m, self.ids, self.generator = m, ids, generator
        self.present = [n for n in KINDS if m.anatomy.having(n) or (n, None) in m.anatomy.places]
        with torch.no_grad():
            self.plain = m.hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        self._acts: Activations | None = None

    @property
    def acts(self) -> Activations:
        if self._acts is None:
            self._acts = self.m.capture(self.ids, self.patterns(), logits=True)
        return self._acts

    def patterns(self, *without: str) -> list[str]:
        return [f"{n}[*]" if KINDS[n].layered else n for n in self.present if n not in without]

    def layers(self, name: str) -> list[int]:
        return self.m.anatomy.having(name)

    def logits(self, *changes: Any) -> Tensor:
        with self.m.intervene(*changes):
            return self.m(self.ids)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.m.device, self.m.dtype)

    def state(self) -> dict[str, Any]:
        hf = self.m.hf
        configs = {id(c): c for mod in hf.modules() if (c := getattr(mod, "config", None)) is not None}
        return {
            "hooks": sum(len(mod._forward_hooks) + len(mod._forward_pre_hooks) + len(mod._backward_hooks) for mod in hf.modules()),
            "implementations": [(getattr(c, "_attn_implementation_internal", None), getattr(c, "_experts_implementation_internal", None))
                                for c in configs.values()],
            "training": hf.training,
            "weights": self.m.__class__.fingerprint.func(self.m),  # type: ignore[attr-defined]
        }


# -- reading ---------------------------------------------------------------------------------------------------
def _logits(b: _Bench) -> Iterator[Result]:
    yield _close("all sites", b.acts.logits, b.plain)  # type: ignore[arg-type]
    light = b.m.capture(b.ids, b.patterns("pattern", "expert_hidden", "expert_out"), logits=True)
    yield _close("all sites but pattern and expert insides", light.logits, b.plain)  # type: ignore[arg-type]


def _attention(b: _Bench) -> Iterator[Result]:
    for layer in b.layers("pattern"):
        pattern, q, k, v, z = (b.acts[f"{n}[{layer}]"] for n in ("pattern", "q", "k", "v", "z"))
        heads = pattern.shape[1]
        values = v.repeat_interleave(heads // v.shape[2], 2)
        yield _close(f"pattern x v = z [{layer}]", torch.einsum("bhqk,bkhd->bqhd", pattern, values), z)
        keys = k.repeat_interleave(heads // k.shape[2], 2)
        size = b.m.anatomy.sizes["q", layer]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys).double() * _scaling(b, layer)
        cap = size.get("softcap") or 0
        if cap:
            scores = cap * (scores / cap).tanh()
        seen = pattern.double() > 1e-5
        rest = torch.where(seen, pattern.double().clamp_min(1e-30).log() - scores, math.nan)
        rest = rest - rest.nanmean(-1, keepdim=True)  # softmax's normaliser is one number per query
        both = seen.all(0)  # what is left must not depend on the content: compare two texts
        rest = rest - torch.where(both, rest, math.nan).nanmean(-1, keepdim=True)
        gap = (rest[0] - rest[1])[both]
        yield _close(f"q.k and positions give the pattern [{layer}]", gap, torch.zeros_like(gap), 1e-3)


def _scaling(b: _Bench, layer: int) -> float:
    size: dict[str, Any] = b.m.anatomy.sizes["q", layer]
    return float(size["scaling"]) if size.get("scaling") else float(size["d_head"]) ** -0.5


def _stream(b: _Bench) -> Iterator[Result]:
    for layer in range(b.m.n_layers - 1):
        if layer in b.layers("resid_post") and layer + 1 in b.layers("resid_pre"):
            yield _close(f"resid_post[{layer}] = resid_pre[{layer + 1}]", b.acts[f"resid_post[{layer}]"], b.acts[f"resid_pre[{layer + 1}]"])
    for layer in b.layers("resid_mid"):
        if layer in b.layers("attn_out"):
            target = b.acts[f"resid_mid[{layer}]"]
            yield _close(f"resid_mid = a resid_pre + b attn_out [{layer}]", _fit(
                target, b.acts[f"resid_pre[{layer}]"], b.acts[f"attn_out[{layer}]"]), target)


def _fit(target: Tensor, *parts: Tensor) -> Tensor:
    """The best combination of `parts`, one coefficient each."""
    columns = torch.stack([p.double().flatten() for p in parts], 1)
    weights = torch.linalg.lstsq(columns, target.double().flatten()[:, None]).solution
    return (columns @ weights).view_as(target).to(target.dtype)


def _experts(b: _Bench) -> Iterator[Result]:
    for layer in b.layers("expert_out"):
        place = b.m.anatomy.places["expert_out", layer]
        seen: list[Tensor] = []
        handle = place.module.register_forward_hook(lambda mod, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        try:
            b.m(b.ids)
        finally:
            handle.remove()
        e = b.acts.experts(layer)
        assert e.out is not None and e.hidden is not None
        total = (e.weights[..., None] * e.out).sum(2)
        yield _close(f"sum of weight x out = experts [{layer}]", total, seen[0].reshape(total.shape))
        again = torch.stack([b.m.expert_output(layer, int(i), h[None])[0] for i, h in
                             zip(e.ids.flatten()[:6].tolist(), e.hidden.flatten(0, 2)[:6], strict=True)])
        yield _close(f"out recomputed from hidden [{layer}]", again, e.out.flatten(0, 2)[:6])


# -- writing ---------------------------------------------------------------------------------------------------
def _surgery(b: _Bench) -> Iterator[Result]:
    """Zeroing at a site against zeroing the weights that read it."""
    m = b.m
    for layer in b.layers("z")[-1:]:
        size = m.anatomy.sizes["z", layer]
        out = _output_projection(b, layer, size["head"] * size["d_head"])
        if out is not None:
            d = size["d_head"]
            with _zeroed(out, columns=slice(d, 2 * d)):
                by_hand = m(b.ids)
            yield _close(f"head 1 of layer {layer}", b.logits(edits.zero(f"z[{layer}, head=1]")), by_hand)
            yield _close(f"pattern of head 1 of layer {layer}", b.logits(edits.zero(f"pattern[{layer}, head=1]")), by_hand)
    for layer in b.layers("mlp_hidden")[-1:]:
        with _zeroed(m.anatomy.places["mlp_hidden", layer].module, columns=slice(3, 4)):
            by_hand = m(b.ids)
        yield _close(f"neuron 3 of layer {layer}", b.logits(edits.zero(f"mlp_hidden[{layer}, neuron=3]")), by_hand)
    for layer in b.layers("expert_out")[-1:]:
        place, expert = m.anatomy.places["expert_out", layer], int(b.acts[f"expert_ids[{layer}]"].flatten()[0])
        with _expert_zeroed(place.module, expert):
            by_hand = m(b.ids)
        for name in ("expert_out", "expert_weight"):
            yield _close(f"{name} of expert {expert} in layer {layer}", b.logits(edits.zero(f"{name}[{layer}, expert={expert}]")), by_hand)
    for layer in b.layers("shared_out")[-1:]:
        module = m.anatomy.places["shared_out", layer].module
        linears = [mod for mod in module.modules() if isinstance(getattr(mod, "weight", None), Tensor) and mod.weight.dim() == 2]
        with _zeroed(linears[-1]):
            by_hand = m(b.ids)
        yield _close(f"shared expert of layer {layer}", b.logits(edits.zero(f"shared_out[{layer}]")), by_hand)


def _output_projection(b: _Bench, layer: int, width: int) -> nn.Module | None:
    """The linear that reads z: the last one inside the attention module whose input is all heads side by side."""
    found: list[nn.Module] = []
    module = b.m.anatomy.places["z", layer].module
    inside = [mod for mod in module.modules() if isinstance(getattr(mod, "weight", None), Tensor) and mod.weight.dim() == 2]
    handles = [mod.register_forward_hook(lambda mod, args, out: found.append(mod) if args[0].shape[-1] == width else None) for mod in inside]
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
    kept = weight.detach().clone(), None if bias is None else bias.detach().clone()
    with torch.no_grad():
        (weight.T if not transposed else weight)[columns] = 0
        if columns == slice(None) and bias is not None:
            bias.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept[0])
            if kept[1] is not None:
                bias.copy_(kept[1])


@contextmanager
def _expert_zeroed(module: Any, expert: int) -> Iterator[None]:
    from interp.hooks import undecorated

    rows = undecorated.output_weights(module, expert)
    kept = [row.detach().clone() for row in rows]
    with torch.no_grad():
        for row in rows:
            row.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for row, old in zip(rows, kept, strict=True):
                row.copy_(old)


def _twins(b: _Bench) -> Iterator[Result]:
    for layer in b.layers("q")[-1:]:
        yield _close(f"2 q = 2 k [{layer}]", b.logits(edits.scale(f"q[{layer}]", 1.5)), b.logits(edits.scale(f"k[{layer}]", 1.5)), 2e-5)
        yield _close(f"2 v = 2 z [{layer}]", b.logits(edits.scale(f"v[{layer}]", 2.0)), b.logits(edits.scale(f"z[{layer}]", 2.0)), 2e-5)
    streams = [i for i in b.layers("resid_pre")[1:] if b.acts[f"resid_pre[{i}]"].dim() == 3]
    for layer in streams[-1:]:
        v = b.random(b.m.d_model)
        after = b.logits(edits.add(f"resid_pre[{layer}]", v))
        yield _close(f"resid_pre[{layer}] = resid_post[{layer - 1}]", b.logits(edits.add(f"resid_post[{layer - 1}]", v)), after)
        yield _close(f"resid_pre[{layer}] = a bare hook", _bare_hook(b, layer, v), after)
    for layer in b.layers("resid_mid")[-1:]:
        if layer not in b.layers("mlp_out") or b.m.anatomy.places["resid_mid", layer].how != "stream":
            continue
        v = b.random(b.m.d_model)
        with b.m.intervene(edits.add(f"resid_mid[{layer}]", v), edits.freeze(f"mlp_out[{layer}]", b.acts)):
            moved = b.m.capture(b.ids, f"resid_post[{layer}]")[f"resid_post[{layer}]"]
        shift = moved - b.acts[f"resid_post[{layer}]"]
        yield _close(f"resid_mid[{layer}] passes on along the residual path", _fit(shift, v.expand_as(shift)), shift, 1e-4)
        yield bool(shift.abs().max() > 1e-3), 0.0, f"resid_mid[{layer}] is written to"


def _bare_hook(b: _Bench, layer: int, v: Tensor) -> Tensor:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return ((args[0] + v, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kwargs["hidden_states"] + v})

    handle = b.m.anatomy.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return b.m(b.ids)
    finally:
        handle.remove()


def _router(b: _Bench) -> Iterator[Result]:
    for layer in b.layers("router_logits")[-1:]:
        for expert in (0, b.m.n_experts - 1):
            for push, share in ((30.0, 1.0), (-30.0, 0.0)):
                with b.m.intervene(edits.add(f"router_logits[{layer}, expert={expert}]", push)):
                    ids = b.m.capture(b.ids, f"expert_ids[{layer}]")[f"expert_ids[{layer}]"]
                got = float((ids == expert).any(-1).float().mean())
                yield got == share, abs(got - share), f"logit {push:+.0f} on expert {expert} of layer {layer}: in {got:.0%} of tokens"


def _gradient(b: _Bench) -> Iterator[Result]:
    acts = b.m.capture(b.ids, b.patterns("expert_ids"), logits=True, grad=True)
    weight = b.random(*b.plain.shape)
    loss = (acts.logits * weight).sum()  # type: ignore[operator]
    wanted = [s for s in acts.sites if acts[s].is_floating_point() and acts[s].requires_grad]
    missing = [str(s) for s in acts.sites if s.name != "expert_ids" and s not in wanted]
    grads = torch.autograd.grad(loss, [acts[s] for s in wanted], allow_unused=True)
    missing += [str(s) for s, g in zip(wanted, grads, strict=True) if g is None or not bool(torch.isfinite(g).all())]
    yield not missing, float(len(missing)), f"no gradient at {', '.join(missing)}" if missing else "every site"
    last: dict[str, tuple[Site, Tensor]] = {s.name: (s, g) for s, g in zip(wanted, grads, strict=True) if g is not None}
    for site, g in last.values():
        direction = g.detach() / g.detach().norm().clamp_min(1e-20)
        slope = float(g.norm())
        if slope < 1e-4:
            continue
        best = math.inf
        for step in (3e-2, 1e-2, 3e-3, 1e-3):
            values = []
            for sign in (1, -1):
                edit = edits.Edit(str(site), _Shift(sign * step * direction))
                values.append(float((b.logits(edit) * weight).double().sum()))
            best = min(best, abs((values[0] - values[1]) / (2 * step) - slope) / slope)
            if best < 0.02:
                break
        yield best < 0.05, best, f"slope along the gradient at {site}: off by {best:.1%}"


@dataclass(frozen=True, eq=False)
class _Shift:
    by: Tensor

    def __call__(self, h: Tensor, where: edits.Where) -> Tensor:
        return h + self.by


# -- batches and caches ----------------------------------------------------------------------------------------
def _padding(b: _Bench) -> Iterator[Result]:
    m, names = b.m, [p for p in b.patterns("pattern", "k", "v", "logits", "expert_out", "expert_hidden")]
    n = b.ids.shape[1]
    short = b.ids[:1, : n - 4]
    ids = torch.cat([torch.nn.functional.pad(short, (0, 4), value=1), b.ids[1:]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, n - 4 :] = False
    right = Tokens(ids, mask)
    alone = m.capture(short, names)
    for side in ("right", "left"):
        acts = m.capture(right.padded(side), names)
        real = acts.mask[0]
        worst, where = 0.0, ""
        for site in alone.sites:
            if alone[site].dtype == torch.long:
                continue
            error = float((acts[site][0][real] - alone[site][0]).abs().max())
            scale = max(1.0, float(alone[site].abs().max()))
            if error / scale > worst:
                worst, where = error / scale, str(site)
        yield worst <= 5e-5, worst, f"{side} padding{f', worst at {where}' if where else ''}"


def _cache(b: _Bench) -> Iterator[Result]:
    m = b.m
    layers = b.layers("resid_post")
    site = f"resid_post[{layers[len(layers) // 2]}]"
    if b.acts[site].dim() != 3:
        return
    v = 0.5 * b.random(m.d_model)
    prompt = b.ids[:1, :6]
    for scope in ("all", "generated", "last"):
        runs = []
        for use_cache in (True, False):
            with m.intervene(edits.add(site, v, scope=scope)) as run:
                out = m.generate(prompt, max_new_tokens=4, use_cache=use_cache, eos_token_id=None)
            trace = run.trace()
            runs.append((out.new_ids.tolist(), sorted(zip(trace.batch, trace.position, trace.token, strict=True))))
        same_text, same_trace = runs[0][0] == runs[1][0], runs[0][1] == runs[1][1]
        yield same_text and same_trace, 0.0 if same_text and same_trace else 1.0, (
            f"scope {scope}: text {'same' if same_text else 'differs'}, edited tokens {'same' if same_trace else 'differ'}")


_CHECKS: dict[str, Callable[[_Bench], Iterator[Result]]] = {
    "logits": _logits, "attention": _attention, "stream": _stream, "experts": _experts, "surgery": _surgery, "twins": _twins,
    "router": _router, "gradient": _gradient, "padding": _padding, "cache": _cache,
}


def table(families: list[str] | None = None, *, details: bool = False) -> pd.DataFrame:
    """Conformance of tiny random models of transformers families: a line each (or, with `details`, one per identity)."""
    import pandas as pd

    from interp.zoo.families import FAMILIES
    from interp.zoo.tiny import tiny

    rows: list[dict[str, Any]] = []
    for family in families or list(FAMILIES):
        kind = FAMILIES[family].kind if family in FAMILIES else ""
        try:
            m = Model(tiny(family), name=family)
            findings = check(m)
        except Exception as error:
            rows.append({"family": family, "kind": kind, "whole": False, "failed": f"{type(error).__name__}: {error}"})
            continue
        if details:
            rows += [{"family": family, "kind": kind, **f.__dict__} for f in findings]
            continue
        failed = sorted({f.check for f in findings if not f.ok})
        absent = sorted({n for n, _ in m.anatomy.absent} - {n for n, _ in m.anatomy.places})
        rows.append({"family": family, "kind": kind, "whole": not failed, "failed": ", ".join(failed),
                     "logit_error": max((f.error for f in findings if f.check == "logits"), default=math.nan),
                     "absent": ", ".join(absent)})
    return pd.DataFrame(rows)
