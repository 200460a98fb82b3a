"""Guardrails: where patching misleads, the check that shows it.

* `subspace_patch`: patching one direction can wake a pathway that the model never uses. The direction mixes a part that
  tells the prompts apart but is not read (in the null space of the outgoing weights) with a part that is read but never
  varies; together they look causal. Makelov et al. 2023 (arXiv 2311.17030). So every patch of a direction runs with
  its row-space and null-space parts and the whole component.
* `both`: noising finds what is needed, denoising what suffices; AND- and OR-like circuits make them differ, so they are
  shown side by side. Heimersheim & Nanda 2024 (arXiv 2404.15255).
* `cautions`: a metric that saturates, a corruption that no text has, too few pairs. Zhang & Nanda 2023 (2309.16042).
* `export`: no result leaves without what it takes to read it: direction, metric, site, position, baselines.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp import metrics
from interp.calls import recorded
from interp.patching.graph import output_maps
from interp.patching.nodes import Node, Nodes
from interp.patching.pairs import Pairs
from interp.patching.patch import patch, table
from interp.patching.runs import Patcher
from interp.patching.task import Direction, PatchError
from interp.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

#: Part of the direction's effect that its row-space part must have by itself, else the verdict is an illusion.
REAL = 0.5
WAYS: tuple[Direction, ...] = ("denoise", "noise")
#: Part of the whole effect from which on `both` calls a node sufficient or necessary.
MATTERS = 0.1


class GuardrailWarning(UserWarning):
    """A result that may not mean what it seems to."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """The part of an activation along orthonormal `basis` [k, d]: what a node may patch instead of all of it."""

    basis: Tensor
    name: str

    def __call__(self, here: Tensor, there: Tensor) -> Tensor:
        basis = self.basis.to(here)
        return here + (there - here) @ basis.T @ basis

    def __str__(self) -> str:
        return self.name


@recorded
def subspace_patch(
    m: Model,
    clean: Any,
    corrupt: Any,
    metric: Any,
    site: str | Site,
    direction: Tensor,
    *,
    position: int | None = None,
    weights: Tensor | None = None,
    way: Direction = "denoise",
) -> pd.DataFrame:
    """Patches one direction of a site, together with the test whether the direction is real.

    Args:
        m: the model.
        clean: prompts, or `Pairs`.
        corrupt: their corrupt twins.
        metric: logits [pair, pos, vocab] -> [pair], or a Metric.
        site: one site, e.g. ``"mlp_hidden[5]"`` or ``"z[5, head=3]"``.
        direction: [d], of any length.
        position: token position; None for all.
        weights: what reads the site, [d, out]. Found by itself for mlp_hidden and for heads' z; elsewhere give it, or
            the test cannot be made and the table says so.
        way: "denoise" or "noise".

    Returns:
        The Table of `patch` with a column `part`: ``direction``, its ``row space`` part (that the weights read) and
        ``null space`` part (that they do not), each patched along itself, and the ``whole`` component. ``.attrs``
        has `verdict` ("real", "illusion", "no effect" or "untested") and `null_share`, the part of the direction's
        squared length in the null space. An illusion also warns.
    """
    place = m.resolve(site)
    if len(place) != 1:
        raise PatchError(f"site {site!r} names {len(place)} sites; a direction is patched at one")
    reads = weights if weights is not None else _outgoing(m, place[0])
    v = _unit(direction, place[0], None if reads is None else reads.shape[0])
    parts: dict[str, Tensor | None] = {"direction": v}
    share = float("nan")
    if reads is not None:
        row, null = _split(v, reads)
        share = float(null.square().sum())
        parts |= {"row space": _normalised(row), "null space": _normalised(null)}
    nodes = [Node(place[0], position, part=Subspace(u[None], name)) for name, u in parts.items() if u is not None]
    patcher = Patcher(m, clean, corrupt, metric, way)
    whole = Node(place[0], position)
    values = patcher.effects([[n] for n in [*nodes, whole]])
    frame = table(m, patcher.task, patcher.baseline, patcher.target, [*nodes, whole], values, "exact")
    frame.insert(1, "part", [str(n.part) for n in nodes] + ["whole"])
    effect = dict(zip(frame["part"], frame["value"], strict=True))
    verdict = _verdict(effect, tested=reads is not None)
    frame.attrs |= {"verdict": verdict, "null_share": share, "real_from": REAL}
    if verdict == "illusion":
        warnings.warn(
            f"{site}: patching this direction changes the metric by {effect['direction']:+.3g}, the part of it that is "
            f"read downstream by {effect.get('row space', 0.0):+.3g} (whole component {effect['whole']:+.3g}); "
            f"{share:.0%} of the direction lies in the null space of the outgoing weights. It wakes a dormant pathway",
            GuardrailWarning,
            stacklevel=2,
        )
    return frame


def _verdict(effect: dict[str, float], tested: bool) -> str:
    if not tested:
        return "untested"
    alone = effect["direction"]
    if abs(alone) < 1e-6:
        return "no effect"
    return "real" if effect.get("row space", 0.0) / alone >= REAL else "illusion"


def _outgoing(m: Model, site: Site) -> Tensor | None:
    """The linear map that reads a site [d, out]; None where there is no single one."""
    if site.name == "mlp_hidden" and not site.index:
        module: Any = m.anatomy.places[site.name, site.layer].module
        weight = module.weight.detach()
        return weight if type(module).__name__ == "Conv1D" else weight.T  # GPT-2 keeps [in, out]
    head = dict(site.index).get("head")
    if site.name == "z" and head is not None and site.layer is not None:
        return output_maps(m)[site.layer][head]
    return None


def _split(v: Tensor, reads: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of v [d] that `reads` [d, out] sees, and does not see."""
    u, size, _ = torch.linalg.svd(reads.double().cpu(), full_matrices=False)
    basis = u[:, size > 1e-6 * size[0]]
    row = basis @ (basis.T @ v)
    return row, v - row


