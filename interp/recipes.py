"""Values as JSON and back: what a recorded call was given (`interp.calls`).

Plain values stand for themselves; the rest are objects of one key that begins with ``$``. What is large is kept as a
digest, and what has no written form (a lambda, an open file) as the reason why, so that whoever reruns the call is
asked for it. Nothing is ever unpickled: classes are ours, named by module, and get plain values.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

#: Bytes of JSON up to which an argument is kept itself.
LIMIT = 64 * 1024
#: Numbers of an array up to which all are hashed: more would cost more than many a call that they are given to.
WHOLE = 1 << 22

_OURS = ("interp", "probes", "steering")
_PLAIN = (type(None), bool, int, float, str)
_made: dict[int, tuple[weakref.ref[Any], dict[str, Any]]] = {}  # id of an object -> the call that made it
_forms: dict[int, tuple[weakref.ref[Any], Any]] = {}  # id of a frozen dataclass -> its form, written once


class Unwritable(TypeError):
    """A value that has no written form; says what it is."""


class TooLarge(ValueError):
    """A value that is better kept as a digest."""


def write(value: Any) -> Any:
    """The form in which an argument is kept: itself, the call that made it, its digest, or why there is none."""
    if (kept := _forms.get(id(value))) is not None and kept[0]() is value:
        return kept[1] if (call := made_by(value)) is None else {"$call": call}
    try:
        form = _write(value, whole=True)
        if len(json.dumps(form)) <= LIMIT or _is_model(value):
            return form
    except TooLarge:
        pass
    except Unwritable as error:
        call = made_by(value)
        return {"$again": str(error)} if call is None else {"$call": call}
    call = made_by(value)
    return digest(value) if call is None else {"$call": call}


def digest(value: Any) -> Any:
    """``{"$digest": sha256, "of": what}``, or why there is none."""
    kept = _forms.get(id(value))
    if kept is not None and kept[0]() is value:
        return kept[1]
    try:
        text = json.dumps(_write(value, whole=False), sort_keys=True)
    except Unwritable as error:
        return {"$again": str(error)}
    size = list(value.shape) if hasattr(value, "shape") else len(value) if hasattr(value, "__len__") else ""
    form = {"$digest": hashlib.sha256(text.encode()).hexdigest(), "of": f"{type(value).__name__} {size}".strip()}
    if is_dataclass(value) and not isinstance(value, type):
        _remember(_forms, value, form)
    return form


def note(value: Any, call: dict[str, Any]) -> None:
    """Remembers, while `value` lives, the call that made it."""
    _remember(_made, value, call)


def made_by(value: Any) -> dict[str, Any] | None:
    """The recorded call that made this very object, if one did."""
    kept = _made.get(id(value))
    return kept[1] if kept is not None and kept[0]() is value else None


def _remember(into: dict[int, Any], value: Any, what: Any) -> None:
    key = id(value)
    try:
        into[key] = (weakref.ref(value, lambda _: into.pop(key, None)), what)
    except TypeError:  # a list or a text: nobody asks where those come from
        return


def named(thing: Any) -> str:
    """``module:name`` of a class or function."""
    return f"{thing.__module__}:{thing.__qualname__}"


def find(name: str) -> Any:
    """What ``module:name`` of ours stands for. Raises Unwritable for anything else."""
    module, _, path = name.partition(":")
    if module.partition(".")[0] not in _OURS or not path or path.startswith("_"):
        raise Unwritable(f"{name!r} is nothing of interp, probes or steering")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _OURS and "<locals>" not in kind.__qualname__


# -- writing -------------------------------------------------------------------------------------------------------
def _write(value: Any, whole: bool) -> Any:
    """Plain data. Unless `whole`, large arrays are hashed in place; else they are TooLarge."""
    import numpy as np
    import torch

    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        inside = list(value) if all(type(v) in _PLAIN for v in value) else [_write(v, whole) for v in value]
        return inside if isinstance(value, list) else {"$tuple": inside}
    if isinstance(value, set | frozenset):
        return {"$set": sorted((_write(v, whole) for v in value), key=repr)}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _write(v, whole) for k, v in value.items()}
        return {"$map": [[_write(k, whole), _write(v, whole)] for k, v in value.items()]}
    if isinstance(value, range | slice):
        return {f"${type(value).__name__}": [value.start, value.stop, value.step]}
    if isinstance(value, torch.Tensor | np.ndarray):
        return _array(value, whole)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if hasattr(value, "to_parquet") and hasattr(value, "attrs"):
        return _frame(value, whole)
    return _object(value, whole)


def _array(value: Any, whole: bool) -> Any:
    import torch

    kind, dtype = ("$tensor" if isinstance(value, torch.Tensor) else "$array"), str(value.dtype).removeprefix("torch.")
    size, shape = (value.numel() if kind == "$tensor" else value.size), list(value.shape)
    if 2 * size <= LIMIT:
        return {kind: _write(value.tolist(), whole), "dtype": dtype}
    if whole:
        raise TooLarge
    if size > WHOLE:  # by evenly spread numbers, as a model's fingerprint is taken
        value = value.reshape(-1)[:: -(-size // WHOLE)]
    if kind == "$tensor":
        flat = value.detach().cpu().contiguous()
        value = (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()
    hashed = hashlib.sha256(value.tobytes() if value.dtype != object else repr(value.tolist()).encode()).hexdigest()
    return {"$hashed": hashed, "shape": shape, "dtype": dtype}


def _frame(frame: Any, whole: bool) -> Any:
    """A Table: by its call where that gives just these rows, else column by column."""
    call = frame.attrs.get("call")
    if call and call.get("table") == fingerprint(frame):
        return {"$call": call}
    if 2 * frame.size > LIMIT and whole:
        raise TooLarge
    if not frame.index.equals(type(frame)(index=range(len(frame))).index):
        frame = frame.reset_index(drop=frame.index.nlevels == 1 and frame.index.name is None)
    columns = []
    for name, column in frame.items():
        cells = zip(column.astype(object), column.isna(), strict=True)
        columns.append([name, str(column.dtype), [None if gone else _write(v, whole) for v, gone in cells]])
    return {"$frame": columns, "attrs": _write({k: v for k, v in frame.attrs.items() if k != "call"}, whole)}


def fingerprint(frame: Any) -> str:
    """A short hash of a Table's columns and rows."""
    from pandas.util import hash_pandas_object

    found = hashlib.sha256(json.dumps([str(c) for c in frame.columns]).encode())
    plain = frame.reset_index(drop=True)
    for i in range(plain.shape[1]):
        column = plain.iloc[:, i]
        try:
            found.update(hash_pandas_object(column, index=False).to_numpy().tobytes())
        except TypeError:  # lists in the cells
            found.update(repr(column.tolist()).encode())
    return found.hexdigest()[:16]


