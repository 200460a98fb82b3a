"""What every identity stands on: one model on one batch, with its plain logits and its activations everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.activations import Activations
from interp.fingerprint import fingerprint
from interp.model import Model
from interp.sites import KINDS

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Finding:
    """One identity on one model: the largest absolute error, and whether that is within tolerance."""

    check: str
    ok: bool
    error: float
    note: str = ""


Result = tuple[bool, float, str]


def close(name: str, a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> Result:
    """Largest absolute difference, against a tolerance that grows with the size of what is compared."""
    error = float((a.detach().float() - b.detach().float()).abs().max()) if a.numel() else 0.0
    return error <= tolerance * max(1.0, float(b.detach().float().abs().max())), error, name


class Bench:
    """One model on one batch, with its plain logits and its activations at every site."""

    def __init__(self, m: Model, ids: Tensor, generator: torch.Generator) -> None:
        self.m, self.ids, self.generator = m, ids, generator
        self.present = [n for n in KINDS if m.anatomy.having(n) or (n, None) in m.anatomy.places]
        with torch.no_grad():
            self.plain = m.hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        self._acts: Activations | None = None

    @property
    def acts(self) -> Activations:
        if self._acts is None:
            self._acts = self.m.capture(self.ids, self.patterns(), logits=True)
        return self._acts

    def patterns(self, *without: str) -> list[str]:
        return [f"{n}[*]" if KINDS[n].layered else n for n in self.present if n not in without]

    def layers(self, name: str) -> list[int]:
        return self.m.anatomy.having(name)

    def logits(self, *changes: Any) -> Tensor:
        with self.m.intervene(*changes):
            return self.m(self.ids)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.m.device, self.m.dtype)

    def state(self) -> dict[str, Any]:
        hf = self.m.hf
        configs = {id(c): c for mod in hf.modules() if (c := getattr(mod, "config", None)) is not None}
        return {
            "hooks": sum(
                len(mod._forward_hooks) + len(mod._forward_pre_hooks) + len(mod._backward_hooks) for mod in hf.modules()
            ),
            "implementations": [
                (
                    getattr(c, "_attn_implementation_internal", None),
                    getattr(c, "_experts_implementation_internal", None),
                )
                for c in configs.values()
            ],
            "training": hf.training,
            "weights": fingerprint(hf),
        }


def fit(target: Tensor, *parts: Tensor) -> Tensor:
    """The best ``sum a_i part_i + c``, coefficients per dimension: multipliers, layer scales and biases are such."""
    rows = target.double().flatten(0, -2)
    columns = torch.stack([*(p.double().flatten(0, -2) for p in parts), torch.ones_like(rows)], -1).transpose(0, 1)
    weights = torch.linalg.lstsq(columns, rows.T[..., None]).solution
    return (columns @ weights)[..., 0].T.reshape(target.shape).to(target.dtype)
