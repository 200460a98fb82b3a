"""Circuits: sets of edges of the residual graph, and how well each stands for the whole model.

A circuit is run as one forward pass in which every edge outside it carries what it carries in the corrupt run
(`interp.patching.wiring`). With m(C) the metric of that run, averaged over pairs, m(M) that of the clean model and m(0)
that of the corrupt run (no edge left):

    faithfulness   f(C) = (m(C) - m(0)) / (m(M) - m(0))                     1: the circuit does what the model does
    completeness   |f(C without K) - f(M without K)| for subsets K of C     0: nothing of it is left outside
    minimality     |f(C without K) - f(C without K and e)| for each e       0: the circuit does not need e
    CPR            area under f over the share of edges kept                higher is better
    CMD            area between f and 1                                     lower is better

The first three are those of Wang et al. 2022 (arXiv 2211.00593), CPR and CMD those of MIB (Mueller et al. 2025, arXiv
2504.13151): circuits of .1 % to 100 % of all edges, highest score first, the trapezoid rule between them and nothing
below .1 %. MIB's benchmark scores depend on whether edges are ranked by signed or by absolute score. Signed ranking
leaves out what works against the behaviour, so f may exceed 1. Here `absolute` says which, and every table repeats it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.patching.edges import Setting
from interp.patching.graph import Graph, GraphError, Level, Reader, mask_of

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

Edge = tuple[str, str]

#: Shares of all edges at which MIB evaluates circuits.
MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
FORMAT = "interp-circuit/1"


@dataclass(frozen=True)
class Circuit:
    """A set of edges.

    Attributes:
        edges: (writer, reader), as in `attribute_edges`.
        scores: their scores, where they come from a table.
        level: "head" or "block".
        about: which model, metric, method, direction, and whether edges were ranked by absolute score.
    """

    edges: tuple[Edge, ...]
    scores: tuple[float, ...] = ()
    level: str = "head"
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if len(set(self.edges)) != len(self.edges):
            raise GraphError("circuit: an edge stands in it twice")
        if self.scores and len(self.scores) != len(self.edges):
            raise GraphError(f"circuit: {len(self.edges)} edges and {len(self.scores)} scores")

    def __len__(self) -> int:
        return len(self.edges)

    def __repr__(self) -> str:
        return f"Circuit({len(self)} edges between {len(self.nodes)} nodes, level {self.level})"

    @property
    def nodes(self) -> list[str]:
        """Every writer and reader named by an edge, in the order of the edges."""
        return list(dict.fromkeys(name for edge in self.edges for name in edge))

    @recorded
    def frame(self) -> pd.DataFrame:
        """A line per edge: writer, reader, value (its score; NaN without one)."""
        import pandas as pd

        writers, readers = zip(*self.edges, strict=True) if self.edges else ((), ())
        values = self.scores or [float("nan")] * len(self)
        return pd.DataFrame({"writer": list(writers), "reader": list(readers), "value": list(values)})

    def without(self, edges: Iterable[Edge]) -> Circuit:
        """The circuit less some edges."""
        gone = set(edges)
        kept = [i for i, e in enumerate(self.edges) if e not in gone]
        scores = tuple(self.scores[i] for i in kept) if self.scores else ()
        return Circuit(tuple(self.edges[i] for i in kept), scores, self.level, self.about)

    def pruned(self, graph: Graph) -> Circuit:
        """Without edges that lie on no path from the embedding to the logits; that changes no run, only the count."""
        feeds = {r.name: _feeds(r, graph) for r in graph.readers}
        alive = set(self.edges)
        while True:
            fed = {"embed"}.union(*(feeds[r] for _, r in alive))  # writers that read something of the circuit
            heard = {w for w, _ in alive}
            kept = {(w, r) for w, r in alive if w in fed and (r == "logits" or feeds[r] & heard)}
            if kept == alive:
                return self.without(set(self.edges) - alive)
            alive = kept

    def overlap(self, other: Circuit) -> float:
        """Share of edges in both, of those in either (intersection over union; Jaccard)."""
        a, b = set(self.edges), set(other.edges)
        return len(a & b) / len(a | b) if a | b else 1.0

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the circuit as JSON: edges with scores, by our names and by those of EAP and MIB."""
        scores = self.scores or [None] * len(self)
        rows = [
            {"writer": w, "reader": r, "score": s, "mib": f"{mib_name(w)}->{mib_name(r)}"}
            for (w, r), s in zip(self.edges, scores, strict=True)
        ]
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, "level": self.level, "about": self.about, "edges": rows}
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """A circuit from its JSON file. GraphError where the file is none."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise GraphError(f"{path}: its format is {document['format']!r}, expected {FORMAT!r}")
            rows = document["edges"]
            edges = tuple((str(r["writer"]), str(r["reader"])) for r in rows)
            scores = tuple(float(r["score"]) for r in rows) if rows and rows[0]["score"] is not None else ()
            return cls(edges, scores, str(document["level"]), dict(document["about"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise GraphError(f"{path}: this is no circuit file ({type(error).__name__}: {error})") from error


def mib_name(name: str) -> str:
    """A node's name in EAP and MIB.

    >>> [mib_name(n) for n in ("embed", "z[3, head=5]", "k[3, head=1]", "mlp_out[2]", "mlp_in[2]", "logits")]
    ['input', 'a3.h5', 'a3.h1<k>', 'm2', 'm2', 'logits']
    """
    if name in ("embed", "logits"):
        return {"embed": "input"}.get(name, name)
    kind, _, inside = name.rstrip("]").partition("[")
    layer, _, index = inside.partition(", head=")
    if kind.startswith("mlp"):
        return f"m{layer}"
    return f"a{layer}.h{index}" + (f"<{kind}>" if kind != "z" else "") if index else f"a{layer}"


def _feeds(reader: Reader, graph: Graph) -> set[str]:
    """The writers that answer to a reader: an MLP, a head, or all heads that share a key or value."""
    if reader.part == "logits":
        return set()
    if reader.head is None:
        return {f"{'mlp_out' if reader.part == 'mlp' else 'attn_out'}[{reader.layer}]"}
    heads, readers = len(graph.output[reader.layer]), graph.m.anatomy.sizes[reader.part, reader.layer]["head"]
    group = heads // readers
    return {f"z[{reader.layer}, head={h}]" for h in range(reader.head * group, (reader.head + 1) * group)}


def top(table: pd.DataFrame, n: int | None = None, *, share: float | None = None, absolute: bool = True) -> Circuit:
    """The highest-scored edges of a table of `attribute_edges`.

    Args:
        table: writer, reader and value per edge.
        n: how many.
        share: or which part of all edges, rounded to whole edges, at least one.
        absolute: rank by |value|; else by how far an edge works for the behaviour (under noising, by -value, since
            what the behaviour needs lowers the metric when it is corrupted).
    """
    if (n is None) == (share is None):
        raise GraphError("top: give n= (edges) or share= (part of all edges), one of them")
    count = n if n is not None else max(1, round((share or 0) * len(table)))
    if not 0 < count <= len(table):
        raise GraphError(f"top: {count} edges were asked for; the table has {len(table)}")
    sign = -1.0 if table.attrs.get("direction", "noise") == "noise" else 1.0
    rank = table["value"].abs() if absolute else sign * table["value"]
    best = table.loc[rank.sort_values(ascending=False, kind="stable").index[:count]]
    keys = ("model", "fingerprint", "metric", "method", "direction", "pairs", "steps")
    about = {k: table.attrs[k] for k in keys if k in table.attrs} | {"absolute": absolute}
    edges = tuple(zip(best["writer"], best["reader"], strict=True))
    return Circuit(edges, tuple(best["value"].astype(float)), str(table.attrs.get("level", "head")), about)


class Bench:
    """A model and pairs on which circuits are run. Made once, used by all the measures below."""

    def __init__(
        self, m: Model, clean: Any, corrupt: Any, metric: Any, level: Level = "head", graph: Graph | None = None
    ) -> None:
        self.setting = Setting.of(graph or Graph(m, level), clean, corrupt, metric, "noise")
        self.graph, self.real = self.setting.graph, self.setting.graph.real
        gap = float((self.setting.baseline - self.setting.target).mean())
        if abs(gap) < 1e-6:
            raise GraphError(
                "the metric is the same on average in the clean and the corrupt runs: nothing to be faithful to"
            )

    def mask(self, circuit: Circuit | Tensor) -> Tensor:
        return circuit if isinstance(circuit, Tensor) else mask_of(self.graph, circuit.edges)

    def metric(self, circuits: Sequence[Circuit | Tensor]) -> Tensor:
        """m(C) of each circuit [circuit, pair]; a tensor [writer, reader] is True at its edges."""
        return self.setting.patched(torch.stack([self.real & ~self.mask(c) for c in circuits]))

    def faithfulness(self, circuits: Sequence[Circuit | Tensor]) -> Tensor:
        """f(C), ratio of the means over pairs [circuit]."""
        return self.ratio(self.metric(circuits).double().mean(1))

    def ratio(self, value: Tensor) -> Tensor:
        none, whole = self.setting.target.double().mean(), self.setting.baseline.double().mean()
        return (value - none) / (whole - none)

    def interval(self, value: Tensor, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap over pairs of the faithfulness that `value` [pair] gives; NaN with fewer than two pairs."""
        n = len(value)
        if n < 2:
            return float("nan"), float("nan")
        drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
        v, none, whole = (t.double()[drawn].mean(1) for t in (value, self.setting.target, self.setting.baseline))
        low, high = torch.quantile((v - none) / (whole - none), torch.tensor([0.025, 0.975]).double()).tolist()
        return low, high

    def random(self, n: int, count: int, seed: int = 0) -> list[Tensor]:
        """`count` random circuits of `n` edges each."""
        generator, places = torch.Generator().manual_seed(seed), self.real.nonzero()
        made = []
        for _ in range(count):
            chosen = places[torch.randperm(len(places), generator=generator)[:n]]
            mask = torch.zeros_like(self.real)
            mask[chosen[:, 0], chosen[:, 1]] = True
            made.append(mask)
        return made


