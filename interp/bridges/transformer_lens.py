"""TransformerLens: its ActivationCache out of our Activations, our Model out of its TransformerBridge.

**Out**: `to_cache`. Sites go under TransformerLens's names, so its shorthand works: ``cache["resid_post", 5]``. What
it has no name for (experts, logits, a single head) stays under ours: ``cache["expert_hidden[3]"]``.

**In**: `from_bridge`. Booting a bridge rewrites the transformers model: every layer, norm and projection is put inside
a component of TransformerLens, and attention is computed by its code. None of our doors leads there. But each component
still holds the module it stands for, and with it the weights. So we walk the tree once and build its twin without the
wrapping: new module objects, the very same parameters. Nothing of the bridge is touched, both can be used side by side,
a weight changed in place changes in both; hooks and edits of one do not act in the other.

Both directions are tested against the lines 3.9 and 4.3.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from interp.sites import Site

if TYPE_CHECKING:
    from interp.activations import Activations
    from interp.model import Model


# -- out -------------------------------------------------------------------------------------------------------
def to_cache(acts: Activations, model: Any = None) -> Any:
    """The activations as a ``transformer_lens.ActivationCache``, sharing their tensors.

    Queries and keys of a rotary model are `hook_rot_q` and `hook_rot_k`, since ours are read after the rotation, else
    `hook_q` and `hook_k`; under grouped-query attention k and v keep their key-value heads, as the bridge's own cache
    has them. Where there is no rotation and both ``embed`` and ``resid_pre[0]`` were captured, their difference goes in
    as `hook_pos_embed` (the learned positions; in BLOOM, what its norm on the embedding changed), so that
    ``decompose_resid`` sums to the residual stream. Sites without a name there keep ours, except the rows of a single
    expert, which have no batch axis and are left out with a warning.

    Args:
        acts: what a run left; the cache holds the sites that were captured, no others.
        model: what the cache asks for sizes and weights. Without one, the last captured layer counts as the last of the
            model, which is enough for ``cache[name, layer]``, ``stack_activation``, ``accumulated_resid`` and
            ``decompose_resid``. With our Model the count is the model's, and ``apply_ln=True`` works. Methods that use
            TransformerLens's view of the weights (``logit_attrs``, ``stack_head_results``) need a TransformerBridge.
    """
    from transformer_lens import ActivationCache

    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for site in acts.sites:
        if "row" in site.axes:
            rows.append(str(site))
        else:
            tensors[cache_name(site, acts.rotary)] = acts.tensors[site]
    if rows:
        import warnings

        warnings.warn(
            f"to_transformer_lens: left out {', '.join(rows)}: rows of one expert have no batch axis, which an "
            "ActivationCache needs; capture the whole site instead",
            stacklevel=3,
        )
    if not acts.rotary and {"hook_embed", "blocks.0.hook_resid_pre"} <= tensors.keys():
        tensors["hook_pos_embed"] = tensors["blocks.0.hook_resid_pre"] - tensors["hook_embed"]
    return ActivationCache(tensors, _stand_in(acts, model))


def cache_name(site: Site, rotary: bool) -> str:
    """The key of a site in the cache: TransformerLens's name if it has one for this tensor, else ours."""
    name = None if site.index else site.tl_name
    if name is None:
        return str(site)
    return name if rotary or site.name not in ("q", "k") else name.replace("hook_rot_", "hook_")


class _Known:
    """The few facts that a cache may ask of its model; anything else is an AttributeError that says what to pass."""

    def __init__(self, mend: str, **facts: Any) -> None:
        self.__dict__.update(facts, _mend=mend)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name!r} is not known to this ActivationCache, which was made from interp's activations: {self._mend}"
        )


def _stand_in(acts: Activations, model: Any) -> Any:
    from interp.model import Model

    layers = [site.layer for site in acts.sites if site.layer is not None]
    if model is None:
        mend = "pass to_transformer_lens(model=...), our Model or a TransformerBridge"
        return _Known(mend, cfg=_Known(mend, n_layers=max(layers, default=-1) + 1, attn_only=False))
    if not isinstance(model, Model):
        return model
    mend = "boot a TransformerBridge on the model and pass it as to_transformer_lens(model=bridge)"
    norm = model.anatomy.places.get(("ln_final_scale", None))
    facts = {"tokenizer": model.tokenizer} | ({"ln_final": norm.module} if norm else {})
    kind = None if norm is None else "LN" if norm.centred else "RMS"
    config = _Known(
        mend,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        d_model=model.d_model,
        attn_only=False,
        normalization_type=kind,
        device=model.device,
        dtype=model.dtype,
    )
    return _Known(mend, cfg=config, **facts)


