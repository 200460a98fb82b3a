"""The second door: transformers' AttentionInterface.

Every family that uses the interface hands its attention function the queries, keys and values (after rotary, key-value
heads as they are). Our function taps them, lets the implementation that was set before do the arithmetic, and taps
what comes out. As long as nobody wants the pattern, that is the very kernel the model used (SDPA); the pattern exists
only in the family's own eager function, which then serves the whole model, and is tapped where it meets the values.

A module that is not tapped goes straight through, and outside our contexts the name we registered is not in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from interp.hooks.functions import PatternMode
from interp.hooks.lending import lent, original
from interp.hooks.tap import Tap

PREFIX = "interp_"
#: Taps of the attention modules that are being watched, by module identity. Two models never share a key.
_live: dict[int, dict[str, Tap]] = {}
_observers: dict[int, dict[int, dict[str, Any]]] = {}


class Name(str):
    """The registered name of our function, which also answers to the name it stands for.

    Some families ask ``config._attn_implementation == "sdpa"`` to decide how to build a mask; they must get the answer
    that they would get without us. Look-ups in transformers' registries go by hash and find ours.
    """

    base: str

    def __new__(cls, base: str) -> Name:
        name = super().__new__(cls, PREFIX + base)
        name.base = base
        return name

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (isinstance(other, str) and str(other) == self.base)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def base_name(config: Any) -> str:
    """The attention implementation of a config, without our prefix."""
    return str(config._attn_implementation).removeprefix(PREFIX)


def delegate(module: nn.Module, name: str) -> AttentionFunction:
    """The function that would have run: the registered one, or the family's own eager attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return family_eager(module)


def family_eager(module: nn.Module) -> AttentionFunction:
    """``eager_attention_forward`` of the file in which this attention's forward was written."""
    import inspect

    forward = inspect.unwrap(type(module).forward)
    function = getattr(forward, "__globals__", {}).get("eager_attention_forward")
    if function is None:
        raise ValueError(f"{type(module).__name__} has no eager attention, so its pattern cannot be read")
    return function


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Stands where an implementation stands: query [batch, head, pos, d_head] -> out [batch, pos, head, d_head]."""
    run = delegate(module, base_name(module.config))
    if id(module) in _observers:
        _note(_observers[id(module)], module, query, key, value, attention_mask, kwargs)
    taps = _live.get(id(module))
    if taps is None:
        return run(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (_swap(taps.get(name), tensor) for name, tensor in (("q", query), ("k", key), ("v", value)))
    if "pattern" in taps:
        with PatternMode(taps["pattern"], heads=query.shape[1]) as mode:
            out, pattern = run(module, query, key, value, attention_mask, **kwargs)
        if not mode.done:
            raise ValueError(
                f"{type(module).__name__}: its eager attention shows no product of a pattern with the values"
            )
    else:
        out, pattern = run(module, query, key, value, attention_mask, **kwargs)
    if "z" in taps:
        out = taps["z"](out)
    return out, pattern


def _note(
    seen: dict[int, dict[str, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """What an observer learns from one call."""
    seen[id(module)] = {
        "heads": query.shape[1],
        "kv_heads": key.shape[1],
        "d_q": query.shape[-1],
        "d_v": value.shape[-1],
        "keys": key.shape[2],
        "scaling": kwargs.get("scaling"),
        "softcap": kwargs.get("softcap"),
        "calls": seen.get(id(module), {}).get("calls", 0) + 1,
        "added": [t for t in (mask, kwargs.get("position_bias")) if isinstance(t, Tensor) and t.is_floating_point()],
    }


def _swap(tap: Tap | None, tensor: Tensor) -> Tensor:
    """Taps a tensor [batch, head, pos, d_head] in the site's axes [batch, pos, head, d_head]."""
    if tap is None:
        return tensor
    return tap(tensor.transpose(1, 2)).transpose(
        1, 2
    )  # goes on from the view that was read, so that gradients reach it


def configs_of(modules: Iterable[nn.Module], attribute: str) -> list[Any]:
    """Every configuration object in use by one of the modules that carries `attribute`, once each."""
    found = {id(c): c for m in modules if (c := vars(m).get("config")) is not None}
    return [c for c in found.values() if hasattr(c, attribute)]


@contextmanager
def implementation(hf: nn.Module, *, eager: bool = False) -> Iterator[None]:
    """Puts our function in the place of each config's implementation (SDPA, eager, flash), and back."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    attribute = "_attn_implementation_internal"
    with ExitStack() as stack:
        for config in configs_of(hf.modules(), attribute):
            base = "eager" if eager else str(original(config, attribute) or "eager")
            if base not in ALL_MASK_ATTENTION_FUNCTIONS:
                continue
            if PREFIX + base not in ALL_MASK_ATTENTION_FUNCTIONS:
                AttentionInterface.register(PREFIX + base, _attend)
                AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
            stack.enter_context(lent(config, attribute, Name(base), strong=eager))
        yield


@contextmanager
def tapped(hf: nn.Module, taps: dict[nn.Module, dict[str, Tap]]) -> Iterator[None]:
    """Puts taps on attention modules. `taps`: module -> {"q" | "k" | "v" | "pattern" | "z": tap}."""
    try:
        _live.update({id(m): t for m, t in taps.items()})
        with implementation(hf, eager=any("pattern" in t for t in taps.values())):
            yield
    finally:
        for module in taps:
            _live.pop(id(module), None)


@contextmanager
def observed(hf: nn.Module, *, eager: bool = False) -> Iterator[dict[int, dict[str, Any]]]:
    """Notes which modules of `hf` call the interface, with their head counts, sizes and score biases, by identity."""
    seen: dict[int, dict[str, Any]] = {}
    modules = list(hf.modules())
    try:
        _observers.update({id(m): seen for m in modules})
        with implementation(hf, eager=eager):
            yield seen
    finally:
        for module in modules:
            _observers.pop(id(module), None)