@recorded
def evaluate(bench: Bench, circuits: dict[str, Circuit], controls: int = 10, seed: int = 0) -> pd.DataFrame:
    """Faithfulness of circuits beside random ones of the same size.

    Returns a line per circuit and baseline: circuit (name), edges, share (of all), metric "faithfulness", baseline
    ("none", or "random": mean over controls, low and high their extremes), value, low, high (95 % bootstrap).
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for name, circuit in circuits.items():
        value = bench.metric([circuit])[0]
        low, high = bench.interval(value)
        common = {
            "circuit": name,
            "edges": len(circuit),
            "share": len(circuit) / int(bench.real.sum()),
            "metric": "faithfulness",
        }
        rows.append(
            {**common, "baseline": "none", "value": float(bench.ratio(value.double().mean())), "low": low, "high": high}
        )
        if controls:
            by_chance = bench.faithfulness(bench.random(len(circuit), controls, seed))
            rows.append({
                **common, "baseline": "random", "value": float(by_chance.mean()), "low": float(by_chance.min()),
                "high": float(by_chance.max()),
            })  # fmt: skip
    return _framed(pd.DataFrame(rows), bench, controls=controls, seed=seed)


@recorded
def curve(
    bench: Bench, table: pd.DataFrame, shares: Sequence[float] = MIB_SHARES, *, absolute: bool = True
) -> pd.DataFrame:
    """Faithfulness of ever larger circuits: share, edges, value; CPR and CMD in ``.attrs``.

    Take the table from other pairs than the bench's, or the curve flatters the method.
    """
    import pandas as pd

    found = [top(table, share=s, absolute=absolute) for s in shares]
    values = bench.faithfulness(found).tolist()
    frame = pd.DataFrame({
        "share": list(shares), "edges": [len(c) for c in found], "value": values, "metric": "faithfulness",
        "method": str(table.attrs.get("method", "")), "absolute": absolute,
    })  # fmt: skip
    return _framed(frame, bench, cpr=cpr(shares, values), cmd=cmd(shares, values), absolute=absolute)


def cpr(shares: Sequence[float], faithfulness: Sequence[float]) -> float:
    """MIB's circuit performance ratio: area under f over the share of edges, trapezoids; higher is better.

    >>> round(cpr([0, 0.5, 1], [0.0, 1.0, 1.0]), 3)
    0.75
    """
    return _area(shares, faithfulness)


def cmd(shares: Sequence[float], faithfulness: Sequence[float]) -> float:
    """MIB's circuit-model distance: area between f and 1, |1 - f| at the ends of each trapezoid; lower is better.

    >>> round(cmd([0, 0.5, 1], [0.0, 1.0, 1.5]), 3)
    0.375
    """
    return _area(shares, [abs(1.0 - f) for f in faithfulness])


def _area(x: Sequence[float], y: Sequence[float]) -> float:
    if len(x) != len(y) or len(x) < 2 or any(b <= a for a, b in pairwise(x)):
        raise ValueError(
            f"area: expected at least two rising shares and a value each, got {list(x)} and {len(y)} values"
        )
    return sum((x[i + 1] - x[i]) * (y[i] + y[i + 1]) / 2 for i in range(len(x) - 1))


@recorded
def completeness(bench: Bench, circuit: Circuit, samples: int = 10, seed: int = 0) -> pd.DataFrame:
    """What the model still does without parts of the circuit, against the circuit without them.

    For the whole circuit and for random halves K of it: removed (edges in K), circuit (f of C without K), model (f of
    the model without K) and value, the incompleteness |circuit - model|. Large: the model has backups outside.
    """
    import pandas as pd

    generator = torch.Generator().manual_seed(seed)
    subsets = [list(circuit.edges)]
    for _ in range(samples):
        drawn = torch.rand(len(circuit), generator=generator) < 0.5
        subsets.append([e for e, gone in zip(circuit.edges, drawn.tolist(), strict=True) if gone])
    own = bench.mask(circuit)
    removed = [mask_of(bench.graph, k) for k in subsets]
    left = bench.faithfulness([own & ~k for k in removed] + [bench.real & ~k for k in removed])
    small, large = left[: len(subsets)], left[len(subsets) :]
    frame = pd.DataFrame({
        "removed": [len(k) for k in subsets], "circuit": small.numpy(), "model": large.numpy(),
        "value": (small - large).abs().numpy(), "metric": "incompleteness",
    })  # fmt: skip
    return _framed(frame, bench, samples=samples, seed=seed)


@recorded
def minimality(bench: Bench, circuit: Circuit, samples: int = 0, seed: int = 0) -> pd.DataFrame:
    """What each edge is good for: writer, reader, value = the largest |change of f| when it is taken out.

    Taken out of the whole circuit and, with `samples`, of it without random halves too: an edge may matter only where
    its backup is gone.
    """
    import pandas as pd

    generator, own = torch.Generator().manual_seed(seed), bench.mask(circuit)
    contexts = [own]
    for _ in range(samples):
        contexts.append(own & (torch.rand(own.shape, generator=generator) < 0.5))
    alone = [mask_of(bench.graph, [e]) for e in circuit.edges]
    best = torch.zeros(len(circuit), dtype=torch.float64)
    for context in contexts:
        with_it = bench.faithfulness([context | one for one in alone])
        without = bench.faithfulness([context & ~one for one in alone])
        best = torch.maximum(best, (with_it - without).abs())
    frame = pd.DataFrame({"writer": [w for w, _ in circuit.edges], "reader": [r for _, r in circuit.edges],
                          "value": best.numpy(), "metric": "minimality"})  # fmt: skip
    return _framed(frame, bench, samples=samples, seed=seed)


def _framed(frame: pd.DataFrame, bench: Bench, **settings: Any) -> pd.DataFrame:
    task = bench.setting.task
    frame.attrs |= {
        "model": bench.graph.m.name, "level": bench.graph.level, "task_metric": task.metric.name, "pairs": task.pairs,
        "baseline": {"clean": float(bench.setting.baseline.mean()), "corrupt": float(bench.setting.target.mean())},
        "ablation": "edges outside carry what they carry in the corrupt run", **settings,
    }  # fmt: skip
    return frame


@recorded
def reuse(tables: dict[str, pd.DataFrame], k: int) -> pd.DataFrame:
    """How many of the k largest nodes two tasks share, for every two of the given tables of `patch` or `attribute`.

    Positions are left aside, since tasks differ in them: a head counts by its largest score. Returns a line per two
    tasks: first, second, value = |A and B| / k, shared (their names). The formula stands in ``.attrs`` (Merullo et al.
    2024, arXiv 2310.08744, compare heads so).
    """
    import pandas as pd

    best: dict[str, list[str]] = {}
    for task, table in tables.items():
        size = table.assign(size=table["value"].abs()).groupby("node", sort=False)["size"].max()
        if not 0 < k <= len(size):
            raise ValueError(f"reuse: k={k}, and the table of {task!r} has {len(size)} nodes")
        best[task] = list(size.sort_values(ascending=False, kind="stable").index[:k])
    rows = [
        {"first": a, "second": b, "value": len(set(best[a]) & set(best[b])) / k,
         "shared": ", ".join(n for n in best[a] if n in best[b]), "metric": "overlap"}
        for i, a in enumerate(best) for b in list(best)[i + 1 :]
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["first", "second", "value", "shared", "metric"])
    frame.attrs |= {"formula": f"|top {k} of first and top {k} of second| / {k}", "k": k, "nodes": best}
    return frame
