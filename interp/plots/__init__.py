"""Figures: each is made from a Table by one call, and carries a title that states what was found.

    figure = plots.dose_response(table, "The vector leaves the band of random vectors")
    plots.save(figure, "dose.html")          one file, no network; .png is a picture

Figures read Tables, never models; text of models and users is escaped before it enters one. They share one plotly
template, palette and way to save (`interp.plots.style`), and set nothing globally.

    where in the model       expert_heat, heat_maps (patching), layer_curve, overview
    on which tokens          routing, token_highlight
    how much                 dose_response, distributions, domain_matrix, frontiers, sae_frontier
    what belongs together    circuit, coactivation, feature_card
"""

from __future__ import annotations

from interp.plots.card import feature_card
from interp.plots.curves import distributions, dose_response, layer_curve, sae_frontier
from interp.plots.graphs import coactivation
from interp.plots.heat import expert_heat, routing, token_highlight
from interp.plots.overview import overview
from interp.plots.patching import circuit, heat_maps
from interp.plots.resection import domain_matrix, frontiers
from interp.plots.style import OKABE_ITO, TEMPLATE, PlotError, picture, save

__all__ = [
    "OKABE_ITO",
    "TEMPLATE",
    "PlotError",
    "circuit",
    "coactivation",
    "distributions",
    "domain_matrix",
    "dose_response",
    "expert_heat",
    "feature_card",
    "frontiers",
    "heat_maps",
    "layer_curve",
    "overview",
    "picture",
    "routing",
    "sae_frontier",
    "save",
    "token_highlight",
]
