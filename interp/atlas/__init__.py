"""The expert atlas: one offline page that shows what every expert of a model does.

    stats = experts.routing(m, texts, norms=True, together=True, examples=5)
    atlas.write("atlas.html", m, stats, effects=experts.attribute(m, held_out))

A heat map of layer x expert for each label, and for the expert that is clicked a card: labels, strongest tokens in
their context, who works with it, what its removal does. Search finds experts by number (``3:17``) or by what their
tokens say. Nothing is loaded from anywhere; texts of models and users are data to the page, never markup.
"""

from __future__ import annotations

from interp.atlas.page import build, write

__all__ = ["build", "write"]