# -- in --------------------------------------------------------------------------------------------------------
#: Largest mean KL divergence (nats) between the bridge and its twin that rounding explains, by the size of an element.
#: In float32 rounding gives 1e-7, in bfloat16 up to 1e-4; weights that do not belong together gave 0.03 and more.
_ROUNDING = {4: 1e-4, 8: 1e-4, 2: 2e-2}


def from_bridge(bridge: Any, tokenizer: Any = None) -> Model:
    """A Model on the weights of a TransformerBridge, with every site the plain transformers model has.

    Weights are shared, not copied; the bridge stays as it is (see the module's text). Weights that
    ``enable_compatibility_mode`` has folded and centred are taken as they now are. Families that keep q, k and v in one
    matrix (GPT-2, NeoX, Falcon, ...) are the exception: TransformerLens then puts the processed weights beside that
    matrix and not into it, so no transformers model computes what the bridge computes, and the bridge is refused.

    Texts go through the bridge's tokenizer unless another one is given. TransformerLens sets it to put the start token
    in front, where it can; ids from ``bridge.to_tokens(text)`` are sure to be the bridge's own.

    Raises LoadError if the bridge and the plain model on the same weights do not agree on a few tokens, which also
    catches a family that the installed TransformerLens computes wrongly (DeepSeek V2 and V3 in 3.9).
    """
    from interp.model import Model

    model = Model(
        unwrapped(bridge.original_model),
        tokenizer if tokenizer is not None else bridge.tokenizer,
        name=bridge.cfg.model_name,
    )
    model.card = {"source": "bridge", "compatibility_mode": bool(getattr(bridge, "compatibility_mode", False))}
    _check_agreement(bridge, model)
    return model


def unwrapped(root: nn.Module) -> nn.Module:
    """The twin of a module tree without TransformerLens's components: other module objects on the same parameters.

    Configs are copied, since entering one of our contexts changes them for the while.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformers import PreTrainedConfig

    twins: dict[int, nn.Module] = {}
    configs: dict[int, Any] = {}

    def twin(module: nn.Module | None) -> Any:
        while isinstance(module, GeneralizedComponent):
            module = module.original_component
        if module is None:  # a part that this layer does not have, such as attention in a Mamba layer
            return None
        if id(module) not in twins:
            new = twins[id(module)] = module.__new__(type(module))
            for name, value in vars(module).items():
                if name == "forward" and _is_lens(value):
                    continue  # a forward that TransformerLens put on this one object: the class's own counts
                if isinstance(value, PreTrainedConfig):
                    value = copy.deepcopy(value, configs)
                elif name.startswith("_") and isinstance(value, dict):
                    value = value.copy()  # parameters, buffers, hooks: own dictionaries, same contents
                new.__dict__[name] = value
            new._modules = {name: twin(child) for name, child in module._modules.items()}
            if "forward" in new.__dict__:
                _refuse(
                    f"the forward of its {type(module).__name__} was replaced on the object (by accelerate, nnsight?) "
                    "and would run on the bridge's modules; boot the bridge on a freshly loaded model"
                )
        return twins[id(module)]

    return twin(root)


def _is_lens(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("transformer_lens")


def _check_agreement(bridge: Any, model: Model) -> None:
    ids = torch.arange(1, 9, device=model.device)[None] % model.d_vocab
    modes = [(module, module.training) for root in (bridge, bridge.original_model) for module in root.modules()]
    try:
        for root in (bridge, bridge.original_model, model.hf):
            root.eval()
        with torch.no_grad():
            theirs, ours = (logits.float().log_softmax(-1) for logits in (bridge(ids), model(ids)))
    except Exception as error:
        _refuse(f"a forward pass on 8 tokens failed, of the bridge or of its model: {type(error).__name__}: {error}")
    finally:
        for module, training in modes:
            module.training = training
    gap = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    if not gap <= _ROUNDING[model.dtype.itemsize]:
        from importlib.metadata import version

        if model.card["compatibility_mode"]:
            why = (
                "this family keeps q, k and v in one matrix, which TransformerLens's processing leaves behind; open it "
                "before enable_compatibility_mode(), or use no_processing=True"
            )
        else:
            why = (
                f"TransformerLens {version('transformer-lens')} computes this family otherwise, or hooks are on the "
                "bridge; take those away, or open the checkpoint itself with interp.load"
            )
        _refuse(f"it and the transformers model on its weights differ by {gap:.2g} nats (mean KL on 8 tokens): {why}")


def _refuse(why: str) -> NoReturn:
    from interp.zoo.errors import LoadError

    raise LoadError(f"load: the TransformerBridge cannot be opened: {why}")
