"""Conceptors: soft projections on the ellipsoid that a set of states fills, with a Boolean algebra.

    C = R (R + a^-2 I)^-1,  R = X' X / n                  the aperture a says how wide it opens
    NOT C = I - C;  C AND B = (C^-1 + B^-1 - I)^-1;  C OR B = NOT (NOT C AND NOT B)

Sources: Jaeger 2014 (arXiv:1403.3369), sec. 3.9; steering ``h -> beta C h``: Postmus and Abreu 2024
(arXiv:2410.16314).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering import pairs as _pairs
from steering.errors import SteeringError
from steering.maps import Affine
from steering.reading import At, one_site, read
from steering.vector import AFTER_PROMPT, SteeringMap


@dataclass(frozen=True, eq=False)
class Conceptor:
    """A matrix C [d, d], symmetric with eigenvalues in [0, 1], float64; ``~C``, ``C & B``, ``C | B``."""

    C: Tensor

    @classmethod
    def of(cls, x: Tensor, aperture: float = 10.0) -> Conceptor:
        """From states x [row, d]."""
        if aperture <= 0:
            raise SteeringError(f"aperture={aperture}: expected more than 0")
        if x.dim() != 2 or not len(x):
            raise SteeringError(f"a conceptor needs states [row, d], got {list(x.shape)}")
        r = x.double().T @ x.double() / len(x)
        return cls(torch.linalg.solve(r + aperture**-2 * torch.eye(len(r), dtype=r.dtype), r).T)

    @property
    def quota(self) -> float:
        """Mean eigenvalue: how much of the space it lets through, 0..1."""
        return float(self.C.trace()) / len(self.C)

    def __invert__(self) -> Conceptor:
        return Conceptor(torch.eye(len(self.C), dtype=self.C.dtype) - self.C)

    def __and__(self, other: Conceptor) -> Conceptor:
        """(C^-1 + B^-1 - I)^-1 on the intersection of both ranges, nought elsewhere (Jaeger, def. 7)."""
        if self.C.shape != other.C.shape:
            raise SteeringError(f"conceptors of different widths: {list(self.C.shape)}, {list(other.C.shape)}")
        outside = sum(_null(c) @ _null(c).T for c in (self.C, other.C))
        value, vector = torch.linalg.eigh(torch.as_tensor(outside))
        inside = vector[:, value < 1e-9]
        inverse = torch.linalg.pinv(self.C, hermitian=True) + torch.linalg.pinv(other.C, hermitian=True)
        core = inside.T @ (inverse - torch.eye(len(self.C), dtype=self.C.dtype)) @ inside
        return Conceptor(inside @ torch.linalg.inv(core) @ inside.T)

    def __or__(self, other: Conceptor) -> Conceptor:
        return ~(~self & ~other)


def _null(c: Tensor) -> Tensor:
    """An orthonormal basis of the null space of a symmetric matrix [d, k]."""
    value, vector = torch.linalg.eigh((c + c.T) / 2)
    return vector[:, value < 1e-12]


def conceptor(m: Any, texts: Any, layer: Any, *, aperture: float = 10.0, site: str = "resid_post", at: At = "last",
              chat: bool = False, batch_tokens: int = 4096) -> Conceptor:  # fmt: skip
    """The conceptor of the states of `texts` at one layer; `conceptor_map` steers with it.

    Args:
        m: the model.
        texts: texts that show what is wanted.
        layer: the layer.
        aperture: a; the states' scale matters to it.
        site: where, with `layer` put in.
        at: which token is read.
        chat: put the texts into the model's chat template.
        batch_tokens: tokens run at once.
    """
    place = one_site(m, layer, site)
    return Conceptor.of(read(m, _pairs.texts(m, texts, chat=chat), [place], at, batch_tokens)[place], aperture)


def conceptor_map(
    m: Any, c: Conceptor, layer: Any, *, beta: float = 1.0, site: str = "resid_post", scope: Any = AFTER_PROMPT,
    centre: Tensor | None = None,
) -> SteeringMap:  # fmt: skip
    """Steers with a conceptor: ``h -> beta C h``; with a `centre` [d], ``h -> beta C (h - centre) + centre``."""
    place = one_site(m, layer, site)
    a = beta * c.C
    b = None if centre is None else (centre.double() - a @ centre.double()).float()
    record = {"beta": beta, "quota": c.quota, "centred": centre is not None}
    return SteeringMap.of(m, {place: Affine(a.float(), b)}, method="conceptor", scope=scope, record=record)
