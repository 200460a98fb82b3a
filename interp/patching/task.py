"""The question that every method of this package answers: two runs, a metric, and which run is patched with which.

In direction "denoise" the corrupt run is patched with activations of the clean one (what suffices to bring the
behaviour back), in "noise" the clean run with those of the corrupt one (what is needed to keep it): Heimersheim & Nanda
(arXiv 2404.15255). The run that is patched is the *base*, the other the *source*. Every effect has one sign convention:
metric of the patched base run, minus metric of the base run as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from interp.activations import Tokens
from interp.hooks.lending import original
from interp.metrics import Metric, as_metric

if TYPE_CHECKING:
    from interp.model import Model

Direction = Literal["denoise", "noise"]


class PatchError(ValueError):
    """Runs that cannot be compared, or a metric that tells nothing about them."""


@dataclass(frozen=True, eq=False)
class Run:
    """One prompt per pair. `embeds` [pair, pos, d_model] stands in for the embeddings where the corruption is noise."""

    tokens: Tokens
    embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Task:
    """Base and source run, metric and direction.

    Attributes:
        base: the run that is patched.
        source: the run that activations are taken from.
        metric: (logits [pair, pos, vocab], tokens) -> [pair].
        direction: "denoise" or "noise".
    """

    base: Run
    source: Run
    metric: Metric
    direction: str
    plain: bool = False  # the metric is a bare function of logits, which knows nothing of padding

    @classmethod
    def of(cls, m: Model, clean: Any, corrupt: Any, metric: Any, direction: Direction) -> Task:
        """Reads what a user gives: texts, ids, Tokens or Pairs (then `corrupt` may be None)."""
        if direction not in ("denoise", "noise"):
            raise PatchError(f"direction={direction!r}: expected 'denoise' (clean into corrupt) or 'noise'")
        pairs = next((p for p in (clean, corrupt) if hasattr(p, "clean") and hasattr(p, "corrupt")), None)
        noise = getattr(pairs, "noise", None)
        if pairs is not None:
            clean = pairs.clean if hasattr(clean, "clean") else clean
            corrupt = pairs.corrupt if corrupt is None or hasattr(corrupt, "corrupt") else corrupt
        if corrupt is None:
            raise PatchError("corrupt: give the corrupt prompts too, or Pairs, which hold both")
        runs = [Run(m.tokens(clean).padded("right")), Run(m.tokens(corrupt).padded("right"), noise)]
        _comparable(m, *runs)
        if not callable(metric):
            raise PatchError(
                f"metric: expected a function of logits [batch, pos, vocab] that gives [batch], got {metric!r:.60}"
            )
        base, source = runs[::-1] if direction == "denoise" else runs
        return cls(base, source, as_metric(metric), direction, not isinstance(metric, Metric))

    @property
    def pairs(self) -> int:
        return len(self.base)

    @property
    def width(self) -> int:
        """Columns of the longest prompt."""
        return self.base.tokens.ids.shape[1]

    @property
    def padded(self) -> bool:
        return not bool(self.base.tokens.mask.all())

    def lengths(self) -> Tensor:
        """Tokens of each pair [pair]."""
        return self.base.tokens.mask.sum(1)


def _comparable(m: Model, clean: Run, corrupt: Run) -> None:
    a, b = clean.tokens, corrupt.tokens
    if len(a) != len(b):
        raise PatchError(f"there are {len(a)} clean and {len(b)} corrupt prompts; patching compares them one by one")
    lengths = a.mask.sum(1), b.mask.sum(1)
    for i, (n, k) in enumerate(zip(lengths[0].tolist(), lengths[1].tolist(), strict=True)):
        if n != k:
            raise PatchError(
                f"pair {i}: the clean prompt has {n} tokens and the corrupt one {k}, so their positions do not "
                f"correspond; replace tokens by as many tokens.\n{_aligned(m, a.row(i), b.row(i))}"
            )
    if corrupt.embeds is None and torch.equal(a.ids[a.mask], b.ids[b.mask]):
        raise PatchError("the clean and corrupt prompts are the same tokens, so no patch can have an effect")


def _aligned(m: Model, a: Tensor, b: Tensor) -> str:
    """Two rows of tokens under each other, as the user needs to see them."""
    from interp.patching.pairs import aligned

    def pieces(ids: Tensor) -> list[str]:
        return [str(i) if m.tokenizer is None else m.tokenizer.decode([i]) for i in ids.tolist()]

    return aligned(pieces(a), pieces(b))


def evaluate(task: Task, logits: Tensor, tokens: Tokens | None, what: str) -> Tensor:
    """The metric of every pair [pair]. Raises PatchError where it is not finite, naming the run."""
    value = task.metric(logits, tokens)
    if bool((bad := ~torch.isfinite(value)).any()):
        raise PatchError(
            f"metric {task.metric.name!r} gives {value[bad][0].item()} for pair {int(bad.nonzero()[0])} of {what}; it "
            "must be a finite number (a logarithm of 0, or a division by 0?)"
        )
    return value


def telling(task: Task, base: Tensor, source: Tensor) -> None:
    """Raises PatchError where the metric does not see the difference between the two runs [pair]."""
    if torch.equal(base, source):
        raise PatchError(
            f"metric {task.metric.name!r} gives the same value on the clean and the corrupt run of every pair "
            f"({base[0].item():.6g} for the first), so there is nothing to explain; does it look at the logits that it "
            "is given, and at tokens that the corruption can change?"
        )


@contextmanager
def without_flash(m: Model) -> Iterator[str]:
    """Switches flash attention to SDPA, or to eager where the family has no SDPA, and back; gives what was switched.

    Flash kernels take no additive mask and make no pattern, and few of them take a gradient with a cached prefix.
    """
    name = str(original(m.config, "_attn_implementation_internal") or "")
    if "flash" not in name or not hasattr(m.hf, "set_attn_implementation"):
        yield ""
        return
    other = "sdpa" if getattr(m.hf, "_supports_sdpa", False) else "eager"
    m.hf.set_attn_implementation(other)
    try:
        yield f"{name} -> {other}"
    finally:
        _restore(m, name)


def _restore(m: Model, name: str) -> None:
    from interp.hooks.attention import configs_of

    for config in configs_of(m.hf.modules(), "_attn_implementation_internal"):
        config._attn_implementation_internal = name
