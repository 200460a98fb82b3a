r"""Secants: a gradient that sees past what is saturated, because it knows both runs.

A gradient is a tangent. Where attention is saturated, or a neuron lies on the flat side of its gate, the tangent is 0
and nothing upstream has an effect by it, however much the other run differs. The QK fix (`qk_fix`) mends queries and
keys, and not what makes them. Here every nonlinear step is replaced by the straight line through the values that it has
in the two runs, of which this is the slope (DeepLIFT's rescale rule, Shrikumar et al. 2017, arXiv 1704.02685)::

    y = f(x), each coordinate by itself     dy_i = (y_i - y'_i) / (x_i - x'_i) dx_i       f'(x_i) where x_i = x'_i
    p = softmax(s)                          dp = (diag L - L L^T / sum L) ds     L_j = (p_j - p'_j) / (ln p_j - ln p'_j)
    y = a b  (q.k, p.v, gates, norms)       dy = (a + a')/2 db + (b + b')/2 da

The matrix of the second line is symmetric, kills constants, and carries s - s' exactly to p - p'. For p_j - p'_j =
L_j (s_j - s'_j - c), c the difference of the two log-sum-exps, and as the left sides sum to 0, c = sum L (s - s') /
sum L. At s = s' it is the Jacobian of the softmax. L_j, the logarithmic mean of p_j and p'_j, is small only where a key
has no weight in *both* runs: what looks at one token here and at another there is not flat between them.

So the network becomes one affine map that agrees with the model at both runs, and the estimates of all parts of a cut
(the embeddings of all tokens, say) add up to the whole difference that the runs make. That is a property of sums. What
one node does *alone* is another question: half of what two factors do together then goes to each, also where one of
them alone does nothing. With `alone`, attention's last product keeps its tangent, p dv + v dp at the base run, which is
exact for either factor by itself, and sums are no longer complete. Products that another line follows (q.k before the
softmax) must reach its other end, and stay as above. Norms are steps like others (a square, a mean, a root, a
product), attention sinks and soft caps too.

The two runs are rows of one batch, base runs first. `Secant` sees every torch function on its way, wherever it is
called from, and hands on its value unchanged: only what autograd will make of it is another. Inside routed experts the
rows of the two runs do not lie side by side, and steps stay tangents there. What one run masks and the other does not
(padding, keys that a threshold drops) is no point of a line either: L_j is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Functions of each coordinate by itself, by torch's names (``__pow__`` counts as pow).
ELEMENTWISE = frozenset(
    "relu relu6 leaky_relu elu selu celu silu gelu mish softplus sigmoid logsigmoid hardtanh hardswish "  # noqa: SIM905
    "hardsigmoid tanh erf exp expm1 log log1p sqrt rsqrt reciprocal square pow abs clamp clamp_min clamp_max rtruediv "
    "sin cos".split()
)
#: Functions linear in each of their two tensors.
PRODUCTS = frozenset(("mul", "multiply", "matmul", "bmm", "mm", "einsum"))
#: Nothing is a difference that is smaller than this, relative to what it is the difference of.
TINY = 1e-8


def log_mean(a: Tensor, b: Tensor) -> Tensor:
    """(e^a - e^b) / (a - b): the logarithmic mean of two numbers given by their logarithms; e^a where they are equal.

    Either may be -inf, then the mean is 0. No difference of large numbers is taken, nor of equal ones.
    """
    gap = (a - b).abs()
    mean = torch.maximum(a, b).exp() * torch.where(gap > 0, -torch.expm1(-gap) / gap, torch.ones_like(gap))
    return mean.nan_to_num(0.0, 0.0, 0.0)


def between(weights: Tensor, d: Tensor, dim: int = -1) -> Tensor:
    """(diag L - L L^T / sum L) d, along `dim`."""
    total = weights.sum(dim, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights * d - weights / total * (weights * d).sum(dim, keepdim=True)


def slope(f: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(f(a) - f(b)) / (a - b) coordinate by coordinate, and where a and b differ enough to have one."""
    a, b = wide(a), wide(b)
    run = a - b
    far = run.abs() > TINY * (a.abs() + b.abs()) + TINY**2
    return (f(a) - f(b)) / torch.where(far, run, torch.ones_like(run)), far


def wide(x: Tensor) -> Tensor:
    """In double precision, where the device has it: the difference of two close numbers is all that counts here."""
    return x.float() if x.device.type == "mps" else x.double()


