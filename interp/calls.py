"""Every Table knows the call that made it, and can be made again.

    table = experts.evaluate(m, law, held_out)
    table.attrs["call"]                      function, arguments, model: plain JSON, which a saved Table keeps
    print(calls.text(table))                 the same as a line of Python
    interp.rerun(table)                      the same call, on the same model, with the same inputs

Inputs of up to 64 KiB (texts, pairs, labels) are kept themselves, larger ones as a digest, so that `rerun` asks for
them and knows them when it sees them (arrays of over four million numbers by some of them, evenly spread). An object
that a recorded call made (statistics, a metric, a vector) is kept as that call. A model is its name and fingerprint;
another one is refused. What has no written form, such as a lambda, is to be passed again under its argument's name.

Only functions marked `recorded` are ever called again, and those read: none of them writes files.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

from interp import recipes
from interp.interrupted import carried_by
from interp.recipes import Unwritable
from interp.version import __version__

P = ParamSpec("P")
R = TypeVar("R")
_inside: ContextVar[bool] = ContextVar("_inside", default=False)


class Call(dict[str, Any]):
    """A call as plain data. Nobody changes it, so the copies that pandas makes of ``.attrs`` all hold this one."""

    def __deepcopy__(self, memo: Any) -> Call:
        return self


class RerunError(ValueError):
    """A Table that cannot be made again as asked: it carries no call, or needs another model or input."""


def recorded(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function whose result remembers its call: a Table in ``.attrs["call"]``, other objects while they live.

    Calls that recorded functions make of each other are part of the outer one and not recorded.
    """
    signature: inspect.Signature | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal signature
        if _inside.get():
            return function(*args, **kwargs)
        signature = signature or inspect.signature(function)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # the function itself says best what does not fit
            return function(*args, **kwargs)
        record = _record(function, bound)
        token = _inside.set(True)
        try:
            result = function(*args, **kwargs)
        except KeyboardInterrupt as stop:
            _attach(carried_by(stop), record)
            raise
        finally:
            _inside.reset(token)
        _attach(result, record)
        return result

    call.__recorded__ = True  # type: ignore[attr-defined]
    return call


def _record(function: Any, bound: inspect.BoundArguments) -> dict[str, Any]:
    given = set(bound.arguments)
    bound.apply_defaults()
    arguments: dict[str, Any] = {}
    edits = 0
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        for key, one in value.items() if kind is inspect.Parameter.VAR_KEYWORD else [(name, value)]:
            form = recipes.write(one)
            if key in given or kind is inspect.Parameter.VAR_KEYWORD or not _asks(form):
                arguments[key] = form  # a default without a written form (a callback) is left to the function
            edits += len(one.uses) if hasattr(one, "hf") else 0
    record = {"function": recipes.named(function), "arguments": arguments, "interp": __version__}
    return record | {"edits": edits} if edits else record


def _asks(form: Any) -> bool:
    return isinstance(form, dict) and ("$again" in form or "$digest" in form)


def _attach(result: Any, record: dict[str, Any]) -> None:
    if _is_table(result):
        result.attrs["call"] = Call(record, table=recipes.fingerprint(result))
    elif result is not None and not isinstance(result, str | int | float):
        recipes.note(result, Call(record))
        for field in fields(result) if is_dataclass(result) and not isinstance(result, type) else ():
            if _is_table(table := getattr(result, field.name)):
                table.attrs["call"] = Call(record, part=field.name, table=recipes.fingerprint(table))


def _is_table(value: Any) -> bool:
    return hasattr(value, "to_parquet") and hasattr(value, "attrs")


def call_of(result: Any) -> dict[str, Any]:
    """The call that made a Table (or an object of this session). RerunError where none is recorded."""
    call = result.attrs.get("call") if _is_table(result) else recipes.made_by(result)
    if not call:
        raise RerunError(
            f"table: this {type(result).__name__} carries no call; Tables of interp, probes and steering do, "
            "unless they were put together by hand"
        )
    return dict(call)


def settings(table: Any) -> dict[str, Any]:
    """What a Table says of itself besides its call."""
    return {str(key): value for key, value in table.attrs.items() if key != "call"}


def about(table: Any) -> dict[str, Any]:
    """A Table's settings for people to read: its call as a line of Python, which may be long."""
    try:
        return settings(table) | ({"call": text(table)} if table.attrs.get("call") else {})
    except (AttributeError, KeyError, TypeError, ValueError):  # a call that somebody else wrote into the file
        return settings(table) | {"call": str(table.attrs["call"])}


def text(result: Any, width: int = 60) -> str:
    """The call as a line of Python, long inputs cut to `width` signs."""
    return _text(call_of(result), width)


def _text(call: Mapping[str, Any], width: int) -> str:
    module, _, name = call["function"].partition(":")
    inside = ", ".join(f"{key}={_shown(form, width)}" for key, form in call["arguments"].items())
    return f"{module.rpartition('.')[0] or module}.{name}({inside})"


def _shown(form: Any, width: int) -> str:
    if not isinstance(form, dict) or not any(key.startswith("$") for key in form):
        found = repr(form)
    elif "$model" in form:
        found = f"<{form['$model']['name']}>"
    elif "$call" in form:
        return _text(form["$call"], width)
    elif "$digest" in form:
        found = f"<{form['of']}, {form['$digest'][:8]}>"
    elif "$again" in form:
        found = f"<{form['$again']}>"
    elif kind := next((form[key] for key in ("$object", "$data", "$estimator") if key in form), ""):
        name, recipe = kind.rpartition(":")[2], form.get("recipe")
        found = f"{name}({recipe!r})" if isinstance(recipe, str) else f"<{name}>"
    else:
        found = json.dumps(next(iter(form.values())), ensure_ascii=False)
    return found if len(found) <= width else f"{found[: width - 1]}…"


