"""CCS: a direction found without labels, from statements and their negations.

Each pair holds the activations of a statement and of its negation. A probe p should call one true and the other false,
whichever it is, and not say "half" to both:

    loss = mean (p(x+) - (1 - p(x-)))^2  +  mean min(p(x+), p(x-))^2

Each side is centred on its own mean first, so that "contains the word not" is no answer. The best of several starts is
kept by its loss alone. Which end of the direction means true cannot be known without labels: `fit(X, y)` uses y, if
given, for that sign only. Source: Burns et al. 2022 (arXiv:2212.03827), eqs. 1-3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from probes.base import as_array
from probes.errors import ProbeError


class CCS(BaseEstimator):
    """Contrast-consistent search.

    Args:
        starts: how many random beginnings.
        steps, lr, decay: of AdamW, as in the paper (1000 steps, 0.01, 0.01).
        seed: of the beginnings.

    X is [pair, 2, feature]: statement, negation. `predict` gives 1 where the statement is held to be true.
    """

    def __init__(
        self, starts: int = 10, steps: int = 1000, lr: float = 0.01, decay: float = 0.01, seed: int = 0
    ) -> None:
        self.starts, self.steps, self.lr, self.decay, self.seed = starts, steps, lr, decay, seed

    def fit(self, X: Any, y: Any = None) -> CCS:
        x = self._data(X)
        self.mean_ = x.mean(0)
        self.scale_ = x.std(0).clamp(min=1e-6)
        z = self._normal(x)
        generator = torch.Generator().manual_seed(self.seed)
        # All beginnings are fitted side by side: their losses do not touch.
        weight = torch.nn.functional.normalize(torch.randn(self.starts, z.shape[-1], generator=generator), dim=1)
        weight.requires_grad_()
        bias = torch.zeros(self.starts, requires_grad=True)
        optimiser = torch.optim.AdamW([weight, bias], lr=self.lr, weight_decay=self.decay)
        for _ in range(self.steps):
            optimiser.zero_grad()
            self._loss(z, weight, bias).sum().backward()
            optimiser.step()
        with torch.no_grad():
            losses = self._loss(z, weight, bias)
        best = int(losses.argmin())
        self.loss_ = float(losses[best])
        self.weight_, self.bias_ = weight[best].detach(), bias[best].detach()
        if y is not None:
            labels = np.asarray(y)
            if len(labels) != len(x):
                raise ProbeError(f"y has {len(labels)} labels and X {len(x)} pairs; give one per pair")
            if (self.predict(X) == labels).mean() < 0.5:
                self.weight_, self.bias_ = -self.weight_, -self.bias_
        return self

    @staticmethod
    def _data(X: Any) -> Tensor:
        x = torch.as_tensor(as_array(X)).float()
        if x.dim() != 3 or x.shape[1] != 2:
            raise ProbeError(f"X is {list(x.shape)}; expected [pair, 2, feature]: each statement and its negation")
        if not bool(torch.isfinite(x).all()):
            raise ProbeError("X holds values that are not finite")
        return x

    def _normal(self, x: Tensor) -> Tensor:
        return (x - self.mean_) / self.scale_

    @staticmethod
    def _loss(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        p = torch.sigmoid(torch.einsum("nsd,kd->kns", z, weight) + bias[:, None, None])  # [start, pair, side]
        consistent = ((p[..., 0] - (1 - p[..., 1])) ** 2).mean(1)
        return consistent + (p.min(-1).values ** 2).mean(1)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability that the statement is true [pair]: the mean of p(x+) and 1 - p(x-)."""
        p = torch.sigmoid(self._normal(self._data(X)) @ self.weight_ + self.bias_)
        return ((p[:, 0] + 1 - p[:, 1]) / 2).numpy()

    def predict(self, X: Any) -> np.ndarray:
        return (self.predict_proba(X) > 0.5).astype(int)

    def score(self, X: Any, y: Any) -> float:
        """Accuracy, whichever end of the direction means true unless `fit` saw labels."""
        return float((self.predict(X) == np.asarray(y)).mean())

    @property
    def direction_(self) -> np.ndarray:
        """Unit vector [feature] along which statements become true, in the activation's own units."""
        v = (self.weight_ / self.scale_.mean(0)).numpy()
        return v / np.linalg.norm(v)
