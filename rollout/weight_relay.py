"""Weights on their way to other hosts: once to each, in pieces, from shared memory into shared memory.

A ``WeightRelay`` runs on every host that has engines but not the learner, and one beside the learner to read. The sender
sends each piece to one host, which passes it on to the others: nobody's link carries more than about one copy, however
many hosts there are. Invariants: a slow host holds up no other (what it should pass on is asked of the sender, late);
what arrives is proved by the engines, which hash every byte.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.actors import Actor, ActorDied, ActorUnreachable, Places, named
from shared.errors import EngineFailed
from shared.weights import Publication, Segment, orphans, segment_name

PIECE_BYTES = 16 << 20
TRIES = 3
SHARED_FROM = 2
"""Hosts from which on they pass pieces on."""
PATIENCE_S, PATIENCE = 0.5, 2.0
"""What others should have passed on is awaited so long, and as many times as long as one's own part took, ..."""
CLOSE_LIMIT_S = 2.0
THREADS = 8


class WeightRelay:
    """One host's end; called from several threads, since a piece that is late must not hold up others."""

    def __init__(self, name: str) -> None:
        """``name`` begins those of its shared memory."""
        self._name = name
        self._read: Segment | None = None
        self._own: list[Segment] = []
        """Two; the last is in turn."""
        self._lock = threading.Lock()
        for orphan in orphans():  # Of a run that was killed.
            orphan.unlink(missing_ok=True)

    def piece(self, segment: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes ``[start, stop)`` of a segment on this host."""
        with self._lock:
            if self._read is None or self._read.name != segment:
                self._read = Segment(segment)
            return self._read.bytes[start:stop]

    def begin(self, size: int) -> str:
        """Make room for ``size`` bytes, in another segment than the last time: engines may still read that one."""
        with self._lock:
            if len(self._own) < 2:
                self._own.append(Segment(segment_name(self._name, str(len(self._own))), size))
            else:
                self._own.reverse()
            return self._own[-1].name

    def take(self, segment: str, start: int, piece: NDArray[np.uint8]) -> None:
        """A piece of what goes into ``segment`` has come."""
        with self._lock:
            target = next(own for own in self._own if own.name == segment)
        np.copyto(target.bytes[start : start + len(piece)], piece)

    def pass_on(self, segment: str, start: int, piece: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """As ``take``; others get it from here."""
        self.take(segment, start, piece)
        return piece

    def close(self) -> None:
        """Remove what it wrote."""
        for segment in self._own:
            segment.unlink()


@dataclass
class _Shipment:
    """The newest publication, on its way to all hosts."""

    publication: Publication
    hosts: list[str]
    """That share it among them: those that took the one before."""
    pieces: list[tuple[int, Any]] = field(default_factory=list)
    """Where each begins, and what a call takes for it, from the sender."""
    passed_on: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    """The same from the hosts that have them first: every ``len(hosts)``-th."""
    offered: dict[str, asyncio.Event] = field(default_factory=dict)
    brought: dict[str, asyncio.Task[Publication]] = field(default_factory=dict)


class Relays:
    """The relays of a run, as the engine pool sees them."""

    def __init__(self, places: Places, environment: dict[str, str]) -> None:
        self._places, self._environment = places, environment
        self._run = uuid.uuid4().hex[:12]
        self._actors: dict[str, Actor] = {}
        self._spawned = 0
        self._newest: _Shipment | None = None

    async def bring(self, publication: Publication, node: str, limit_s: float) -> Publication:
        """``publication`` as engines on ``node`` find it there. Raises ``EngineFailed``.

        Engines of one host that ask at the same time, or later, share what came.
        """
        if not publication.segment or publication.node in ("", node):
            return publication
        shipment = self._newest
        if shipment is None or shipment.publication is not publication:
            hosts = sorted(shipment.brought) if shipment else []
            hosts = hosts if len(hosts) >= SHARED_FROM else []
            shipment = self._newest = _Shipment(publication, hosts)
            shipment.offered = {host: asyncio.Event() for host in hosts}
        if node not in shipment.brought:
            shipment.brought[node] = asyncio.create_task(self._carry(shipment, node, limit_s))
        brought = shipment.brought[node]
        try:
            return await asyncio.shield(brought)
        except EngineFailed:
            self.forget(node, brought)
            raise

    def forget(self, node: str, brought: asyncio.Task[Publication] | None = None) -> None:
        """What came to ``node`` is no good: the next engine there has it brought again."""
        if self._newest is not None and brought in (None, self._newest.brought.get(node)):
            self._newest.brought.pop(node, None)

    async def close(self) -> None:
        """End the relays and what they hold."""
        calls = [actor.call("close").answer for actor in self._actors.values()]
        if calls:
            await asyncio.wait(calls, timeout=CLOSE_LIMIT_S)
        for actor in self._actors.values():
            actor.release()

    async def _carry(self, shipment: _Shipment, node: str, limit_s: float) -> Publication:
        for attempt in range(1, TRIES + 1):
            try:
                segment = await asyncio.wait_for(self._move(shipment, node), limit_s)
                return replace(shipment.publication, segment=segment)
            except (ActorDied, ActorUnreachable, TimeoutError) as error:
                self._give_up(shipment, node, attempt > 1)
                if attempt == TRIES:
                    raise EngineFailed(
                        f"weights did not reach host {node}: {str(error) or f'> {limit_s:g} s'}"
                    ) from None
        raise AssertionError("unreachable")

    def _give_up(self, shipment: _Shipment, node: str, again: bool) -> None:
        """Which end is at fault is not known: the receiver gets a new relay, and should that not help the sender too."""
        for host in (node, shipment.publication.node) if again else (node,):
            if (actor := self._actors.pop(host, None)) is not None:
                actor.kill()
        if again:
            shipment.pieces = []

    async def _move(self, shipment: _Shipment, node: str) -> str:
        publication, target = shipment.publication, self._on(node)
        size = max(t.offset + t.nbytes for t in publication.tensors)
        segment: str = await target.call("begin", size).answer
        pieces = self._cut(shipment, size)
        if node in shipment.hosts and node not in shipment.passed_on:
            await self._share(shipment, pieces, node, segment)
        else:
            await asyncio.gather(*(target.call("take", segment, *piece).answer for piece in pieces))
        return segment

    def _cut(self, shipment: _Shipment, size: int) -> list[tuple[int, Any]]:
        """The pieces from the sender; the same list for all, until it is given up for another."""
        if not shipment.pieces:
            source, segment = self._on(shipment.publication.node), shipment.publication.segment
            cuts = [(start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES)]
            shipment.pieces = [(start, source.offer("piece", segment, start, stop)) for start, stop in cuts]
        return shipment.pieces

    async def _share(self, shipment: _Shipment, pieces: list[tuple[int, Any]], node: str, segment: str) -> None:
        """Take one's own part from the sender, and what the others pass on from them."""
        target, clock = self._on(node), asyncio.get_running_loop().time
        begun, count = clock(), len(shipment.hosts)
        starts = [start for start, _ in pieces]
        mine = shipment.hosts.index(node)
        refs = [target.offer("pass_on", segment, *piece) for piece in pieces[mine::count]]
        shipment.passed_on[node] = list(zip(starts[mine::count], refs))
        shipment.offered[node].set()
        had = asyncio.gather(*(target.call("take", segment, *piece).answer for piece in shipment.passed_on[node]))
        others = [(i, host) for i, host in enumerate(shipment.hosts) if host != node]
        parts = [asyncio.create_task(self._from(shipment, host, target, segment)) for _, host in others]
        try:
            await had
            await asyncio.wait(parts, timeout=PATIENCE_S + PATIENCE * (clock() - begun))
            late = [
                target.call("take", segment, *piece).answer
                for part, (i, _) in zip(parts, others)
                if not part.done() or part.exception()
                for piece in pieces[i::count]
            ]
            await asyncio.gather(*late)
        finally:
            for part in parts:
                part.cancel()

    async def _from(self, shipment: _Shipment, host: str, target: Actor, segment: str) -> None:
        """The part that ``host`` passes on."""
        await shipment.offered[host].wait()
        await asyncio.gather(*(target.call("take", segment, *piece).answer for piece in shipment.passed_on[host]))

    def _on(self, node: str) -> Actor:
        if node not in self._actors:
            self._spawned += 1
            name, slot = f"{self._run}-relay-{self._spawned}", self._places.on(node)
            environment = self._environment | named(f"relay-{self._spawned}")
            self._actors[node] = slot.spawn(WeightRelay, name, environment=environment, concurrency=THREADS)
        return self._actors[node]
