"""Arithmetic that no interface shows: reading and writing it with torch's own TorchFunctionMode.

Two things happen inside a module's forward with nothing at a boundary: the router's logits and the choice by them
(`interp.hooks.choice`), and the attention of a few older families that write it out by hand (BLOOM, MPT, Falcon, GPT-J,
...). While such a module runs, every torch function it calls passes by here; we know each by its place in the formula:

    router:     the first linear map onto n_experts columns -> topk                  -> router_logits
    attention:  matmul(q, kᵀ) -> ... -> softmax -> ... -> matmul(pattern, v)          -> q, k, pattern, v, z

The mode is on only while that module runs, in that thread only.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp.hooks.tap import Tap

LINEAR = {nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.addmm}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm}
_SOFTMAX = {nn.functional.softmax, torch.softmax, Tensor.softmax}


class PatternMode(TorchFunctionMode):
    """Taps the attention pattern in a family's eager function: what is multiplied with the values, after the softmax.

    Whatever the family does around it (sinks dropped before, outputs scaled after) stays its own arithmetic.
    """

    def __init__(self, tap: Tap, heads: int) -> None:
        super().__init__()
        self.tap, self.heads, self.normalised, self.done = tap, heads, False, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _SOFTMAX:
            self.normalised = True
        elif (
            self.normalised and not self.done and func in _MATMUL and isinstance(args[0], Tensor) and args[0].dim() == 4
        ):
            self.done = True
            return func(self.tap(args[0]), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class AttentionMode(TorchFunctionMode):
    """Taps hand-written attention. Heads may be folded into the batch ([batch * head, ...], as in BLOOM)."""

    def __init__(self, taps: dict[str, Tap], heads: int, note: dict[str, int] | None = None) -> None:
        super().__init__()
        self.taps, self.heads, self.note = taps, heads, note
        self.stage = "qk"

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.stage == "qk" and func is nn.functional.scaled_dot_product_attention:
            return self._fused(func, args, kwargs)
        if self.stage == "qk" and func in _MATMUL and self._is_scores(func, args, kwargs):
            return self._scores(func, args, kwargs)
        if self.stage == "softmax" and func in _SOFTMAX:
            self.stage = "pattern"
        elif self.stage == "pattern" and func in _MATMUL:
            self.stage = "done"
            left, right = self._tap("pattern", args[0], pattern=True), self._tap("v", args[1])
            return self._tap("z", func(left, right, *args[2:], **kwargs))
        return func(*args, **kwargs)

    def _operands(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if func in (torch.baddbmm, Tensor.baddbmm):
            return kwargs.get("batch1", args[1] if len(args) > 1 else None), kwargs.get(
                "batch2", args[2] if len(args) > 2 else None
            )
        return args[0], args[1]

    def _is_scores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        q, k = self._operands(func, args, kwargs)
        if not (isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() and q.dim() in (3, 4)):
            return False
        folded = q.shape[0] % self.heads == 0 if q.dim() == 3 else True
        return folded and q.shape[-1] == k.shape[-2]

    def _scores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.stage = "softmax"
        q, k = self._operands(func, args, kwargs)
        if self.note is not None:
            self.note |= {
                "heads": self.heads,
                "kv_heads": k.shape[1] if k.dim() == 4 else self.heads,
                "d_q": q.shape[-1],
            }
        new_q, new_k = self._tap("q", q), self._tap("k", k.transpose(-1, -2)).transpose(-1, -2)
        if func in (torch.baddbmm, Tensor.baddbmm):
            rest = {**kwargs, "batch1": new_q, "batch2": new_k}
            return func(args[0], **{n: v for n, v in rest.items() if n != "self"})
        return func(new_q, new_k, *args[2:], **kwargs)

    def _fused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.stage = "done"
        q, k, v = args[:3]
        if self.note is not None:
            self.note |= {"heads": q.shape[1], "kv_heads": k.shape[1], "d_q": q.shape[-1], "d_v": v.shape[-1]}
        if "pattern" in self.taps:
            raise ValueError(
                "this attention runs as one fused kernel (SDPA) and makes no pattern; load the model with "
                "attn_implementation='eager'"
            )
        q, k, v = self._tap("q", q), self._tap("k", k), self._tap("v", v)
        return self._tap("z", func(q, k, v, *args[3:], **kwargs))

    def _tap(self, name: str, tensor: Tensor, pattern: bool = False) -> Tensor:
        if self.note is not None and name == "v":
            self.note["d_v"] = tensor.shape[-1]
        tap = self.taps.get(name)
        if tap is None:
            return tensor
        folded = tensor.dim() == 3
        seen = tensor.unflatten(0, (-1, self.heads)) if folded else tensor
        seen = seen if pattern else seen.transpose(1, 2)
        given = tap(seen)
        given = given if pattern else given.transpose(1, 2)
        return given.flatten(0, 1) if folded else given


class Watched:
    """Turns a mode on while a module runs: a forward pre-hook enters it, a forward hook (also on errors) leaves it."""

    def __init__(self, module: nn.Module, make: Callable[[], TorchFunctionMode]) -> None:
        self.make, self.stack = make, []  # type: ignore[var-annotated]
        self.handles = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        mode = self.make()
        mode.__enter__()
        self.stack.append(mode)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.stack:
            self.stack.pop().__exit__(None, None, None)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        while self.stack:
            self.stack.pop().__exit__(None, None, None)


def writes_attention(module: nn.Module) -> bool:
    """True if this class's own methods contain the attention formula: a softmax between two products."""
    if type(module).__module__.startswith("torch."):
        return False
    text = "".join(inspect.getsource(f) for _, f in vars(type(module)).items() if inspect.isfunction(f))
    return bool(
        re.search(r"softmax|scaled_dot_product_attention", text, re.I)
        and re.search(r"matmul|bmm|@|scaled_dot", text)
        and "ALL_ATTENTION_FUNCTIONS" not in text
        and re.search(r"quer|\bq\b", text)
    )


def head_count(module: nn.Module) -> int:
    """Heads of a hand-written attention module, by the names that families use; 0 if it has none of them."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return 0


def observe(hf: nn.Module, modules: list[nn.Module], run: Callable[[nn.Module], Any]) -> dict[int, dict[str, Any]]:
    """Which of `modules` show the whole formula when the model runs, with their head counts and sizes."""
    notes: dict[int, dict[str, Any]] = {}
    watched = []
    for module in modules:
        heads = head_count(module)
        if heads:
            note = notes.setdefault(id(module), {"calls": 0})
            watched.append(Watched(module, lambda note=note, heads=heads: AttentionMode({}, heads, note)))  # type: ignore[misc]
    try:
        run(hf)
    finally:
        for watch in watched:
            watch.remove()
    return {key: note for key, note in notes.items() if note.keys() >= {"heads", "kv_heads", "d_q", "d_v"}}
