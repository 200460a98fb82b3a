"""Steering: a vector or map from data, applied to exactly the tokens meant.

    v = steering.caa(m, pairs, layer=15)                fit: pairs = [(prompt, positive_text, negative_text), ...]
    with m.intervene(v * 2.0):                          apply
        m.generate("I believe that")
    v.save("honest"); steering.load("honest", m)        keep

Every fit returns a `SteeringMap` (a `SteeringVector` where it only adds): maps at sites, each with a scope and
perhaps a gate. So every fit meets every schedule, report, export and weight edit.
"""

from __future__ import annotations

from steering.disk import load
from steering.errors import SteeringError
from steering.fit_mean import caa, mean_centre
from steering.vector import AFTER_PROMPT, Part, SteeringMap, SteeringVector, equalise

__all__ = [
    "AFTER_PROMPT",
    "Part",
    "SteeringError",
    "SteeringMap",
    "SteeringVector",
    "caa",
    "equalise",
    "load",
    "mean_centre",
]
