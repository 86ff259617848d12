"""Frames between a worker and its child processes: four bytes of length, then one JSON value.

Kept to the standard library: the children start in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, BinaryIO


def read_frame(stream: BinaryIO) -> Any:
    """Read the next JSON value; None at the end of ``stream``."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    return json.loads(stream.read(int.from_bytes(header, "big")))


def write_frame(stream: BinaryIO, value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write ``value`` to ``stream``; ``default`` converts what JSON has no form for."""
    data = json.dumps(value, default=default).encode()
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()
