"""Control vectors for llama.cpp: ``llama-cli -m model.gguf --control-vector-scaled v.gguf 1.0``.

A gguf file of architecture "controlvector": the model's type as hint, the number of layers that have a vector, and
one float32 tensor ``direction.<l>`` [d_model] per layer. llama.cpp adds direction l to the stream behind block l
(counted from 0), on every token, and keeps no slot for layer 0. What does not fit that is refused rather than lost:
layer 0, other sites, maps that do more than add, gates, and scopes other than "all".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from interp.sites import Site
from steering.errors import SteeringError
from steering.vector import SteeringMap, SteeringVector

ARCHITECTURE = "controlvector"


def to_gguf(m: Any, v: SteeringMap, path: str | os.PathLike[str]) -> Path:
    """Writes the vectors of `v` for llama.cpp and gives the path.

    Args:
        m: the model, whose type becomes the file's hint.
        v: a vector whose parts are at resid_post, with scope "all".
        path: the file, usually ``*.gguf``.

    Raises SteeringError for what a control vector cannot say.
    """
    from gguf import GGUFWriter

    directions = _directions(v)
    v.as_edits(m)  # refuses another model's
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    writer = GGUFWriter(str(partial), ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", str(m.config.model_type))
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
    for layer, direction in sorted(directions.items()):
        writer.add_tensor(f"direction.{layer}", direction.float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, target)
    return target


def from_gguf(m: Any, path: str | os.PathLike[str]) -> SteeringVector:
    """A control vector of llama.cpp or repeng as a SteeringVector on all tokens of `m`.

    Raises SteeringError for another kind of gguf file, another model type, or a width that is not the model's.
    """
    from gguf import GGUFReader

    if not Path(path).is_file():
        raise SteeringError(f"{path}: there is no such file")
    try:
        reader = GGUFReader(str(path))
    except ValueError as error:
        raise SteeringError(f"{path} is no gguf file: {error}") from error
    field = reader.get_field("general.architecture")
    kind = "nothing" if field is None else str(field.contents())
    if kind != ARCHITECTURE:
        raise SteeringError(f"{path} holds {kind!r}; expected a {ARCHITECTURE!r}, as llama.cpp and repeng write it")
    hint = reader.get_field(f"{ARCHITECTURE}.model_hint")
    if hint is not None and str(hint.contents()) != str(m.config.model_type):
        raise SteeringError(
            f"{path} was made for a model of type {hint.contents()!r}; {m.name} is {m.config.model_type!r}"
        )
    vectors = {}
    for tensor in reader.tensors:
        name, _, layer = tensor.name.partition(".")
        if name == "direction" and layer.isdigit():
            vectors[f"resid_post[{layer}]"] = torch.from_numpy(tensor.data.copy()).float()
    if not vectors:
        raise SteeringError(f"{path}: there is no tensor called direction.<layer> in it")
    return SteeringVector.of(m, vectors, method="gguf", scope="all", record={"file": Path(path).name})


def _directions(v: SteeringMap) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for part in v.parts:
        site = Site.parse(part.site)
        if not isinstance(v, SteeringVector):
            raise SteeringError(f"{part.site}: a control vector only adds, and this is a {part.map.kind} map")
        if site.name != "resid_post" or site.index:
            raise SteeringError(f"{part.site}: llama.cpp adds control vectors behind a block, which is resid_post")
        if site.layer == 0:
            raise SteeringError("resid_post[0]: llama.cpp keeps no slot for layer 0; steer at a later layer")
        if part.gate is not None or part.scope.text != "all":
            raise SteeringError(
                f"{part.site}: llama.cpp adds to every token, and this has "
                + (
                    "a gate"
                    if part.gate is not None
                    else f"the scope {part.scope.text!r}; write v.within('all') if all are meant"
                )
            )
        assert site.layer is not None
        if site.layer in found:
            raise SteeringError(f"{part.site} stands twice; add the vectors up first")
        found[site.layer] = v.vectors[part.site]
    return found