class Secant(TorchFunctionMode):
    """While it is on, values are what they were, and gradients of the first half of each batch's rows are secants.

    The second half of the rows, the source runs, is cut off from the graph at every nonlinear step.

    Args:
        rows: rows of the batch, both halves together.
        alone: the product of a pattern and values keeps its tangent.
    """

    def __init__(self, rows: int, alone: bool = False) -> None:
        super().__init__()
        self.rows, self.alone, self.paused = rows, alone, 0
        self.pattern: torch.Size | None = None  # of the newest softmax, as long as nothing was made of it

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.paused or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        name = str(getattr(func, "__name__", ""))
        name = name.strip("_") if name.startswith("__") else name
        if name == "baddbmm":  # which is called by names too
            args = *args, *(kwargs.pop(key) for key in ("batch1", "batch2") if key in kwargs)
        given = [i for i, t in enumerate(args) if isinstance(t, Tensor) and t.requires_grad]
        if not given or not all(self._paired(args[i]) for i in given):
            return func(*args, **kwargs)
        if name in ELEMENTWISE and given == [0]:
            return self._elementwise(func, args, kwargs)
        if name in PRODUCTS and len(given) == 2 and args[given[0]].dim() == args[given[1]].dim():
            if self.alone and name not in ("mul", "multiply") and self._mixes(args[given[0]]):
                return func(*args, **kwargs)
            return self._product(func, args, kwargs, *given)
        if name in ("softmax", "_softmax") and given == [0]:
            return self._softmax(func, args, kwargs)
        if name in DECOMPOSED:
            with self:  # its parts come by here themselves
                done = DECOMPOSED[name](*args, **kwargs)
            if done is not None:
                return done
        return func(*args, **kwargs)

    def _paired(self, x: Tensor) -> bool:
        return x.dim() > 0 and x.shape[0] > 0 and x.shape[0] % self.rows == 0 and self.rows % 2 == 0

    def _mixes(self, a: Tensor) -> bool:
        """Is this left factor the pattern that the newest softmax has made, with or without its sink?"""
        shape, width = self.pattern, a.shape[-1]
        found = shape is not None and width in (shape[-1], shape[-1] - 1) and a.numel() // width == shape[:-1].numel()
        self.pattern = None if found else shape
        return found

    def _elementwise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        here, there = args[0].chunk(2)
        y, other = func(*args, **kwargs).chunk(2)
        with torch.no_grad():
            rise, far = slope(lambda x: func(x, *args[1:], **kwargs), here, there)
        line = y.detach() + rise.to(y.dtype) * (here - here.detach()).to(y.dtype)
        return torch.cat([torch.where(far, line, y), other.detach()])

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        with torch.no_grad():
            p = func(*args, **kwargs)
            here, there = (wide(s).log_softmax(dim) for s in args[0].chunk(2))
            weights = log_mean(here, there).to(p.dtype)
        s = args[0].chunk(2)[0]
        move = torch.where(s.isfinite(), s - s.detach(), torch.zeros_like(s))  # what is masked cannot move
        self.pattern = p.shape
        y, other = p.chunk(2)
        return torch.cat([y + between(weights, move.to(p.dtype), dim), other])

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], i: int, j: int) -> Tensor:
        def of(a: Tensor, b: Tensor) -> Tensor:
            given = list(args)
            given[i], given[j] = a, b
            return func(*given, **kwargs)

        (a, a2), (b, b2) = args[i].chunk(2), args[j].chunk(2)
        with torch.no_grad():
            y, other = of(args[i], args[j]).chunk(2)
        line = of(a, (b + b2).detach() / 2) + of((a + a2).detach() / 2, b)
        return torch.cat([y + (line - line.detach()), other])


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    """torch's fused attention, written out."""
    if dropout_p:
        return None
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ v


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    y = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    y = x * (x.square().mean(axes, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return y if weight is None else y * weight


def _quotient(a: Tensor, b: Any, **kwargs: Any) -> Tensor | None:
    return a * b.reciprocal() if isinstance(b, Tensor) and b.requires_grad and not kwargs else None


def _added(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    return beta * added + alpha * (a @ b) if a.requires_grad and b.requires_grad else None


#: Functions that are several steps; None where a call is one that needs no taking apart.
DECOMPOSED: dict[str, Callable[..., Tensor | None]] = {
    "scaled_dot_product_attention": _attention,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    **dict.fromkeys(("div", "truediv", "true_divide", "divide"), _quotient),
    "baddbmm": _added,
}


class _Aside(TorchFunctionMode):
    """Pauses a `Secant` while it is on."""

    def __init__(self, secant: Secant) -> None:
        super().__init__()
        self.secant = secant

    def __enter__(self) -> _Aside:
        self.secant.paused += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.secant.paused -= 1
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def secants(hf: nn.Module, rows: int, apart: list[nn.Module], alone: bool = False) -> Iterator[None]:
    """A forward pass inside has base rows and as many source rows under them, and its gradients are secants.

    Args:
        hf: the model. Its weights are constants meanwhile: whatever asks for a gradient depends on the tokens.
        rows: rows of the batch, both runs together.
        apart: modules in which rows of the two runs do not correspond; there steps stay tangents.
        alone: see `Secant`.
    """
    from interp.hooks.functions import Watched

    mode = Secant(rows, alone)
    learning = [p for p in hf.parameters() if p.requires_grad]
    watched = [Watched(module, lambda: _Aside(mode)) for module in apart]
    try:
        for p in learning:
            p.requires_grad_(False)
        with mode:
            yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for watch in watched:
            watch.remove()
