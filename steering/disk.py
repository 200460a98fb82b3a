"""Steering maps on disk: one safetensors file (tensors, and the rest as JSON in its header) and a card beside it.

    v.save("honest")                  honest.safetensors, honest.card.json
    steering.load("honest", m)        the same map; refused on another model

Nothing in it is code: maps and gates are named (`steering.maps.savable`) and consist of tensors and settings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from interp.cards import Card
from interp.scope import Scope
from steering.errors import SteeringError
from steering.maps import pack, unpack
from steering.vector import Part, SteeringMap, SteeringVector

FORMAT = "interp.steering/1"


def save(steer: SteeringMap, path: str | os.PathLike[str], **card: Any) -> Path:
    """Writes ``path.safetensors`` and ``path.card.json``; gives the path of the former.

    Args:
        steer: a map or vector.
        path: with or without the suffix.
        **card: fields of the card that code cannot know (``intended_use="..."``; see `interp.cards`).

    Raises SteeringError for a scope or gate that a file cannot hold.
    """
    from safetensors.torch import save_file

    path = _file(path)
    tensors, parts = {}, []
    for i, part in enumerate(steer.parts):
        line: dict[str, Any] = {"site": part.site, "scope": _scope_text(part.scope)}
        for role, thing in (("map", part.map), ("gate", part.gate)):
            line[role] = None
            if thing is not None:
                line[role], own = pack(thing)
                tensors.update({f"{i}.{role}.{name}": t for name, t in own.items()})
        parts.append(line)
    about = {
        "format": FORMAT, "model": steer.model, "fingerprint": steer.fingerprint, "method": steer.method,
        "vector": isinstance(steer, SteeringVector), "record": steer.record, "parts": parts,
    }  # fmt: skip
    partial = path.with_name(f".{path.name}.partial")
    # tensors that share memory (one direction at many sites) are stored once each
    save_file({k: t.clone() for k, t in tensors.items()}, partial, {"about": json.dumps(about, default=str)})
    os.replace(partial, path)
    known = {
        "description": repr(steer), "model": steer.model, "model_hash": steer.fingerprint, "site": steer.sites,
        "method": {"method": steer.method, **steer.record},
    }  # fmt: skip
    Card("vector", path.stem, {**known, "versions": _versions(), **card}).save(path.with_suffix(".card.json"))
    return path


def load(path: str | os.PathLike[str], model: Any = None) -> SteeringMap:
    """Reads what `save` wrote: a SteeringVector if it was one.

    Raises SteeringError for another kind of file, and, with `model`, unless it was fitted on that very model.
    """
    from safetensors import SafetensorError, safe_open

    path = _file(path)
    if not path.is_file():
        raise SteeringError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, ValueError) as error:
        raise SteeringError(f"{path} cannot be read: {error}") from error
    if about.get("format") != FORMAT:
        raise SteeringError(f"{path}: format {about.get('format')!r}; expected {FORMAT!r}, as v.save() writes it")
    parts = []
    for i, line in enumerate(about["parts"]):
        things: dict[str, Any] = {}
        for role in ("map", "gate"):
            prefix = f"{i}.{role}."
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            things[role] = None if line[role] is None else unpack(line[role], own)
        parts.append(Part(line["site"], things["map"], Scope.parse(line["scope"]), things["gate"]))
    cls = SteeringVector if about["vector"] else SteeringMap
    steer = cls(tuple(parts), about["fingerprint"], about["model"], about["method"], about["record"])
    if model is not None:
        steer.as_edits(model)  # refuses another model
    return steer


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def _scope_text(scope: Scope) -> str:
    try:
        Scope.parse(scope.text)
    except ValueError as error:
        raise SteeringError(
            f"the scope {scope.text} belongs to one batch and cannot be saved; save v.within('last | generated') or "
            "another scope that has a text"
        ) from error
    return scope.text


def _versions() -> dict[str, str]:
    import torch

    from interp.version import __version__

    return {"interp": __version__, "torch": torch.__version__}
