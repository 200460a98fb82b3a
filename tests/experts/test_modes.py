"""Every mode in every family: the fast path equals a literal forward of the layer, one token and one slot at a time.

The literal side takes what a plain run left, the hidden states that the experts were given and the router's logits,
routes each token by hand (`literal_routing`), lets the family's own experts module compute one expert of one token at a
time, and adds up. Before that the router's bias, where it has one, is set to favour an expert that is to be left out: a
sigmoid of -inf is 0, and the bias alone would bring it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import experts
from interp.experts import ExpertSet
from interp.zoo.families import families

from .literal_routing import Router, bias_of, route

ALL = [name for name in (*families("moe"), *families("moe-undecorated")) if name != "llama4"]
Slots = list[tuple[int, float]]


def experts_module(m: Any, layer: int) -> Any:
    return m.anatomy.places["expert_weight", layer].module


@contextmanager
def watching(m: Any, layer: int) -> Iterator[dict[str, Tensor]]:
    """What the experts are given and what they return, by bare hooks that are closer to the module than any other."""
    seen: dict[str, Tensor] = {}

    def before(module: Any, args: Any) -> None:
        seen["x"] = args[0].detach().reshape(-1, args[0].shape[-1])

    def after(module: Any, args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        bias = module.bias if type(module).__name__ == "JetMoeMoE" else 0  # it adds one behind its experts
        seen["y"] = (out - bias).detach().reshape(-1, out.shape[-1])

    module = experts_module(m, layer)
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def one(module: Any, expert: int, x: Tensor) -> Tensor:
    """E_e(x) of one token [d_model], by the family's own code, which is asked for this expert with weight 1."""
    if type(module).__name__ == "JetMoeMoE":
        gate, up = (module.input_linear.weight[expert] @ x).chunk(2)
        return module.output_linear.weight[expert] @ (module.activation(gate) * up)
    ids, weight = torch.tensor([[expert, expert]]), torch.tensor([[1.0, 0.0]])  # LongCat cannot do with one slot
    return module(x[None], ids, weight).reshape(-1)


def mixed(outputs: Any, slots: list[Slots], width: int) -> Tensor:
    """sum_s w_s E(x), token by token; `outputs(token, expert)`."""
    rows = []
    for token, chosen in enumerate(slots):
        total = torch.zeros(width)
        for expert, weight in chosen:
            total = total + weight * outputs(token, expert)
        rows.append(total)
    return torch.stack(rows)


def close(name: str, a: Tensor, b: Tensor) -> None:
    error = float((a - b).abs().max())
    assert error <= 1e-5 * max(1.0, float(b.abs().max())), f"{name}: off by {error:.2g}"


