"""The dark matter of an SAE: how much of its error is a linear function of what it reads.

Engels, Riggs & Tegmark 2024 (arXiv:2410.14670): about half of the error vector, and more than nine tenths of its norm,
can be predicted linearly from the activation; what cannot hardly shrinks with more latents or better codes. So::

    x = x' + e,    e = A x + b  (linear part)  +  what is left  (nonlinear part)

`dark_matter` fits A on one part of the tokens and scores on the rest; unlike the paper's code the regression has an
intercept, without which the mean of the error counts as unexplained. It takes any reconstruction, so the error of
experts as features is measured by the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.calls import recorded
from interp.sae.autoencoder import SAE

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model


@dataclass(frozen=True, eq=False)
class Linear:
    """A least-squares map x -> A x + b; matrix A [d_out, d_in], offset b [d_out], float64."""

    matrix: Tensor
    offset: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, ridge: float = 1e-8) -> Linear:
        """From rows [row, d_in] and [row, d_out]; `ridge` is relative to the mean variance of x, against ties only."""
        x, y = x.double(), y.double()
        mx, my = x.mean(0), y.mean(0)
        xc, yc = x - mx, y - my
        gram = xc.T @ xc
        gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-30))
        matrix = torch.linalg.solve(gram, xc.T @ yc).T
        return cls(matrix, my - matrix @ mx)

    def __call__(self, x: Tensor) -> Tensor:
        return x.double() @ self.matrix.T + self.offset


def r2(y: Tensor, predicted: Tensor) -> float:
    """Share of variance explained: mean over dimensions of 1 - SSE / variance about the mean."""
    y, predicted = y.double(), predicted.double()
    total = (y - y.mean(0)).square().sum(0)
    some = total > 1e-20 * total.max().clamp_min(1e-30)
    if not bool(some.any()):
        return float("nan")
    return float((1 - (y - predicted).square().sum(0) / total)[some].mean())


def _fvu(y: Tensor, predicted: Tensor) -> float:
    y = y.double()
    return float((y - predicted.double()).square().sum() / (y - y.mean(0)).square().sum())


def halves(n: int, seed: int = 0, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to score on, half each; whole documents [row] stay together where they are known."""
    groups = torch.arange(n) if documents is None else documents
    names = groups.unique()
    mixed = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    fit = torch.isin(groups, mixed[: len(mixed) // 2])
    return fit.nonzero().squeeze(1), (~fit).nonzero().squeeze(1)


@recorded
def dark_matter(
    x: Tensor,
    reconstruction: Tensor | SAE,
    *,
    documents: Tensor | None = None,
    pursuit: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """The Table of the error: metric, value, method; every number is of tokens that the regressions have not seen.

    Metrics: ``fvu`` of the reconstruction; ``r2_error`` of x -> e; ``r2_error_norm`` of x -> |e|^2; ``fvu_nonlinear``,
    the fvu once the linear part of the error is added; ``fvu_linear``, the share that this saves; the last two also as
    shares of the error. With `pursuit` and an SAE, again with codes by gradient pursuit at each token's own L0.

    Args:
        x: activations [row, d].
        reconstruction: of the same shape, or the SAE that makes it.
        documents: number of each row's document [row]; the split then goes between documents.
        pursuit: measure inference-time optimisation too.
        seed: of the split.
    """
    import pandas as pd

    fit, score = halves(len(x), seed, documents)
    if min(len(fit), len(score)) <= x.shape[1] + 1:
        raise SAEError(
            f"dark_matter: {len(fit)} tokens to fit on and {len(score)} to score on; a linear map from {x.shape[1]} "
            "dimensions takes more than that many of each"
        )
    s = reconstruction if isinstance(reconstruction, SAE) else None
    if isinstance(reconstruction, SAE):
        methods = {"encoder": reconstruction.reconstruct(x.float())}
    else:
        methods = {"given": reconstruction}
    if s is not None and pursuit:
        pieces = [s.decode(s.pursue(part), part) for part in x.float().split(1024)]
        methods["pursuit"] = torch.cat(pieces)
    rows = []
    for method, made in methods.items():
        for metric, value in _parts(x.double(), made.reshape(x.shape).double(), fit, score).items():
            rows.append({"metric": metric, "value": value, "method": method})
    frame = pd.DataFrame(rows)
    frame.attrs.update({"fit_tokens": len(fit), "scored_tokens": len(score), "intercept": True,
                        "split": "documents" if documents is not None else "tokens"})  # fmt: skip
    return frame


def _parts(x: Tensor, made: Tensor, fit: Tensor, score: Tensor) -> dict[str, float]:
    error = x - made
    size = error.square().sum(1, keepdim=True)
    linear = Linear.fit(x[fit], error[fit])(x[score])
    sizes = Linear.fit(x[fit], size[fit])(x[score])
    fvu, rest = _fvu(x[score], made[score]), _fvu(x[score], made[score] + linear)
    return {
        "fvu": fvu,
        "r2_error": r2(error[score], linear),
        "r2_error_norm": r2(size[score], sizes),
        "fvu_nonlinear": rest,
        "fvu_linear": fvu - rest,
        "nonlinear_share": rest / fvu if fvu else float("nan"),
    }


@dataclass(frozen=True, eq=False)
class _Inserted:
    """An edit's map: the reconstruction, plus the linear or the nonlinear part of its error."""

    s: SAE
    linear: Linear
    part: str

    def __call__(self, h: Tensor, where: Any) -> Tensor:
        made = self.s(h.float()).reshape(h.shape)
        if self.part == "reconstruction":
            return made.to(h.dtype)
        flat = self.s._flat(h.float())
        linear = self.linear(flat).to(h.dtype).reshape(h.shape)
        return (made + linear).to(h.dtype) if self.part == "+ linear" else (h - linear).to(h.dtype)


@recorded
def loss_of_parts(
    s: SAE, model: Model, fit_texts: Sequence[Any], texts: Sequence[Any], *, context: int = 128, run: int = 8
) -> pd.DataFrame:
    """Loss of the model (nats per token) with each part of the error put back: metric, value, method.

    The linear map is fitted on `fit_texts`, losses are of `texts`. Methods: clean (nothing inserted), reconstruction,
    "+ linear" (reconstruction and linear part), "+ nonlinear" (reconstruction and the rest: the activation less the
    linear part).
    """
    import pandas as pd

    from interp.edits import Edit

    rows = []
    for i in range(0, len(fit_texts), run):
        tokens = model.tokens(list(fit_texts[i : i + run]), max_length=context, truncate=True)
        acts = model.capture(tokens, list(s.sites))
        rows.append(s.read(acts)[acts.mask].float())
    x = torch.cat(rows)
    linear = Linear.fit(x, x - s.reconstruct(x))
    site, table = str(s.site), []
    for method in ("clean", "reconstruction", "+ linear", "+ nonlinear"):
        edits = [] if method == "clean" else [Edit(site, _Inserted(s, linear, method), name=method)]
        nats = count = 0.0
        with model.intervene(*edits):
            for i in range(0, len(texts), run):
                tokens = model.tokens(list(texts[i : i + run]), max_length=context, truncate=True)
                log = model(tokens)[:, :-1].float().log_softmax(-1)
                real = tokens.mask[:, 1:]
                nats += float((-log.gather(-1, tokens.ids[:, 1:, None])[..., 0] * real).sum())
                count += int(real.sum())
        table.append({"metric": "ce", "value": nats / count, "method": method})
    frame = pd.DataFrame(table)
    frame["change"] = frame.value - frame.value.iloc[0]
    frame.attrs.update({"fit_tokens": len(x), "site": site, "model": model.name})
    return frame