def _unit(direction: Tensor, site: Site, width: int | None) -> Tensor:
    v = direction.detach().double().cpu().flatten()
    if not bool(v.isfinite().all()) or float(v.norm()) == 0:
        raise PatchError(f"direction at {site}: it must be finite and not zero")
    if width is not None and len(v) != width:
        raise PatchError(f"direction at {site}: it has {len(v)} numbers, the site {width}")
    return v / v.norm()


def _normalised(part: Tensor) -> Tensor | None:
    """A part at unit length; None where there is nothing of it."""
    size = float(part.norm())
    return part / size if size > 1e-6 else None


@recorded
def both(
    m: Model,
    clean: Any,
    corrupt: Any,
    metric: Any,
    nodes: Nodes,
    *,
    positions: str | int | Sequence[int] = "each",
    matters: float = MATTERS,
) -> pd.DataFrame:
    """Denoising and noising of the same nodes, side by side.

    Returns a line per node: the node columns of `patch`, `denoise` and `noise` (effects as in `patch`), `suffices` and
    `needed` (the same as shares of the difference between clean and corrupt, positive where the node works for the
    behaviour), and `reading`: "sufficient and needed", "sufficient only" (others do it too: OR, backups), "needed only"
    (it takes others as well: AND), or "" below `matters`.
    """
    frames = {d: patch(m, clean, corrupt, metric, nodes, d, positions=positions) for d in WAYS}
    first = frames["denoise"]
    out = first[["node", "site", "layer", "head", "neuron", "expert", "position", "joint"]].copy()
    gap = first.attrs["baseline"]["clean"] - first.attrs["baseline"]["corrupt"]
    for direction, frame in frames.items():
        out[direction] = frame["value"].to_numpy()
    out["suffices"], out["needed"] = out["denoise"] / gap, -out["noise"] / gap
    readings = {(True, True): "sufficient and needed", (True, False): "sufficient only", (False, True): "needed only"}
    out["reading"] = [
        readings.get((bool(s >= matters), bool(n >= matters)), "")
        for s, n in zip(out["suffices"], out["needed"], strict=True)
    ]
    out["metric"], out["method"], out["direction"] = first["metric"], "exact", "both"
    out.attrs |= first.attrs | {"direction": "both", "matters": matters}
    return out


