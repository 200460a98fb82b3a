"""Forward passes written out by hand: the oracle of what a site holds and of what an edit there must do.

One function per architecture, in plain torch, from the weights alone: no module of transformers runs, nothing of
interp is used. Heads, queries, tokens and experts are looped over one by one, as on a blackboard. Each function calls
``see(name, layer, h)`` at every place that is a site: it writes down what passes and lets an edit change it.

    logits, values = literal.run(hf, ids, {"z[1]": lambda h: 2 * h})

Five architectures, chosen for what they differ in, and a sixth for the shared expert:

    llama       grouped heads, rotary positions, RMS norm, gated MLP
    gpt2        learned positions, LayerNorm, biases, weights kept as [in, out]
    gemma2      norms before and behind both blocks, capped scores and logits, sliding window
    olmoe       experts: softmax over all, then the best k; norms on q and k
    gpt_oss     attention sinks, YaRN, biased experts with interleaved, clamped gates; the best k, then softmax
    qwen2_moe   experts beside a shared one that has a gate of its own
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Edits = Mapping[str, Callable[[Tensor], Tensor]]
Scale = Callable[[Tensor], Tensor]


class See:
    """Writes down the value at each site, after the edit there, if there is one."""

    def __init__(self, edits: Edits) -> None:
        self.edits, self.values = edits, dict[str, Tensor]()

    def __call__(self, name: str, layer: int | None, h: Tensor) -> Tensor:
        site = name if layer is None else f"{name}[{layer}]"
        self.values[site] = self.edits[site](h) if site in self.edits else h
        return self.values[site]

    def at(self, name: str, layer: int | None = None) -> Scale:
        return lambda h: self(name, layer, h)


@torch.no_grad()
def run(hf: Any, ids: Tensor, edits: Edits | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [batch, pos, vocab] and the value at every site, under `edits`."""
    see = See(edits or {})
    return _FORWARD[hf.config.model_type](hf, dict(hf.state_dict()), ids, see), see.values


# -- parts -----------------------------------------------------------------------------------------------------
def rms(x: Tensor, weight: Tensor, eps: float, see: Scale = lambda s: s) -> Tensor:
    """x / s * weight, with s the root mean square, which `see` is shown."""
    return x / see((x.pow(2).mean(-1, keepdim=True) + eps).sqrt()) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, see: Scale) -> Tensor:
    return rms(x - x.mean(-1, keepdim=True), weight, eps, see) + bias


def heads_of(x: Tensor, d_head: int) -> Tensor:
    return x.reshape(*x.shape[:2], -1, d_head)  # [batch, pos, head, d_head]


def rotate(x: Tensor, frequencies: list[float], stretch: float = 1.0) -> Tensor:
    """Each pair (i, i + half) of a head turns by position x frequency i."""
    half, turned = x.shape[-1] // 2, []
    for pos in range(x.shape[1]):
        cos = stretch * torch.tensor([math.cos(pos * f) for f in frequencies])
        sin = stretch * torch.tensor([math.sin(pos * f) for f in frequencies])
        a, b = x[:, pos, :, :half], x[:, pos, :, half:]
        turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
    return torch.stack(turned, 1)


