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
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

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
    needs: str | None = None  # a text that only a tokenizer can find

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
        """Tokens after the prompt, as they are fed back in; the first is *predicted* at the last prompt token."""
        return Scope("generated", lambda c: ~c.in_prompt)

    @staticmethod
    def last() -> Scope:
        """The last token of the prompt."""
        return Scope("last", lambda c: c.in_prompt & (c.position == c.prompt_tokens - 1))

    @staticmethod
    def window(start: int, stop: int | None = None) -> Scope:
        """Token positions start <= p < stop, counted without padding; negative ones count from the prompt's end."""
        if not isinstance(start, int) or not isinstance(stop, int | None):
            raise TypeError(f"Scope.window({start!r}, {stop!r}): expected whole numbers, or None for an open end")

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
            raise ValueError(
                f"Scope.mask: expected a bool tensor [batch, pos], got {chosen.dtype} {list(chosen.shape)}"
            )

        def rule(c: Columns) -> Tensor:
            if chosen.shape != c.given.shape:
                raise ValueError(
                    f"Scope.mask: the mask is {list(chosen.shape)}, the tokens are {list(c.given.shape)}; "
                    "give one entry per token of the batch that runs"
                )
            # The batch may have been padded to another side since: go by the n-th real token, not by column.
            real = c.given.long().argsort(dim=1, descending=True, stable=True)
            by_position = chosen.to(real.device).gather(1, real)
            place = c.position.clamp(max=by_position.shape[1] - 1)
            return by_position.gather(1, place) & c.in_prompt

        return Scope(f"mask({int(chosen.sum())} of {chosen.numel()})", rule)

    @staticmethod
    def after(what: str | int | list[int]) -> Scope:
        """Tokens behind the first occurrence of a token (id), of a sequence of ids, or of a text.

        A text is looked for in the decoded tokens, however it was cut: ``after('cat')`` starts behind the token that
        completes it, be that " cat", "cat" or "cats".
        """
        if isinstance(what, str):
            if not what:
                raise ValueError("Scope.after: the text is empty")
            return Scope(f"after({what!r})", _unbound, needs=what)
        wanted = [what] if isinstance(what, int) else what
        if not isinstance(wanted, list | tuple) or not all(isinstance(i, int) for i in wanted):
            raise TypeError(f"Scope.after({what!r}): expected a text, a token id or a list of token ids")
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
        """A scope from a text such as ``"window(-3, None) & ~last"``, from a bool mask, or as it is; None means all."""
        if value is None:
            return Scope.all()
        if isinstance(value, Scope):
            return value
        if isinstance(value, Tensor):
            return Scope.mask(value)
        if not isinstance(value, str):
            raise TypeError(
                f"scope {value!r}: expected a text such as 'last', a bool mask or a Scope, not {type(value).__name__}"
            )
        try:
            return _read(ast.parse(value.strip(), mode="eval").body)
        except (KeyError, SyntaxError, ValueError, TypeError):
            raise ValueError(
                f"scope {value!r}: expected one of 'all', 'prompt', 'generated', 'last', 'window(a, b)', "
                "'after(text or id)', these joined by &, | and ~, a bool mask [batch, pos], or a "
                "Scope"
            ) from None

    def recipe(self) -> str:
        """The text from which `from_recipe` makes it again. TypeError for a mask, which no text says."""
        if "mask(" in self.text:
            raise TypeError(f"a scope that is a mask, {self.text}")
        return self.text

    @staticmethod
    def from_recipe(text: str) -> Scope:
        return Scope.parse(text)

    def bind(self, decode: Callable[[list[int]], str] | None) -> Scope:
        """The same scope, its text looked for in what `decode` makes of the tokens."""
        if self.needs is None:
            return self
        if decode is None:
            raise ValueError(f"scope {self.text}: this model has no tokenizer; give token ids instead of text")
        return Scope(self.text, _behind(self.needs, decode))

    def __and__(self, other: Scope) -> Scope:
        return _join(f"({self.text} & {other.text})", lambda a, b: a & b, self, other)

    def __or__(self, other: Scope) -> Scope:
        return _join(f"({self.text} | {other.text})", lambda a, b: a | b, self, other)

    def __invert__(self) -> Scope:
        return _Joined(f"~{self.text}", _unbound, None, lambda a: ~a, (self,))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Scope({self.text!r})"


def _read(node: ast.expr) -> Scope:
    """The scope that a parsed text means. Python's own grammar serves: names, calls with literals, ``& | ~``."""
    words: dict[str, Callable[..., Scope]] = {
        "all": Scope.all,
        "prompt": Scope.prompt,
        "generated": Scope.generated,
        "last": Scope.last,
        "window": Scope.window,
        "after": Scope.after,
    }
    match node:
        case ast.Name(id=word):
            return words[word]()
        case ast.Call(func=ast.Name(id=word), args=arguments, keywords=[]):
            return words[word](*(ast.literal_eval(a) for a in arguments))
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _read(left) & _read(right)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _read(left) | _read(right)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_read(operand)
    raise ValueError(f"{ast.unparse(node)} is no scope")


def _behind(text: str, decode: Callable[[list[int]], str]) -> Select:
    """Picks the tokens behind the shortest beginning of each row whose decoding holds `text`."""

    def length(tokens: list[int]) -> int:  # what is found stays found, so the shortest beginning can be halved for
        return bisect_left(range(len(tokens) + 1), True, key=lambda n: text in decode(tokens[:n]))

    def rule(c: Columns) -> Tensor:
        if c.ids is None:
            raise ValueError(f"Scope.after({text!r}) looks for a text, but the model was fed embeddings, not ids")
        picked = torch.zeros_like(c.mask)
        for row, (ids, mask) in enumerate(zip(c.ids, c.mask, strict=True)):
            picked[row, mask.nonzero()[length(ids[mask].tolist()) :, 0]] = True
        return picked

    return rule


def _unbound(columns: Columns) -> Tensor:
    raise ValueError("this scope holds a text; bind it to a tokenizer first")


@dataclass(frozen=True)
class _Joined(Scope):
    """Scopes under a Boolean operator. Kept apart until called, so that texts inside can still be bound."""

    join: Callable[..., Tensor] = torch.logical_and
    parts: tuple[Scope, ...] = ()

    def __call__(self, columns: Columns) -> Tensor:
        return self.join(*(part(columns) for part in self.parts)) & columns.mask

    def bind(self, decode: Callable[[list[int]], str] | None) -> Scope:
        return _Joined(self.text, self.rule, None, self.join, tuple(part.bind(decode) for part in self.parts))


def _join(text: str, join: Callable[..., Tensor], *parts: Scope) -> Scope:
    return _Joined(text, _unbound, None, join, parts)
