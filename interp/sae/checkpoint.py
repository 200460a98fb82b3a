"""A training that was killed goes on as if it had not been: the same weights at the end, bit for bit.

One file holds everything that the next step depends on: weights, both moments of Adam, who fired when, thresholds,
counters, and where the source is (for a live model with its whole buffer). It is safetensors with one JSON text in its
header, written under another name and then renamed, so there is always a whole one. Random numbers are drawn from
(seed, epoch) alone, so there is no generator to keep.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.sae.settings import differences
from interp.sae.shards import WHOLE, Shard
from interp.sae.sources import Source
from interp.sae.trainer import Trainer

FILE = "training.safetensors"


def path_of(dir: str | os.PathLike[str], part: Shard = WHOLE) -> Path:
    """The file of a process; those that share the latents have one each."""
    return Path(dir) / (FILE if part.world == 1 else f"training-{part.rank}-of-{part.world}.safetensors")


def begun(dir: str | os.PathLike[str], part: Shard) -> bool:
    """Whether a training was begun there; SAEError where that was with another number of processes."""
    place = path_of(dir, part)
    for file in Path(dir).glob("training*.safetensors"):
        if file.name.partition("-of-")[2] != place.name.partition("-of-")[2]:
            raise SAEError(f"{file} is of another number of processes that share the latents; go on with as many")
    return place.exists()


def write(dir: str | os.PathLike[str], trainers: list[Trainer], source: Source) -> Path:
    """Writes the checkpoint, in place of the one before."""
    from safetensors.torch import save_file

    numbers, buffer = source.cursor()
    tensors = {f"source/{name}": t.contiguous() for name, t in buffer.items()}
    runs = []
    for i, t in enumerate(trainers):
        tensors[f"{i}/silent"] = t.state.silent
        for name, weight in t.weights.items():
            tensors[f"{i}/weights/{name}"] = weight.detach()
            for key, value in t.optimizer.state[weight].items():
                tensors[f"{i}/adam/{name}/{key}"] = value
        runs.append({
            "settings": _identity(t), "state": t.state.scalars(), "counts": vars(t.counts), "rows": t.rows,
            "scale": [t.scale, t.scale_out, t.limit],
        })  # fmt: skip
    about = json.dumps({"source": source.identity, "cursor": numbers, "runs": runs})
    target = path_of(dir, trainers[0].state.part)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".tmp")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, {"interp": about})
    with open(beside, "rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(beside, target)
    return target


def _identity(t: Trainer) -> dict[str, Any]:
    return {"sites": list(t.sites), "targets": list(t.targets), **t.settings.to_dict()}


def read(dir: str | os.PathLike[str], trainers: list[Trainer], source: Source) -> None:
    """Takes trainers and source to where the checkpoint is.

    SAEError, with the differences, where it belongs to other settings or another source.
    """
    from safetensors import SafetensorError, safe_open

    place = path_of(dir, trainers[0].state.part)
    try:
        with safe_open(place, "pt") as handle:
            about = json.loads(handle.metadata()["interp"])
            found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise SAEError(f"{place} is no checkpoint of a training, or damaged ({error})") from None
    runs = about["runs"]
    if len(runs) != len(trainers):
        raise SAEError(f"{place}: it trains {len(runs)} SAEs there, {len(trainers)} here")
    for run, t in zip(runs, trainers, strict=True):
        if different := differences(run["settings"], _identity(t)):
            raise SAEError(
                f"{place} was begun with other settings ({different}). Give the same to resume it, or another directory"
            )
    if about["source"] != source.identity:
        raise SAEError(
            f"{place} was begun on other activations than {source.name}; give the same, or another directory"
        )
    for i, (run, t) in enumerate(zip(runs, trainers, strict=True)):
        _restore(t, run, {name.partition("/")[2]: v for name, v in found.items() if name.startswith(f"{i}/")})
    source.seek(about["cursor"], {n.partition("/")[2]: v for n, v in found.items() if n.startswith("source/")})


@torch.no_grad()
def _restore(t: Trainer, run: dict[str, Any], found: dict[str, Tensor]) -> None:
    for name, weight in t.weights.items():
        weight.copy_(found[f"weights/{name}"])
        prefix = f"adam/{name}/"
        moments = {key.removeprefix(prefix): v for key, v in found.items() if key.startswith(prefix)}
        if moments:
            t.optimizer.state[weight] = {
                key: value if key == "step" else value.to(weight.device) for key, value in moments.items()
            }
    t.state.silent.copy_(found["silent"])
    for key, value in run["state"].items():
        setattr(t.state, key, value)
    t.counts.tokens, t.counts.outliers = run["counts"]["tokens"], run["counts"]["outliers"]
    t.rows = run["rows"]
    t.scale, t.scale_out, t.limit = run["scale"]
