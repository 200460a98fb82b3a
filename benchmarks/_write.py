"""How fast a dataset is written, beside `safetensors.save_file` on the same bytes.

The model is left out: a `Replay` gives the same activations for every batch at no cost, and what remains is
`store.write` whole: checksums, statistics, the table of tokens, fsync, renames. The raw writer gets its tensors ready
made, one file per site as the store has it, once as it is and once with the fsync that the store's promise needs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _methods import MODELS
from torch import Tensor

import interp
from interp import store
from interp.activations import Activations, Tokens

CONTEXT, BATCH = 128, 8


class Replay:
    """A model whose forward pass costs nothing; all else it is asked for is the real model's."""

    def __init__(self, model: interp.Model, acts: Activations) -> None:
        self._model, self._acts = model, acts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def capture(self, tokens: Tokens, sites: Any, **_: Any) -> Activations:
        return replace(self._acts, tokens=tokens)


@dataclass(frozen=True)
class Load:
    """Something to write: `run[name]()` writes it and returns the directory; `bytes` is the payload."""

    title: str
    bytes: int
    runs: dict[str, Callable[[], Any]]


def loads(tokens: int, where: Path | None) -> Iterator[Load]:
    """Dense rows (residual streams) and rows sorted by expert, in bfloat16."""
    for name, title, sites in (("smollm2", "30 residual streams of SmolLM2", ["resid_post[*]"]),
                               ("olmoe", "expert_hidden of 4 layers, sorted by expert", ["expert_hidden[0:4]"])):
        model = MODELS[name](torch.bfloat16, "cpu")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.d_vocab, (tokens // CONTEXT, CONTEXT), generator=generator)
        acts = model.capture(ids[:BATCH], sites)
        replay = Replay(model, acts)
        rows = {str(site): torch.cat([acts[site].flatten(0, 1)] * (len(ids) // BATCH)) for site in model.resolve(sites)}

        def raw(sync: bool, rows: dict[str, Tensor] = rows) -> Any:
            from safetensors.torch import save_file

            folder = _folder(where)
            for site, tensor in rows.items():
                path = Path(folder.name) / f"{site}.safetensors"
                save_file({"rows": tensor}, path)
                if sync:
                    fd = os.open(path, os.O_RDONLY)
                    os.fsync(fd)
                    os.close(fd)
            return folder

        def ours(replay: Any = replay, ids: Tensor = ids, sites: list[str] = sites) -> Any:
            folder = _folder(where)
            store.write(replay, ids, sites, folder.name, context=CONTEXT, batch_size=BATCH, shard_tokens=tokens,
                        progress=False)
            return folder

        size = sum(t.numel() * t.element_size() for t in rows.values())
        yield Load(title, size, {"raw with fsync": partial(raw, True), "raw": partial(raw, False), "store.write": ours})


def _folder(where: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A directory that is deleted when it is dropped, so after the clock has stopped."""
    return tempfile.TemporaryDirectory(dir=where)
