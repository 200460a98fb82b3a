"""Scopes: which tokens an edit touches.

A forward pass sees *columns*: with a KV cache only the newest one, without it all of them again; with padding some
that are no tokens at all. A scope must pick the same tokens every time, so it never looks at the columns of one call
alone. It is decided on the whole history of the sequence, by real token positions, and only from facts that cannot
change later (`last` is the last token of the *prompt*, once and for all). The columns a call needs are then cut out.

The language, as texts or as calls::

    "all"  "prompt"  "generated"  "last"  "window(0, 5)"  "window(-3, None)"  "after('</think>')"
    Scope.window(0, 5) & ~Scope.last()     Scope.mask(bool_tensor)     Scope.after(token_id)
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Columns:
    """What is known of every column of the running batch, from the first to the newest.

    Attributes:
        ids: token ids [batch, column], or None where the model was fed embeddings.
        mask: True at real tokens [batch, column].
        start: the first column of the present call.
        prompt: how many columns are prompt.
        given: mask of the prompt as the caller laid it out [batch, pos], for scopes that are masks over it.
    """

    ids: Tensor | None
    mask: Tensor
    start: int
    prompt: int
    given: Tensor

    @property
    def position(self) -> Tensor:
        """Place of each column among its row's real tokens [batch, column]; padding counts as the token before it."""
        return (self.mask.long().cumsum(1) - 1).clamp_(min=0)

    @property
    def in_prompt(self) -> Tensor:
        """True at columns of the prompt [batch, column]."""
        return (torch.arange(self.mask.shape[1], device=self.mask.device) < self.prompt).expand_as(self.mask)

    @property
    def prompt_tokens(self) -> Tensor:
        """Number of real prompt tokens per row [batch, 1]."""
        return (self.mask & self.in_prompt).sum(1, keepdim=True)


Select = Callable[[Columns], Tensor]