def plain_frequencies(theta: float, d_head: int) -> list[float]:
    return [theta ** (-2 * i / d_head) for i in range(d_head // 2)]


def yarn_frequencies(rope: Mapping[str, float], d_head: int) -> tuple[list[float], float]:
    """YaRN (Peng et al. 2023, eq. 20-23): slow pairs are interpolated by `factor`, quick ones kept, a ramp between."""

    def pair_with(turns: float) -> float:  # the pair that turns this often over the original context
        wavelength = rope["original_max_position_embeddings"] / turns
        return d_head / 2 * math.log(wavelength / (2 * math.pi)) / math.log(rope["rope_theta"])

    low, high = max(pair_with(rope["beta_fast"]), 0), min(pair_with(rope["beta_slow"]), d_head - 1)
    out = []
    for i, f in enumerate(plain_frequencies(rope["rope_theta"], d_head)):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        out.append(f / rope["factor"] * ramp + f * (1 - ramp))
    return out, 0.1 * math.log(rope["factor"]) + 1


def attend(see: See, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, *, window: int | None = None,
           cap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """q, k, v [batch, pos, head, d_head] -> z, heads side by side [batch, pos, head * d_head]."""
    q, k, v = see("q", layer, q), see("k", layer, k), see("v", layer, v)
    batch, n, heads, _ = q.shape
    group = heads // k.shape[2]  # query heads that share a key-value head
    pattern = q.new_zeros(batch, heads, n, n)
    for head in range(heads):
        for query in range(n):
            first = 0 if window is None else max(0, query - window + 1)
            keys = k[:, first : query + 1, head // group]
            scores = (keys @ q[:, query, head, :, None])[..., 0] * scale
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            if sinks is not None:  # one more key, with a learned score and no value
                scores = torch.cat([scores, sinks[head].expand(batch, 1)], 1)
            pattern[:, head, query, first : query + 1] = scores.softmax(-1)[:, : keys.shape[1]]
    pattern = see("pattern", layer, pattern)
    z = torch.stack([pattern[:, head] @ v[:, :, head // group] for head in range(heads)], 2)
    return see("z", layer, z).flatten(2)


def mix(see: See, layer: int, x: Tensor, ids: Tensor, weights: Tensor, up: Callable[[int, Tensor], Tensor],
        down: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Sum over slots of weight x expert(x), token by token. `up` and `down` are one expert's two halves."""
    ids = see("expert_ids", layer, ids)
    weights = see("expert_weight", layer, weights)
    cells = [(b, p, s) for b in range(ids.shape[0]) for p in range(ids.shape[1]) for s in range(ids.shape[2])]
    hidden = torch.stack([up(int(ids[b, p, s]), x[b, p]) for b, p, s in cells]).unflatten(0, ids.shape)
    hidden = see("expert_hidden", layer, hidden)
    out = torch.stack([down(int(ids[c]), hidden[c]) for c in cells]).unflatten(0, ids.shape)
    out = see("expert_out", layer, out)
    return (weights[..., None] * out).sum(2)


# -- architectures ---------------------------------------------------------------------------------------------
def llama(hf: Any, w: dict[str, Tensor], ids: Tensor, see: See) -> Tensor:
    c = hf.config

    def block(p: str, layer: int, x: Tensor) -> Tensor:
        gate, up, down = (w[f"{p}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return see("mlp_hidden", layer, functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def qk(p: str, name: str, x: Tensor) -> Tensor:
        return x @ w[f"{p}.self_attn.{name}_proj.weight"].T

    return _llama_like(hf, w, ids, see, c.head_dim, qk, block)


def olmoe(hf: Any, w: dict[str, Tensor], ids: Tensor, see: See) -> Tensor:
    c = hf.config

    def block(p: str, layer: int, x: Tensor) -> Tensor:
        return _softmax_then_best(w, c, see, p, layer, x)

    def qk(p: str, name: str, x: Tensor) -> Tensor:
        projected = x @ w[f"{p}.self_attn.{name}_proj.weight"].T
        return projected if name == "v" else rms(projected, w[f"{p}.self_attn.{name}_norm.weight"], c.rms_norm_eps)

    return _llama_like(hf, w, ids, see, c.hidden_size // c.num_attention_heads, qk, block)


def qwen2_moe(hf: Any, w: dict[str, Tensor], ids: Tensor, see: See) -> Tensor:
    c = hf.config

    def block(p: str, layer: int, x: Tensor) -> Tensor:
        gate, up, down = (w[f"{p}.mlp.shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down"))
        shared = see("shared_out", layer, (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        share = see("shared_weight", layer, torch.sigmoid(x @ w[f"{p}.mlp.shared_expert_gate.weight"].T))
        return _softmax_then_best(w, c, see, p, layer, x) + share * shared

    def qk(p: str, name: str, x: Tensor) -> Tensor:
        return x @ w[f"{p}.self_attn.{name}_proj.weight"].T + w[f"{p}.self_attn.{name}_proj.bias"]

    return _llama_like(hf, w, ids, see, c.hidden_size // c.num_attention_heads, qk, block)


def _softmax_then_best(w: dict[str, Tensor], c: Any, see: See, p: str, layer: int, x: Tensor) -> Tensor:
    """Routed experts whose weights are their softmax probabilities among all experts, not renormalised."""
    scores = see("router_logits", layer, x @ w[f"{p}.mlp.gate.weight"].T)
    weights, chosen = scores.softmax(-1).topk(c.num_experts_per_tok)
    gate_up, down = w[f"{p}.mlp.experts.gate_up_proj"], w[f"{p}.mlp.experts.down_proj"]
    wide = gate_up.shape[1] // 2

    def neurons(expert: int, t: Tensor) -> Tensor:
        return functional.silu(gate_up[expert, :wide] @ t) * (gate_up[expert, wide:] @ t)

    return mix(see, layer, x, chosen, weights, neurons, lambda expert, h: down[expert] @ h)


def _llama_like(hf: Any, w: dict[str, Tensor], ids: Tensor, see: See, d_head: int,
                project: Callable[[str, str, Tensor], Tensor], block: Callable[[str, int, Tensor], Tensor]) -> Tensor:
    """Norm, attention, add; norm, block, add. `project(prefix, "q" | "k" | "v", x)` gives heads side by side."""
    c = hf.config
    turns = plain_frequencies(c.rope_parameters["rope_theta"], d_head)
    x = see("embed", None, w["model.embed_tokens.weight"][ids])
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}"
        x = see("resid_pre", layer, x)
        normed = rms(x, w[f"{p}.input_layernorm.weight"], c.rms_norm_eps, see.at("ln1_scale", layer))
        q, k, v = (heads_of(project(p, name, normed), d_head) for name in "qkv")
        z = attend(see, layer, rotate(q, turns), rotate(k, turns), v, d_head**-0.5)
        x = see("resid_mid", layer, x + see("attn_out", layer, z @ w[f"{p}.self_attn.o_proj.weight"].T))
        normed = rms(x, w[f"{p}.post_attention_layernorm.weight"], c.rms_norm_eps, see.at("ln2_scale", layer))
        x = see("resid_post", layer, x + see("mlp_out", layer, block(p, layer, normed)))
    x = rms(x, w["model.norm.weight"], c.rms_norm_eps, see.at("ln_final_scale"))
    return see("logits", None, x @ w["lm_head.weight"].T)


def gpt2(hf: Any, w: dict[str, Tensor], ids: Tensor, see: See) -> Tensor:
    c = hf.config

    def affine(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]  # [in, out], not transposed

    def normed(name: str, x: Tensor, scale: Scale) -> Tensor:
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], c.layer_norm_epsilon, scale)

    x = see("embed", None, w["transformer.wte.weight"][ids]) + w["transformer.wpe.weight"][: ids.shape[1]]
    d_head = c.n_embd // c.n_head
    for layer in range(c.n_layer):
        p = f"transformer.h.{layer}"
        x = see("resid_pre", layer, x)
        qkv = affine(f"{p}.attn.c_attn", normed(f"{p}.ln_1", x, see.at("ln1_scale", layer)))
        q, k, v = (heads_of(t, d_head) for t in qkv.chunk(3, -1))
        z = attend(see, layer, q, k, v, d_head**-0.5)
        x = see("resid_mid", layer, x + see("attn_out", layer, affine(f"{p}.attn.c_proj", z)))
        inner = affine(f"{p}.mlp.c_fc", normed(f"{p}.ln_2", x, see.at("ln2_scale", layer)))
        hidden = see("mlp_hidden", layer, functional.gelu(inner, approximate="tanh"))
        x = see("resid_post", layer, x + see("mlp_out", layer, affine(f"{p}.mlp.c_proj", hidden)))
    return see("logits", None, normed("transformer.ln_f", x, see.at("ln_final_scale")) @ w["transformer.wte.weight"].T)


def gemma2(hf: Any, w: dict[str, Tensor], ids: Tensor, see: See) -> Tensor:
    c = hf.config

    def normed(name: str, x: Tensor, scale: Scale = lambda s: s) -> Tensor:
        return rms(x, 1 + w[f"{name}.weight"], c.rms_norm_eps, scale)

    turns = plain_frequencies(c.rope_parameters["rope_theta"], c.head_dim)
    x = see("embed", None, w["model.embed_tokens.weight"][ids] * c.hidden_size**0.5)
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}"
        x = see("resid_pre", layer, x)
        before = normed(f"{p}.input_layernorm", x, see.at("ln1_scale", layer))
        q, k, v = (heads_of(before @ w[f"{p}.self_attn.{n}_proj.weight"].T, c.head_dim) for n in "qkv")
        window = c.sliding_window if c.layer_types[layer] == "sliding_attention" else None
        z = attend(see, layer, rotate(q, turns), rotate(k, turns), v, c.query_pre_attn_scalar**-0.5, window=window,
                   cap=c.attn_logit_softcapping)
        behind = normed(f"{p}.post_attention_layernorm", z @ w[f"{p}.self_attn.o_proj.weight"].T)
        x = see("resid_mid", layer, x + see("attn_out", layer, behind))
        before = normed(f"{p}.pre_feedforward_layernorm", x, see.at("ln2_scale", layer))
        gate, up, down = (w[f"{p}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        hidden = see("mlp_hidden", layer, functional.gelu(before @ gate.T, approximate="tanh") * (before @ up.T))
        behind = normed(f"{p}.post_feedforward_layernorm", hidden @ down.T)
        x = see("resid_post", layer, x + see("mlp_out", layer, behind))
    scores = normed("model.norm", x, see.at("ln_final_scale")) @ w["model.embed_tokens.weight"].T
    return see("logits", None, c.final_logit_softcapping * torch.tanh(scores / c.final_logit_softcapping))


def gpt_oss(hf: Any, w: dict[str, Tensor], ids: Tensor, see: See) -> Tensor:
    c = hf.config

    def affine(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def block(p: str, layer: int, x: Tensor) -> Tensor:
        scores = see("router_logits", layer, affine(f"{p}.mlp.router", x))
        best, chosen = scores.topk(c.num_experts_per_tok)
        e = {n: w[f"{p}.mlp.experts.{n}"] for n in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")}

        def neurons(expert: int, t: Tensor) -> Tensor:
            both = t @ e["gate_up_proj"][expert] + e["gate_up_proj_bias"][expert]
            gate, up = both[0::2].clamp(max=c.swiglu_limit), both[1::2].clamp(-c.swiglu_limit, c.swiglu_limit)
            return (up + 1) * gate * torch.sigmoid(c.swiglu_alpha * gate)

        def out(expert: int, h: Tensor) -> Tensor:
            return h @ e["down_proj"][expert] + e["down_proj_bias"][expert]

        return mix(see, layer, x, chosen, best.softmax(-1), neurons, out)

    turns, stretch = yarn_frequencies(c.rope_parameters, c.head_dim)
    x = see("embed", None, w["model.embed_tokens.weight"][ids])
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}"
        x = see("resid_pre", layer, x)
        normed = rms(x, w[f"{p}.input_layernorm.weight"], c.rms_norm_eps, see.at("ln1_scale", layer))
        q, k, v = (heads_of(affine(f"{p}.self_attn.{n}_proj", normed), c.head_dim) for n in "qkv")
        window = c.sliding_window if c.layer_types[layer] == "sliding_attention" else None
        z = attend(see, layer, rotate(q, turns, stretch), rotate(k, turns, stretch), v, c.head_dim**-0.5, window=window,
                   sinks=w[f"{p}.self_attn.sinks"])
        x = see("resid_mid", layer, x + see("attn_out", layer, affine(f"{p}.self_attn.o_proj", z)))
        normed = rms(x, w[f"{p}.post_attention_layernorm.weight"], c.rms_norm_eps, see.at("ln2_scale", layer))
        x = see("resid_post", layer, x + see("mlp_out", layer, block(p, layer, normed)))
    x = rms(x, w["model.norm.weight"], c.rms_norm_eps, see.at("ln_final_scale"))
    return see("logits", None, x @ w["lm_head.weight"].T)


_FORWARD = {"llama": llama, "gpt2": gpt2, "gemma2": gemma2, "olmoe": olmoe, "gpt_oss": gpt_oss, "qwen2_moe": qwen2_moe}
