"""Weights on their way to other hosts: once to each, in pieces, from shared memory into shared memory.

A ``WeightRelay`` on every host takes the pieces. The sender sends each to one host, which passes it on to the others:
nobody's link carries more than about one copy, however many hosts there are. Invariants: a slow host holds up no other
(what it should pass on is asked of the sender, late), and one that fails costs no other anything; what arrives is proved by
the engines, which hash every byte.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rollout.weight_relay import WeightRelay
from shared.actors import Actor, ActorDied, ActorUnreachable, ArgumentLost, Places, named
from shared.errors import EngineFailed, one_line
from shared.weights import Publication

PIECE_BYTES = 16 << 20
TRIES = 3
SHARED_FROM = 2
PATIENCE_S, PATIENCE = 0.5, 2.0
"""What others should have passed on is awaited so long, and as many times as long as one's own part took, ..."""
ASK_LIMIT_S = 5.0
"""For a sender to say whether it lives."""
CLOSE_LIMIT_S = 2.0
THREADS = 8

Piece = tuple[int, Any]
"""Where it begins, and what a call takes for it."""


class NotBrought(EngineFailed):
    """Weights did not reach a host: its engines cannot take them, but may be well."""


@dataclass(frozen=True)
class _Cut:
    """All pieces of a publication, as one relay on its host offers them."""

    sender: Actor
    pieces: list[Piece]


