"""The certificate: what an attribution table may have missed, and what it cost to know.

An attribution ranks nodes by a gradient. `certify` turns the ranking into a statement, in two steps (Kramár et al.
2024, arXiv 2403.00745, section 3.3 and Algorithm 1):

1. the top of the ranking is patched exactly, one node at a time, down to the nodes whose estimate is far below the
   threshold or until its share of the budget is spent;
2. the rest is patched in random halves, and a t test bounds the effect of each node from above
   (`interp.patching.welch`). Nodes that the bound cannot exclude are patched exactly too while the budget lasts.

The tests are looked at several times, on doubling samples; the number of looks is fixed before the first, and each gets
an equal part of the error probability. Exact verification of what a look leaves open needs no correction: a node that
was measured is no longer one that may have been missed.

The statement holds under the sampling model: it is about a node's mean effect while each other unverified node is
patched with probability 1/2, averaged over the given pairs. Where nodes interact strongly (a backup that acts only when
its principal is patched), that is another quantity than the effect on the otherwise untouched run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.calls import recorded
from interp.interrupted import handed_on, salvaged
from interp.patching.nodes import Node
from interp.patching.welch import Design, Estimate, draw_subsets, from_complements, from_subsets

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

#: Joint effects of sets of nodes: lists of node numbers -> [set, pair].
Effects = Callable[[list[list[int]]], Tensor]

#: Draws of the first look; each later look has twice as many in all.
FIRST_LOOK = 32


@dataclass(frozen=True)
class Certificate:
    """What `certify` found.

    Attributes:
        holds: True if no unverified node may reach the threshold, at this confidence.
        bound: the smallest threshold for which that would hold (0 where every node was verified).
        threshold: the size of effect that was asked about, in units of the metric.
        confidence: of the statement.
        frame: a line per node, by rank: those of the attribution table with `estimate` (its score), `status` (verified,
            bounded), `value` (exact effect, verified nodes), `bound` and `p` (the others).
        cost: patched forward passes: verify, sample, left (of the budget), brute_force (what exactness would cost).
        settings: everything that the numbers depend on.
    """

    holds: bool
    bound: float
    threshold: float
    confidence: float
    frame: pd.DataFrame
    cost: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def found(self) -> pd.DataFrame:
        """The verified nodes whose effect reaches the threshold, largest first."""
        size = self.frame["value"].abs()
        return self.frame[size >= self.threshold].assign(size=size).sort_values("size", ascending=False).drop(
            columns="size"
        )  # fmt: skip

    @property
    def statement(self) -> str:
        """The result in words."""
        verified = int((self.frame["status"] == "verified").sum())
        rest = len(self.frame) - verified
        head = f"{len(self.found)} of {verified} verified nodes reach {self.threshold:g} ({self.settings['metric']})."
        if not rest:
            tail = "Every node was verified; nothing can have been missed."
        elif self.holds:
            tail = (
                f"None of the {rest} unverified nodes does, at {self.confidence:.0%} confidence; the largest of their "
                f"effects is at most {self.bound:.3g}."
            )
        else:
            open_ = int((self.frame["bound"] >= self.threshold).sum())
            tail = (
                f"This cannot be said of {open_} of the {rest} unverified nodes at {self.confidence:.0%} confidence: "
                f"effects of up to {self.bound:.3g} are not excluded. Give a larger budget or threshold."
            )
        model = (
            "Sampling model: mean effect over random backgrounds, each other unverified node patched with probability "
            f"1/2, over {self.settings['pairs']} pair(s), direction {self.settings['direction']}."
        )
        cost = (
            f"Cost in patched forward passes: {self.cost['verify']} to verify, {self.cost['sample']} to sample, "
            f"{self.cost['left']} left; patching every node would take {self.cost['brute_force']}."
        )
        return " ".join([head, tail, *([model] if rest else []), cost])

    def __str__(self) -> str:
        return self.statement


@recorded
def certify(
    m: Model,
    clean: Any,
    corrupt: Any = None,
    metric: Any = None,
    table: pd.DataFrame | None = None,
    *,
    threshold: float,
    confidence: float = 0.99,
    budget: int | None = None,
    share: float = 0.5,
    design: Design = "independent",
    seed: int = 0,
    memory: int | None = None,
) -> Certificate:
    """Verifies the top of an attribution table and bounds the rest.

    Args:
        m: the model.
        clean: clean prompts, as for `patching.patch`, or `Pairs`.
        corrupt: corrupt prompts.
        metric: what the effect is measured in.
        table: from `patching.attribute` on the same prompts: a node per row with its `score`.
        threshold: the effect that would matter, in units of the metric.
        confidence: of the statement about the unverified nodes.
        budget: patched forward passes to spend (one pair, one patch each); default: a quarter of what patching every
            node would cost, and at least 256.
        share: part of the budget for the first, exact step.
        design: how subsets are drawn; see `interp.patching.welch`.
        seed: of the subsets.
        memory: bytes that patching may use at its peak; see `patching.effects`.

    Interrupted, it leaves a Table of the nodes that were verified (`interp.unfinished`), and no certificate.

    Raises:
        ValueError: a table without nodes or scores, a threshold that is not positive, a budget too small for one look.
    """
    from interp.patching.runs import Patcher

    if table is None or not {"node", "score"} <= set(table.columns):
        raise ValueError("table: expected a table of patching.attribute, with columns 'node' and 'score'")
    direction = str(table.attrs.get("direction", "denoise"))
    nodes = nodes_of(m, table)
    patcher = Patcher(m, clean, corrupt, metric, direction, memory)  # type: ignore[arg-type]

    verified: dict[int, float] = {}

    def note(sets: list[list[int]], values: Tensor) -> None:
        verified.update({s[0]: v for s, v in zip(sets, values.mean(1).tolist(), strict=True) if len(s) == 1 and v == v})

    def run(sets: list[list[int]]) -> Tensor:
        with handed_on("patching.certify", lambda values: note(sets, values)):
            values = patcher.effects([[nodes[i] for i in s] for s in sets])
        note(sets, values)
        return values

    places = [c for c in ("node", "site", "layer", "head", "neuron", "expert", "position") if c in table.columns]

    def so_far() -> pd.DataFrame | None:
        """No certificate, which takes the whole budget: the nodes that were verified."""
        at = sorted(verified)
        found = table[places].iloc[at].assign(estimate=table["score"].iloc[at], value=[verified[i] for i in at])
        found.attrs = {"model": m.name, "fingerprint": m.fingerprint, "direction": direction, "threshold": threshold}
        return found.sort_values("estimate", ascending=False, ignore_index=True) if at else None

    with salvaged("patching.certify", so_far):
        result = certify_effects(
            run, table["score"].tolist(), threshold=threshold, confidence=confidence, budget=budget,
            share=share, design=design, seed=seed,
        )  # fmt: skip
    frame = table[places].reset_index(drop=True).join(result.frame)
    frame = frame.sort_values("estimate", ascending=False, ignore_index=True)
    settings = result.settings | {
        "model": m.name, "direction": direction, "metric": str(table.attrs.get("metric", "metric")),
        "method": str(table.attrs.get("method", "")),
    }  # fmt: skip
    frame.attrs |= settings | {"threshold": threshold, "confidence": confidence, "cost": result.cost}
    return Certificate(result.holds, result.bound, threshold, confidence, frame, result.cost, settings)


def certify_effects(
    run: Effects,
    scores: Sequence[float] | Tensor,
    *,
    threshold: float,
    confidence: float = 0.99,
    budget: int | None = None,
    share: float = 0.5,
    design: Design = "independent",
    seed: int = 0,
) -> Certificate:
    """The same for any function that measures joint effects, `run`: sets of node numbers -> [set, pair]."""
    score = torch.as_tensor(scores, dtype=torch.float64)
    _check(score, threshold, confidence, share, design)
    spending = _Spending(run, len(score), budget)
    order = score.argsort(descending=True, stable=True).tolist()
    wanted = [i for i in order if score[i] >= threshold / 2]
    spending.verify(wanted[: spending.affordable(share)])
    estimate, rest, looks = _sample(spending, order, threshold, confidence, design, seed)
    return _certificate(spending, score, estimate, rest, threshold, confidence, looks, design, seed)


class _Spending:
    """Measurements so far, and what they cost."""

    def __init__(self, run: Effects, n: int, budget: int | None) -> None:
        self.run, self.value = run, torch.full((n,), torch.nan, dtype=torch.float64)
        first = self._mean(run([[0]]))  # one measurement tells how many pairs there are
        self.value[0] = first[0]
        self.brute_force = n * self.pairs
        self.budget = max(self.brute_force // 4, 256) if budget is None else budget
        self.verified, self.sampled = self.pairs, 0
        if self.budget < self.pairs:
            raise ValueError(f"budget={budget}: patching one node on {self.pairs} pairs takes {self.pairs} passes")

    def _mean(self, effect: Tensor) -> Tensor:
        if not bool(effect.isfinite().all()):
            raise ValueError(
                "certify: some pairs have no token at a node's position (or the metric gives no number there); subsets "
                "are patched on all pairs alike, so give pairs of one length"
            )
        self.pairs = effect.shape[1]
        return effect.double().mean(1)

    @property
    def left(self) -> int:
        return self.budget - self.verified - self.sampled

    def affordable(self, share: float = 1.0) -> int:
        """How many more nodes can be verified with this share of what is left."""
        return max(int(self.left * share) // self.pairs, 0)

    def verify(self, nodes: Sequence[int]) -> None:
        todo = [i for i in nodes if bool(self.value[i].isnan())]
        if todo:
            self.value[todo] = self._mean(self.run([[i] for i in todo]))
            self.verified += len(todo) * self.pairs

    def joint(self, sets: list[list[int]]) -> Tensor:
        """Mean effect over pairs of each set [set]; the empty set has none."""
        out = torch.zeros(len(sets), dtype=torch.float64)
        at = [i for i, s in enumerate(sets) if s]
        if at:
            out[at] = self._mean(self.run([sets[i] for i in at]))
            self.sampled += len(at) * self.pairs
        return out


def _sample(
    spending: _Spending, order: list[int], threshold: float, confidence: float, design: Design, seed: int
) -> tuple[Estimate | None, list[int], int]:
    """Looks at doubling samples until the bound is below the threshold. Gives (estimate, its nodes, looks planned)."""
    sampled = [i for i in order if bool(spending.value[i].isnan())]
    per_draw = (2 if design == "complements" else 1) * spending.pairs
    most = spending.left // per_draw
    if not sampled or most < 4:
        return None, sampled, 0
    looks = 1 + max(int(math.log2(most / FIRST_LOOK)), 0) if most >= FIRST_LOOK else 1
    each = 1 - (1 - confidence) / looks  # the error probability in equal parts
    generator = torch.Generator().manual_seed(seed)
    inside, value = torch.zeros(0, len(sampled), dtype=torch.bool), torch.zeros(0, dtype=torch.float64)
    estimate: Estimate | None = None
    for look in range(looks):
        target = min(most, FIRST_LOOK * 2**look) if look < looks - 1 else max(most, 2)
        target = min(target, len(value) + spending.left // per_draw)
        new = draw_subsets(max(target - len(value), 0), len(sampled), generator)
        inside = torch.cat([inside, new])
        value = torch.cat([value, _measure(spending, new, sampled, design)])
        estimate = from_complements(inside, value) if design == "complements" else from_subsets(inside, value)
        bound = estimate.bound(each)
        open_ = [i for i, b in zip(sampled, bound.tolist(), strict=True) if b >= threshold]
        open_ = [i for i in open_ if bool(spending.value[i].isnan())]
        next_look = per_draw * len(value)
        if open_ and (len(open_) * spending.pairs <= next_look or look == looks - 1):
            spending.verify(open_[: spending.affordable()])  # cheaper than to look again
            open_ = [i for i in open_ if bool(spending.value[i].isnan())]
        if not open_:
            break
    return estimate, sampled, looks


def _measure(spending: _Spending, inside: Tensor, nodes: list[int], design: Design) -> Tensor:
    sets = [[i for i, here in zip(nodes, row, strict=True) if here] for row in inside.tolist()]
    if design == "independent":
        return spending.joint(sets)
    others = [[i for i, here in zip(nodes, row, strict=True) if not here] for row in inside.tolist()]
    return spending.joint(sets) - spending.joint(others)


def _certificate(
    spending: _Spending, score: Tensor, estimate: Estimate | None, sampled: list[int], threshold: float,
    confidence: float, looks: int, design: Design, seed: int,
) -> Certificate:  # fmt: skip
    import pandas as pd

    verified = ~spending.value.isnan()
    bound, p = torch.full_like(score, torch.inf), torch.ones_like(score)
    if estimate is not None:
        bound[sampled] = estimate.bound(1 - (1 - confidence) / looks)
        p[sampled] = (estimate.p_value(threshold) * looks).clamp(max=1)
    bound[verified], p[verified] = torch.nan, torch.nan
    rest = bound[~verified]
    largest = float(rest.max()) if len(rest) else 0.0
    frame = pd.DataFrame({
        "estimate": score.numpy(), "status": ["verified" if v else "bounded" for v in verified.tolist()],
        "value": spending.value.numpy(), "bound": bound.numpy(), "p": p.numpy(),
    })  # fmt: skip
    cost = {
        "verify": spending.verified, "sample": spending.sampled, "left": spending.left,
        "brute_force": spending.brute_force,
    }  # fmt: skip
    settings = {
        "metric": "metric", "direction": "", "pairs": spending.pairs, "design": design, "seed": seed,
        "budget": spending.budget, "looks": looks, "draws": 0 if estimate is None else estimate.draws,
    }  # fmt: skip
    return Certificate(largest < threshold, largest, threshold, confidence, frame, cost, settings)


def nodes_of(m: Model, table: pd.DataFrame) -> list[Node]:
    """The nodes that the rows of a table name, by their columns node (text) and position (missing: all)."""
    import pandas as pd

    places = table["position"] if "position" in table.columns else [None] * len(table)
    nodes = []
    for text, place in zip(table["node"], places, strict=True):
        first, *others = m.resolve(str(text).split(" + "))
        nodes.append(Node(first, None if place is None or pd.isna(place) else int(place), tuple(others)))
    return nodes


def _check(score: Tensor, threshold: float, confidence: float, share: float, design: str) -> None:
    if not len(score) or not bool(score.isfinite().all()):
        raise ValueError("table: it has no rows, or a score that is not finite")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: expected a positive effect, in units of the metric")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number between 0.5 and 1, such as 0.99")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: expected a part of the budget, 0..1")
    if design not in ("complements", "independent"):
        raise ValueError(f"design={design!r}: expected 'complements' or 'independent'")
