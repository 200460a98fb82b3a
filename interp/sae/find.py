"""A bench for explainers: functions that are known, so that an interpretation can be marked right or wrong.

After FIND (Schwettmann et al. 2023, arXiv:2309.03886): seeded numeric and string functions, composed, noisy, or
corrupted in a region where they do something else. An *interpretation* is any callable that claims to compute the same;
its mark is the share of test inputs at which it does. The function itself earns 1, and an interpretation that misses
exactly the corrupted region loses exactly the inputs that lie there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Function:
    """A function to be interpreted.

    Attributes:
        kind: numeric | string.
        what: its description.
        clean: what it computes outside the corrupted region, without noise.
        inside: True at inputs of the corrupted region; None where there is none.
        instead: what it computes there.
        noise: standard deviation of what is added to a numeric value.
        seed: of noise and test inputs.
    """

    kind: str
    what: str
    clean: Callable[[Any], Any]
    inside: Callable[[Any], bool] | None = None
    instead: Callable[[Any], Any] | None = None
    noise: float = 0.0
    seed: int = 0

    def exact(self, x: Any) -> Any:
        """Its value without noise."""
        if self.inside is not None and self.instead is not None and self.inside(x):
            return self.instead(x)
        return self.clean(x)

    def __call__(self, x: Any) -> Any:
        """What an explainer gets to see; the noise of an input is always the same."""
        value = self.exact(x)
        return value if not self.noise else value + random.Random(f"{self.seed} {x!r}").gauss(0, self.noise)

    def inputs(self, n: int = 200) -> list[Any]:
        """Test inputs, the same for everybody."""
        draw = random.Random(f"inputs {self.seed}")
        if self.kind == "numeric":
            return [draw.uniform(-10, 10) for _ in range(n)]
        return ["".join(draw.choices(_LETTERS, k=draw.randint(3, 9))) for _ in range(n)]


_NUMERIC: dict[str, Callable[[random.Random], Callable[[float], float]]] = {
    "a line": lambda d: (lambda a, b: lambda x: a * x + b)(d.uniform(-3, 3), d.uniform(-5, 5)),
    "a parabola": lambda d: (lambda a, c: lambda x: a * (x - c) ** 2)(d.uniform(0.2, 1), d.uniform(-4, 4)),
    "a wave": lambda d: (lambda a, w: lambda x: a * math.sin(w * x))(d.uniform(1, 5), d.uniform(0.3, 2)),
    "a ramp": lambda d: (lambda a, c: lambda x: a * max(0.0, x - c))(d.uniform(0.5, 3), d.uniform(-5, 5)),
}
_STRING: dict[str, Callable[[random.Random], Callable[[str], str]]] = {
    "reversed": lambda d: lambda x: x[::-1],
    "in capitals": lambda d: lambda x: x.upper(),
    "without vowels": lambda d: lambda x: "".join(c for c in x if c.lower() not in "aeiou"),
    "letters moved on": lambda d: (lambda k: lambda x: "".join(_moved(c, k) for c in x))(d.randint(1, 25)),
    "first letter last": lambda d: lambda x: x[1:] + x[:1],
}


def _moved(letter: str, k: int) -> str:
    return _LETTERS[(_LETTERS.index(letter) + k) % 26] if letter in _LETTERS else letter


def functions(n: int = 20, seed: int = 0) -> list[Function]:
    """Half numeric, half string; of each, by turns plain, composed of two, noisy (numeric) and corrupted."""
    out = []
    for i in range(n):
        draw = random.Random(f"{seed} {i}")
        kind, twist = ("numeric", "string")[i % 2], ("plain", "composed", "noisy", "corrupted")[i // 2 % 4]
        parts: Any = _NUMERIC if kind == "numeric" else _STRING
        names = draw.sample(sorted(parts), 2)
        f = parts[names[0]](draw)
        what = names[0]
        if twist == "composed":
            g = parts[names[1]](draw)
            f, what = _composed(g, f), f"{names[0]}, then {names[1]}"
        extra: dict[str, Any] = {}
        if twist == "noisy" and kind == "numeric":
            extra = {"noise": 0.1}
        if twist == "corrupted":
            low = draw.uniform(-8, 5)
            letter = draw.choice(_LETTERS)
            numeric = kind == "numeric"
            extra = {"inside": (lambda x, a=low: a <= x <= a + 3) if numeric else (lambda x, c=letter: c in x),
                     "instead": (lambda x: 99.0) if numeric else (lambda x: "#")}  # fmt: skip
            what += (
                f", but 99 between {low:.1f} and {low + 3:.1f}" if numeric else f", but # where there is a {letter!r}"
            )
        out.append(Function(kind, what, f, seed=seed * 1000 + i, **extra))
    return out


def _composed(g: Callable[[Any], Any], f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: g(f(x))


def mark(function: Function, interpretation: Callable[[Any], Any], *, n: int = 200, tolerance: float = 0.02) -> float:
    """Share of test inputs at which an interpretation is right.

    Strings must be equal; numbers must be within `tolerance` of the range of the function's values, noise apart. An
    interpretation that fails at an input is wrong there.
    """
    inputs = function.inputs(n)
    truth = [function.exact(x) for x in inputs]
    span = max(truth) - min(truth) if function.kind == "numeric" else 0.0
    right = 0
    for x, value in zip(inputs, truth, strict=True):
        try:
            claimed = interpretation(x)
            right += abs(claimed - value) <= tolerance * span if function.kind == "numeric" else claimed == value
        except Exception:  # whatever somebody's interpretation may raise
            continue
    return right / n
