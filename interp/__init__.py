"""interp: open up transformer language models, Mixture-of-Experts first.

Six nouns (Model, Site, Activations, Edit, Metric, Table) and five verbs (capture, intervene, attribute, fit,
bake):

    import interp
    m = interp.load("smollm2")                           # or a hub id, a directory, a .gguf, a model
    acts = m.capture("The capital of France is", ["resid_post[*]"])
    acts["resid_post[5]"]                                # Tensor [batch, pos, d_model]

Everything below is found on first use (PEP 562), so `import interp` itself loads neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from interp.version import __version__

# public name -> the module that defines it; a module's own name stands for the module itself
_HOME = {
    "load": "interp.zoo.load",
    "Model": "interp.model",
    "Site": "interp.sites",
    "Tokens": "interp.activations",
    "Activations": "interp.activations",
    "ExpertActivations": "interp.activations",
    "Edit": "interp.edits",
    "Scope": "interp.scope",
    "rerun": "interp.calls",
    "unfinished": "interp.interrupted",
}
_MODULES = ("corpora", "edits", "experts", "metrics", "monet", "patching", "plots", "sae", "store", "zoo")

# written out for the linters; tests/test_import.py compares it with the two tables above
__all__ = [
    "Activations",
    "Edit",
    "ExpertActivations",
    "Model",
    "Scope",
    "Site",
    "Tokens",
    "__version__",
    "corpora",
    "edits",
    "experts",
    "load",
    "metrics",
    "monet",
    "patching",
    "plots",
    "rerun",
    "sae",
    "store",
    "unfinished",
    "zoo",
]

if TYPE_CHECKING:
    from interp import corpora, edits, experts, metrics, monet, patching, plots, sae, store, zoo
    from interp.activations import Activations, ExpertActivations, Tokens
    from interp.calls import rerun
    from interp.edits import Edit
    from interp.interrupted import unfinished
    from interp.model import Model
    from interp.scope import Scope
    from interp.sites import Site
    from interp.zoo.load import load


def __getattr__(name: str) -> Any:
    """Import what `interp.<name>` stands for, and keep it, so that the next look-up is an ordinary
    attribute."""
    if name in _MODULES:
        value: Any = import_module(f"interp.{name}")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"interp has no {name!r}; it has {', '.join(sorted(__all__))}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
