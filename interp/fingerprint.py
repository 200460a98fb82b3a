"""A model's fingerprint: which configuration and which weights are these?"""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import Any

import torch
from torch import Tensor, nn


class Fingerprint:
    """The fingerprint of one model, remembered until a tensor is replaced or written to.

    (Through ``tensor.data`` torch does not tell of it; `fingerprint` always looks.)
    """

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self._seen: list[tuple[weakref.ref[Tensor], int]] = []
        self._value = ""

    def __str__(self) -> str:
        tensors = _tensors(self.hf).values()
        versions = [0 if t.is_inference() else t._version for t in tensors]
        seen = [(ref(), version) for ref, version in self._seen]
        now = list(zip(tensors, versions, strict=True))
        if len(now) != len(seen) or any(a is not b or v != w for (a, v), (b, w) in zip(now, seen, strict=True)):
            self._seen = [(weakref.ref(t), version) for t, version in now]
            self._value = fingerprint(self.hf)
        return self._value


def fingerprint(hf: Any) -> str:
    """A hash of the configuration and of every weight's name, shape, dtype and 1,024 evenly spread values.

    Masks (Boolean tensors) count whole, and what is kept beside the weights in a checkpoint (statistics) counts as
    they do. Where the model came from does not count.
    """
    told = {"transformers_version", "dtype", "torch_dtype", "architectures"}  # saving a model writes them
    config = {k: v for k, v in hf.config.to_dict().items() if not k.startswith("_") and k not in told}
    digest = hashlib.sha256((type(hf).__name__ + json.dumps(config, sort_keys=True, default=str)).encode())
    for name, tensor in sorted(_tensors(hf).items()):
        flat = tensor.detach().flatten()
        step = 1 if flat.dtype == torch.bool else max(1, flat.numel() // 1024)
        spread = flat[::step][: None if step == 1 else 1024].float().cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode() + spread.numpy().tobytes())
    return digest.hexdigest()


def _tensors(hf: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint would hold: the tensors themselves, not copies."""
    return {k: t for k, t in hf.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
