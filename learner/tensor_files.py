"""Safetensors files that are written tensor by tensor: their headers come from shapes, so that no more than one tensor is held."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
    wanted = iter([(path, one.name) for path, all_ in files for one in all_])
    stream = _Stream(dict(files))
    for name, tensor in tensors:
        path, expected = next(wanted)
        assert name == expected, f"{name} where {expected} was described"
        stream.write(path, tensor)
    stream.close()
    assert next(wanted, None) is None, "tensors were described and did not come"


class _Stream:
    """Writes one file after the other; after the first failure it takes what comes and writes nothing."""

    def __init__(self, files: dict[Path, Sequence[Described]]) -> None:
        self._files = files
        self._path: Path | None = None
        self._open: IO[bytes] | None = None
        self._failed: OSError | None = None

    def write(self, path: Path, tensor: Tensor) -> None:
        """Append ``tensor`` to the file ``path``, which begins with its header."""
        if self._failed is not None:
            return
        try:
            if path != self._path or self._open is None:
                self._begin(path)
            assert self._open is not None
            self._open.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            self._failed = error

    def _begin(self, path: Path) -> None:
        if self._open is not None:
            self._open.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._open = path, path.open("wb")
        self._open.write(_header(self._files[path]))

    def close(self) -> None:
        """End the last file. Raises the first failure."""
        try:
            if self._open is not None:
                self._open.close()
        except OSError as error:
            self._failed = self._failed or error
        if self._failed is not None:
            raise self._failed


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
