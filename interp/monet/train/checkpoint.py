"""Stop and go on: the state of a run in one safetensors file.

One file, because a file is replaced in one step: whenever the process is killed, the directory holds the checkpoint
before or the one after, never half of one. Tensors are `model/<name>` and `optimizer/<number>/<field>/<name>`;
everything else is JSON in the file's own header. No pickle.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def save(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Writes the checkpoint and then puts it in place, replacing the one that is there."""
    from safetensors.torch import save_file

    private = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save_file(_tensors(model, optimizers), private, metadata={"state": json.dumps(state)})
        with private.open("rb+") as handle:
            os.fsync(handle.fileno())
        private.replace(file)
    finally:
        private.unlink(missing_ok=True)


def read_state(file: Path) -> dict[str, Any]:
    """The state alone, without the tensors. Raises ValueError if the file is no checkpoint of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            state: dict[str, Any] = json.loads((handle.metadata() or {})["state"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not a training checkpoint ({error}); remove it, or choose another --out") from error
    return state


@torch.no_grad()
def load(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Fills model and optimisers from a checkpoint and returns its state.

    Raises ValueError if the tensors are not exactly those of this model.
    """
    from safetensors.torch import load_file

    state, saved = read_state(file), load_file(file)
    own = _model_tensors(model)
    found = {name.removeprefix("model/") for name in saved if name.startswith("model/")}
    if odd := sorted(found ^ set(own)):
        raise ValueError(f"{file}: tensor {odd[0]} is in the checkpoint or in the model but not in both")
    for name, tensor in own.items():
        if tensor.shape != saved[f"model/{name}"].shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(saved[f'model/{name}'].shape)}, expected {tuple(tensor.shape)}"
            )
        tensor.copy_(saved[f"model/{name}"])
    parameters = dict(model.named_parameters())
    for key, tensor in saved.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            number, field, name = rest.split("/")
            optimizers[int(number)].state[parameters[name]][field] = tensor.to(parameters[name].device)
    return state


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and the buffers that belong to a checkpoint."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    buffers = {name for name, _ in model.named_buffers()}
    return parameters | {name: t for name, t in model.state_dict(keep_vars=True).items() if name in buffers}


def _tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model/{name}": t.detach() for name, t in _model_tensors(model).items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, fields in optimizer.state.items():
            for field, value in fields.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{number}/{field}/{names[id(parameter)]}"] = value
    return {name: t.contiguous() for name, t in tensors.items()}