@dataclass(frozen=True)
class Scope:
    """A rule that picks tokens. Combine with ``&``, ``|`` and ``~``; padding is never picked."""

    text: str
    rule: Select
    needs: str | None = None  # a text that must be turned into token ids before the rule can run

    def __call__(self, columns: Columns) -> Tensor:
        """True at the picked tokens [batch, column]."""
        return self.rule(columns) & columns.mask

    # -- the words ---------------------------------------------------------------------------------------------
    @staticmethod
    def all() -> Scope:
        """Every token, of the prompt and generated."""
        return Scope("all", lambda c: c.mask)

    @staticmethod
    def prompt() -> Scope:
        return Scope("prompt", lambda c: c.in_prompt)

    @staticmethod
    def generated() -> Scope:
        """Tokens after the prompt, as they are fed back in. The first new token is *predicted* at the last prompt token."""
        return Scope("generated", lambda c: ~c.in_prompt)

    @staticmethod
    def last() -> Scope:
        """The last token of the prompt."""
        return Scope("last", lambda c: c.in_prompt & (c.position == c.prompt_tokens - 1))

    @staticmethod
    def window(start: int, stop: int | None = None) -> Scope:
        """Token positions start <= p < stop, counted without padding; negative ones count from the prompt's end."""

        def rule(c: Columns) -> Tensor:
            low = start if start >= 0 else c.prompt_tokens + start
            picked = c.position >= low
            if stop is not None:
                picked = picked & (c.position < (stop if stop >= 0 else c.prompt_tokens + stop))
            return picked

        return Scope(f"window({start}, {stop})", rule)

    @staticmethod
    def mask(chosen: Tensor) -> Scope:
        """The prompt tokens where `chosen` [batch, pos] is True, laid out as the tokens were given."""
        if chosen.dim() != 2 or chosen.dtype != torch.bool:
            raise ValueError(f"Scope.mask: expected a bool tensor [batch, pos], got {chosen.dtype} {list(chosen.shape)}")

        def rule(c: Columns) -> Tensor:
            if chosen.shape != c.given.shape:
                raise ValueError(f"Scope.mask: the mask is {list(chosen.shape)}, the tokens are {list(c.given.shape)}; "
                                 "give one entry per token of the batch that runs")
            # The batch may have been padded to another side since: go by the n-th real token, not by column.
            real = c.given.long().argsort(dim=1, descending=True, stable=True)
            by_position = chosen.to(real.device).gather(1, real)
            place = c.position.clamp(max=by_position.shape[1] - 1)
            return by_position.gather(1, place) & c.in_prompt

        return Scope(f"mask({int(chosen.sum())} of {chosen.numel()})", rule)

    @staticmethod
    def after(what: str | int | list[int]) -> Scope:
        """Tokens behind the first occurrence of a token (id), of a sequence of ids, or of a text."""
        if isinstance(what, str):
            return Scope(f"after({what!r})", _unbound, needs=what)
        wanted = [what] if isinstance(what, int) else list(what)
        if not wanted:
            raise ValueError("Scope.after: the sequence of token ids is empty")

        def rule(c: Columns) -> Tensor:
            if c.ids is None:
                raise ValueError(f"Scope.after({what!r}) looks for a token, but the model was fed embeddings, not ids")
            ids = c.ids.masked_fill(~c.mask, -1)
            n, width = len(wanted), ids.shape[1]
            if width < n:
                return torch.zeros_like(c.mask)
            here = torch.stack([ids[:, i : width - n + 1 + i] == t for i, t in enumerate(wanted)]).all(0)
            ends = torch.zeros_like(c.mask)
            ends[:, n:] = here[:, : width - n]
            return ends.long().cumsum(1) > 0

        return Scope(f"after({what})", rule)

    # -- the grammar around them -------------------------------------------------------------------------------
    @staticmethod
    def parse(value: str | Scope | Tensor | None) -> Scope:
        """A scope from a text such as ``"window(-3, None)"``, from a bool mask, or as it is; None means all."""
        if value is None:
            return Scope.all()
        if isinstance(value, Scope):
            return value
        if isinstance(value, Tensor):
            return Scope.mask(value)
        words: dict[str, Callable[..., Scope]] = {
            "all": Scope.all, "prompt": Scope.prompt, "generated": Scope.generated, "last": Scope.last,
            "window": Scope.window, "after": Scope.after,
        }
        name, _, rest = value.strip().partition("(")
        try:
            arguments: tuple[Any, ...] = ast.literal_eval(f"({rest[:-1]},)") if rest else ()
            return words[name](*arguments)
        except (KeyError, SyntaxError, ValueError, TypeError):
            raise ValueError(f"scope {value!r}: expected one of 'all', 'prompt', 'generated', 'last', 'window(a, b)', "
                             "'after(text or id)', a bool mask [batch, pos], or a Scope") from None

    def bind(self, encode: Callable[[str], list[int]] | None) -> Scope:
        """The same scope with its text turned into token ids by `encode`."""
        if self.needs is None:
            return self
        if encode is None:
            raise ValueError(f"scope {self.text}: this model has no tokenizer; give token ids instead of text")
        ids = encode(self.needs)
        if not ids:
            raise ValueError(f"scope {self.text}: the tokenizer makes no token of {self.needs!r}")
        return Scope(self.text, Scope.after(ids).rule)

    def __and__(self, other: Scope) -> Scope:
        return _join(f"{self.text} & {other.text}", lambda a, b: a & b, self, other)

    def __or__(self, other: Scope) -> Scope:
        return _join(f"({self.text} | {other.text})", lambda a, b: a | b, self, other)

    def __invert__(self) -> Scope:
        return _Joined(f"~{self.text}", _unbound, None, lambda a: ~a, (self,))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Scope({self.text!r})"


def _unbound(columns: Columns) -> Tensor:
    raise ValueError("this scope holds a text; bind it to a tokenizer first")


@dataclass(frozen=True)
class _Joined(Scope):
    """Scopes under a Boolean operator. Kept apart until called, so that texts inside can still be bound."""

    join: Callable[..., Tensor] = torch.logical_and
    parts: tuple[Scope, ...] = ()

    def __call__(self, columns: Columns) -> Tensor:
        return self.join(*(part(columns) for part in self.parts)) & columns.mask

    def bind(self, encode: Callable[[str], list[int]] | None) -> Scope:
        return _Joined(self.text, self.rule, None, self.join, tuple(part.bind(encode) for part in self.parts))


def _join(text: str, join: Callable[..., Tensor], *parts: Scope) -> Scope:
    return _Joined(text, _unbound, None, join, parts)
