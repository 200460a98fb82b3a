"""Patching: which heads, neurons, positions and experts carry a behaviour, exactly and by gradients.

table = patching.patch(m, clean, corrupt, metric, "z[*]")                       exact, batched
table = patching.attribute(m, clean, corrupt, metric, "z[*]", method="atp*")    estimated, one row per node too
card  = patching.report_card(m, clean, corrupt, metric, "z[*]")                 how far to trust the estimates here
cert  = patching.certify(m, clean, corrupt, metric, table, threshold=0.5)       what the estimates may have missed
pairs = patching.builders.ioi(m)                                                prompt pairs, alignment checked
"""

# Not lazily: some functions have the name of their module, and the function must be what `patching.patch` is.
from interp.patching import builders, circuits, guardrails, pairs
from interp.patching.attribute import METHODS, attribute
from interp.patching.certify import Certificate, certify
from interp.patching.circuits import Circuit
from interp.patching.edges import attribute_edges
from interp.patching.graph import Graph
from interp.patching.guardrails import both, subspace_patch
from interp.patching.nodes import Node, expand, window
from interp.patching.pairs import Pairs
from interp.patching.patch import patch
from interp.patching.paths import path_patch
from interp.patching.report_card import report_card
from interp.patching.runs import Patcher, effects
from interp.patching.self_repair import conditional
from interp.patching.sweeps import sweep

__all__ = [
    "METHODS",
    "Certificate",
    "Circuit",
    "Graph",
    "Node",
    "Pairs",
    "Patcher",
    "attribute",
    "attribute_edges",
    "both",
    "builders",
    "certify",
    "circuits",
    "conditional",
    "effects",
    "expand",
    "guardrails",
    "pairs",
    "patch",
    "path_patch",
    "report_card",
    "subspace_patch",
    "sweep",
    "window",
]
