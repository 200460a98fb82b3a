"""The figures of resection experiments, under their former name; they live in `interp.plots`."""

from __future__ import annotations

from interp.plots.resection import domain_matrix, frontiers

__all__ = ["domain_matrix", "frontiers"]