def _is_model(value: Any) -> bool:
    return hasattr(value, "hf") and hasattr(value, "fingerprint")


def _object(value: Any, whole: bool) -> Any:
    kind = type(value)
    if _is_model(value):
        return {"$model": {"name": value.name, "fingerprint": value.fingerprint}}
    if _ours(kind) and hasattr(kind, "from_recipe"):
        home = next(c for c in kind.__mro__ if "from_recipe" in vars(c))
        try:
            return {"$object": named(home), "recipe": _write(value.recipe(), whole)}
        except TypeError as error:
            raise Unwritable(str(error)) from None
    if _ours(kind) and is_dataclass(value):
        try:
            inside = {f.name: _write(getattr(value, f.name), whole) for f in fields(value) if f.init}
        except Unwritable as error:
            if (call := made_by(value)) is not None:
                return {"$call": call}
            raise Unwritable(f"a {kind.__name__} with {error}") from None
        return {"$data": named(kind), "fields": inside}
    if (call := made_by(value)) is not None:
        return {"$call": call}
    if _ours(kind) and hasattr(value, "get_params"):
        found = {k: v for k, v in vars(value).items() if k.endswith("_") and not k.startswith("_")}
        params = value.get_params(deep=False)
        return {"$estimator": named(kind), "params": _write(params, whole), "fitted": _write(found, whole)}
    if (
        callable(value) and str(getattr(value, "__module__", None)).partition(".")[0] in _OURS
    ):  # a bound builtin has None
        name = getattr(value, "__qualname__", "<")
        if "<" not in name and not name.startswith("_"):
            return {"$function": named(value)}
    raise Unwritable(f"a {kind.__name__}" + (f" {value.__name__}" if hasattr(value, "__name__") else ""))


# -- reading -------------------------------------------------------------------------------------------------------
def read(form: Any, model: Callable[[Mapping[str, str]], Any], call: Callable[[Mapping[str, Any]], Any]) -> Any:
    """The value of a form. `model` finds the model of a name and fingerprint, `call` makes a call again."""
    import numpy as np
    import torch

    def again(part: Any) -> Any:
        return read(part, model, call)

    if isinstance(form, list):
        return form if all(type(v) in _PLAIN for v in form) else [again(v) for v in form]
    if not isinstance(form, dict):
        return form
    match next((key for key in form if key.startswith("$")), ""):
        case "":
            return {k: again(v) for k, v in form.items()}
        case "$tuple":
            return tuple(again(v) for v in form["$tuple"])
        case "$set":
            return {again(v) for v in form["$set"]}
        case "$map":
            return {again(k): again(v) for k, v in form["$map"]}
        case "$range":
            return range(*form["$range"])
        case "$slice":
            return slice(*form["$slice"])
        case "$tensor":
            return torch.tensor(form["$tensor"], dtype=getattr(torch, form["dtype"]))
        case "$array":
            return np.array(again(form["$array"]), dtype=form["dtype"])
        case "$dtype":
            return getattr(torch, form["$dtype"])
        case "$frame":
            return _table(form, again)
        case "$model":
            return model(form["$model"])
        case "$call":
            return call(form["$call"])
        case "$object":
            return find(form["$object"]).from_recipe(again(form["recipe"]))
        case "$data" if is_dataclass(kind := find(form["$data"])):
            return kind(**{k: again(v) for k, v in form["fields"].items()})  # type: ignore[operator]
        case "$estimator" if hasattr(kind := find(form["$estimator"]), "get_params"):
            made = kind(**again(form["params"]))
            vars(made).update(again(form["fitted"]))
            return made
        case "$function":
            return find(form["$function"])
    raise Unwritable(f"{next(iter(form))} has no value here")


def _table(form: Mapping[str, Any], again: Callable[[Any], Any]) -> Any:
    import pandas as pd

    columns = {name: pd.Series([again(v) for v in values], dtype=dtype) for name, dtype, values in form["$frame"]}
    table = pd.DataFrame(columns)
    table.attrs = again(form["attrs"])
    return table
