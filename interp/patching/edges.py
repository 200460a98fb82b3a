"""Scores of every edge of the residual graph: exact, EAP and EAP-IG.

The effect of an edge writer -> reader is the change of the metric when only that reader gets what that writer writes in
the other run. Exact patching takes a run per edge. Edge attribution patching (Syed et al. 2023, arXiv 2310.10348)
takes the first-order term of all of them from one backward pass:

    score(u -> v) = (write of u in the source run - in the base run) . dL/d(what v reads), at the base run

EAP-IG (Hanna et al. 2024, arXiv 2403.17806) averages the gradient while the embeddings go from the base to the source
run. Its reference code disagrees with itself on where: edges are taken at steps 0 .. m-1 of m, nodes at 1 .. m. We take
the midpoints (i + 1/2) / m, the rule of second order.

Here the signs are those of `patching.patch`: a value is the metric of the patched run minus that of the base run.
`score` is the mean over pairs of the absolute value, taken pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from interp import edits
from interp.activations import Tokens
from interp.calls import recorded
from interp.metrics import Metric
from interp.patching import wiring
from interp.patching.graph import Graph, Level, Reader, mask_of
from interp.patching.task import Direction, PatchError, Run, Task, evaluate, telling, without_flash

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

EdgeMethod = Literal["eap", "eap-ig", "exact"]


@recorded
def attribute_edges(
    m: Model,
    clean: Any,
    corrupt: Any,
    metric: Any,
    method: EdgeMethod = "eap-ig",
    *,
    level: Level = "head",
    direction: Direction = "noise",
    steps: int = 5,
    edges: Sequence[tuple[str, str]] | None = None,
    graph: Graph | None = None,
) -> pd.DataFrame:
    """Scores edges of the residual graph.

    Args:
        m: the model; see `interp.patching.graph.Graph` for families that have no such graph.
        clean: prompts, or `Pairs`.
        corrupt: their corrupt twins.
        metric: logits [pair, pos, vocab] -> [pair], or a Metric.
        method: "eap", "eap-ig", or "exact": a patched run per edge, for small graphs or a few `edges`.
        level: "head" or "block".
        direction: "noise" (the clean run gets corrupt writes: what is needed), as in the sources, or "denoise".
        steps: of eap-ig.
        edges: (writer, reader) pairs to score; default: all.
        graph: a Graph made before for this model, to spare making it again.

    Returns:
        A line per edge: writer, reader, writer_layer, reader_layer, value, score, metric, method, direction; baselines
        of both runs and the settings in ``.attrs``.
    """
    if method not in ("eap", "eap-ig", "exact"):
        raise PatchError(f"method={method!r}: expected 'eap', 'eap-ig' or 'exact'")
    if steps < 1:
        raise PatchError(f"steps={steps}: expected at least one")
    graph = graph or Graph(m, level)
    with without_flash(m):
        setting = Setting.of(graph, clean, corrupt, metric, direction)
        wanted = _wanted(graph, edges)
        if method == "exact":
            values = _exact(setting, wanted)
        else:
            points = [0.0] if method == "eap" else [(i + 0.5) / steps for i in range(steps)]
            values = _gradient(setting, points)[:, wanted[:, 0], wanted[:, 1]].T
    return _table(setting, wanted, values, method, {"steps": steps} if method == "eap-ig" else {})


@dataclass(frozen=True, eq=False)
class Setting:
    """A task on a graph: both runs, what every writer wrote in them, the metric of each [pair]."""

    graph: Graph
    task: Task
    change: Tensor  # source - base of every writer [writer, pair, pos, d_model]
    baseline: Tensor
    target: Tensor

    @classmethod
    def of(cls, graph: Graph, clean: Any, corrupt: Any, metric: Any, direction: Direction) -> Setting:
        task = Task.of(graph.m, clean, corrupt, metric, direction)
        change = graph.difference(task.base.tokens, task.source.tokens, (task.base.embeds, task.source.embeds))
        values = [evaluate(task, logits_of(graph.m, run), run.tokens, "a run") for run in (task.base, task.source)]
        telling(task, *values)
        return cls(graph, task, change, *values)

    def patched(self, masks: Tensor) -> Tensor:
        """Metric of the base run with edges patched: masks [run, writer, reader] -> [run, pair]."""
        base, tokens = self.task.base, self.task.base.tokens
        logits = wiring.run(self.graph, tokens, self.source, masks, base.embeds)
        return torch.stack([evaluate(self.task, one, tokens, "a run with patched edges") for one in logits])

    @property
    def source(self) -> Tensor:
        """What every writer wrote in the source run [writer, pair, pos, d_model]."""
        run = self.task.source
        cached: dict[str, Tensor] = self.__dict__
        if "_source" not in cached:
            change = [] if run.embeds is None else [edits.replace("embed", run.embeds)]
            with torch.no_grad(), self.graph.m.intervene(*change):
                cached["_source"] = self.graph.written(self.graph.m.capture(run.tokens, self.graph.sites))
        return cached["_source"]


def logits_of(m: Model, run: Run) -> Tensor:
    """Logits of one run as it is [pair, pos, vocab]."""
    change = [] if run.embeds is None else [edits.replace("embed", run.embeds)]
    with m.intervene(*change):
        return m(run.tokens)


def _wanted(graph: Graph, edges: Sequence[tuple[str, str]] | None) -> Tensor:
    """Numbers (writer, reader) of the edges to score [edge, 2]."""
    return (graph.real if edges is None else mask_of(graph, edges)).nonzero()


def _exact(setting: Setting, wanted: Tensor) -> Tensor:
    """A run per edge: effect [edge, pair]."""
    shape = len(setting.graph.writers), len(setting.graph.readers)
    parts = []
    for chunk in wanted.split(64):
        masks = torch.zeros(len(chunk), *shape, dtype=torch.bool)
        masks[torch.arange(len(chunk)), chunk[:, 0], chunk[:, 1]] = True
        parts.append(setting.patched(masks) - setting.baseline)
    return torch.cat(parts)


def _gradient(setting: Setting, points: list[float]) -> Tensor:
    """First-order effect of every edge [pair, writer, reader]; the gradient is averaged over points base .. source."""
    task, graph = setting.task, setting.graph
    scores = torch.zeros(task.pairs, len(graph.writers), len(graph.readers), dtype=torch.float64)
    for pair in range(task.pairs):
        change = setting.change[:, pair]
        mean = torch.stack([_reader_gradients(setting, pair, a) for a in points]).mean(0)  # [reader, pos, d_model]
        scores[pair] = torch.einsum("utd,rtd->ur", change.double(), mean.double())
    return scores


def _reader_gradients(setting: Setting, pair: int, point: float) -> Tensor:
    """dL/d(what each reader reads), one pair, embeddings `point` of the way to the source [reader, pos, d_model].

    One backward pass gives the gradients at q, k, v and behind the norms of MLPs and logits. Those of heads are then
    pulled back, each alone, through its own columns of the projection and the norm.
    """
    graph, task, m = setting.graph, setting.task, setting.graph.m
    tokens = Tokens(task.base.tokens.ids[[pair]], task.base.tokens.mask[[pair]])
    read: dict[str, Tensor] = {}

    def alias(reader: Reader, x: Tensor) -> Tensor:
        read[reader.name] = x.view_as(x) if x.requires_grad else x.clone().requires_grad_(True)
        return read[reader.name]

    sites = [f"{part}[*]" for part in ("q", "k", "v")] if graph.level == "head" else []
    embed = _embedding(setting, pair, point)
    with graph.reading(alias), m.intervene(edits.replace("resid_pre[0]", embed)):
        acts = m.capture(tokens, [*sites, "resid_pre[0]"], logits=True, grad=True)
    assert acts.logits is not None
    value = _one(task.metric, acts.logits, setting, pair)
    if not value.requires_grad:
        raise PatchError(f"metric {task.metric.name!r} has no gradient with respect to the logits; use method='exact'")
    keys = [s for s in acts.sites if s.name in ("q", "k", "v")]
    whole = [r for r in graph.readers if r.head is None]
    targets = [acts.tensors[s] for s in keys] + [read[r.name] for r in whole]
    found = torch.autograd.grad(value, targets, retain_graph=bool(keys), allow_unused=True)
    at = dict(zip([(s.name, s.layer) for s in keys], found, strict=False))
    direct = dict(zip([r.name for r in whole], found[len(keys) :], strict=True))
    first = {r.layer: r for r in reversed(graph.readers) if r.head is not None}
    rows = []
    for r in graph.readers:
        grad = direct.get(r.name)
        if r.head is not None and (outer := at[r.part, r.layer]) is not None:
            own = acts[f"{r.part}[{r.layer}]"][:, :, r.head]
            (grad,) = torch.autograd.grad(
                own, read[first[r.layer].name], outer[:, :, r.head], retain_graph=True, allow_unused=True
            )
        rows.append(torch.zeros_like(embed[0]) if grad is None else grad[0].detach())
    return torch.stack(rows)


def _embedding(setting: Setting, pair: int, point: float) -> Tensor:
    """The stream that enters layer 0, `point` of the way from the base to the source run [1, pos, d_model]."""
    base = setting.source[0, pair] - setting.change[0, pair]
    return (base + point * setting.change[0, pair])[None].requires_grad_(True)


def _one(metric: Metric, logits: Tensor, setting: Setting, pair: int) -> Tensor:
    """The metric of one pair, its other pairs standing by with the logits of the base run."""
    if setting.task.pairs == 1:
        return metric(logits, setting.task.base.tokens)[0]
    cached: dict[str, Tensor] = setting.__dict__
    if "_base_logits" not in cached:
        cached["_base_logits"] = logits_of(setting.graph.m, setting.task.base)
    rows = [logits[0] if i == pair else cached["_base_logits"][i] for i in range(setting.task.pairs)]
    return metric(torch.stack(rows), setting.task.base.tokens)[pair]


def _table(setting: Setting, wanted: Tensor, values: Tensor, method: str, more: dict[str, Any]) -> pd.DataFrame:
    import pandas as pd

    graph, task = setting.graph, setting.task
    writers, readers = [graph.writers[u] for u, _ in wanted.tolist()], [graph.readers[v] for _, v in wanted.tolist()]
    frame = pd.DataFrame({
        "writer": [w.name for w in writers], "reader": [r.name for r in readers],
        "writer_layer": [w.layer for w in writers], "reader_layer": [r.layer for r in readers],
        "value": values.double().mean(1).numpy(), "score": values.double().abs().mean(1).numpy(),
        "metric": task.metric.name, "method": method, "direction": task.direction,
    })  # fmt: skip
    both = {"base": float(setting.baseline.mean()), "source": float(setting.target.mean())}
    clean, corrupt = ("base", "source") if task.direction == "noise" else ("source", "base")
    frame.attrs |= {
        "model": graph.m.name, "fingerprint": graph.m.fingerprint, "level": graph.level, "metric": task.metric.name,
        "method": method, "direction": task.direction, "baseline": {"clean": both[clean], "corrupt": both[corrupt]},
        "pairs": task.pairs, "sign": "metric of the patched run - metric of the unpatched run", **more,
    }  # fmt: skip
    return frame
