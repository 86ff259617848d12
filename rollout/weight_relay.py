"""One host's end of the way that weights take to other hosts: an actor between two shared memories.

``Relays`` spawns one on every host that has engines but not the learner, to write, and one beside the learner, to read.
Invariant: pieces of one publication are never written over those of another, however late they come.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from shared.weights import Segment, orphans, segment_name


class _Room:
    """Memory for one publication after the other. Invariant: only pieces of publication ``number`` are written."""

    def __init__(self, segment: Segment) -> None:
        self.segment, self.number = segment, -1
        self._lock = threading.Lock()

    def clear(self, number: int) -> None:
        """It is for publication ``number`` from now on."""
        with self._lock:
            self.number = number

    def put(self, number: int, start: int, piece: NDArray[np.uint8]) -> None:
        """Write a piece, unless it is so late that the room has become another's."""
        with self._lock:
            if number == self.number:
                np.copyto(self.segment.bytes[start : start + len(piece)], piece)


class WeightRelay:
    """One host's end; called from several threads, since a piece that is late must not hold up others."""

    def __init__(self, name: str) -> None:
        """``name`` begins those of its shared memory."""
        self._name = name
        self._read: Segment | None = None
        self._rooms: list[_Room] = []
        """Two, in turn."""
        self._closed = False
        self._lock = threading.Lock()
        for orphan in orphans():  # Of a run that was killed.
            orphan.unlink(missing_ok=True)

    def piece(self, segment: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes ``[start, stop)`` of a segment on this host. Raises ``OSError`` if it is gone."""
        with self._lock:
            if self._read is None or self._read.name != segment:
                self._read = Segment(segment)
            return self._read.bytes[start:stop]

    def begin(self, number: int, size: int) -> str:
        """Make room for publication ``number`` of ``size`` bytes; engines may still read the one before.

        The same again for a number that has room already. Returns the segment's name. Raises ``OSError``.
        """
        with self._lock:
            assert not self._closed
            room = self._room(number)
            if room is None:
                room = self._next_room(size)
                room.clear(number)
            return room.segment.name

    def take(self, number: int, start: int, piece: NDArray[np.uint8]) -> None:
        """A piece of publication ``number`` has come."""
        with self._lock:
            room = self._room(number)
        if room is not None:
            room.put(number, start, piece)

    def pass_on(self, number: int, start: int, piece: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """As ``take``; others get it from here."""
        self.take(number, start, piece)
        return piece

    def close(self) -> None:
        """Remove what it wrote."""
        with self._lock:
            self._closed = True
            for room in self._rooms:
                room.segment.unlink()

    def _room(self, number: int) -> _Room | None:
        return next((room for room in self._rooms if room.number == number), None)

    def _next_room(self, size: int) -> _Room:
        """A new one; or of two that with the older publication, whatever comes in which order."""
        if len(self._rooms) < 2:
            self._rooms.append(_Room(Segment(segment_name(self._name, str(len(self._rooms))), size)))
            return self._rooms[-1]
        return min(self._rooms, key=lambda room: room.number)
