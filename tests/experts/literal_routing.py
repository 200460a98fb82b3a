"""Every router of transformers written out by hand, one token at a time: the oracle of what a mode must do.

    slots = route(Router.of(m, layer), logits, absent={3}, forced={5})      [(expert, weight), ...]

Nothing here knows of -inf: an absent expert is left out of the list of experts before anything else happens, as if the
model had been built without it. A router is told apart by what it does, not by its family:

    score     logits -> scores: softmax over all experts, sigmoid, another function of each, or the logits themselves
    bias      is added to the scores for the choice only
    groups    only experts of the best groups can be chosen (scored by the best, or the sum of the two best, of a group)
    weight    of a chosen expert: its score, or a function of the chosen logits
    norm      weights are divided by their sum;  scale: and multiplied by a number, or by one of each expert
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MARGIN = 0.01


@dataclass
class Router:
    """How one layer routes. `bias` and `per_expert` are indexed by expert."""

    top_k: int
    score: str | Callable[[float], float] = "softmax"
    bias: list[float] | None = None
    groups: tuple[int, int, str, float] | None = None  # how many, kept, "top2" or "max", what the others' scores become
    weight: str = "score"  # or "softmax" / "sigmoid" of the chosen logits, "sparsemixer", "with shared"
    norm: float | None = None  # power of the sum that weights are divided by; 1 in nearly all families
    floor: float = 0.0  # under that sum
    scale: float = 1.0
    per_expert: list[float] | None = None
    jitter: float = 0.0
    cap: float = 0.0
    temper: float = 1.0
    extra: int = 0  # classes behind the experts: shared experts, or doing nothing

    @staticmethod
    def of(model: Any, layer: int, family: str) -> Router:
        """Settings from the router's own attributes and the configuration."""
        return _read(model, layer, family)


def route(r: Router, logits: Tensor, absent: set[int] = frozenset(), forced: set[int] = frozenset()) -> Any:
    """The experts of one token and their weights, from its logits [expert]; what is absent does not exist."""
    logit = {e: float(v) for e, v in enumerate(logits.tolist()) if e not in absent}
    top = max((v for e, v in logit.items() if e not in forced), default=0.0) + MARGIN
    logit |= dict.fromkeys(forced, top)
    logit = {e: v * r.temper for e, v in logit.items()}
    if r.cap:
        logit = {e: r.cap * math.tanh(v / r.cap) for e, v in logit.items()}
    if r.weight == "sparsemixer":
        return _sparsemixer(r, logit)
    routed = len(logits) - r.extra
    if r.score == "softmax":
        highest = max(logit.values())
        total = sum(math.exp(v - highest) for v in logit.values())
        score = {e: math.exp(v - highest) / total for e, v in logit.items()}
    else:
        function = r.score if callable(r.score) else {"sigmoid": _sigmoid, "logits": float}[r.score]
        score = {e: function(v) for e, v in logit.items()}
    candidates = [e for e in logit if e < routed or r.weight != "with shared"]
    choice = {e: score[e] + (r.bias[e] if r.bias else 0.0) for e in candidates}
    if r.groups is not None:
        choice = _best_groups(r, choice, routed, forced)
    chosen = sorted(choice, key=lambda e: (e in forced, choice[e]), reverse=True)[: r.top_k]
    if r.weight == "with shared":
        return _with_shared(r, chosen, logit, routed)
    if r.weight == "softmax":
        highest = max(logit[e] for e in chosen)
        weight = {e: math.exp(logit[e] - highest) for e in chosen}
    else:
        weight = {e: _sigmoid(logit[e]) if r.weight == "sigmoid" else score[e] for e in chosen}
    if r.weight == "softmax" or r.norm is not None:
        p = r.norm or 1.0
        total = sum(w**p for w in weight.values()) ** (1 / p)
        weight = {e: w / max(total, r.floor) for e, w in weight.items()}
    each = r.per_expert or [1.0] * len(logits)
    slots = [(e, w * r.scale * each[e]) for e, w in weight.items()]
    return [(e, w) for e, w in slots if e < routed]  # ZAYA may choose to do nothing


