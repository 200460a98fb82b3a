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
from interp.hooks import attention, undecorated
from interp.model import Model
from interp.sites import KINDS, Site

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 1e-5

#: Identities that a family cannot satisfy by its own making, with the reason; they are reported, and not counted as ours.
KNOWN = {
    ("bitnet", "gradient"): "activations are rounded to 8 bits with a straight-through gradient, so slopes are not gradients",
    ("hrm_text", "gradient"): "gradients are cut between the passes of its loop by design",
}


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
    family = getattr(m.config, "model_type", "")
    findings = [f if f.ok or (family, f.check) not in KNOWN else Finding(f.check, True, f.error, KNOWN[family, f.check]) for f in findings]
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
    if not b.layers("pattern"):
        return
    with attention.observed(b.m.hf, eager=True) as notes:
        b.m(b.ids)
    for layer in b.layers("pattern"):
        if layer not in b.layers("v") or layer not in b.layers("k"):
            continue
        pattern, q, k, v, z = (b.acts[f"{n}[{layer}]"] for n in ("pattern", "q", "k", "v", "z"))
        heads = pattern.shape[1]
        product = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(heads // v.shape[2], 2))
        exact = _close(f"pattern x v = z [{layer}]", product, z)
        if not exact[0]:  # a sink may scale each query's output (GraniteMoeSwa): then z is parallel to the product
            factor = (product * z).sum(-1, keepdim=True) / product.pow(2).sum(-1, keepdim=True)
            exact = _close(f"pattern x v = z up to a factor per query [{layer}]", product * factor, z)
        yield exact
        keys = k.repeat_interleave(heads // k.shape[2], 2)
        raw = torch.einsum("bqhd,bkhd->bhqk", q, keys).double()
        known = b.m.anatomy.scores.get(layer)
        factors = [known] if known else [(q.shape[-1] ** -0.5, None), (1.0, None)]  # written out: scaled before or after
        note = notes.get(id(b.m.anatomy.places["pattern", layer].module), {})
        added = sum((t[..., -raw.shape[-1]:].double().clamp_min(-1e30) for t in note.get("added", ())), torch.zeros_like(raw))
        gaps = [_content_gap(pattern.double(), raw, added, *f) for f in factors]
        error = min(gaps)
        yield error < 1e-3, error, f"q.k and positions give the pattern [{layer}]"


def _content_gap(pattern: Tensor, raw: Tensor, added: Tensor, factor: float, cap: float | None) -> float:
    """What log pattern - scores holds besides a normaliser per query and a bias per position: nothing, if all is right."""
    scores = raw * factor
    scores = (cap * (scores / cap).tanh() if cap else scores) + added
    seen = (pattern > 1e-5).all(0)  # the bias is the same in both texts, so it cancels between them
    rest = torch.where(seen, pattern.clamp_min(1e-30).log() - scores, math.nan)
    rest = rest - rest.nanmean(-1, keepdim=True)
    gap = (rest[0] - rest[1])[seen]
    return float(gap.abs().max()) if gap.numel() else 0.0


def _stream(b: _Bench) -> Iterator[Result]:
    for layer in range(b.m.n_layers - 1):
        if layer in b.layers("resid_post") and layer + 1 in b.layers("resid_pre"):
            yield _close(f"resid_post[{layer}] = resid_pre[{layer + 1}]", b.acts[f"resid_post[{layer}]"], b.acts[f"resid_pre[{layer + 1}]"])
    for layer in b.layers("resid_mid"):
        if layer in b.layers("attn_out"):
            mid, attn, pre = (b.acts[f"{n}[{layer}]"] for n in ("resid_mid", "attn_out", "resid_pre"))
            result = _close(f"resid_mid = a resid_pre + b attn_out + c [{layer}]", _fit(mid, pre, attn), mid, 1e-4)
            if not result[0] and layer in b.layers("ln1_scale"):  # MiniMax: the normalised stream is what goes on
                normed = pre / b.acts[f"ln1_scale[{layer}]"]
                result = _close(f"resid_mid = a norm(resid_pre) + b attn_out + c [{layer}]", _fit(mid, normed, attn), mid, 1e-4)
            yield result


def _fit(target: Tensor, *parts: Tensor) -> Tensor:
    """The best ``sum a_i part_i + c``, with coefficients per dimension: multipliers, layer scales and biases are such."""
    rows = target.double().flatten(0, -2)
    columns = torch.stack([*(p.double().flatten(0, -2) for p in parts), torch.ones_like(rows)], -1).transpose(0, 1)
    weights = torch.linalg.lstsq(columns, rows.T[..., None]).solution
    return (columns @ weights)[..., 0].T.reshape(target.shape).to(target.dtype)


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
        bias = getattr(place.module, "bias", None)  # JetMoE's block adds one behind its experts
        whole = seen[0].reshape(total.shape) - (bias if isinstance(bias, Tensor) else 0)
        yield _close(f"sum of weight x out = experts [{layer}]", total, whole)
        n = undecorated.computing(place.module)
        rows = [r for r, i in enumerate(e.ids.flatten().tolist()) if i < n][:6]
        again = torch.stack([b.m.expert_output(layer, int(e.ids.flatten()[r]), e.hidden.flatten(0, 2)[r : r + 1])[0] for r in rows])
        yield _close(f"out recomputed from hidden [{layer}]", again, e.out.flatten(0, 2)[rows])


# -- writing ---------------------------------------------------------------------------------------------------
def _surgery(b: _Bench) -> Iterator[Result]:
    """Zeroing at a site against zeroing the weights that read it."""
    m = b.m
    for layer in b.layers("z")[-1:]:
        out, d = _output_projection(b, layer), m.anatomy.sizes["z", layer]["d_head"]
        if out is not None:
            with _zeroed(out, columns=slice(d, 2 * d)):
                by_hand = m(b.ids)
            yield _close(f"head 1 of layer {layer}", b.logits(edits.zero(f"z[{layer}, head=1]")), by_hand)
            if layer in b.layers("pattern"):
                yield _close(f"pattern of head 1 of layer {layer}", b.logits(edits.zero(f"pattern[{layer}, head=1]")), by_hand)
    for layer in b.layers("mlp_hidden")[-1:]:
        with _zeroed(m.anatomy.places["mlp_hidden", layer].module, columns=slice(3, 4)):
            by_hand = m(b.ids)
        yield _close(f"neuron 3 of layer {layer}", b.logits(edits.zero(f"mlp_hidden[{layer}, neuron=3]")), by_hand)
    for layer in b.layers("expert_out")[-1:]:
        place, expert = m.anatomy.places["expert_out", layer], int(b.acts[f"expert_ids[{layer}]"].flatten()[0])
        with _weights_zeroed(undecorated.output_weights(place.module, expert)):
            by_hand = m(b.ids)
        for name in ("expert_out", "expert_weight"):
            yield _close(f"{name} of expert {expert} in layer {layer}", b.logits(edits.zero(f"{name}[{layer}, expert={expert}]")), by_hand)
    for layer in b.layers("shared_out")[-1:]:
        module = m.anatomy.places["shared_out", layer].module
        weights = [p for p in module.parameters() if p.dim() >= 2 and p.shape[-2 if p.dim() == 3 else 0] == m.d_model]
        if weights:
            with _weights_zeroed([weights[-1], *(p for p in module.parameters() if p.dim() == 1 and p.shape[0] == m.d_model)]):
                by_hand = m(b.ids)
            yield _close(f"shared expert of layer {layer}", b.logits(edits.zero(f"shared_out[{layer}]")), by_hand)


def _output_projection(b: _Bench, layer: int) -> nn.Module | None:
    """The linear that reads z, all heads side by side; None where something stands between, or layers share it."""
    shared = [p.data_ptr() for mod in b.m.hf.modules() for p in mod.parameters(recurse=False)]
    module, z = b.m.anatomy.places["z", layer].module, b.acts[f"z[{layer}]"].flatten(2)
    found: list[nn.Module] = []

    def note(mod: nn.Module, args: Any, out: Any) -> None:
        if shared.count(mod.weight.data_ptr()) > 1:  # type: ignore[union-attr]
            return
        if args and args[0].numel() == z.numel() and torch.allclose(args[0].reshape(z.shape), z, atol=1e-4):
            found.append(mod)

    inside = [mod for mod in module.modules() if isinstance(getattr(mod, "weight", None), Tensor) and mod.weight.dim() == 2]
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


def _twins(b: _Bench) -> Iterator[Result]:
    for layer in sorted(set(b.layers("q")) & set(b.layers("k")))[-1:]:
        yield _close(f"2 q = 2 k [{layer}]", b.logits(edits.scale(f"q[{layer}]", 1.5)), b.logits(edits.scale(f"k[{layer}]", 1.5)), 2e-5)
        yield _close(f"2 v = 2 z [{layer}]", b.logits(edits.scale(f"v[{layer}]", 2.0)), b.logits(edits.scale(f"z[{layer}]", 2.0)), 2e-5)
    for layer in b.layers("resid_pre")[-1:]:
        v = b.random(b.acts[f"resid_pre[{layer}]"].shape[-1])
        after = b.logits(edits.add(f"resid_pre[{layer}]", v))
        if layer - 1 in b.layers("resid_post"):
            yield _close(f"resid_pre[{layer}] = resid_post[{layer - 1}]", b.logits(edits.add(f"resid_post[{layer - 1}]", v)), after)
        yield _close(f"resid_pre[{layer}] = a bare hook", _bare_hook(b, layer, v), after)
    for layer in b.layers("resid_mid")[-1:]:
        if layer not in b.layers("mlp_out"):
            continue
        v, mid, post = b.random(b.m.d_model), b.acts[f"resid_mid[{layer}]"], b.acts[f"resid_post[{layer}]"]
        with b.m.intervene(edits.add(f"resid_mid[{layer}]", v), edits.freeze(f"mlp_out[{layer}]", b.acts)):
            moved = b.m.capture(b.ids, f"resid_post[{layer}]")[f"resid_post[{layer}]"]
        shift = moved - post
        yield bool(shift.abs().max() > 1e-3), 0.0, f"resid_mid[{layer}] is written to"
        if _close("", _fit(post, mid, b.acts[f"mlp_out[{layer}]"]), post, 1e-4)[0]:  # the layer ends in a plain sum
            yield _close(f"resid_mid[{layer}] passes on along the residual path", shift.mean((0, 1)).expand_as(shift), shift, 1e-4)


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
        site, changed = f"expert_ids[{layer}]", False
        for expert in range(b.m.n_experts):
            before = float((b.acts[site] == expert).any(-1).float().mean())
            for push in (30.0, -30.0):
                with b.m.intervene(edits.add(f"router_logits[{layer}, expert={expert}]", push)):
                    ids = b.m.capture(b.ids, site)[site]
                share = float((ids == expert).any(-1).float().mean())
                changed |= share != before
                yield (share >= before if push > 0 else share <= before), abs(share - before), (
                    f"logit {push:+.0f} on expert {expert} of layer {layer}: chosen by {before:.0%} -> {share:.0%} of tokens")
        yield changed, 0.0, f"router_logits[{layer}] decides"


def _gradient(b: _Bench) -> Iterator[Result]:
    acts = b.m.capture(b.ids, b.patterns("expert_ids"), logits=True, grad=True)
    loss = (acts.logits * b.random(*b.plain.shape)).sum()  # type: ignore[operator]
    wanted = [s for s in acts.sites if acts[s].is_floating_point() and acts[s].requires_grad]
    missing = [str(s) for s in acts.sites if s.name != "expert_ids" and s not in wanted]
    grads = torch.autograd.grad(loss, [acts[s] for s in wanted], allow_unused=True)
    missing += [str(s) for s, g in zip(wanted, grads, strict=True) if g is None or not bool(torch.isfinite(g).all())]
    yield not missing, float(len(missing)), f"no gradient at {', '.join(missing)}" if missing else "every site"
    # Slopes on short texts: where a router or a sparse pattern switches within the step there is no slope, so a few are tried.
    errors: dict[str, float] = {}
    for start in range(3):
        tokens = b.ids[start % 2 : start % 2 + 1, start : start + 5]
        for site, error in _slopes(b, tokens, [s for s, e in errors.items() if e > 0.05] if errors else None).items():
            errors[site] = min(error, errors.get(site, math.inf))
        if all(e <= 0.05 for e in errors.values()):
            break
    for site, error in errors.items():
        yield error <= 0.05, error, f"slope along the gradient at {site}: off by {error:.1%}"


def _slopes(b: _Bench, tokens: Tensor, only: list[str] | None) -> dict[str, float]:
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


# -- batches and caches ----------------------------------------------------------------------------------------
def _padding(b: _Bench) -> Iterator[Result]:
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
                error = float((acts[site][0][real] - alone[site][0]).abs().max()) / max(1.0, float(alone[site].abs().max()))
                worst, where = max((worst, where), (error, str(site)))
        plain = m(tokens)
        inherent = float((plain[0][real] - m(short)[0]).abs().max()) > 1e-3  # the family itself minds padding
        note = f"{side} padding{f', worst at {where}' if worst > 5e-5 else ''}"
        if worst > 5e-5 and inherent:
            yield _close(note + " (so does the model without us)", acts["logits"], plain)
        else:
            yield worst <= 5e-5, worst, note


def _cache(b: _Bench) -> Iterator[Result]:
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
        inherent = inherent or texts[0] != texts[1] and _cache_gap(b) > 1e-3
        same = traces[0] == traces[1] and (texts[0] == texts[1] or inherent)
        note = " (its own logits differ with and without cache)" if inherent else ""
        yield same, float(not same), f"scope {scope}: text {texts[0] == texts[1]}, edited tokens {traces[0] == traces[1]}{note}"


def _cache_gap(b: _Bench) -> float:
    """How far the model's own logits move when the last tokens are computed one by one from a cache."""
    ids, n, gap = b.ids, b.ids.shape[1], 0.0
    with torch.no_grad():
        out = b.m.hf(input_ids=ids[:, : n - 4], attention_mask=torch.ones_like(ids[:, : n - 4]), use_cache=True)
        if getattr(out, "past_key_values", None) is None:
            return 0.0  # a family without a cache
        for t in range(n - 4, n):
            out = b.m.hf(input_ids=ids[:, t : t + 1], attention_mask=torch.ones_like(ids[:, : t + 1]),
                         past_key_values=out.past_key_values, use_cache=True)
            gap = max(gap, float((out.logits[:, -1] - b.plain[:, t]).abs().max()))
    return gap


_CHECKS: dict[str, Callable[[_Bench], Iterator[Result]]] = {
    "logits": _logits, "attention": _attention, "stream": _stream, "experts": _experts, "surgery": _surgery, "twins": _twins,
    "router": _router, "gradient": _gradient, "padding": _padding, "cache": _cache,
}


#: What a family must show, besides passing every identity, to count as whole.
CORE = ("embed", "resid_pre", "resid_post", "attn_out", "q", "k", "v", "pattern", "z", "mlp_out", "logits")
WHOLE = {
    "dense": (*CORE, "mlp_hidden"),
    "moe": (*CORE, "router_logits", "expert_ids", "expert_weight", "expert_hidden", "expert_out"),
}


def family(name: str) -> dict[str, Any]:
    """One line of the table: does this family, tiny and random, pass; what it lacks, and why."""
    from interp.zoo.families import FAMILIES
    from interp.zoo.tiny import tiny

    kind = FAMILIES[name].kind if name in FAMILIES else "dense"
    row: dict[str, Any] = {"family": name, "kind": kind, "whole": False, "logit_error": math.nan, "failed": "", "refused": ""}
    try:
        m = Model(tiny(name), name=name)
        findings = check(m)
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}"}
    places = {n for n, _ in m.anatomy.places}
    missing = [n for n in WHOLE["dense" if kind == "dense" else "moe"] if n not in places]
    reasons = {why for n in missing for (site, _), why in m.anatomy.absent.items() if site == n}
    failed = sorted({f"{f.check} ({f.note})" for f in findings if not f.ok})
    return row | {
        "whole": not failed and not missing, "logit_error": max(f.error for f in findings if f.check == "logits"),
        "failed": "; ".join(failed), "refused": f"{', '.join(missing)}: {sorted(reasons)[0]}" if missing else "",
    }


def table(families: list[str] | None = None) -> pd.DataFrame:
    """Conformance of tiny random models of transformers families, one line each.

    Columns: family, kind, whole, logit_error (max abs, float32), failed (identities that do not hold), refused (core
    sites that the family does not have, with the reason).
    """
    import pandas as pd

    from interp.zoo.families import FAMILIES

    return pd.DataFrame([family(name) for name in families or FAMILIES])


def totals(frame: pd.DataFrame) -> pd.DataFrame:
    """Families per kind: all, whole, passing with refused sites, failing."""
    rows = frame.assign(partly=~frame.whole & (frame.failed == ""), failing=frame.failed != "")
    return rows.groupby("kind")[["whole", "partly", "failing"]].sum().assign(families=rows.groupby("kind").size())
