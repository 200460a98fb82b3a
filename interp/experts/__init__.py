"""Experts: measure them, choose them, switch them off, prove what that did, take the result away.

    stats = experts.routing(m, {"law": texts, "code": texts})        how much each expert works on each label
    law   = experts.select(stats, "law", rule="skew", ratio=2.0)     the experts that carry one
    with experts.switched_off(m, law):                               without them
        m.generate("The court")
    with m.intervene(experts.ablate(law, scope="generated")): ...    the same as an Edit, on some tokens
    table = experts.evaluate(m, law, held_out, controls=20)          what that did, beside random experts
    path  = experts.resect(m, law, "without-law")                    a checkpoint that is so for good

    guess = experts.attribute(m, texts)                              every removal at once, estimated
    exact = experts.sweep(m, texts)                                  and measured
    moe   = experts.split(dense, n=16)                               experts made of a dense model's MLPs

The same words work on Monet's pairs, on the routed experts of any Mixture of Experts, and, with kind="neurons", on the
MLP neurons of a dense model, so that the three can be compared (`interp.experts.units`).
"""

from __future__ import annotations

from interp.experts.ablate import MODES, Ablation, ablate
from interp.experts.attribute import agreement, attribute
from interp.experts.autonomy import autonomy
from interp.experts.bake import resect
from interp.experts.balance import load, saturation
from interp.experts.batches import Corpus, corpus
from interp.experts.coactivation import coactivation
from interp.experts.collect import routing
from interp.experts.controls import matched
from interp.experts.dimensions import dimensions
from interp.experts.divergence import divergence
from interp.experts.dose import dose
from interp.experts.evaluate import evaluate, switched_off
from interp.experts.examples import examples
from interp.experts.losses import Losses, losses
from interp.experts.partition import Partition, partition
from interp.experts.reference import Means, mean_outputs
from interp.experts.relation import interference, recall
from interp.experts.replay import replay
from interp.experts.resection import at_damage, frontier, matrix, remove_each, summary
from interp.experts.scores import auroc, correlation, lift, skew
from interp.experts.select import RULES, select
from interp.experts.sets import ExpertSet
from interp.experts.specialisation import specialisation
from interp.experts.split import neurons, split
from interp.experts.split_curve import split_curve
from interp.experts.stats import RoutingStats
from interp.experts.sweep import sweep
from interp.experts.units import ExpertError, units_of

__all__ = [
    "MODES",
    "RULES",
    "Ablation",
    "Corpus",
    "ExpertError",
    "ExpertSet",
    "Losses",
    "Means",
    "Partition",
    "RoutingStats",
    "ablate",
    "agreement",
    "at_damage",
    "attribute",
    "auroc",
    "autonomy",
    "coactivation",
    "corpus",
    "correlation",
    "dimensions",
    "divergence",
    "dose",
    "evaluate",
    "examples",
    "frontier",
    "interference",
    "lift",
    "load",
    "losses",
    "matched",
    "matrix",
    "mean_outputs",
    "neurons",
    "partition",
    "recall",
    "remove_each",
    "replay",
    "resect",
    "routing",
    "saturation",
    "select",
    "skew",
    "specialisation",
    "split",
    "split_curve",
    "summary",
    "sweep",
    "switched_off",
    "units_of",
]
