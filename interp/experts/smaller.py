"""A physically smaller checkpoint: the experts of a set cut out, with their rows of the router, and the config told.

A router without its rows for some experts is what mode "reroute" computes, so the smaller model equals the model with
the set rerouted. One number in the configuration says how many experts every layer has; so every layer must lose as
many, and where experts form groups, every group.

What has to be cut is not listed by family. A second model is built from the changed configuration, without memory for
its weights, and every tensor whose shape differs there is cut along the axis that differs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from interp.experts.sets import ExpertSet
from interp.experts.surgery import around_router
from interp.experts.units import ExpertError
from interp.hooks import undecorated

#: What families call the number of experts of a layer.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def why_not(model: Any, chosen: ExpertSet) -> str:
    """Why a set cannot be cut out; "" if it can."""
    layers = model.anatomy.having("expert_weight")
    losses = {len(chosen.ids.get(layer, ())) for layer in layers}
    if len(losses) != 1:
        return f"layers lose {min(losses)} to {max(losses)} experts, and the configuration has one number for all"
    n = _count(model, layers[0])
    for layer, ids in chosen.ids.items():
        router = model.anatomy.places["router_logits", layer].module
        if int(ids.max()) >= n:
            return f"expert {int(ids.max())} of layer {layer} returns its input and has no weights to cut out"
        if any(name.endswith("tid2eid") for name, _ in router.named_buffers()):
            return f"layer {layer} looks its experts up by token id"
        if (groups := getattr(router, "num_group", None) or 1) > 1:
            per_group = (~chosen.mask(layer)[:n]).view(groups, -1).sum(1).unique()
            if len(per_group) > 1:
                return f"layer {layer} has {groups} groups of experts that would no longer be of one size"
    if n - losses.pop() < model.top_k:
        return f"fewer experts would be left than the {model.top_k} that a token visits"
    return "" if _fields(model.hf.config, n) else f"no field of its configuration says that a layer has {n} experts"


def cut(model: Any, chosen: ExpertSet) -> Any:
    """The same model without the set's experts. It shares the memory of all tensors that are not cut.

    Raises ExpertError where `why_not` has a reason, or a tensor outside the routed experts would have to change.
    """
    if reason := why_not(model, chosen):
        raise ExpertError(f"{model.name}: its experts cannot be cut out: {reason}")
    layer = next(iter(chosen.ids))
    n, lost = _count(model, layer), len(chosen.ids[layer])
    config = copy.deepcopy(model.hf.config)
    for owner, name in _fields(config, n):
        setattr(owner, name, n - lost)
    with torch.device("meta"):
        small = type(model.hf)._from_config(config, dtype=model.dtype)
    shapes, tensors = small.state_dict(), {}
    for key, tensor in model.hf.state_dict().items():
        if key not in shapes:
            raise ExpertError(f"{model.name}: {key} has no place in the smaller model")
        tensors[key] = tensor
        if tensor.shape != shapes[key].shape:
            home = _layer_of(model, key)
            if home is None:
                raise ExpertError(f"{model.name}: {key} would shrink too, and belongs to no layer's routed experts")
            keep = (~chosen.mask(home)[:n]).nonzero()[:, 0]
            tensors[key] = _rows(tensor, shapes[key], keep, n, f"{model.name}: {key}")
    small.load_state_dict(tensors, assign=True)
    for name, buffer in model.hf.named_buffers():  # what a checkpoint does not hold, such as rotary frequencies
        if name not in tensors:
            home, _, own = name.rpartition(".")
            small.get_submodule(home).register_buffer(own, buffer, persistent=False)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.hf.generation_config)
    return small.eval()


def _count(model: Any, layer: int) -> int:
    return undecorated.computing(model.anatomy.places["expert_weight", layer].module)


def _fields(config: Any, n: int) -> list[tuple[Any, str]]:
    """Where the configuration, or a part of it, says how many experts there are."""
    found = [(config, name) for name in COUNTS if getattr(config, name, None) == n]
    parts = [part for part in vars(config).values() if hasattr(part, "to_dict") and hasattr(part, "model_type")]
    return found + [field for part in parts for field in _fields(part, n)]


def _layer_of(model: Any, key: str) -> int | None:
    """The layer to whose routed experts, or to whose router, a tensor belongs."""
    names = {id(m): name for name, m in model.hf.named_modules()}
    for layer in model.anatomy.having("expert_weight"):
        experts = names[id(model.anatomy.places["expert_weight", layer].module)]
        if key.startswith(f"{experts}.") or key.rpartition(".")[0] in around_router(model, layer):
            return layer
    return None


def _rows(tensor: Tensor, shape: Tensor, keep: Tensor, n: int, name: str) -> Tensor:
    """`tensor` without the rows of experts that go, along the one axis in which it differs."""
    axes = [a for a in range(tensor.dim()) if tensor.shape[a] != shape.shape[a]]
    gone = n - len(keep)
    if tensor.dim() != shape.dim() or len(axes) != 1:
        raise ExpertError(f"{name} would change from {list(tensor.shape)} to {list(shape.shape)}")
    axis, keep = axes[0], keep.to(tensor.device)
    old, new = tensor.shape[axis], shape.shape[axis]
    if old - new == gone:  # a row per expert; rows behind the experts (shared ones, doing nothing) stay
        return tensor.index_select(axis, torch.cat([keep, torch.arange(n, old, device=tensor.device)]))
    if old % n == 0 and (old - new) * n == old * gone:  # DBRX: the rows of all experts one after the other
        blocks = tensor.unflatten(axis, (n, old // n)).index_select(axis, keep)
        return blocks.flatten(axis, axis + 1)
    raise ExpertError(f"{name} would change from {list(tensor.shape)} to {list(shape.shape)}")
