"""Logistic regression on activations: the objective of scikit-learn, minimised in far fewer passes over the data.

For labels y and features x the binary probe minimises

    F(w, b) = 1/2 |w|^2 + C sum_i log(1 + exp(-y_i (w x_i + b))),        y in {-1, +1}

and the multinomial one the softmax form with a weight vector per class: scikit-learn's LogisticRegression, intercept
unpenalised. Activations are badly conditioned (a few directions are a thousand times as large as most), which costs a
quasi-Newton method hundreds of passes over them. Here it takes five to seven:

1. Few rows stand for all. A pass over all rows gives each one's error p - y; then some thousands are drawn in
   proportion to |p - y| |x|^2, each weighted by one over its chance. An even sample would do for a hard question; in an
   easy one it holds hardly a row that counts, and of rare directions hardly a row that has them.
2. Far from the minimum the small problem is solved in place of the whole, with a linear term that makes its slope that
   of the whole here (Shamir et al. 2014, "Communication-efficient distributed optimization", arXiv:1312.7853, eq. 13).
3. Near it, L-BFGS (scipy's) runs on all rows, over u with w = P u, P P' = H^-1, where H = I + C X' diag(p (1 - p)) X is
   the Hessian (for several classes its diagonal blocks) from the rows drawn. Seen from u every direction is about
   equally steep, and each pass gains a digit.
4. It begins with what an even sample says under the whole's C: by its size a far stronger penalty, as so few rows need.

The minimum is the same, whatever rows are drawn; tests compare it with scikit-learn's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probes.errors import ProbeWarning

BLOCK = 2048  # rows read at once, and then again from the processor's cache: some 5 MB of a residual stream
SAMPLE = 8192  # rows that stand for all, or eight times the features where that is more
EVEN = 0.1  # share of the draw that does not go by error, so that no row stands for too many others
LEAST = 50  # rows of each class in the even sample, where there are as many
FAR, TRIES = 0.02, 10  # more of F than that is to be gained: the small problem is solved first; so often at most
ROUGH = 0.03  # tol of the small problem; more would be precise about the wrong minimum
STEPS = 20  # L-BFGS iterations before H is taken anew


@dataclass(frozen=True)
class Fit:
    """A minimum: weights [class or 1, feature], intercepts [class or 1], how many passes it took, and if it
    converged."""

    weight: Tensor
    bias: Tensor
    passes: int
    converged: bool

    @property
    def joined(self) -> Tensor:
        """Weights with the intercepts behind them [class or 1, feature + 1]."""
        return torch.cat([self.weight, self.bias[:, None]], 1)


@dataclass(frozen=True)
class _Slope:
    """F, its gradient [class or 1, feature + 1], and p - y of each row [sample, class or 1]."""

    value: float
    gradient: Tensor
    error: Tensor


def path(
    x: Tensor, y: Tensor, n_classes: int, Cs: Sequence[float], centre: Tensor, deviation: Tensor, *,
    tol: float = 1e-3, max_iter: int = 200,
) -> list[Fit]:  # fmt: skip
    """The minimum for each of several penalties, in the order given; each begins where the last weaker one ended.

    Args:
        x: features [sample, feature], float.
        y: class numbers [sample], 0 .. n_classes - 1.
        n_classes: 2 gives the binary probe with one weight vector, for class 1.
        Cs: inverse strengths of the penalty, as in scikit-learn.
        centre: means [feature], float64.
        deviation: [feature], float64; the probe is fitted to (x - centre) / deviation.
        tol: the gradient's length in u, relative to sqrt(2 F): F is then about tol^2 F above its minimum.
        max_iter: L-BFGS iterations; a warning says so when they do not suffice.
    """
    if len(x) < x.shape[1]:  # the minimum lies in the span of the samples: solve there, with as many weights as samples
        x = (x - centre.to(x)) / deviation.to(x)
        basis = torch.linalg.qr(x.T)[0]
        zero, one = torch.zeros(len(x), dtype=torch.float64), torch.ones(len(x), dtype=torch.float64)
        inner = path(x @ basis, y, n_classes, Cs, zero, one, tol=tol, max_iter=max_iter)
        return [Fit(f.weight @ basis.T.double(), f.bias, f.passes, f.converged) for f in inner]
    classes = torch.arange(1, n_classes) if n_classes == 2 else torch.arange(n_classes)
    problem, found, last = _Problem(x, (y[:, None] == classes).to(x), (centre, deviation)), {}, None
    for C in sorted(set(Cs)):
        found[C] = last = problem.solve(C, None if last is None else last.joined, tol, max_iter)
        if not last.converged:
            warnings.warn(
                f"logistic probe: {max_iter} iterations did not reach tol={tol:g}; raise max_iter, or lower C={C:g} "
                "(separable data has no minimum without a penalty)",
                ProbeWarning,
                stacklevel=4,
            )
    return [found[C] for C in Cs]


class _Problem:
    """F over rows x [sample, feature] of classes y [sample, class or 1], one-hot, each row counted `weight` times.

    With a `scale` = (centre, deviation) it is F of (x - centre) / deviation. Many rows are centred anew whenever they
    are read, a block at a time: a copy would need as much memory again, and time for its first writing.

    With a `pull` = (gradient, from where) its product with the way from there is added: a line that tilts F.
    """

    def __init__(
        self, x: Tensor, y: Tensor, scale: tuple[Tensor, Tensor] | None = None, weight: Tensor | None = None
    ) -> None:
        self.x, self.y, self.d, self.rows = x, y, x.shape[1], y.shape[1]
        self.weight = x.new_ones(len(x), 1) if weight is None else weight.to(x)
        self.size = max(SAMPLE, 8 * self.d)
        self.many = len(x) >= 2 * self.size
        self.scale = scale
        if scale is not None and not self.many:
            self.x, self.scale = self.scaled(x), None
        self.length: Tensor | None = None  # |x|^2 of each row, where some are to be drawn
        self.pull: tuple[Tensor, Tensor] | None = None

    def scaled(self, x: Tensor) -> Tensor:
        """Rows as the probe sees them."""
        return x if self.scale is None else (x - self.scale[0].to(x)).mul_((1 / self.scale[1]).to(x))

    def solve(self, C: float, w: Tensor | None, tol: float, max_iter: int, lower: Tensor | None = None) -> Fit:
        """The minimum from w, or from nothing, where `lower` is the first H's factor L, H = L L', if that is known."""
        w = self.start(C, max_iter) if w is None else w
        at, passes, done, tries = self.slope(w, C), 1, 0, 0
        while max(done, passes) < max_iter:
            few, error = self.drawn(at.error) if self.many else (self, at.error)
            lower = few.curvature(error, C) if lower is None else lower
            gain = _gain(_to_u(lower, at.gradient))  # so much does H foretell
            if self.many and gain > FAR * at.value and tries < TRIES:
                few.pull = at.gradient - few.slope(w, C).gradient, w
                step = few.solve(C, w, ROUGH, max_iter, lower).joined - w
                found = self.slope(w + step, C)
                passes, tries = passes + 1, tries + 1
                while found.value > at.value and passes < max_iter:  # F falls along it, if not so far
                    step /= 4
                    found, passes = self.slope(w + step, C), passes + 1
                w, at = w + step, found
                # H as it was is good enough to solve the small problem by
                lower = lower if _gain(_to_u(lower, at.gradient)) > FAR * at.value else None
            elif gain <= tol**2 * at.value:
                break
            else:
                before = at.value
                w, at, n, more, near = self.descend(w, at, lower, C, tol, min(STEPS, max_iter - done))
                passes, done, lower = passes + more, done + n, None
                if near or before - at.value <= self.rounding(before):
                    break
        return Fit(w[:, : self.d].contiguous(), w[:, self.d].contiguous(), passes, max(done, passes) < max_iter)

    def start(self, C: float, max_iter: int) -> Tensor:
        """No weights, and intercepts by the classes' shares; of many rows, what an even sample says from there."""
        count, w = (self.weight * self.y).sum(0).double(), torch.zeros(self.rows, self.d + 1, dtype=torch.float64)
        w[:, self.d] = (
            (count / (self.weight.sum() - count)).log() if self.rows == 1 else count.log() - count.log().mean()
        )
        if not self.many:
            return w
        share, least = self.size / len(self.x), torch.tensor(float(LEAST))
        of_class = self.y @ (least / count.to(self.y))
        if self.rows == 1:
            of_class += (1 - self.y[:, 0]) * least / (len(self.x) - float(count))
        few = self.draw(of_class.double().clamp(min=share, max=1))[0]
        return few.solve(C * share, w, 3 * ROUGH, max_iter).joined

    def drawn(self, error: Tensor) -> tuple[_Problem, Tensor]:
        """The rows that matter where errors [sample, class or 1] are these, and their errors."""
        assert self.length is not None
        weight = error.abs().sum(1, dtype=torch.float64) * self.length
        weight += EVEN * weight.mean() + 1e-30
        chance = weight * (self.size / weight.sum())
        for _ in range(4):  # what rows surely drawn leave over goes to the others
            sure = chance >= 1
            left = self.size - int(sure.sum())
            if left <= 0 or bool(sure.all()):
                break
            chance = torch.where(sure, 1.0, weight * (left / weight[~sure].sum()))
        few, chosen = self.draw(chance.clamp(max=1))
        return few, error[chosen]

    def draw(self, chance: Tensor) -> tuple[_Problem, Tensor]:
        """Rows with the chances given [sample], each standing for one over its chance, and their numbers."""
        count = (chance.cumsum(0) + 0.5).floor().numpy()
        chosen = torch.from_numpy(np.flatnonzero(np.diff(count, prepend=0)))  # each time a whole number is passed
        x = self.scaled(torch.from_numpy(self.x.numpy()[chosen.numpy()]))
        return _Problem(x, self.y[chosen], weight=self.weight[chosen] / chance[chosen, None]), chosen

    def descend(
        self, start: Tensor, at: _Slope, lower: Tensor, C: float, tol: float, most: int
    ) -> tuple[Tensor, _Slope, int, int, bool]:
        """At most so many iterations with one H: where they end, F there, how many, how many passes, if near enough."""
        from scipy.optimize import minimize

        first = _to_u(lower, at.gradient)
        # In units of the first gradient's length scipy's first step, of length one, is Newton's.
        scale = max(float(first.norm()), 1e-300)
        seen, passes, near = (np.zeros(start.numel()), at), 0, False

        def to_w(u: np.ndarray) -> Tensor:
            step = torch.from_numpy(u * scale).view(self.rows, self.d + 1, 1)
            step = torch.linalg.solve_triangular(lower.mT, step, upper=True)[..., 0]
            # What all classes share changes no probability, only the penalty: at the minimum it is 0, so it stays so.
            return start + (step - step.mean(0) if self.rows > 1 else step)

        def value_and_gradient(u: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal seen, passes
            if (u != seen[0]).any():
                seen, passes = (u.copy(), self.slope(to_w(u), C)), passes + 1
            slope = _to_u(lower, seen[1].gradient) / scale
            return (seen[1].value - at.value) / scale**2, slope.reshape(-1).numpy()

        def enough(xk: np.ndarray) -> None:
            nonlocal near
            value, slope = value_and_gradient(xk)
            near = 0.5 * float(slope @ slope) <= tol**2 * (value + at.value / scale**2)
            if near:
                raise StopIteration

        found = minimize(
            value_and_gradient, np.zeros(start.numel()), jac=True, method="L-BFGS-B", callback=enough,
            options={"maxiter": most, "gtol": 0.0, "ftol": self.rounding(at.value) / scale**2, "maxcor": 20,
                     "maxls": 4},
        )  # fmt: skip
        value_and_gradient(found.x)
        return to_w(found.x), seen[1], found.nit, passes, near

    def rounding(self, value: float) -> float:
        """Of F: less is no gain."""
        return 0.1 * torch.finfo(self.x.dtype).eps * abs(value)

    def slope(self, w: Tensor, C: float) -> _Slope:
        """F and what goes with it at weights with their intercepts, in one reading of the data."""
        factor = torch.ones(self.d, dtype=torch.float64) if self.scale is None else 1 / self.scale[1]
        centre, spare = None if self.scale is None else self.scale[0].to(self.x), self.x.new_empty(BLOCK, self.d)
        weight, bias = (w[:, : self.d] * factor).to(self.x), w[:, self.d].to(self.x)
        out, score, error = torch.zeros_like(w), torch.empty_like(self.y), torch.empty_like(self.y)
        length = self.x.new_empty(len(self.x)) if self.length is None else self.length
        every = (self.x, self.y, self.weight, score, error, length)
        for part, label, v, s, e, size in zip(*(a.split(BLOCK) for a in every), strict=True):
            if centre is not None:
                part = torch.sub(part, centre, out=spare[: len(part)])
            torch.addmm(bias, part, weight.T, out=s)
            torch.sigmoid(s, out=e) if self.rows == 1 else torch.softmax(s, -1, out=e)
            e -= label
            out[:, : self.d] += (e * v).T @ part
            if self.many and self.length is None:
                torch.mv(part.square(), factor.square().to(part), out=size)
        self.length = length if self.many else None
        out[:, : self.d] *= factor
        out[:, self.d] = (error * self.weight).sum(0, dtype=torch.float64)
        out = C * out
        out[:, : self.d] += w[:, : self.d]
        if self.rows == 1:
            loss = torch.nn.functional.softplus(score * (1 - 2 * self.y))
        else:
            loss = score.logsumexp(1, keepdim=True) - (score * self.y).sum(1, keepdim=True)
            out -= out.mean(0)
        value = 0.5 * float((w[:, : self.d] ** 2).sum()) + C * float((loss.double() * self.weight).sum())
        if self.pull is not None:
            tilt, origin = self.pull
            value, out = value + float((tilt * (w - origin)).sum()), out + tilt
        return _Slope(value, out, error)

    def curvature(self, error: Tensor, C: float) -> Tensor:
        """Lower Cholesky factors of the Hessian's diagonal blocks [class or 1, feature + 1, feature + 1]."""
        from scipy.linalg.blas import dsyrk, ssyrk

        x, size = self.x.numpy(), error.abs()
        weight = (size * (1 - size) * self.weight).clamp(min=0).sqrt().numpy()  # |p - y| is p or 1 - p
        product = ssyrk if x.dtype == np.float32 else dsyrk  # a symmetric product is half of the work
        scaled, gram = np.empty((len(x), self.d + 1), x.dtype), np.empty((self.rows, self.d + 1, self.d + 1))
        for k, root in enumerate(weight.T):
            np.multiply(x, root[:, None], out=scaled[:, : self.d])
            scaled[:, self.d] = root
            half = product(1.0, scaled.T, lower=1)
            gram[k] = np.tril(half) + np.tril(half, -1).T
        hessian = torch.from_numpy(C * gram)
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        diagonal[:, : self.d] += 1
        # Rounding of a float32 product must not make it indefinite.
        diagonal += 1e-7 * diagonal.mean(1, keepdim=True)
        return torch.linalg.cholesky(hessian)


def _to_u(lower: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in w [class or 1, feature + 1] as one in u."""
    return torch.linalg.solve_triangular(lower, gradient[..., None], upper=False)[..., 0]


def _gain(gradient: Tensor) -> float:
    """How far F would fall were it a parabola with this gradient in u."""
    return 0.5 * float(gradient.square().sum())
