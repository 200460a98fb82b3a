"""Anatomy: where the parts of a model are, found by watching it run once.

Families name their parts as they please, and the same name means different things: ``post_attention_layernorm`` is
the norm *before the MLP* in Llama and a norm *on attention's output* in OLMo 2. So names decide little here. The
model runs once on a few tokens; from which tensor goes into which module follows what each module is:

    a norm whose output is the MLP's input           -> the norm before the MLP; its input is resid_mid
    a norm whose input is attention's output         -> part of attention: attn_out is behind it
    the norm before the MLP reads the layer's input  -> the blocks are parallel: there is no resid_mid
    the MLP's output is the layer's output           -> it adds the residual itself: mlp_out is its last linear's output

Tensors are recognised by their memory, not their values, so residual multipliers and odd dtypes do not confuse it.
The result is a table: for each (site, layer) a `Place`, or the reason why this model has no such site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Place:
    """How to reach a site: by which door (`how`), at which module.

    how: output | input | stream (the module's input, shared with the residual path) | sum | scale | sigmoid | logits |
         grouped (output whose last axis is groups side by side) | argument (positional) |
         attention (the module calls AttentionInterface) | handmade (attention written out) | router | experts
    """

    how: str
    module: nn.Module
    path: str = ""
    centred: bool = False  # for scale: the norm subtracts the mean
    other: nn.Module | None = None  # sum: runs before, its output is added to this one's; grouped: runs this one
    groups: int = 0  # for grouped: how many
    argument: int = 0  # for argument: which one


@dataclass(eq=False)
class Call:
    """One module's call during the probe: which memory went in, which came out."""

    path: str
    module: nn.Module
    inputs: list[Tensor]
    output: Tensor | None

    def reads(self, tensor: Tensor | None) -> bool:
        return tensor is not None and any(same(t, tensor) for t in self.inputs)

    @property
    def source(self) -> Tensor | None:
        return self.inputs[0] if self.inputs else None


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


#: Length of the probe. Long enough for keys that are pooled over a few tokens to show that they are.
PROBE_TOKENS = 8


class AnatomyError(ValueError):
    """A model whose decoder layers could not be found or run."""


@dataclass
class Anatomy:
    """The map of one model.

    Attributes:
        layers: the decoder layers, in order.
        places: (site name, layer) -> Place; unlayered sites have layer None.
        absent: (site name, layer) -> why this model has no such site.
        sizes: (site name, layer) -> {axis: size} for axes that indices pick from.
        no_pattern: why the family's eager attention, the only one that makes a pattern, does not run; "" if it does.
        scores: layer -> (factor on q.k, soft cap or None): how attention scores are made before masks and biases.
    """

    hf: nn.Module
    layers: nn.ModuleList
    path: str
    no_pattern: str = ""
    sizes: dict[tuple[str, int | None], dict[str, int]] = field(default_factory=dict)
    scores: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    places: dict[tuple[str, int | None], Place] = field(default_factory=dict)
    absent: dict[tuple[str, int | None], str] = field(default_factory=dict)

    def put(self, name: str, layer: int | None, place: Place | None, why: str = "", **sizes: int) -> None:
        """Enters a site, or the reason for which it is absent."""
        if place is None:
            self.absent[name, layer] = why
        else:
            self.places[name, layer] = place
            self.sizes.setdefault((name, layer), {}).update(sizes)

    def having(self, name: str) -> list[int]:
        """The layers that have this site."""
        return [layer for layer in range(len(self.layers)) if (name, layer) in self.places]


def text_config(hf: nn.Module) -> Any:
    """The configuration of the text decoder (vision-language models nest it)."""
    config: Any = hf.config
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get is not None else config


def find_layers(hf: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: the heaviest ModuleList that has as many entries as the config has layers."""
    config = text_config(hf)
    n_layers = next(
        (
            getattr(config, k)
            for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if isinstance(getattr(config, k, None), int)
        ),
        None,
    )
    lists = [(path, m) for path, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    fitting = [(path, m) for path, m in lists if n_layers is None or len(m) == n_layers] or lists
    text = [(p, m) for p, m in fitting if not re.search(r"vision|visual|audio|encoder\.", p)] or fitting
    if not text:
        raise AnatomyError(
            f"{type(hf).__name__}: found no list of decoder layers; interp reads decoder-only transformers"
        )
    return max(text, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def dissect(hf: nn.Module) -> Anatomy:
    """Runs the model on a few tokens and returns its map. Nothing of the model is changed."""
    from interp.hooks import attention, experts, functions, parts

    path, layers = find_layers(hf)
    anatomy = Anatomy(hf, layers, path)
    with attention.observed(hf) as heads, experts.observed(hf) as routed:
        calls = watch(hf, layers)
    anatomy.no_pattern = _eager_trouble(hf)
    written = [m for layer in layers for m in layer.modules() if id(m) not in heads and functions.writes_attention(m)]
    by_hand = functions.observe(hf, written, run_probe) if written else {}
    for index, layer in enumerate(layers):
        parts.read_layer(anatomy, index, layer, calls.get(index, []), heads, by_hand, routed)
    parts.read_ends(anatomy, calls)
    _refuse_repeats(anatomy, calls)
    _refuse_rebuilt_streams(anatomy, calls)
    return anatomy


def _refuse_rebuilt_streams(anatomy: Anatomy, calls: dict[int | None, list[Call]]) -> None:
    """Where a layer does not start from what the layer before left, there is no one residual stream to speak of."""
    tops = [next((c for c in calls.get(i, []) if c.module is layer), None) for i, layer in enumerate(anatomy.layers)]
    for i, (top, after) in enumerate(pairwise(tops)):
        if top is None or after is None or top.output is None or after.source is None:
            continue
        if same(top.output, after.source) or torch.equal(top.output, after.source):
            continue
        why = f"this family rebuilds its stream between layers {i} and {i + 1}: what leaves one does not enter the next"
        for key in [k for k in anatomy.places if k[0] in ("resid_pre", "resid_post", "resid_mid")]:
            del anatomy.places[key]
            anatomy.absent[key] = why
        return


def _eager_trouble(hf: nn.Module) -> str:
    """Why patterns cannot be read: they exist in eager attention only, which must run and agree with what is set."""
    from interp.hooks import attention

    try:
        plain = run_probe(hf)
        with attention.observed(hf, eager=True):
            eager = run_probe(hf)
    except AnatomyError as error:
        return f"this family's own eager attention fails here: {error.__cause__}"
    if plain is None or eager is None:
        return ""
    gap, size = float((plain - eager).abs().max()), max(1.0, float(plain.abs().max()))
    if gap <= size * (1e-3 if plain.dtype == torch.float32 else 0.1):
        return ""
    return (
        f"this family's eager attention gives other logits than the one in use (by {gap:.2g}), so its pattern is not "
        "this model's; load it with attn_implementation='eager'"
    )


def _refuse_repeats(anatomy: Anatomy, calls: dict[int | None, list[Call]]) -> None:
    """A module that runs several times in one pass (shared or looped layers) is no single place."""
    times: dict[int, int] = {}
    for call in (c for group in calls.values() for c in group):
        times[id(call.module)] = times.get(id(call.module), 0) + 1
    for key, place in list(anatomy.places.items()):
        if times.get(id(place.module), 1) > 1:
            del anatomy.places[key]
            anatomy.absent[key] = (
                f"{type(place.module).__name__} runs {times[id(place.module)]} times in one forward pass, "
                "so the site would not be one place"
            )


def watch(hf: nn.Module, layers: nn.ModuleList) -> dict[int | None, list[Call]]:
    """Every module call of one tiny forward pass, by layer (None: outside the layers), in the order of return.

    Outputs are kept alive until the map is made, so that memory addresses identify tensors.
    """
    owner: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for module in layer.modules():
            owner.setdefault(id(module), index)
    calls: dict[int | None, list[Call]] = {}
    names = {id(m): name for name, m in hf.named_modules()}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [t for t in flat([*args, *kwargs.values()]) if t.is_floating_point()]
        calls.setdefault(owner.get(id(module)), []).append(Call(names[id(module)], module, tensors, first(output)))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in hf.modules()]
    try:
        run_probe(hf)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def run_probe(hf: nn.Module) -> Tensor | None:
    """A forward pass on a few tokens, in evaluation mode and without gradients; its logits."""
    weight = hf.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.arange(1, 1 + PROBE_TOKENS, device=weight.device)[None] % weight.shape[0]
    training = [(module, module.training) for module in hf.modules()]  # a part may be in another mode than the whole
    try:
        hf.eval()
        with torch.no_grad():
            out = hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:
        raise AnatomyError(
            f"{type(hf).__name__}: a forward pass on a few tokens failed, so its parts cannot be found: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for module, mode in training:
            module.training = mode
    return getattr(out, "logits", None)


def first(output: Any) -> Tensor | None:
    """The tensor that a module's output is, or leads with."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output:
        return first(output[0])
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return None


def flat(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from flat(value)
