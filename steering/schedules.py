"""How strong, when: schedules over generation steps, and stretches between tokens.

    steering.scheduled(m, v, steering.linear(30))        full strength at the first token, none at the thirtieth
    v.within(steering.between(start_ids, stop_ids))      only while it thinks

Step 0 is the last token of the prompt, at which the first new token is predicted; a schedule is a function of the step.
It becomes a gate, so a scheduled map is a map like any other: it is evaluated, budgeted and combined as such. Steps are
counted by real tokens, so a schedule is the same with and without a cache, and whatever the padding.

The schedules are those that Scalena et al. 2024 (arXiv:2406.17563, section 3) compare with their dynamic one
(`steering.dac`): constant (plain steering), diminishing (`linear`) and start only (`first`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp.edits import Gate, Where
from interp.scope import Columns, Scope
from steering.errors import SteeringError
from steering.vector import SteeringMap

#: step [batch, pos] (float, 0 = the prompt's last token) -> factor on the map, of the same shape
Schedule = Callable[[Tensor], Tensor]


def linear(steps: int) -> Schedule:
    """1 at step 0, falling by 1/steps per step, 0 from `steps` on: the paper's diminishing schedule."""
    _positive("steps", steps)
    return lambda step: (1 - step / steps).clamp(0, 1)


def exponential(half_life: float) -> Schedule:
    """Halves every `half_life` steps."""
    _positive("half_life", half_life)
    return lambda step: 0.5 ** (step / half_life)


def first(steps: int = 1) -> Schedule:
    """Full strength for the first `steps` steps, then none; with 1 only the first new token is steered directly."""
    _positive("steps", steps)
    return lambda step: (step < steps).to(step)


def cosine(steps: int) -> Schedule:
    """Half a cosine from 1 at step 0 to 0 at `steps`, then none."""
    _positive("steps", steps)
    return lambda step: 0.5 * (1 + torch.cos(torch.pi * (step / steps).clamp(0, 1)))


def scheduled(m: Any, v: SteeringMap, schedule: Schedule) -> SteeringMap:
    """`v` with its strength following a schedule; a gate that it has is kept and multiplied.

    Tokens before the prompt's last, if its scope has any, count as step 0.
    """
    gates: dict[int, Gate] = {}
    parts = []
    for part in v.parts:
        gate = gates.setdefault(id(part.gate), Timed(m, schedule, part.gate))
        parts.append(replace(part, gate=gate))
    return replace(v, parts=tuple(parts))


@dataclass(frozen=True, eq=False)
class Timed:
    """The gate of a schedule: it reads from the model's clock where the prompt ended."""

    m: Any
    schedule: Schedule
    inner: Gate | None = None

    def __call__(self, h: Tensor, where: Where) -> Tensor:
        end = self.m.clock.now.prompt_tokens.to(where.position.device)  # [batch, 1]
        step = (where.position - end + 1).clamp(min=0)
        factor = self.schedule(step.float())
        if factor.shape != step.shape or not bool(torch.isfinite(factor).all()):
            raise SteeringError(f"schedule: expected finite factors {list(step.shape)}, got {list(factor.shape)}")
        if self.inner is None:
            return factor
        given = self.inner(h, where)
        return factor * (given[:, None] if given.dim() == 1 else given)


def between(start: int | Sequence[int], stop: int | Sequence[int]) -> Scope:
    """Tokens behind the latest `start` that no later `stop` has ended; both are token ids or sequences of them.

    The start's own tokens are not among them, the stop's last token is: only behind it is it known that it stopped.
    Unlike ``after(a) & ~after(b)``, which knows first occurrences only, this holds for each stretch of several.
    """
    begin, end = _ids("start", start), _ids("stop", stop)

    def rule(c: Columns) -> Tensor:
        if c.ids is None:
            raise SteeringError("between: looks for tokens, but the model was fed embeddings, not ids")
        on = torch.zeros_like(c.mask)
        for row, (ids, mask) in enumerate(zip(c.ids.tolist(), c.mask.tolist(), strict=True)):
            real = [(column, token) for column, token in enumerate(ids) if mask[column]]
            tokens, now = [token for _, token in real], False
            for i, (column, _) in enumerate(real):
                on[row, column] = now
                if tokens[max(0, i + 1 - len(end)) : i + 1] == end:
                    now = False
                if tokens[max(0, i + 1 - len(begin)) : i + 1] == begin:
                    now = True
        return on

    return Scope(f"between({start}, {stop})", rule)


def _ids(name: str, given: int | Sequence[int]) -> list[int]:
    ids = [given] if isinstance(given, int) else list(given)
    if not ids or not all(isinstance(i, int) for i in ids):
        raise SteeringError(f"{name}={given!r}: expected a token id or a sequence of token ids")
    return ids


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise SteeringError(f"{name}={value}: expected a positive number of steps")
