"""Bridges: the same model, activations and dictionaries in the hands of other packages.

    transformer_lens   activations as its ActivationCache; a model out of its TransformerBridge
    nnsight            its LanguageModel on the same weights; sites as its proxies
    sae_lens           its SAE directory, read and written

These three modules are the only ones that import those packages, and each does so inside the function that needs it.
What they share is one question: which module of the model carries a site?
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.sites import Site, SiteError

if TYPE_CHECKING:
    from interp.hooks.anatomy import Place
    from interp.model import Model


def place_of(model: Model, site: str | Site) -> tuple[Site, Place, str]:
    """The concrete site, how it is reached, and the dotted path of the module that carries it ("" for the model).

    Raises SiteError where `site` names none or several of this model's sites, or only a part of one.
    """
    found = model.resolve(site)
    if len(found) != 1:
        raise SiteError(f"{site}: this names {len(found)} sites of {model.name}; give one, such as {found[0]}")
    if found[0].index:
        raise SiteError(f"{site}: other packages know whole sites only; take {found[0].base} and index its tensor")
    place = model.anatomy.places[found[0].name, found[0].layer]
    path = next(name for name, module in model.hf.named_modules() if module is place.module)
    return found[0], place, path
