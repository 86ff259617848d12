"""Safetensors files that are written tensor by tensor: their headers come from shapes, so that no more than one tensor is held."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors as safetensors names them."""
NAMES = {dtype: name for name, dtype in TYPES.items()}


class Described(NamedTuple):
    """What a header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(files: Sequence[tuple[Path, Sequence[Described]]], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write ``tensors`` into ``files``, each with those that it describes, in that order.

    Raises ``OSError``, but only after ``tensors`` has ended: to iterate it may be a collective that other ranks wait for.
    """
    failed: OSError | None = None
    wanted = iter([(path, one.name, number) for path, all_ in files for number, one in enumerate(all_)])
    described = dict(files)
    with ExitStack() as opened:
        stream: IO[bytes] | None = None
        for name, tensor in tensors:
            path, expected, number = next(wanted)
            assert name == expected, f"{name} where {expected} was described"
            if failed is not None:
                continue
            try:
                if number == 0 or stream is None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    stream = opened.enter_context(path.open("wb"))
                    stream.write(_header(described[path]))
                stream.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                stream.flush()
            except OSError as error:
                failed = error
        assert failed or next(wanted, None) is None, "tensors were described and did not come"
    if failed is not None:
        raise failed


def _header(described: Sequence[Described]) -> bytes:
    """Return the head of a file: its own length, then names, types and places of the tensors, padded to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in described:
        end = offset + one.nbytes
        table[one.name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