def _best_groups(r: Router, choice: dict[int, float], n: int, forced: set[int]) -> dict[int, float]:
    assert r.groups is not None
    count, kept, how, others = r.groups
    size = n // count
    best: dict[int, tuple[int, float]] = {}
    for g in range(count):
        members = sorted((choice[e] for e in choice if e // size == g), reverse=True)
        best[g] = (sum(e // size == g for e in forced), sum(members[: 2 if how == "top2" else 1]))
    allowed = sorted(best, key=lambda g: best[g], reverse=True)[:kept]
    return {e: s if e // size in allowed else others for e, s in choice.items()}


def _sparsemixer(r: Router, logit: dict[int, float]) -> list[tuple[int, float]]:
    """Each slot takes the highest logit left, weighed by a softmax over those left that are near it (Phi-3.5-MoE)."""
    left, slots = dict(logit), []
    for _ in range(r.top_k):
        best = max(left, key=lambda e: left[e])
        near = [e for e, s in left.items() if (left[best] - s) / max(abs(s), left[best]) <= 2 * r.jitter]
        total = sum(math.exp(left[e] - left[best]) for e in near)
        slots.append((best, 1 / total))
        del left[best]
    return slots


def _with_shared(r: Router, chosen: list[int], logit: dict[int, float], routed: int) -> list[tuple[int, float]]:
    """Inkling: log-sigmoids of chosen and shared experts together under one softmax; the routed ones' part of it."""
    log = {e: math.log(_sigmoid(logit[e])) for e in [*chosen, *(e for e in logit if e >= routed)]}
    total = sum(math.exp(v) for v in log.values())
    return [(e, math.exp(log[e]) / total * r.scale) for e in chosen]


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


# -- which router is this? -------------------------------------------------------------------------------------
SOFTMAX_NORMED = "mixtral minimax qwen3_vl_moe qwen3_5_moe hunyuan_v1_moe"
SOFTMAX_IF_SET = "olmoe flex_olmo qwen2_moe qwen3_moe qwen3_next mellum qwen4_exp qwen3_omni_moe"
TOPK_SOFTMAX = "aria gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared jetmoe"
GROUPED_SIGMOID = """axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe glm4_moe
glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v4 kimi_linear mimo_v2_flash nemotron_h solar_open"""
BIASED_SIGMOID = "afmoe hy_v3 laguna lfm2_moe minimax_m2 minimax_m3_vl step3p7 muse_spark flint"
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def bias_of(layer: nn.Module) -> Tensor | None:
    """The tensor that is added to scores for the choice, in the layer's router or beside it."""
    named = [*layer.named_buffers(), *layer.named_parameters()]
    return next((t for name, t in named if name.endswith(BIASES)), None)


def _read(model: Any, layer: int, family: str) -> Router:
    module = model.anatomy.layers[layer]
    bias = bias_of(module)

    def get(*names: str, default: Any = None) -> Any:
        for m in module.modules():
            for name in names:
                if isinstance(value := getattr(m, name, None), (bool, int, float)):
                    return value
        return next((getattr(model.config, n) for n in names if getattr(model.config, n, None) is not None), default)

    r = Router(model.anatomy.sizes["expert_weight", layer]["slot"])
    r.bias = None if bias is None else bias.detach().flatten().tolist()
    r.norm = 1.0
    if family in SOFTMAX_NORMED.split():
        pass
    elif family in SOFTMAX_IF_SET.split():
        r.norm = 1.0 if get("norm_topk_prob") else None
    elif family == "jamba":
        r.norm = None
    elif family in ("deepseek_v2", "deepseek_ocr2", "unlimited_ocr"):
        r.norm, r.scale = None, get("routed_scaling_factor")
        router = next(m for m in module.modules() if hasattr(m, "topk_method"))
        if router.topk_method == "group_limited_greedy":
            r.groups = (get("num_group"), get("topk_group"), "max", 0.0)
    elif family in ("mistral4", "mistral_large4"):
        r.groups, r.scale = (get("num_group"), get("topk_group"), "top2", 0.0), get("routed_scaling_factor")
        r.norm = 1.0 if get("norm_topk_prob", default=True) else None
    elif family == "gemma4":
        each = next(m.per_expert_scale for m in module.modules() if hasattr(m, "per_expert_scale"))
        r.per_expert = each.detach().tolist()
    elif family in ("ernie4_5_moe", "ernie4_5_vl_moe"):
        r.floor = get("norm_min")
    elif family == "longcat_flash":
        r.norm, r.scale = None, get("routed_scaling_factor")
    elif family == "zaya":
        r.norm, r.extra = None, 1
    elif family == "dbrx":
        r.norm = float(get("moe_normalize_expert_weights"))
    elif family in TOPK_SOFTMAX.split():
        r.score, r.weight = "logits", "softmax"
    elif family == "cohere2_moe":
        r.score, r.weight = "logits", model.config.expert_selection_fn
        r.norm = 1.0 if get("norm_topk_prob") else None
    elif family in GROUPED_SIGMOID.split():
        r.score = "sigmoid"
        r.norm = 1.0 if get("norm_topk_prob") else None
        r.scale = 1.0 if family == "beam" else get("routed_scaling_factor")  # BEAM scales behind the sum
        if get("num_group") is not None:
            r.groups = (get("num_group"), get("topk_group"), "top2", 0.0 if family == "axk2" else -math.inf)
    elif family in BIASED_SIGMOID.split():
        r.score = "sigmoid"
        r.norm = 1.0 if get("norm_topk_prob", default=True) else None
        r.scale = get("route_scale", "router_scaling_factor", "routed_scaling_factor", default=1.0)
        if family in ("minimax_m2", "minimax_m3_vl", "step3p7"):  # these scale behind the sum, if at all
            r.scale = 1.0
        r.cap = get("router_logit_softcapping", default=0.0)
        r.temper = get("output_multiplier", default=1.0) if family == "muse_spark" else 1.0
    elif family == "kolibri1":
        r.score, r.weight = "logits", "sigmoid"
        r.norm = 1.0 if get("norm_topk_prob") else None
    elif family in ("deepseek_v4", "inkling2"):
        router = next(m for m in module.modules() if hasattr(m, "score_fn"))
        r.score = lambda v: float(router.score_fn(torch.tensor(v, dtype=torch.float64)))
        r.scale = get("routed_scaling_factor")
    elif family == "inkling":
        router = next(m for m in module.modules() if hasattr(m, "global_scale"))
        r.score, r.weight, r.norm = "sigmoid", "with shared", None
        r.extra, r.scale = router.n_shared_experts, router.route_scale * float(router.global_scale.detach())
    elif family == "phimoe":
        r.weight, r.jitter = "sparsemixer", get("router_jitter_noise")
    else:
        raise NotImplementedError(f"{family}: write its router down here")
    return r
