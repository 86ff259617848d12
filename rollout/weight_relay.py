"""Weights on their way to other hosts: once to each, in pieces, from shared memory into shared memory.

A ``WeightRelay`` runs on every host that has engines but not the learner, and one beside the learner to read. Pieces
travel through the object store: a host that has one passes it on, so the sender does not send everything to everybody.
Invariants: hosts do not wait for each other; what arrives is proved by the engines, which hash every byte.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.actors import Actor, ActorDied, ActorUnreachable, Places
from shared.errors import EngineFailed
from shared.weights import Publication, Segment, orphans, segment_name

PIECE_BYTES = 32 << 20
TRIES = 2
CLOSE_LIMIT_S = 2.0


class WeightRelay:
    """One host's end."""

    def __init__(self, name: str) -> None:
        """``name`` begins those of its shared memory."""
        self._name = name
        self._read: Segment | None = None
        self._own: list[Segment] = []
        """Two; the last is in turn."""
        for orphan in orphans():  # Of a run that was killed.
            orphan.unlink(missing_ok=True)

    def piece(self, segment: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes ``[start, stop)`` of a segment on this host."""
        if self._read is None or self._read.name != segment:
            self._read = Segment(segment)
        return self._read.bytes[start:stop]

    def begin(self, size: int) -> str:
        """Make room for ``size`` bytes, in another segment than the last time: engines may still read that one."""
        if len(self._own) < 2:
            self._own.append(Segment(segment_name(self._name, str(len(self._own))), size))
        else:
            self._own.reverse()
        return self._own[-1].name

    def put(self, segment: str, start: int, piece: NDArray[np.uint8]) -> None:
        """A piece of what goes into ``segment`` has come."""
        target = next(own for own in self._own if own.name == segment)
        np.copyto(target.bytes[start : start + len(piece)], piece)

    def close(self) -> None:
        """Remove what it wrote."""
        for segment in self._own:
            segment.unlink()


class Relays:
    """The relays of a run, as the engine pool sees them."""

    def __init__(self, places: Places, environment: dict[str, str]) -> None:
        self._places, self._environment = places, environment
        self._run = uuid.uuid4().hex[:12]
        self._actors: dict[str, Actor] = {}
        self._spawned = 0
        self._newest: Publication | None = None
        self._pieces: list[tuple[int, Any]] = []
        """Of the newest publication: where each begins, and what a call takes for it."""
        self._brought: dict[str, asyncio.Task[Publication]] = {}
        """By host, of the newest publication."""

    async def bring(self, publication: Publication, node: str, limit_s: float) -> Publication:
        """``publication`` as engines on ``node`` find it there. Raises ``EngineFailed``.

        Engines of one host that ask at the same time, or later, share what came.
        """
        if not publication.segment or publication.node in ("", node):
            return publication
        if publication is not self._newest:
            self._newest, self._pieces, self._brought = publication, [], {}
        if node not in self._brought:
            self._brought[node] = asyncio.create_task(self._carry(publication, node, limit_s))
        brought = self._brought[node]
        try:
            return await asyncio.shield(brought)
        except EngineFailed:
            self.forget(node, brought)
            raise

    def forget(self, node: str, brought: asyncio.Task[Publication] | None = None) -> None:
        """What came to ``node`` is no good: the next engine there has it brought again."""
        if brought in (None, self._brought.get(node)):
            self._brought.pop(node, None)

    async def close(self) -> None:
        """End the relays and what they hold."""
        calls = [actor.call("close").answer for actor in self._actors.values()]
        if calls:
            await asyncio.wait(calls, timeout=CLOSE_LIMIT_S)
        for actor in self._actors.values():
            actor.release()

    async def _carry(self, publication: Publication, node: str, limit_s: float) -> Publication:
        for attempt in range(1, TRIES + 1):
            try:
                return await asyncio.wait_for(self._move(publication, node), limit_s)
            except (ActorDied, ActorUnreachable, TimeoutError) as error:
                self._give_up(publication.node, node)
                if attempt == TRIES:
                    raise EngineFailed(
                        f"weights did not reach host {node}: {str(error) or f'> {limit_s:g} s'}"
                    ) from None
        raise AssertionError("unreachable")

    def _give_up(self, *nodes: str) -> None:
        """Which end is at fault is not known: both get new relays."""
        for node in nodes:
            if (actor := self._actors.pop(node, None)) is not None:
                actor.kill()
        self._pieces = []

    async def _move(self, publication: Publication, node: str) -> Publication:
        size = max(t.offset + t.nbytes for t in publication.tensors)
        source, target = self._on(publication.node), self._on(node)
        segment = await target.call("begin", size).answer
        if publication is self._newest and not self._pieces:
            cuts = [(start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES)]
            self._pieces = [(a, source.offer("piece", publication.segment, a, b)) for a, b in cuts]
        await asyncio.gather(*(target.call("put", segment, start, piece).answer for start, piece in self._pieces))
        return replace(publication, segment=segment)

    def _on(self, node: str) -> Actor:
        if node not in self._actors:
            self._spawned += 1
            name = f"{self._run}-relay-{self._spawned}"
            self._actors[node] = self._places.on(node).spawn(WeightRelay, name, environment=self._environment)
        return self._actors[node]