class Case:
    """One family, its last routed layer with a choice, and a plain run of it."""

    def __init__(self, family: str) -> None:
        torch.set_num_threads(1)
        self.m = interp.load(f"tiny:{family}")
        self.layer = self.m.anatomy.having("expert_weight")[-1]
        self.module = experts_module(self.m, self.layer)
        generator = torch.Generator().manual_seed(7)
        self.ids, self.others = torch.randint(3, 90, (2, 2, 5), generator=generator)
        used = self.plain(self.ids)[3][f"expert_ids[{self.layer}]"].flatten().bincount(minlength=self.m.n_experts)
        self.banned = used.topk(2).indices.tolist()
        if (bias := bias_of(self.m.anatomy.layers[self.layer])) is not None:
            bias.view(-1)[self.banned[0]] += 2.0
        self.router = Router.of(self.m, self.layer, family)
        self.x, self.y, self.logits, self.taken = self.plain(self.ids)
        self.set = ExpertSet(self.m, {self.layer: self.banned})

    def plain(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        with watching(self.m, self.layer) as seen:
            acts = self.m.capture(ids, [f"router_logits[{self.layer}]", f"expert_weight[{self.layer}]"], logits=True)
        return seen["x"], seen["y"], acts[f"router_logits[{self.layer}]"].flatten(0, -2), acts

    def slots(self, **how: Any) -> list[Slots]:
        return [route(self.router, logits, **how) for logits in self.logits]

    def literal(self, slots: list[Slots], outputs: Any = None) -> Tensor:
        return mixed(outputs or self.output, slots, self.y.shape[-1])

    def output(self, token: int, expert: int) -> Tensor:
        return one(self.module, expert, self.x[token])

    def fast(self, *edits: Any) -> Tensor:
        with self.m.intervene(*edits), watching(self.m, self.layer) as seen:
            self.m(self.ids)
        close("the layer's input", seen["x"], self.x)
        return seen["y"]


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_each_mode_equals_a_literal_forward(family: str) -> None:
    c = Case(family)
    ids, weights = (c.taken[f"{n}[{c.layer}]"].flatten(0, 1) for n in ("expert_ids", "expert_weight"))
    plain = c.slots()
    for token, chosen in enumerate(plain):  # the router written by hand is the family's router
        found = {e: float(w) for e, w in zip(ids[token].tolist(), weights[token], strict=True) if w != 0}
        assert found == pytest.approx({e: w for e, w in chosen if w != 0}, rel=1e-4, abs=1e-6)
    banned = set(c.banned)
    assert banned & set(ids.flatten().tolist()), "nothing to switch off here"
    close("plain", c.literal(plain), c.y)
    close("all experts on", c.fast(experts.ablate(ExpertSet(c.m, {}))), c.y)

    without = [[(e, w) for e, w in chosen if e not in banned] for chosen in plain]
    close("zero", c.fast(experts.ablate(c.set)), c.literal(without))
    scaled = [[(e, w * (0.3 if e in banned else 1)) for e, w in chosen] for chosen in plain]
    close("scale", c.fast(experts.ablate(c.set, "scale", factor=0.3)), c.literal(scaled))
    shared = []
    for chosen, left in zip(plain, without, strict=True):
        total, rest = sum(w for _, w in chosen), sum(w for _, w in left)
        shared.append([(e, w * total / rest) for e, w in left])
    close("renormalise", c.fast(experts.ablate(c.set, "renormalise")), c.literal(shared))

    rerouted = c.slots(absent=banned)
    assert not any(e in banned for chosen in rerouted for e, _ in chosen)
    close("reroute", c.fast(experts.ablate(c.set, "reroute")), c.literal(rerouted))
    rare = ids.flatten().bincount(minlength=c.m.n_experts).argmin().item()
    forced = c.slots(forced={rare})
    assert all(any(e == rare for e, _ in chosen) for chosen in forced)
    alone = ExpertSet(c.m, {c.layer: [rare]})
    close("force", c.fast(experts.ablate(alone, "force")), c.literal(forced))

    a, b = c.banned
    partners = {c.layer: {a: rare, b: a}}
    swap = lambda t, e: c.output(t, partners[c.layer].get(e, e))  # noqa: E731
    close("swap", c.fast(experts.ablate(c.set, "swap", partners=partners)), c.literal(plain, swap))
    rows = {e: (ids == e).any(-1).nonzero()[:, 0].tolist() for e in banned}
    present = {e for e in banned if rows[e]}
    means = {e: torch.stack([c.output(t, e) for t in rows[e]]).mean(0) for e in present}
    mean = experts.ablate(ExpertSet(c.m, {c.layer: present}), "mean", reference=c.ids)
    close("mean", c.fast(mean), c.literal(plain, lambda t, e: means[e] if e in means else c.output(t, e)))

    _, _, _, recorded = c.plain(c.others)
    theirs, worth = (recorded[f"{n}[{c.layer}]"].flatten(0, 1).tolist() for n in ("expert_ids", "expert_weight"))
    frozen = [list(zip(e, w, strict=True)) for e, w in zip(theirs, worth, strict=True)]
    close("freeze", c.fast(experts.ablate(c.set, "freeze", recorded=recorded)), c.literal(frozen))
    replayed = c.m.capture(c.ids, "expert_weight[*]")
    with c.m.intervene(experts.replay(replayed)):
        again = c.m(c.ids)
    close("a run's own routing replayed", again, c.taken.logits)

    parts = torch.zeros_like(c.y)  # each expert's contribution is what is missing when it alone is off
    for e in sorted(set(ids.flatten().tolist())):
        parts += c.y - c.fast(experts.ablate(ExpertSet(c.m, {c.layer: [e]})))
    close("sum of contributions", parts, c.y)
