"""Replaying recorded routing: which experts each token goes to, and with what weight, as another run had it.

    acts = m.capture(clean, "expert_weight[*]")
    with m.intervene(edits.add("resid_post[3]", v), experts.replay(acts)):     what v does, routing apart
        m(clean)

With routing frozen, what an intervention does through content is left, and what it does through routing is gone. A
shared expert's gate, where a family has one, is no part of the choice and is not replayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from interp import edits
from interp.activations import Activations
from interp.edits import Edit
from interp.experts.units import ExpertError
from interp.scope import Scope
from interp.sites import Site


def replay(acts: Activations, layers: Iterable[int] | None = None, *, scope: str | Scope = "prompt") -> list[Edit]:
    """Edits that give each token the experts and weights that `acts` recorded for it, by token position.

    Args:
        acts: a capture with ``expert_weight`` (``expert_ids`` comes with it) of the layers.
        layers: which layers; all that were recorded if missing.
        scope: which tokens. On generated tokens there is nothing to replay.

    Raises ExpertError for a layer whose routing was not recorded.
    """
    recorded = sorted({s.layer for s in acts.tensors if s.name == "expert_ids" and s.layer is not None})
    chosen = recorded if layers is None else list(layers)
    for layer in chosen:
        missing = [n for n in ("expert_ids", "expert_weight") if Site(n, layer) not in acts.tensors]
        if missing:
            raise ExpertError(
                f"replay: {missing[0]}[{layer}] was not recorded (routing of layers {recorded} was); "
                f"capture 'expert_weight[{layer}]'"
            )
    if not chosen:
        raise ExpertError("replay: no routing was recorded; capture 'expert_weight[*]'")
    how: dict[str, Any] = {"name": "replay", "scope": Scope.parse(scope)}
    sites = [f"{name}[{layer}]" for layer in chosen for name in ("expert_ids", "expert_weight")]
    return [edits.freeze(site, acts, **how) for site in sites]
