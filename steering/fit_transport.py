"""Activation Transport: per unit, the map that carries the source's distribution onto the target's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.maps import Affine, Map, Shift
from steering.nonlinear import Transport
from steering.reading import At, read, sites_at
from steering.vector import SteeringMap


def act(
    m: Any,
    source_texts: Any,
    target_texts: Any,
    layer: Any = "*",
    *,
    how: Literal["linear", "mean"] = "linear",
    support: bool = True,
    site: str = "mlp_out",
    at: At = "all",
    scope: Any = "all",
    chat: bool = False,
    batch_tokens: int = 4096,
) -> SteeringMap:
    """Activation Transport (AcT): ``h -> omega h + beta`` per unit, fitted layer by layer with the earlier maps active.

    Both samples are sorted: omega = sum a~ b~ / sum a~^2 of the centred order statistics (least squares), and
    beta = mean(b) - omega mean(a). How far to go is the strength: ``m.intervene(act(...) * 0.5)`` is lambda = .5, and
    1 is the whole way. Source: Rodriguez et al. 2024 (arXiv:2410.23054), sec. 3; activations are means over a text's
    tokens. (Their best place is behind the norms, which is no site; the blocks' outputs are the next in their
    tables.)

    Args:
        m: the model.
        source_texts: from what.
        target_texts: to what; equally many.
        layer: a layer, several, or "*".
        how: "linear", or "mean" (omega = 1: a shift of means).
        support: change a unit only where it lies in the range that the source had (to mitigate); False everywhere (to
            induce).
        site: where, with `layer` put in.
        at: which tokens are read.
        scope: to which tokens it is applied.
        chat: put the texts into the model's chat template.
        batch_tokens: tokens run at once.
    """
    sites = sorted(sites_at(m, layer, site), key=lambda s: m.resolve(s)[0])
    source = _pairs.texts(m, source_texts, chat=chat, name="source_texts")
    target = _pairs.texts(m, target_texts, chat=chat, name="target_texts")
    wanted = read(m, target, sites, at, batch_tokens)
    record = {"how": how, "support": support, "at": at, "source": len(source), "target": len(target)}
    made: SteeringMap | None = None
    for s in sites:
        # what the source is at this place once the places before it have been mapped
        with m.intervene(*([made] if made else [])):
            x = read(m, source, [s], at, batch_tokens)[s]
        one = SteeringMap.of(
            m, {s: transport_map(x, wanted[s], how, support)}, method="act", scope=scope, record=record
        )
        made = one if made is None else SteeringMap(
            made.parts + one.parts, one.fingerprint, one.model, "act", record
        )  # fmt: skip
    assert made is not None
    return made


def transport_map(source: Tensor, target: Tensor, how: str = "linear", support: bool = True) -> Map:
    """The map of one site from rows [row, d] to rows [row, d]; see `act`."""
    if how not in ("linear", "mean"):
        raise SteeringError(f"how={how!r}: expected 'linear' or 'mean'")
    if source.shape != target.shape:
        raise SteeringError(
            f"source and target: {list(source.shape)} and {list(target.shape)}; samples are sorted and matched, so "
            "give equally many texts"
        )
    a, b = source.double(), target.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    omega = torch.ones_like(mean_a)
    if how == "linear":
        a_sorted, b_sorted = a.sort(dim=0).values - mean_a, b.sort(dim=0).values - mean_b
        spread = a_sorted.square().sum(0)
        # a unit that never varies in the source can only be shifted
        omega = torch.where(spread > 0, (a_sorted * b_sorted).sum(0) / spread.clamp_min(1e-300), omega)
    beta = mean_b - omega * mean_a
    if support:
        return Transport(omega.float(), beta.float(), source.amin(0), source.amax(0))
    return Shift(beta.float()) if how == "mean" else Affine(omega.float(), beta.float())
