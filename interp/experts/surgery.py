"""Making a change of experts permanent in the weights, where a weight exists that holds it.

    zero     an expert's output weights (and their bias) become 0
    scale    they are multiplied by the factor
    swap     an expert gets the weights of its partner
    mean     output weights 0, output bias the mean: where experts have such a bias
    reroute  the router's bias for the expert becomes so low that it is never chosen: where the router has one

Everything is done to the model in memory and undone on leaving, so that a checkpoint can be written in between.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.experts.ablate import Ablation, measured, partners_of
from interp.experts.units import ExpertError
from interp.hooks import undecorated

Undo = list[Callable[[], Any]]


@contextmanager
def operated(model: Any, ablation: Ablation) -> Iterator[None]:
    """The model with a change made in its weights; on leaving, bit for bit as before.

    Raises ExpertError where a layer has no weight that holds this change, with the reason.
    """
    operate = {
        "zero": _scaled, "scale": _scaled, "swap": _swapped, "mean": _averaged, "reroute": _kept_out,
    }.get(ablation.mode)  # fmt: skip
    if operate is None:
        raise ExpertError(f"mode={ablation.mode!r} cannot be baked: {WHY_NOT[ablation.mode]}")
    undo: Undo = []
    try:
        with torch.no_grad():
            operate(model, ablation, undo)
        yield
    finally:
        with torch.no_grad():
            for step in reversed(undo):
                step()


#: Modes that no weights can hold.
WHY_NOT = {
    "renormalise": "what the others get depends on who else was chosen; 'reroute' or 'zero' can be baked",
    "force": "the logit it is given depends on the other experts' at each token",
    "freeze": "recorded routing belongs to the tokens it was recorded on",
}


def _write(weight: Tensor, index: Any, value: Any, undo: Undo) -> None:
    undo.append(partial(operator.setitem, weight, index, weight[index].clone()))
    weight[index] = value


def _scaled(model: Any, ablation: Ablation, undo: Undo) -> None:
    factor = ablation.settings.get("factor", 0.0)
    for layer, ids in ablation.chosen.ids.items():
        if ablation.chosen.kind == "neurons":
            weight, index = neuron_weights(model, layer, ids)
            _write(weight, index, weight[index] * factor, undo)
            continue
        for weight in (w for e in ids.tolist() for w in output_weights(model, layer, e, factor)):
            _write(weight, ..., weight * factor, undo)


def _swapped(model: Any, ablation: Ablation, undo: Undo) -> None:
    for layer, ids in ablation.chosen.ids.items():
        table = partners_of(ablation.settings["partners"], ablation.chosen, layer)
        module = _module(model, layer)
        n = undecorated.computing(module)
        if max(ids.tolist() + table[ids].tolist()) >= n:
            raise ExpertError(
                f"{model.name}, layer {layer}: experts from {n} on return their input and have no weights"
            )
        for weight in _of_experts(module, n, model.anatomy.places["router_logits", layer].module):
            rows = weight.view(n, -1)
            _write(rows, ids, rows[table[ids]].clone(), undo)


def _averaged(model: Any, ablation: Ablation, undo: Undo) -> None:
    means = ablation.means(model)
    for layer, ids in ablation.chosen.ids.items():
        values = measured(means, ablation.chosen, layer)
        module = _module(model, layer) if ablation.chosen.kind == "routed" else None
        bias = getattr(module, "down_proj_bias", None)
        if not isinstance(bias, Tensor) or getattr(module, "has_post_expert_norm", False):
            raise ExpertError(
                f"mode='mean' cannot be baked: {model.name}, layer {layer}: its experts have no output bias that could "
                "hold a mean"
            )
        for e in ids.tolist():
            _write(module.down_proj, e, 0.0, undo)  # type: ignore[union-attr]
        _write(bias, ids, values[ids].to(bias), undo)


def _kept_out(model: Any, ablation: Ablation, undo: Undo) -> None:
    for layer, ids in ablation.chosen.ids.items():
        router = model.anatomy.places["router_logits", layer].module
        bias = choice_bias(model, layer)
        if bias is None:
            raise ExpertError(
                f"mode='reroute' cannot be baked: {model.name}, layer {layer}: {type(router).__name__} has no bias "
                "that could keep an expert out, and experts can be cut out only where every layer loses as many"
            )
        if starved(router, ablation.chosen.mask(layer), model.top_k):
            raise ExpertError(
                f"mode='reroute' cannot be baked: {model.name}, layer {layer}: a group of experts could be left with "
                f"fewer than the {model.top_k} that a token visits, and what then happens no bias can say"
            )
        low = -3e4 if bias.dtype == torch.float16 else -1e30  # far below any score, and finite: groups are added up
        _write(bias.view(-1), ids, low, undo)


def choice_bias(model: Any, layer: int) -> Tensor | None:
    """The bias [expert] that a layer adds to logits, or to scores for the choice; None if it has none.

    It sits on the router or beside it, as a parameter or as a buffer that is saved.
    """
    sizes = (model.anatomy.sizes["router_logits", layer]["expert"], model.n_experts)
    for module in around_router(model, layer).values():
        unsaved = module._non_persistent_buffers_set
        buffers = [(name, b) for name, b in module.named_buffers(recurse=False) if name not in unsaved]
        for name, tensor in (*module.named_parameters(recurse=False), *buffers):
            if name.endswith(("bias", "biases")) and tensor.numel() in sizes and tensor.numel() == max(tensor.shape):
                return tensor
    return None


def around_router(model: Any, layer: int) -> dict[str, nn.Module]:
    """A layer's router with what is in it, then the modules it is in, up to the layer: by name, innermost first."""
    router, home = model.anatomy.places["router_logits", layer].module, model.anatomy.layers[layer]
    names = {id(m): name for name, m in model.hf.named_modules()}
    own = {names[id(m)]: m for m in router.modules()}
    inside = f"{names[id(router)]}."
    outer = {names[id(m)]: m for m in home.modules() if inside.startswith(f"{names[id(m)]}.") and m is not router}
    return own | dict(reversed(outer.items()))


