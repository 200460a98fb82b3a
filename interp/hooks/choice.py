"""The choice of experts: between the router's logits and the experts there is arithmetic that no interface shows.

A router makes logits, turns them into scores, perhaps adds a bias, perhaps keeps some groups of experts only, takes the
best k, and weighs them, all in one forward pass. Logits are tapped where they are made, before anything is chosen by
them (most routers return them *afterwards*, when a change would change nothing). Two values an edit may write there are
no numbers but words, and the choice keeps to them whatever the family does in between:

    -inf    this expert is not there: it is never chosen, and has no part in any sum over experts
    +inf    this expert is chosen; its logit becomes the largest finite one plus `MARGIN`, its weight follows from that

Without that, a bias that a router adds to sigmoid(-inf) = 0 could still bring an absent expert in, and +inf would make
a softmax NaN. The margin is SteerMoE's (arXiv 2509.09660), which writes max + 0.01 for an expert to be switched on.

Choosing is `topk` in every family but one (sparsemixer takes the maximum twice, of the logits themselves, which obeys
by itself). A group is scored by the experts that are there; a group with fewer of them than the router adds up comes
last. Where the groups that are kept hold fewer experts than there are slots, a slot stays empty: an absent expert is
listed there with weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp.hooks.anatomy import Place
from interp.hooks.functions import LINEAR, Watched
from interp.hooks.tap import Tap

#: By how much a forced expert's logit exceeds the largest finite one.
MARGIN = 0.01
_TOPK = {torch.topk, Tensor.topk}
#: Routers that were seen to return the very logits they chose by: which part of the output these are.
_returned: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
Tapping = Callable[[Place, Tap], list[Any]]


class ChoiceMode(TorchFunctionMode):
    """Taps logits [token, expert] at the first linear map onto `n_experts` columns, and makes `topk` keep to them.

    With `tap` None somebody else taps them, and calls `heed` with what came out.
    """

    def __init__(self, tap: Tap | None, n_experts: int) -> None:
        super().__init__()
        self.tap, self.n_experts = tap, n_experts
        self.made: Tensor | None = None
        self.absent: Tensor | None = None
        self.certain: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.absent is not None and func in _TOPK:
            return self._choose(func, args, kwargs)
        out = func(*args, **kwargs)
        if self.tap is not None and func in LINEAR and isinstance(out, Tensor) and out.shape[-1] == self.n_experts:
            tap, self.tap, self.made = self.tap, None, out
            given = tap.framed(out)
            return self.heed(given) if tap.edits else given
        return out

    def heed(self, logits: Tensor) -> Tensor:
        """Notes the words among the logits, and gives the numbers to go on with."""
        absent, certain = logits == -torch.inf, logits == torch.inf
        if not bool((absent | certain).any()):
            return logits
        self.absent, self.certain = absent.flatten(0, -2), certain.flatten(0, -2)
        best = logits.masked_fill(certain, -torch.inf).amax(-1, keepdim=True) + MARGIN
        return torch.where(certain, best.masked_fill(best == -torch.inf, 0.0), logits)

    def _choose(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`topk` of the scores with absent experts last and certain ones first; the values stay those of the scores."""
        scores = args[0]
        marks = self._marks(scores)
        if marks is None:
            return func(*args, **kwargs)
        far = torch.finfo(scores.dtype).max / 8  # finite, since the scores of a group are added up
        out = func(scores.masked_fill(marks[0], -far).masked_fill(marks[1], far), *args[1:], **kwargs)
        if scores.dim() != 2 and scores.shape[-1] != self.n_experts:  # the best of each group, to score it
            return out
        return torch.return_types.topk((scores.gather(-1, out.indices), out.indices))

    def _marks(self, scores: Tensor) -> tuple[Tensor, Tensor] | None:
        """Absent and certain, laid out as `scores`; None where these are no scores of experts (groups, positions)."""
        assert self.absent is not None
        assert self.certain is not None
        tokens, columns = self.absent.shape
        if scores.numel() == tokens * columns:  # [token, expert], [batch, pos, expert] or [token, group, expert]
            return self.absent.view(scores.shape), self.certain.view(scores.shape)
        width = scores.shape[-1]  # a router that scores shared experts too chooses among the routed ones, which lead
        if scores.dim() == 2 and len(scores) == tokens and columns < 2 * width <= 2 * columns:
            return self.absent[:, :width], self.certain[:, :width]
        return None


class Router(Watched):
    """Watches a router that both makes the logits and chooses by them.

    A mode is asked about every operation, which costs more than reading does. Many routers return the very tensor that
    they chose by; where one was seen to do so, logits that nobody writes to are from then on read where it ends.
    """

    def __init__(self, place: Place, tap: Tap, n_experts: int) -> None:
        self.module, self.tap = place.module, tap
        super().__init__(place.module, lambda: ChoiceMode(tap, n_experts))

    @property
    def _reads(self) -> bool:
        """True if logits are only looked at; a reader under gradients may put a twin in their place."""
        return not (self.tap.edits or self.tap.splice or self.module.training or torch.is_grad_enabled())

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module not in _returned or not self._reads:
            super()._enter(module, args)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.stack:
            made = self.stack[-1].made
            super()._leave(module, args, output)
            if self._reads and made is not None and not made.is_inference() and made._version == 0:
                for i, part in enumerate(output if isinstance(output, tuple) else ()):
                    if part is made:
                        _returned[module] = i
        elif isinstance(output, tuple):  # None where an error is on its way out
            self.tap.framed(output[_returned[module]])


def place_tap(place: Place, tap: Tap, n_experts: int, at_boundary: Tapping) -> list[Any]:
    """Hooks for a tap on router logits; `at_boundary` taps a router that is a plain linear.

    A plain linear is read where it ends. To write there takes more: the choice is made by the module around it.
    """
    if place.how == "router":
        return [Router(place, tap, n_experts)]
    handles = at_boundary(place, tap)
    if place.other is None or not tap.edits:
        return handles
    running: list[ChoiceMode] = []

    def begin() -> ChoiceMode:
        running[:] = [ChoiceMode(None, n_experts)]
        return running[0]

    def heed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return running[0].heed(output)

    return [Watched(place.other, begin), *handles, place.module.register_forward_hook(heed)]
