"""Weights through one buffer in chunks: a learner rank writes the next chunk when the engine on its GPU has taken the last.

Both processes map the buffer, which stays on the GPU. Whose turn it is stands in two counters in shared memory of the host,
because the processes have no other way to each other. Invariants: a chunk is written only when the one before it was taken,
and taken only when it was written whole; whoever waits longer than its limit raises ``TurnMissed``.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from shared.errors import MillraceError
from shared.weights import SHM_DIR, Segment, TensorMeta

CHUNK_BYTES = 1 << 30
"""Size of the buffer in bytes, unless one tensor is larger."""
COUNTER_BYTES = 16
POLL_S = 0.0005
"""Seconds between two looks at the other side's counter."""


class TurnMissed(MillraceError):
    """The process at the other end of a buffer wrote or took no chunk in time."""


def buffer_size(tensors: Iterable[TensorMeta]) -> int:
    """Return the size in bytes of the buffer for ``tensors``: at most ``CHUNK_BYTES``, but at least the largest tensor."""
    sizes = [tensor.nbytes for tensor in tensors]
    return max(min(sum(sizes), CHUNK_BYTES), max(sizes, default=0))


def cut(tensors: Iterable[TensorMeta], size: int) -> Iterator[list[TensorMeta]]:
    """Yield ``tensors`` in order, in chunks of whole tensors that fit into ``size`` bytes."""
    chunk: list[TensorMeta] = []
    filled = 0
    for tensor in tensors:
        if chunk and filled + tensor.nbytes > size:
            yield chunk
            chunk, filled = [], 0
        chunk.append(tensor)
        filled += tensor.nbytes
    if chunk:
        yield chunk


class Turns:
    """The two counters of one buffer: chunks written and chunks taken since the buffer was made."""

    def __init__(self, name: str, owner: bool = False) -> None:
        """Make the counters in a shared-memory file called ``name``, or with ``owner`` False join those that are there."""
        self.name = name
        self._segment = Segment(name, COUNTER_BYTES) if owner else None
        if self._segment is not None:
            self._counters = self._segment.bytes[:COUNTER_BYTES].view(np.int64)
        else:
            with (SHM_DIR / name).open("r+b") as file:
                self._counters = np.frombuffer(mmap.mmap(file.fileno(), 0), np.int64, 2)

    @contextmanager
    def write(self, limit_s: float) -> Iterator[None]:
        """Wait until every chunk was taken; when the block ends without an error, another one is there to be taken."""
        self.emptied(limit_s)
        yield
        self._counters[0] += 1

    def emptied(self, limit_s: float) -> None:
        """Wait until every chunk that was written was taken. Raises ``TurnMissed`` after ``limit_s`` seconds."""
        self._wait(
            lambda: bool(self._counters[1] == self._counters[0]), limit_s, "the engine on this GPU took no weights"
        )

    @contextmanager
    def take(self, limit_s: float) -> Iterator[None]:
        """Wait for the next chunk; when the block ends without an error, it may be written over."""
        message = "the learner rank on this GPU sent no weights"
        self._wait(lambda: bool(self._counters[0] > self._counters[1]), limit_s, message)
        yield
        self._counters[1] += 1

    def close(self) -> None:
        """Remove the file, if this is the owner."""
        if self._segment is not None:
            self._segment.unlink()

    @staticmethod
    def _wait(ready: Callable[[], bool], limit_s: float, message: str) -> None:
        deadline = time.monotonic() + limit_s
        while not ready():
            if time.monotonic() > deadline:
                raise TurnMissed(f"{message} for {limit_s:g} s")
            time.sleep(POLL_S)