def starved(router: Any, off: Tensor, slots: int) -> bool:
    """True if a group-limited router could keep groups with fewer experts left than slots; off bool [expert]."""
    groups, kept = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
    left = (~off).view(groups, -1).sum(1).sort().values[:kept]
    return groups > 1 and int(left.sum()) < slots


def neuron_weights(model: Any, layer: int, ids: Tensor) -> tuple[Tensor, Any]:
    """The weights that read some neurons of a dense MLP, as (tensor, index)."""
    module: Any = model.anatomy.places["mlp_hidden", layer].module
    ids = ids.to(model.device)
    transposed = not isinstance(module, nn.Linear)  # GPT-2's Conv1D keeps [in, out]
    return module.weight, ids if transposed else (slice(None), ids)


def output_weights(model: Any, layer: int, expert: int, factor: float = 0.0) -> list[Tensor]:
    """The weights that make an expert's output, as views to write to. ExpertError where scaling them scales it not."""
    module = _module(model, layer)
    if expert >= undecorated.computing(module):
        raise ExpertError(
            f"{model.name}, layer {layer}: expert {expert} returns its input and has no weights that could be zeroed"
        )
    if getattr(module, "has_post_expert_norm", False) and (
        factor != 0 or bool(torch.count_nonzero(_norm_of_zero(module)))
    ):
        raise ExpertError(
            f"{model.name}, layer {layer}: a norm behind each expert undoes a change of its output's size, and only an "
            "output of 0 is kept where the norm keeps it"
        )
    return undecorated.output_weights(module, expert)


def _module(model: Any, layer: int) -> Any:
    module = model.anatomy.places["expert_weight", layer].module
    down = getattr(module, "down_proj", None)
    if down is not None and not (isinstance(down, Tensor) and down.is_floating_point()):
        raise ExpertError(
            f"{model.name}, layer {layer}: {type(module).__name__} does not keep its experts in plain tensors, so they "
            "cannot be written to; load the model without quantisation"
        )
    return module


def _of_experts(module: nn.Module, n: int, router: nn.Module) -> Iterator[Tensor]:
    """Every parameter of an experts module that has rows of each of its n experts, the router's left out."""
    routing = {id(p) for p in router.parameters()}
    for weight in module.parameters():
        if weight.dim() >= 2 and weight.shape[0] % n == 0 and id(weight) not in routing:
            yield weight


def _norm_of_zero(module: Any) -> Tensor:
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    return module.post_expert_norm(torch.zeros(1, width, dtype=module.down_proj.dtype, device=module.down_proj.device))
