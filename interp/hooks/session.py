"""Putting taps on a model, and taking them away again without a trace.

`install` is the only way in: it sorts the taps by the door that leads to their place, opens the doors, and closes them
all on leaving, also when an exception passes through. Nothing else in the toolkit touches a foreign module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from interp.hooks import attention, choice, experts, functions, modules, undecorated
from interp.hooks.anatomy import Anatomy
from interp.hooks.tap import Clock, Tap
from interp.sites import Site


@contextmanager
def install(hf: nn.Module, anatomy: Anatomy, taps: dict[Site, Tap], clock: Clock) -> Iterator[None]:
    """Opens the doors for `taps` (whole sites only) until the context is left."""
    attending: dict[nn.Module, dict[str, Tap]] = {}
    handmade: dict[nn.Module, dict[str, Tap]] = {}
    routed: dict[nn.Module, dict[str, Tap]] = {}
    recomputed: dict[nn.Module, dict[str, Tap]] = {}
    with ExitStack() as stack:

        def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ["input_ids", *list(inspect.signature(hf.forward).parameters)[1:]] if args else []
            clock.begin({**dict(zip(names, args, strict=False)), **kwargs})

        stack.callback(hf.register_forward_pre_hook(start, with_kwargs=True).remove)
        for site, tap in taps.items():
            place = anatomy.places[site.name, site.layer]
            if place.how == "attention":
                attending.setdefault(place.module, {})[site.name] = tap
            elif place.how == "handmade":
                handmade.setdefault(place.module, {})[site.name] = tap
            elif place.how == "experts":
                routed.setdefault(place.module, {})[site.name] = tap
            elif place.how == "undecorated":
                recomputed.setdefault(place.module, {})[site.name] = tap
            elif site.name == "router_logits":
                size = anatomy.sizes[site.name, site.layer]["expert"]
                for handle in choice.place_tap(place, tap, size, modules.place_tap):
                    stack.callback(handle.remove)
            else:
                for handle in modules.place_tap(place, tap):
                    stack.callback(handle.remove)
        for module, named in handmade.items():
            stack.callback(functions.Watched(module, _attention(named, functions.head_count(module))).remove)
        for module, named in recomputed.items():
            for handle in undecorated.place_taps(module, named):
                stack.callback(handle.remove)
        if any("pattern" in named for named in handmade.values()) and not attending:
            stack.enter_context(attention.implementation(hf, eager=True))
        if attending:
            stack.enter_context(attention.tapped(hf, attending))
        if routed:
            stack.enter_context(experts.tapped(routed))
        yield


def _attention(taps: dict[str, Tap], heads: int) -> Any:
    return lambda: functions.AttentionMode(taps, heads)