def rerun(table: Any, model: Any = None, **inputs: Any) -> Any:
    """Makes a Table again: the call that it comes from, with the same settings and inputs.

    Args:
        table: a Table of interp, probes or steering, fresh or from a file (`interp.report.load_table`); or another
            object that a recorded call made in this session. Of a Table that was filtered since, the whole is made.
        model: the model (a list, where several took part); default: loaded by its name.
        **inputs: arguments that the Table knows by digest only, or not at all; others may be given, and must agree.

    Returns what the call returns; for a Table that is part of a result, that part.

    Raises RerunError for a Table without a call, a model of another fingerprint, an input that is missing or not the
    one recorded, and where edits were in force that are not now.

    Example:
        >>> import interp
        >>> from interp import metrics, patching
        >>> m = interp.load("tiny:llama")
        >>> table = patching.patch(m, [[5, 6, 7]], [[5, 9, 7]], metrics.logit_diff(3, 4), "resid_post[*]")
        >>> interp.rerun(table).equals(table)
        True
    """
    call = call_of(table)
    models = [] if model is None else list(model) if isinstance(model, list | tuple) else [model]
    again = _Again(models, inputs)
    result = again.call(call)
    if unused := [name for name in inputs if name not in again.used]:
        raise RerunError(f"{unused[0]}: {_text(call, 20)} has no such argument")
    return getattr(result, call["part"]) if "part" in call else result


class _Again:
    """One rerun: the models and inputs at hand."""

    def __init__(self, models: list[Any], inputs: Mapping[str, Any]) -> None:
        self.models, self.inputs, self.used = models, inputs, set[str]()
        self.results: dict[str, Any] = {}

    def call(self, call: Mapping[str, Any]) -> Any:
        key = json.dumps(call, sort_keys=True)
        if key not in self.results:
            self.results[key] = self._call(call)
        return self.results[key]

    def _call(self, call: Mapping[str, Any]) -> Any:
        try:
            function = recipes.find(call["function"])
        except (Unwritable, ImportError, AttributeError) as error:
            raise RerunError(f"table: {call['function']} is not in interp {__version__} ({error})") from None
        if not getattr(function, "__recorded__", False):
            raise RerunError(f"table: {call['function']} is no function that Tables record")
        if missing := self._missing(call):
            raise RerunError(f"{call['function'].partition(':')[2]}: pass {'; '.join(missing)}")
        arguments = {name: self._value(name, form) for name, form in call["arguments"].items()}
        here = sum(len(value.uses) for value in arguments.values() if hasattr(value, "hf"))
        if here != call.get("edits", 0):
            raise RerunError(
                f"model: the Table was made under {call.get('edits', 0)} contexts of edits, now there are {here}; "
                "enter the same ones (m.intervene) and rerun inside"
            )
        parameters = inspect.signature(function).parameters.values()
        leading = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]
        return function(*(arguments.pop(name) for name in leading), **arguments)

    def _missing(self, call: Mapping[str, Any]) -> list[str]:
        found = []
        for name, form in call["arguments"].items():
            if _asks(form) and name not in self.inputs:
                why = f"it is {form['$again']}" if "$again" in form else f"only its digest is kept, of a {form['of']}"
                found.append(f"{name}= again ({why})")
        return found

    def _value(self, name: str, form: Any) -> Any:
        if name not in self.inputs:
            try:
                return recipes.read(form, self._model, self.call)
            except RerunError:
                raise
            except (TypeError, ValueError, KeyError, AttributeError, OSError) as error:
                raise RerunError(f"{name}: cannot be read back ({error}); pass {name}= again") from None
        given = self.inputs[name]
        self.used.add(name)
        here = recipes.digest(given) if isinstance(form, dict) and "$digest" in form else recipes.write(given)
        free = isinstance(form, dict) and ("$again" in form or "$call" in form)
        if not free and json.dumps(here, sort_keys=True) != json.dumps(form, sort_keys=True):
            raise RerunError(
                f"{name}: not what the Table was made with ({_shown(here, 40)} instead of {_shown(form, 40)}); to "
                "measure something else, call the function itself"
            )
        return given

    def _model(self, wanted: Mapping[str, str]) -> Any:
        for one in self.models:
            if one.fingerprint == wanted["fingerprint"]:
                return one
        name, want = wanted["name"], wanted["fingerprint"][:12]
        if self.models:
            have = ", ".join(f"{m.name} ({m.fingerprint[:12]})" for m in self.models)
            raise RerunError(f"model: the Table was made on {name} ({want}), not on {have}")
        import interp

        try:
            made = interp.load(name)
        except (ValueError, OSError) as error:
            raise RerunError(f"model: {name} ({want}) cannot be loaded by its name ({error}); pass model=") from None
        if made.fingerprint != wanted["fingerprint"]:
            raise RerunError(
                f"model: the Table was made on {name} ({want}), and interp.load({name!r}) gives another "
                f"({made.fingerprint[:12]}); pass model="
            )
        self.models.append(made)
        return made


__all__ = ["RerunError", "about", "call_of", "recorded", "rerun", "settings", "text"]