def cautions(m: Model, pairs: Pairs, metric: Any, *, warn: bool = True) -> list[str]:
    """What to keep in mind about these pairs and this metric, as sentences; with `warn`, as warnings too.

    Looks at the metric (a probability, or its logarithm, is not linear in the logits), the corruption (noise), how
    surprised the model is by the corrupt prompts, how many pairs there are and how many show the behaviour.
    """
    found = []
    metric = metrics.as_metric(metric)
    if "prob" in metric.name and "log" not in metric.name:
        found.append(
            "probability metric: it saturates, and hides components that work against the answer; compare with "
            "logit_diff"
        )
    if pairs.corruption != "token replacement":
        found.append(
            f"{pairs.corruption}: the corrupt run is off the distribution that the model knows; replaced tokens can "
            "localise differently"
        )
    table = surprise(m, pairs)
    more = float((table["corrupt"] - table["clean"]).mean())
    if more > 1.0:
        found.append(
            f"off-distribution: corrupt prompts surprise the model by {more:.1f} nats per token more than clean ones"
        )
    if len(pairs) < 8:
        found.append(f"{len(pairs)} pair(s): too few for an interval over prompts to mean much")
    with torch.no_grad():
        shown = metric(m(pairs.clean), pairs.clean)
    if metric.name == "logit_diff" and float((shown > 0).float().mean()) < 0.8:
        found.append(
            f"the model itself prefers the right answer on {int((shown > 0).sum())} of {len(pairs)} clean prompts"
        )
    for sentence in found if warn else ():
        warnings.warn(sentence, GuardrailWarning, stacklevel=2)
    return found


@recorded
def surprise(m: Model, pairs: Pairs) -> pd.DataFrame:
    """Mean loss (nats per token) of clean and corrupt prompts: columns pair, clean, corrupt."""
    import pandas as pd

    from interp import edits

    with torch.no_grad():
        clean = metrics.loss(pairs.clean)(m(pairs.clean))
        change = [] if pairs.noise is None else [edits.replace("embed", pairs.noise)]
        with m.intervene(*change):
            corrupt = metrics.loss(pairs.corrupt)(m(pairs.corrupt))
    return pd.DataFrame({"pair": range(len(pairs)), "clean": clean.cpu().numpy(), "corrupt": corrupt.cpu().numpy()})


#: What a result must say of itself, as a column or in ``.attrs``.
REQUIRED = ("direction", "metric", "node", "position", "baseline")


def export(frame: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Writes a result as .parquet, .csv or .json, refusing one that cannot be read without its author.

    A .csv keeps no attributes, so baselines are written as columns beside every row.

    Raises ValueError that names what is missing: direction, metric, node, position, or the baseline values of the clean
    and the corrupt run.
    """
    missing = [name for name in REQUIRED if name not in frame.columns and name not in frame.attrs]
    values = frame.attrs.get("baseline", {})
    if "baseline" not in missing and not {"clean", "corrupt"} <= set(values):
        missing.append("baseline values of the clean and the corrupt run")
    if missing:
        raise ValueError(
            f"export: this table does not say its {', '.join(missing)}; export the table that patching made, before "
            "columns or attributes are dropped"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = frame.assign(clean_value=values["clean"], corrupt_value=values["corrupt"])
    for name in ("direction", "metric"):
        if name not in whole.columns:
            whole[name] = frame.attrs[name]
    if path.suffix == ".parquet":
        whole.to_parquet(path)
    elif path.suffix == ".csv":
        whole.to_csv(path, index=False)
    elif path.suffix == ".json":
        whole.to_json(path, orient="records", indent=1)
    else:
        raise ValueError(f"export: {path.name}: expected a name that ends in .parquet, .csv or .json")
    return path
