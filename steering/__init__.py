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
from steering.fit_actadd import actadd
from steering.fit_affine import Nearer, affine, affine_map
from steering.fit_angular import angular
from steering.fit_conceptor import Conceptor, conceptor, conceptor_map
from steering.fit_directions import operator, pca, probe
from steering.fit_erase import leace, leace_map
from steering.fit_experts import mote, steermoe, without
from steering.fit_functions import function_vector, layer_mean
from steering.fit_heads import iti, pas
from steering.fit_mean import caa, mean_centre
from steering.fit_probe_edit import probe_edit
from steering.fit_refusal import Refusal, directional_ablation, projections, refusal
from steering.fit_reversal import reversal, reversed_generation
from steering.fit_sae import largest_activation, sae_latent
from steering.fit_transport import act, transport_map
from steering.vector import AFTER_PROMPT, Part, SteeringMap, SteeringVector, equalise

__all__ = [
    "AFTER_PROMPT",
    "Conceptor",
    "Nearer",
    "Part",
    "Refusal",
    "SteeringError",
    "SteeringMap",
    "SteeringVector",
    "act",
    "actadd",
    "affine",
    "affine_map",
    "angular",
    "caa",
    "conceptor",
    "conceptor_map",
    "directional_ablation",
    "equalise",
    "function_vector",
    "iti",
    "largest_activation",
    "layer_mean",
    "leace",
    "leace_map",
    "load",
    "mean_centre",
    "mote",
    "operator",
    "pas",
    "pca",
    "probe",
    "probe_edit",
    "projections",
    "refusal",
    "reversal",
    "reversed_generation",
    "sae_latent",
    "steermoe",
    "transport_map",
    "without",
]
