"""Factored experts (Monet): n^2 experts made of 2n parts, and routing that several layers share.

Expert (i, j) is never a row of anything: its weight is a sum over routing heads of g1_hi g2_hj, and its neurons belong
to part i and part j, which n experts each share. So the sites are the factors::

    x --router.w1, w2--> key_logits1, key_logits2 --threshold, softmax--> g1, g2      in the first layer of a group
    x --moe.act-->       z1, z2                                                       neurons of the parts
    y = sum_ij W_ij E_ij(x),   W_ij = M_ij sum_h g1_hi g2_hj                          mlp_out

g1 and g2 are read where a layer is *given* them, as arguments of its experts. So every layer has them, and an edit
reaches that layer alone; writing the key logits changes the routing of the whole group. Any values may be written: the
sum above holds for rows that do not sum to 1 too.

Gradients reach every factor. One caveat: where pairs are masked and keys are many, the layer visits only experts that
have weight, so the derivative by an entry of g that is exactly 0 comes out as 0 there, whatever it would be.

A layer's experts are known by what they can do (a mask, its structure, products under it, one expert's output), not by
their class; sizes and the router are read off the tensors of the probe.

Source: Monet, arXiv 2412.04139; the equations are in `interp.monet`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.hooks.anatomy import Anatomy, Call, Place, same
from interp.sites import SiteError

if TYPE_CHECKING:
    from interp.hooks.parts import Layer

FACTORS = ("g1", "g2")
LOGITS = ("key_logits1", "key_logits2")
NEURONS = ("z1", "z2")
_ABILITIES = ("keep", "kept", "mix", "expert")


def find(layer: nn.Module) -> Any:
    """The factored experts of a layer, or None."""
    return next((m for m in layer.modules() if all(hasattr(m, name) for name in _ABILITIES)), None)


def read(anatomy: Anatomy, layer: Layer) -> bool:
    """Enters the factored sites of one layer, or why it has none; True where it has."""
    i, experts = layer.index, find(layer.module)
    call = layer.by_module.get(id(experts))
    if call is None or len(call.inputs) != 3:  # x, g1, g2
        for name in (*FACTORS, *LOGITS, *NEURONS):
            anatomy.put(name, i, None, f"layer {i} has no factored experts (Monet's); see expert_weight and mlp_hidden")
        return False
    heads, n = call.inputs[1].shape[-2:]
    for which, name in enumerate(FACTORS, 1):
        anatomy.put(name, i, Place("argument", experts, argument=which), head=heads, key=n)
    _key_logits(anatomy, layer, call, heads, n)
    acts = [experts.act] if hasattr(experts, "act") else [experts.act1, experts.act2]
    for name, act in zip(NEURONS, acts, strict=False):
        width = layer.by_module[id(act)].inputs[0].shape[-1]
        anatomy.put(name, i, Place("grouped", act, groups=n, other=experts), key=n, neuron=width // n)
    if len(acts) == 1:
        anatomy.put(
            "z2", i, None,
            f"layer {i} is decomposed horizontally: part i computes all neurons of expert (i, j), which are z1[{i}], "
            "and part j only puts them out",
        )  # fmt: skip
    return True


def _key_logits(anatomy: Anatomy, layer: Layer, call: Call, heads: int, n: int) -> None:
    """The router is the module that put out the tensor that the experts are given as g1, here or in a layer before."""
    router: Any = next((c.module for c in layer.calls if same(c.output, call.inputs[1])), None)
    for name, linear in zip(LOGITS, (router and router.w1, router and router.w2), strict=True):
        first = anatomy.having(name)[-1:]
        anatomy.put(
            name, layer.index,
            Place("grouped", linear, groups=heads) if linear is not None else None,
            f"layer {layer.index} uses the router of layer {first[0]}: read {name}[{first[0]}]" if first
            else f"the router of layer {layer.index} was not found",
            head=heads, key=n,
        )  # fmt: skip


def refusals(index: int, experts: Any) -> dict[str, str]:
    """Why a layer with factored experts lacks the sites of other MLPs and mixtures, and what to read instead."""
    neurons = f"z1[{index}]" if hasattr(experts, "act") else f"z1[{index}] and z2[{index}]"
    made = f"layer {index}'s n^2 experts are products of two sets of parts"
    routed = f"{made}, never one row each; read g1[{index}] and g2[{index}], and acts.experts({index}) of both"
    names = ("router_logits", "expert_ids", "expert_weight", "expert_hidden", "expert_out")
    none = dict.fromkeys(("shared_out", "shared_weight"), f"layer {index} has no shared expert")
    return {"mlp_hidden": f"{made}; their neurons are {neurons}", **dict.fromkeys(names, routed), **none}


def masks(anatomy: Anatomy) -> dict[int, Tensor]:
    """layer -> bool [key, key], True = expert (i, j) is on; only layers that have some of them off."""
    found = {layer: anatomy.places["g1", layer].module.keep for layer in anatomy.having("g1")}
    return {layer: keep for layer, keep in found.items() if isinstance(keep, Tensor)}


def output(experts: Any, ids: int | Iterable[int] | Tensor, x: Tensor) -> Tensor:
    """E_ij(x) of the experts i * n + j, before weight and mask: x [..., d_model] -> [..., expert, d_model].

    The axis `expert` is missing for a single id. Raises SiteError for an id that does not exist.
    """
    chosen = torch.as_tensor(ids if isinstance(ids, (int, Tensor)) else list(ids), device=x.device)
    n = int(experts.n)
    wrong = chosen[(chosen < 0) | (chosen >= n * n)]
    if wrong.numel() or chosen.is_floating_point():
        bad = wrong[0].item() if wrong.numel() else chosen.flatten()[0].item()
        raise SiteError(f"expert {bad}: the layer has experts 0..{n * n - 1}, expert (i, j) is {n} i + j")
    flat = chosen.reshape(-1)
    out: Tensor = experts.expert(x, flat // n, flat % n)
    return out.reshape(*x.shape[:-1], *chosen.shape, out.shape[-1])
