"""The figures of patching, under their former name; they live in `interp.plots`."""

from __future__ import annotations

from interp.plots.patching import DIVERGING, circuit, heat_maps

__all__ = ["DIVERGING", "circuit", "heat_maps"]
