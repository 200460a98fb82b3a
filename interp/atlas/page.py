"""From statistics to the page: everything the page shows, as one JSON document inside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.experts import ExpertError, RoutingStats
from interp.experts.coactivation import coactivation

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 4


def write(
    path: str | os.PathLike[str],
    model: Any,
    stats: RoutingStats,
    *,
    effects: pd.DataFrame | None = None,
    title: str | None = None,
    companions: int = 5,
) -> Path:
    """Writes the atlas as one HTML file.

    Args:
        path: the file.
        model: the Model, for its tokenizer and name.
        stats: from `experts.routing`; with norms, together and examples the cards say more.
        effects: a Table of `experts.attribute` or `experts.sweep` with the same units.
        title: of the page, default the model's name.
        companions: other experts named on a card.

    Raises ExpertError for Monet's pairs, which are too many for a page, and for effects of another model.
    """
    path = Path(path)
    page = build(model, stats, effects=effects, title=title, companions=companions)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def build(
    model: Any,
    stats: RoutingStats,
    *,
    effects: pd.DataFrame | None = None,
    title: str | None = None,
    companions: int = 5,
) -> str:
    """The atlas as HTML; see `write`."""
    if stats.kind == "monet":
        raise ExpertError(
            f"{stats.name} has {stats.size:,} pairs a layer, too many for a page; write an atlas of a set"
        )
    if effects is not None and effects.attrs.get("fingerprint") != stats.fingerprint:
        raise ExpertError("effects: the Table is of another model than the statistics")
    document = {
        "title": title or f"Experts of {stats.name}",
        "model": stats.name,
        "labels": stats.labels,
        "tokens": [int(n) for n in stats.tokens],
        "layers": list(stats.layers),
        "experts": stats.size,
        "maps": _maps(stats, effects),
        "examples": _examples(model, stats),
        "companions": _companions(stats, companions) if "together" in stats.more else {},
        "effect": {} if effects is None else {k: str(effects.attrs.get(k, "")) for k in ("metric", "mode", "method")},
    }
    template = resources.files("interp.atlas").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", embedded(document))


def embedded(document: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element: no ``<``, ``>`` or ``&`` ends it, or begins anything, early."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _maps(stats: RoutingStats, effects: pd.DataFrame | None) -> list[dict[str, Any]]:
    """What can be coloured: name, what it is, whether 0 is in its middle, values [label][layer][expert]."""
    p = stats.probability
    routers = torch.tensor(list(stats.layers.values()))
    even = p / p.mean(0).clamp_min(1e-300)
    values: list[tuple[str, str, bool, Tensor]] = [
        ("weight", "mean routing weight per token", False, p[:, routers]),
        ("lift", "log2 of the weight over its mean over labels", True, even.clamp_min(2**-8).log2()[:, routers]),
        ("used", "share of tokens that use it", False, stats.rate[:, routers]),
    ]
    if "contribution" in stats.more:
        each = stats.more["contribution"] / stats.tokens[:, None, None]
        values.append(("contribution", "norm of weight x output, per token", False, each[:, routers]))
    if effects is not None:
        values.append(("effect", "change when it is switched off", True, _effects(stats, effects)))
    return [{"name": name, "what": what, "signed": signed, "values": _rounded(v)} for name, what, signed, v in values]


def _effects(stats: RoutingStats, effects: pd.DataFrame) -> Tensor:
    """[label, layer, expert]; 0 where the Table has none."""
    out = torch.zeros(len(stats.labels), len(stats.layers), stats.size, dtype=torch.float64)
    layers = {layer: i for i, layer in enumerate(stats.layers)}
    for (label, layer), part in effects.groupby(["label", "layer"]):
        if label in stats.labels and layer in layers:
            row = out[stats.labels.index(label), layers[layer]]
            row[torch.from_numpy(part["expert"].to_numpy().copy())] = torch.from_numpy(part["value"].to_numpy().copy())
    return out


def _rounded(values: Tensor) -> list[Any]:
    """Nested lists with few digits: the page is read by people."""

    def short(row: Any) -> Any:
        return [short(x) for x in row] if isinstance(row, list) else float(f"{row:.{DIGITS}g}")

    result: list[Any] = short(values.tolist())
    return result


def _examples(model: Any, stats: RoutingStats) -> dict[str, list[list[Any]]]:
    """'layer:expert' -> [weight, before, token, after, label] for each of its strongest tokens."""
    if stats.examples is None:
        return {}
    from interp.experts.examples import examples

    out: dict[str, list[list[Any]]] = {}
    for row in examples(stats, model).itertuples():
        weight = float(f"{row.weight:.{DIGITS}g}")
        out.setdefault(f"{row.layer}:{row.expert}", []).append(
            [weight, row.before, row.token, row.after, stats.labels.index(str(row.label))]
        )
    return out


def _companions(stats: RoutingStats, most: int) -> dict[str, list[list[float]]]:
    """'layer:expert' -> [other, share of its tokens that use the other too, lift]."""
    table = coactivation(stats, top=None)
    best = table.sort_values("value", ascending=False).groupby(["layer", "expert"], sort=False).head(most)
    out: dict[str, list[list[float]]] = {}
    for row in best.to_dict("records"):
        pair = [int(row["other"]), round(float(row["value"]), 3), round(float(row["lift"]), 2)]
        out.setdefault(f"{row['layer']}:{row['expert']}", []).append(pair)
    return out
