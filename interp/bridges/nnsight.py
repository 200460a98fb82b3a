"""nnsight: its LanguageModel on our weights, and our sites as its proxies.

    lm = m.nnsight()                                         # the same weights, no copy
    with lm.trace("The capital of France is"):
        h = nnsight.proxy(lm, m, "resid_post[5]").save()     # [batch, pos, d_model]
        nnsight.proxy(lm, m, "mlp_out[7]")[:] = 0            # writing in place acts on the run

where ``nnsight`` is `interp.bridges.nnsight`. As in any trace, read sites in the order in which the model reaches them:
by layers, and within a layer mostly in the order of `interp.sites.KINDS` (some families run the shared expert first).

nnsight stands at module boundaries. What lives inside a function (q, k, v, pattern, z, the neurons and outputs of
single experts, a norm's scale) has no proxy, and `proxy` says so. Our own contexts work around a trace, though,
because the model underneath is the same::

    with m.recording("q[5]") as rec, m.intervene(edits.zero("z[5, head=3]")):
        with lm.trace("The capital of France is"):
            h = lm.model.layers[5].output.save()
    q = rec.activations()["q[5]"]

At one module nnsight acts first, then our edits, then our recordings: ``.output`` is what the module gave, before
our edits of that place; a recording shows the change that a trace made.

**What stays behind.** nnsight puts a ``forward`` of its own on every module object and leaves it there. Outside a trace
it does nothing; our map, captures and edits are the same with and without it (tested).

**Remote execution.** A trace on NDIF runs on a copy of the model that lives there; the weights here are not used, so an
edit made with ``m.intervene`` cannot act. `location` tells where a site is, so that a trace can be written for it::

    from nnsight import CONFIG, TransformersModel
    CONFIG.set_default_api_key("...")                         # from login.ndif.us
    location(interp.load("tiny:llama"), "attn_out[1]")        # 'model.layers.1.self_attn.output'
    big = TransformersModel("meta-llama/Llama-3.1-70B", task="text-generation")    # no weights are loaded here
    with big.trace("The capital of France is", remote=True):
        a = big.model.layers[5].self_attn.output[0].save()    # attention modules give a tuple

This is nnsight's own feature; it needs an account and the network, and none of it is tested here.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from interp.bridges import place_of
from interp.sites import Site, SiteError

if TYPE_CHECKING:
    from torch import Tensor

    from interp.model import Model

# how a place is reached -> what nnsight calls that side of its module
_SIDE = {
    "output": "output",
    "input": "input",
    "stream": "input",
    "router": "output",
    "logits": "output",
    "experts": "inputs",
}
_ARGUMENT = {"expert_ids": 1, "expert_weight": 2}  # the experts module is called with (hidden, ids, weights)


def open_model(model: Model) -> Any:
    """nnsight's LanguageModel on the model's weights, or its NNsight where there is no tokenizer (give ``input_ids=``).

    It gets a copy of the tokenizer, since it sets a padding token and the padding side (left; ours is right).
    """
    import nnsight

    model.anatomy  # noqa: B018 - the map is made by a forward pass, which must not happen inside a trace
    if model.tokenizer is None:
        return nnsight.NNsight(model.hf)
    with warnings.catch_warnings():
        # 0.8 calls the name deprecated: it is a TransformersModel of this task. It is still what people look for.
        warnings.filterwarnings("ignore", message="LanguageModel is deprecated")
        kind = getattr(nnsight, "LanguageModel", None) or nnsight.TransformersModel
        return kind(model.hf, tokenizer=copy.deepcopy(model.tokenizer), task="text-generation")


def location(model: Model, site: str | Site) -> str:
    """Where nnsight finds a site: the module's path and the side, such as ``model.layers.5.self_attn.output``.

    Where that is a tuple, the site is its first element (for the chosen experts and their weights: the second and third
    of the positional ``inputs`` of the experts module).

    Raises SiteError, with the way out, for a site inside a function.
    """
    found, place, path = place_of(model, site)
    if place.how not in _SIDE or (place.how == "experts" and found.name not in _ARGUMENT):
        raise SiteError(
            f"{found}: nnsight sees module boundaries only, and this lives inside {type(place.module).__name__}"
            f"{f' ({path})' if path else ''}; read it with m.capture or m.recording, write it with m.intervene, which "
            "also work around a trace"
        )
    return f"{path}.{_SIDE[place.how]}".lstrip(".")


def proxy(lm: Any, model: Model, site: str | Site) -> Tensor:
    """The tensor at `site`, inside ``with lm.trace(...)``: read it, ``.save()`` it, or write into it in place.

    Axes are the module's own: [batch, pos, ...] as ours, but routers and experts see tokens in one row:
    router_logits [batch * pos, expert], expert_ids and expert_weight [batch * pos, slot]. Routers that choose inside
    return their logits afterwards, so writing those changes nothing; write expert_weight instead.

    Args:
        lm: what ``model.nnsight()`` gave.
        model: the Model that it belongs to.
        site: one whole site: embed, resid_pre, resid_mid, resid_post, attn_out, mlp_out, mlp_hidden, shared_out,
            router_logits, expert_ids, expert_weight or logits.
    """
    found, place, _ = place_of(model, site)
    value = lm.get(location(model, found))
    if place.how == "logits":
        return value[0] if isinstance(value, tuple) else value.logits
    if place.how == "experts":
        positional, named = value
        which = _ARGUMENT[found.name]
        return positional[which] if len(positional) > which else list(named.values())[which - len(positional)]
    value = value[0] if isinstance(value, tuple) else value
    if place.how == "router" and value.shape[-1] != model.anatomy.sizes[found.name, found.layer]["expert"]:
        raise SiteError(
            f"{found}: {type(place.module).__name__} does not return its logits (its first output is "
            f"{list(value.shape)}); read them with m.capture or m.recording"
        )
    return value
