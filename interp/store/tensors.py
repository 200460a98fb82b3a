"""Safetensors files written as a stream and read by memory map.

The format is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range) and the raw tensors. Because
the header comes first, `safetensors.save_file` needs every tensor in memory; we know all shapes before the first
activation exists, so we write the header and then append rows as the model produces them. Any safetensors reader opens
the result; the test suite opens it with the reference one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.store.disk import Staged
from interp.store.errors import Corrupt

_NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
    torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def n_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size


def rows_in(size: int, rows: Tensor) -> int:
    """How many of these rows [row, ...] fit in `size` bytes, one at least."""
    return max(1, size // max(1, rows[:1].nbytes))


def header(shapes: Shapes, metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file whose tensors follow in the order of `shapes`.

    Put wider types first: tensors are packed without gaps, so that order is what keeps each one aligned.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + n_bytes(dtype, shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # data starts at a multiple of 64 bytes, as a cache line does
    return len(text).to_bytes(8, "little") + text


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def as_items(rows: Tensor) -> Any:
    """Rows [row, ...], contiguous, as a numpy array [row] whose items are whole rows of bytes: the same memory."""
    flat = rows.view(len(rows), -1).view(torch.uint8)
    return flat.numpy().view(f"V{flat.shape[1]}").squeeze(1)


def take(rows: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """``rows[index]`` along the first axis, on the CPU, for numbers in range; into `out` (contiguous) if given.

    Goes by numpy, which copies a row as one piece of memory: ten times faster than torch's indexing, and more in
    bfloat16.
    """
    if out is None:
        out = torch.empty(len(index), *rows.shape[1:], dtype=rows.dtype)
    if out.numel():  # mode "raise" would go through a second buffer
        np.take(as_items(rows.contiguous()), index.numpy(), out=as_items(out), mode="clip")
    return out


def real_tokens(tensor: Tensor, mask: Tensor) -> Tensor:
    """The rows [row, ...] of a captured tensor [batch, pos, ...] where `mask` [batch, pos] is true, on the CPU.

    Where that is every row, they are the captured tensor's own memory.
    """
    rows = tensor.detach().flatten(0, 1)
    if bool(mask.all()):
        return rows.cpu()
    index = mask.flatten().nonzero().flatten()
    if rows.device.type != "cpu":
        return rows[index.to(rows.device)].cpu()
    return take(rows, index.cpu())


def save(staged: Staged, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write whole tensors, in the order given."""
    staged.write(header({k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, metadata))
    for tensor in tensors.values():
        staged.write(raw(tensor))


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, memory-mapped: nothing is read until it is used, no descriptor stays open.

    The map is private, so writing to these tensors changes neither the file nor other readers. Raises Corrupt when the
    file is missing, shorter or longer than its header says, or its header is no header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(size - 8, 1 << 27):
                raise Corrupt(f"{path}: not a safetensors file or cut short ({size} bytes); {MEND}")
            entries = json.loads(handle.read(length))
    except FileNotFoundError as error:
        raise Corrupt(f"{path}: the file is missing; {MEND}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Corrupt(f"{path}: the header is damaged; {MEND}") from error
    entries.pop("__metadata__", None)
    expected = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
    if size != expected:
        raise Corrupt(f"{path}: {size} bytes, but its header promises {expected}; {MEND}")
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    everything = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,))  # type: ignore[call-overload]
    out = {}
    for name, entry in entries.items():
        start, end = (8 + length + o for o in entry["data_offsets"])
        out[name] = everything[start:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return out


MEND = "store.verify(dir) lists all damage, store.repair(dir) drops it so that store.write can fill the gap"
