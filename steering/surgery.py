"""Model Surgery: a behaviour changed by shifting the few weight rows that point against its probe.

    direction = steering.behaviour_probe(m, texts_with, texts_without)
    cut = steering.surgery(m, direction, rows=1000, alpha=1.0)
    with cut.applied(m): ...                 and afterwards the weights are as before, bit for bit

A linear probe on hidden states tells texts with the behaviour (toxic, say) from others; v is its row for the
behaviour. Each row w of the MLPs' gate projections is scored by -cos(w, v): rows that fire where the behaviour is
absent. The highest get w + alpha v. Source: Wang et al. 2024 (arXiv:2407.08770, section 3): all layers, 16,384 rows
of LLaMA-2-7B. With a negative alpha the same rows are moved away from the probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.quiet import quiet
from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.reading import At, one_site, read

if TYPE_CHECKING:
    import pandas as pd

#: What the first map of an MLP is called where no module is called gate_proj.
NAMES = ("gate_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "up_proj", "w1")


def behaviour_probe(
    m: Any, with_it: Any, without: Any, layer: Any = -1, *, site: str = "resid_post", at: At = "all", seed: int = 0
) -> Tensor:
    """The row [d_model] for the behaviour of a two-class linear probe (logistic regression) on hidden states.

    Args:
        m: the model.
        with_it: texts with the behaviour.
        without: as ordinary texts as possible without it.
        layer: where; the last by default.
        site: where in the layer.
        at: which tokens of a text are averaged (`steering.reading`).
        seed: of the solver.
    """
    from sklearn.linear_model import LogisticRegression

    groups = [_pairs.texts(m, with_it, name="with_it"), _pairs.texts(m, without, name="without")]
    place = one_site(m, layer, site)
    x = read(m, [*groups[0], *groups[1]], [place], at)[place].numpy()
    y = [1] * len(groups[0]) + [0] * len(groups[1])
    probe = LogisticRegression(max_iter=2000, random_state=seed).fit(x, y)
    return torch.from_numpy(probe.coef_[0]).float()


@dataclass(frozen=True, eq=False)
class Surgery:
    """Which rows are shifted, and by what.

    Attributes:
        rows: parameter name -> row numbers.
        direction: v [d_model].
        alpha: factor on v.
        fingerprint: of the model it was planned on.
        scores: columns parameter, row, score (-cos), of the chosen rows.
    """

    rows: dict[str, Tensor]
    direction: Tensor
    alpha: float
    fingerprint: str
    scores: pd.DataFrame

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    def __repr__(self) -> str:
        return f"Surgery({len(self)} rows in {len(self.rows)} matrices, alpha={self.alpha:g})"

    @contextmanager
    def applied(self, m: Any) -> Iterator[None]:
        """The model with the rows shifted; on leaving, by an exception too, they are put back."""
        if m.fingerprint != self.fingerprint:
            raise SteeringError(f"this surgery was planned on another model than {m.name}; plan it there")
        weights = dict(m.hf.named_parameters())
        kept = {name: weights[name].data[rows].clone() for name, rows in self.rows.items()}
        try:
            with torch.no_grad():
                for name, rows in self.rows.items():
                    weights[name][rows] += self.alpha * self.direction.to(weights[name])
            yield
        finally:
            with torch.no_grad():
                for name, rows in self.rows.items():
                    weights[name][rows] = kept[name]

    def save(self, m: Any, out: Any) -> None:
        """A transformers checkpoint with the rows shifted, and the tokenizer. `m` is as before."""
        with self.applied(m), quiet():
            m.hf.save_pretrained(out)
        if m.tokenizer is not None:
            m.tokenizer.save_pretrained(out)

    def random(self, m: Any, seed: int = 0) -> Surgery:
        """As many other rows, drawn from all layers: the control."""
        generator = torch.Generator().manual_seed(seed)
        chosen = {(name, row) for name, rows in self.rows.items() for row in rows.tolist()}
        free = [key for name, w in _gates(m).items() for row in range(len(w)) if (key := (name, row)) not in chosen]
        if len(free) < len(self):
            raise SteeringError(f"random: {len(free)} rows are left, and {len(self)} are wanted; choose fewer")
        picked = [free[i] for i in torch.randperm(len(free), generator=generator)[: len(self)].tolist()]
        return replace(self, rows=_grouped(picked), scores=self.scores.iloc[:0])


def surgery(m: Any, direction: Tensor, rows: int, alpha: float = 1.0) -> Surgery:
    """Plans the shift of the `rows` gate rows with the largest -cos(row, direction), over all layers.

    Args:
        m: the model, with dense MLPs.
        direction: the behaviour's probe row [d_model].
        rows: how many.
        alpha: how far: w + alpha * direction.

    Raises SteeringError for a direction of another width, or that is zero or not finite, and for more rows than
    there are.
    """
    import pandas as pd

    gates = _gates(m)
    width = next(iter(gates.values())).shape[1]
    if direction.shape != (width,) or not bool(torch.isfinite(direction).all()) or float(direction.norm()) == 0:
        raise SteeringError(f"direction: expected [{width}], finite and not zero, got {list(direction.shape)}")
    total = sum(len(w) for w in gates.values())
    if not 0 < rows <= total:
        raise SteeringError(f"rows={rows}: {m.name} has {total} gate rows")
    unit = direction / direction.norm()
    keys = [(name, row) for name, w in gates.items() for row in range(len(w))]
    score = torch.cat(
        [-torch.nn.functional.cosine_similarity(w.float(), unit.to(w.device)[None], dim=1) for w in gates.values()]
    )
    best = score.topk(rows)
    picked = [keys[i] for i in best.indices.tolist()]
    table = pd.DataFrame(picked, columns=["parameter", "row"]).assign(score=best.values.tolist())
    return Surgery(_grouped(picked), direction.detach().clone(), float(alpha), m.fingerprint, table)


def _grouped(picked: list[tuple[str, int]]) -> dict[str, Tensor]:
    rows: dict[str, list[int]] = {}
    for name, row in picked:
        rows.setdefault(name, []).append(row)
    return {name: torch.tensor(sorted(numbers)) for name, numbers in rows.items()}


def _gates(m: Any) -> dict[str, Tensor]:
    """Parameter name -> weight [row, d_model] of the map that decides which neurons of a dense MLP fire, by layer."""
    names = {id(module): name for name, module in m.hf.named_modules()}
    found: dict[str, Tensor] = {}
    for layer in m.anatomy.having("mlp_hidden"):
        inside = {name.rpartition(".")[2]: x for name, x in m.anatomy.layers[layer].named_modules()}
        module = next((inside[name] for name in NAMES if isinstance(inside.get(name), nn.Linear)), None)
        if module is not None:
            found[f"{names[id(module)]}.weight"] = module.weight.detach()
    if not found:
        raise SteeringError(
            f"{m.name}: found no gate rows; this works on dense MLPs whose first map is a Linear called one of "
            f"{', '.join(NAMES)}"
        )
    return found
