"""Steering: a vector or map from data, applied to exactly the tokens meant.

    v = steering.caa(m, pairs, layer=15)                fit: pairs = [(prompt, positive_text, negative_text), ...]
    with m.intervene(v * 2.0):                          apply
        m.generate("I believe that")
    v.save("honest"); steering.load("honest", m)        keep

Every fit returns a `SteeringMap` (a `SteeringVector` where it only adds): maps at sites, each with a scope and
perhaps a gate. So every fit meets every schedule, report, export and weight edit.
"""

from __future__ import annotations

from steering.bake import bake
from steering.baselines import random_like, shuffled
from steering.budget import budget, compare
from steering.dac import Composed, dac
from steering.damage import choices, fluency, neutral
from steering.disk import load
from steering.east import action_entropy, east
from steering.errors import SteeringError
from steering.evaluate import evaluate, summarise, verdict
from steering.examples import example_pairs
from steering.export_gguf import from_gguf, to_gguf
from steering.export_hook import to_hook
from steering.ext_sub import ext_sub
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
from steering.gates import Condition, conditional, find_condition
from steering.importers import from_repeng, from_steering_vectors
from steering.lettered import ab
from steering.personas import early_decoding, persona_effects
from steering.planted import Planted
from steering.pres import pres
from steering.propensity import propensities, slopes
from steering.reasoning import final_logits, reasoning_vector, solved
from steering.report import Report, report
from steering.schedules import between, scheduled
from steering.surgery import behaviour_probe, surgery
from steering.sweep import sweep
from steering.vector import AFTER_PROMPT, Part, SteeringMap, SteeringVector, cosines, equalise

__all__ = [
    "AFTER_PROMPT",
    "Composed",
    "Conceptor",
    "Condition",
    "Nearer",
    "Part",
    "Planted",
    "Refusal",
    "Report",
    "SteeringError",
    "SteeringMap",
    "SteeringVector",
    "ab",
    "act",
    "actadd",
    "action_entropy",
    "affine",
    "affine_map",
    "angular",
    "bake",
    "behaviour_probe",
    "between",
    "budget",
    "caa",
    "choices",
    "compare",
    "conceptor",
    "conceptor_map",
    "conditional",
    "cosines",
    "dac",
    "directional_ablation",
    "early_decoding",
    "east",
    "equalise",
    "evaluate",
    "example_pairs",
    "ext_sub",
    "final_logits",
    "find_condition",
    "fluency",
    "from_gguf",
    "from_repeng",
    "from_steering_vectors",
    "function_vector",
    "iti",
    "largest_activation",
    "layer_mean",
    "leace",
    "leace_map",
    "load",
    "mean_centre",
    "mote",
    "neutral",
    "operator",
    "pas",
    "pca",
    "persona_effects",
    "pres",
    "probe",
    "probe_edit",
    "projections",
    "propensities",
    "random_like",
    "reasoning_vector",
    "refusal",
    "report",
    "reversal",
    "reversed_generation",
    "sae_latent",
    "scheduled",
    "shuffled",
    "slopes",
    "solved",
    "steermoe",
    "summarise",
    "surgery",
    "sweep",
    "to_gguf",
    "to_hook",
    "transport_map",
    "verdict",
    "without",
]
