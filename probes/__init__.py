"""Probes: what a layer, a head, a neuron, an expert or a latent knows, and edits that follow from it.

    table = probes.by_layer(m, texts, labels)                 a probe per layer, beside its controls
    p = probes.LinearProbe().fit(X, y)                        one probe, scikit-learn's interface
    with m.intervene(probes.edit(p, "resid_post[8]", 2.0)):   along its direction: does the output follow?
    probes.Leace().fit(X, y).edit("resid_post[8]")            without it
    probes.tcav(m, concept, random, inputs, metric, site)     is the output sensitive to it?

A probe says that something can be read, not that the model reads it. So scores stand beside controls, and
`probes.causal` asks the model.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from probes.disk import save as save  # not when asked for: nnsight gives every object, modules too, a `save` of its own

_HOME = {
    "LinearProbe": "linear", "MeanDifference": "linear", "NearestMean": "linear", "LDA": "linear",
    "RidgeProbe": "linear", "KSparseProbe": "linear", "AttentionProbe": "attention", "CCS": "ccs",
    "MultiLabelProbe": "multilabel", "Leace": "erasure", "MeanProjection": "erasure", "INLP": "erasure",
    "features": "reading", "Features": "reading", "split": "splitting", "Split": "splitting",
    "by_layer": "sweep", "by_site": "sweep", "survey": "sweep", "Survey": "sweep",
    "tcav": "concepts", "TcavResult": "concepts",
    "interval": "scores", "auroc": "scores", "calibration": "scores", "description_length": "scores",
    "calibrated": "calibrate", "edit": "intervening", "causal": "intervening", "load": "disk",
    "massive": "outliers", "massive_effect": "outliers", "massive_attention": "outliers",
    "effect": "effects", "random_adds": "effects", "by_variant": "variants", "transfer": "variants",
    "detector": "detectors", "Detector": "detectors", "guard": "guarding", "Guard": "guarding", "shift": "shifts",
    "axis": "axes", "fit_axis": "axes", "Axis": "axes", "across": "languages", "Across": "languages",
    "magnitude": "quantities", "prompt_probe": "prompting", "knows": "knowing", "Knows": "knowing",
    "p_true": "knowing", "awareness": "entities", "attention_change": "entities",
    "ProbeError": "errors", "ProbeWarning": "errors",
}  # fmt: skip

__all__ = sorted([*_HOME, "save"])


def __getattr__(name: str) -> Any:
    """Import what ``probes.<name>`` stands for when it is asked for: scikit-learn is not loaded before."""
    if name not in _HOME:
        raise AttributeError(f"probes has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"probes.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
