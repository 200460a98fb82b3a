"""A probe that chooses its tokens: attention pooling over a text.

    score(x) = sum_t a_t (x_t . v),   a = softmax_t(x_t . q)          one (q, v) per class and head

The last token is not always where the answer stands; the pooled probe learns where to look, and `attention(X)` says
where it looked. Linear in the values, so `v` is still a direction of the model's space.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from probes.errors import ProbeError


class AttentionProbe(BaseEstimator):
    """Attention-pooled probe over tokens.

    Args:
        heads: how many places it may look at.
        C: inverse penalty on the values, as in LinearProbe.
        steps, lr: of Adam, on the whole batch.
        seed: of the start.

    ``fit(X, y, mask)`` takes X [text, pos, feature], y [text] and mask [text, pos] (True at tokens).
    """

    def __init__(self, heads: int = 1, C: float = 1.0, steps: int = 300, lr: float = 0.02, seed: int = 0) -> None:
        self.heads, self.C, self.steps, self.lr, self.seed = heads, C, steps, lr, seed

    def fit(self, X: Any, y: Any, mask: Any = None) -> AttentionProbe:
        x, use = self._data(X, mask)
        labels = np.asarray(y)
        if len(labels) != len(x):
            raise ProbeError(f"y has {len(labels)} labels and X {len(x)} texts; give one per text")
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ProbeError(f"y holds one class only ({self.classes_[0]!r}); a probe needs at least two")
        tokens = x[use]
        self.mean_, self.scale_ = tokens.mean(0), tokens.std(0).clamp(min=1e-6)
        generator = torch.Generator().manual_seed(self.seed)
        d, k = x.shape[-1], len(self.classes_)
        self.query_ = nn.Parameter(torch.randn(self.heads, d, generator=generator) * d**-0.5)
        self.value_ = nn.Parameter(torch.zeros(self.heads, k, d))
        self.bias_ = nn.Parameter(torch.zeros(k))
        target = torch.from_numpy(numbers)
        optimiser = torch.optim.Adam([self.query_, self.value_, self.bias_], lr=self.lr)
        for _ in range(self.steps):
            optimiser.zero_grad()
            penalty = 0.5 * (self.value_**2).sum() / (self.C * len(x))
            loss = nn.functional.cross_entropy(self._scores(x, use), target) + penalty
            loss.backward()
            optimiser.step()
        for p in (self.query_, self.value_, self.bias_):
            p.requires_grad_(False)
        return self

    def _data(self, X: Any, mask: Any) -> tuple[Tensor, Tensor]:
        x = torch.as_tensor(X).detach().float().cpu()
        if x.dim() != 3:
            raise ProbeError(f"X is {list(x.shape)}; expected [text, pos, feature]")
        use = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool().cpu()
        if use.shape != x.shape[:2] or not bool(use.any(1).all()):
            raise ProbeError(f"mask is {list(use.shape)}; expected {list(x.shape[:2])} with a token in every text")
        if not bool(torch.isfinite(x[use]).all()):
            raise ProbeError("X holds values that are not finite")
        return x, use

    def _weights(self, x: Tensor, use: Tensor) -> Tensor:
        score = ((x - self.mean_) / self.scale_) @ self.query_.T  # [text, pos, head]
        return score.masked_fill(~use[..., None], -torch.inf).softmax(1)

    def _scores(self, x: Tensor, use: Tensor) -> Tensor:
        z = ((x - self.mean_) / self.scale_).masked_fill(~use[..., None], 0)
        pooled = torch.einsum("nth,ntd->nhd", self._weights(x, use), z)
        return torch.einsum("nhd,hkd->nk", pooled, self.value_) + self.bias_

    def attention(self, X: Any, mask: Any = None) -> np.ndarray:
        """Where it looks [text, pos, head]; sums to 1 over tokens."""
        x, use = self._data(X, mask)
        return self._weights(x, use).numpy()

    def predict_proba(self, X: Any, mask: Any = None) -> np.ndarray:
        x, use = self._data(X, mask)
        return self._scores(x, use).softmax(-1).numpy()

    def predict(self, X: Any, mask: Any = None) -> np.ndarray:
        return self.classes_[self.predict_proba(X, mask).argmax(1)]

    def score(self, X: Any, y: Any, mask: Any = None) -> float:
        """Accuracy."""
        return float((self.predict(X, mask) == np.asarray(y)).mean())