@dataclass(eq=False)
class _Shipment:
    """A publication, on its way to all hosts."""

    publication: Publication
    number: int
    hosts: list[str]
    """That share it among them: those that took the one before."""
    cut: _Cut | None = None
    """The same for all, until it is given up for another."""
    passed_on: dict[str, list[Piece]] = field(default_factory=dict)
    """From the hosts that have them first: every ``len(hosts)``-th."""
    offered: dict[str, asyncio.Event] = field(default_factory=dict)
    brought: dict[str, asyncio.Task[Publication]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """In bytes, gaps included."""
        return max(t.offset + t.nbytes for t in self.publication.tensors)


class Relays:
    """The relays of a run, as the engine pool sees them."""

    def __init__(self, places: Places, environment: dict[str, str]) -> None:
        self._places, self._environment = places, environment
        self.shared_from = SHARED_FROM
        """Hosts from which on they pass pieces on."""
        self._run = uuid.uuid4().hex[:12]
        self._actors: dict[str, Actor] = {}
        self._spawned = 0
        self._numbers = itertools.count()
        self._newest: _Shipment | None = None
        self._carries: set[asyncio.Task[Publication]] = set()
        """Under way, those of publications that have been overtaken too."""
        self._came_at = 0.0
        """When a piece came anywhere last, on the loop's clock."""
        self._closed = False

    async def bring(self, publication: Publication, node: str, limit_s: float) -> Publication:
        """``publication`` as engines on ``node`` find it there. Raises ``NotBrought``.

        Engines of one host that ask at the same time, or later, share what came.
        """
        if not publication.segment or publication.node in ("", node):
            return publication
        shipment = self._shipment(publication)
        if node not in shipment.brought:
            carry = shipment.brought[node] = asyncio.create_task(self._carry(shipment, node, limit_s))
            self._carries.add(carry)
            carry.add_done_callback(partial(self._carried, shipment, node))
        return await asyncio.shield(shipment.brought[node])

    def forget(self, publication: Publication, node: str) -> None:
        """What came of it to ``node`` is no good: the next engine there has it brought again."""
        if self._newest is not None and self._newest.publication is publication:
            self._newest.brought.pop(node, None)

    async def close(self) -> None:
        """End the relays and what they hold, whatever is under way."""
        self._closed = True
        for carry in self._carries:
            carry.cancel()
        await asyncio.gather(*self._carries, return_exceptions=True)
        calls = [actor.call("close").answer for actor in self._actors.values()]
        if calls:
            await asyncio.wait(calls, timeout=CLOSE_LIMIT_S)
        for actor in self._actors.values():
            actor.release()

    def _shipment(self, publication: Publication) -> _Shipment:
        newest = self._newest
        if newest is None or newest.publication is not publication:
            hosts = sorted(newest.brought) if newest else []
            hosts = hosts if len(hosts) >= self.shared_from else []
            newest = self._newest = _Shipment(publication, next(self._numbers), hosts)
            newest.offered = {host: asyncio.Event() for host in hosts}
        return newest

    # --- to one host ---

    async def _carry(self, shipment: _Shipment, node: str, limit_s: float) -> Publication:
        failures = 0
        while failures < TRIES:
            target, cut = self._on(node), self._cut(shipment)
            begun = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(limit_s):
                    segment = await self._move(shipment, node, target, cut)
                return replace(shipment.publication, segment=segment)
            except ArgumentLost as error:
                why, counts = one_line(error), await self._recut(shipment, cut)
            except (ActorDied, ActorUnreachable) as error:
                why, counts = one_line(error), self._replace(node, target)
            except TimeoutError:
                why, counts = f"> {limit_s:g} s", self._replace(node, target)
                if self._came_at < begun:  # Not one piece to anybody: it may be the sender that hangs.
                    self._replace(shipment.publication.node, cut.sender)
            except OSError as error:  # No space there, or the learner and its memory are gone.
                raise NotBrought(f"weights did not reach host {node}: {one_line(error)}") from error
            failures += counts
        raise NotBrought(f"weights did not reach host {node}: {why}")

    def _carried(self, shipment: _Shipment, node: str, carry: asyncio.Task[Publication]) -> None:
        """What failed is not kept: the next engine there has it brought again."""
        self._carries.discard(carry)
        failed = carry.cancelled() or carry.exception() is not None
        if failed and shipment.brought.get(node) is carry:
            del shipment.brought[node]

    async def _recut(self, shipment: _Shipment, cut: _Cut) -> bool:
        """Pieces of ``cut`` were lost, so there must be others. Whether they are: not if somebody has seen to it."""
        sender = shipment.publication.node
        dead = await self._is_dead(cut.sender, shipment.publication.segment)
        if shipment.cut is not cut or self._actors.get(sender) is not cut.sender:
            return False
        shipment.cut = None
        if dead:
            self._replace(sender, cut.sender)
        return True

    async def _is_dead(self, sender: Actor, segment: str) -> bool:
        """Whether it says so itself: one that is silent may have much to do."""
        try:
            async with asyncio.timeout(ASK_LIMIT_S):
                await sender.call("piece", segment, 0, 0).answer
        except ActorDied:
            return True
        except (ActorUnreachable, OSError):  # The next try will tell.
            return False
        return False

    async def _move(self, shipment: _Shipment, node: str, target: Actor, cut: _Cut) -> str:
        segment: str = await target.call("begin", shipment.number, shipment.size).answer
        if node in shipment.hosts and node not in shipment.passed_on:
            await self._share(shipment, node, target, cut)
        else:
            await self._send(shipment, target, cut.pieces)
        return segment

    async def _share(self, shipment: _Shipment, node: str, target: Actor, cut: _Cut) -> None:
        """Take one's own part from the sender, and what the others pass on from them."""
        clock = asyncio.get_running_loop().time
        begun, count = clock(), len(shipment.hosts)
        mine = cut.pieces[shipment.hosts.index(node) :: count]
        shipment.passed_on[node] = [(start, target.offer("pass_on", shipment.number, start, it)) for start, it in mine]
        shipment.offered[node].set()
        others = [(i, host) for i, host in enumerate(shipment.hosts) if host != node]
        parts = [asyncio.create_task(self._from(shipment, host, target)) for _, host in others]
        try:
            await self._send(shipment, target, shipment.passed_on[node])
            await asyncio.wait(parts, timeout=PATIENCE_S + PATIENCE * (clock() - begun))
            late = [i for part, (i, _) in zip(parts, others) if not part.done() or part.exception()]
            await self._send(shipment, target, [piece for i in late for piece in cut.pieces[i::count]])
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _from(self, shipment: _Shipment, host: str, target: Actor) -> None:
        """The part that ``host`` passes on."""
        await shipment.offered[host].wait()
        await self._send(shipment, target, shipment.passed_on[host])

    async def _send(self, shipment: _Shipment, target: Actor, pieces: Iterable[Piece]) -> None:
        answers = [target.call("take", shipment.number, *piece).answer for piece in pieces]
        for answer in answers:
            answer.add_done_callback(self._came)
        await asyncio.gather(*answers)

    def _came(self, answer: asyncio.Future[Any]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            self._came_at = asyncio.get_running_loop().time()

    # --- who carries ---

    def _cut(self, shipment: _Shipment) -> _Cut:
        """The pieces from the sender: it is asked once, for all."""
        source = self._on(shipment.publication.node)
        if shipment.cut is None or shipment.cut.sender is not source:
            segment, size = shipment.publication.segment, shipment.size
            cuts = [(start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES)]
            shipment.cut = _Cut(source, [(a, source.offer("piece", segment, a, b)) for a, b in cuts])
        return shipment.cut

    def _on(self, node: str) -> Actor:
        if self._closed:
            raise NotBrought("the relays are closed")
        if node not in self._actors:
            self._spawned += 1
            name, slot = f"{self._run}-relay-{self._spawned}", self._places.on(node)
            environment = self._environment | named(f"relay-{self._spawned}")
            self._actors[node] = slot.spawn(WeightRelay, name, environment=environment, concurrency=THREADS)
        return self._actors[node]

    def _replace(self, node: str, actor: Actor) -> bool:
        """End ``actor``, and have another on ``node`` when one is needed. False if somebody has already."""
        if self._actors.get(node) is not actor:
            return False
        self._actors.pop(node).kill()
        return True
