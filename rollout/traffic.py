"""Who is given work, and who is waited for: kept up to date one engine at a time, whatever the size of the fleet.

``EnginePool`` asks, ``Fleet`` tells what happens to the engines. Invariants: an answer costs the same with a thousand
engines as with one; who waits hears when nothing can go on.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rollout.replica import Replica
from shared.errors import LinkLost

T = TypeVar("T")
Test = Callable[[Replica], bool]


class Traffic:
    """Work for engines that serve, stages that all of them pass, and the failure that ends everything."""

    def __init__(self) -> None:
        self._serving: set[Replica] = set()
        self._by_load: defaultdict[int, dict[Replica, None]] = defaultdict(dict)
        """Of those that serve, by the number of their requests."""
        self._lowest = 0
        """None of them has fewer."""
        self._somebody_serves = asyncio.Event()
        self._rounds: list[_Round] = []
        self._leaving: dict[Replica, asyncio.Event] = {}
        """Those that finish what they have, and whether they have."""
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def serving(self) -> int:
        """Engines that may be given work."""
        return len(self._serving)

    def open(self, replica: Replica) -> None:
        """From now on it may be given work."""
        self._serving.add(replica)
        self._file(replica)
        self._somebody_serves.set()

    def shut(self, replica: Replica) -> None:
        """From now on it may not."""
        self._serving.discard(replica)
        self._by_load[replica.outstanding].pop(replica, None)
        if not self._serving:
            self._somebody_serves.clear()

    async def idlest(self) -> Replica:
        """The engine with the fewest requests, in turn among equals, as soon as one serves."""
        while not self._serving:
            await self.unless_failed(self._somebody_serves.wait())
        while not self._by_load[self._lowest]:
            del self._by_load[self._lowest]
            self._lowest += 1
        return next(iter(self._by_load[self._lowest]))

    @contextmanager
    def occupied(self, replica: Replica) -> Iterator[None]:
        """It has a request more for the length of the block."""
        self._change(replica, +1)
        try:
            yield
        finally:
            self._change(replica, -1)
            if not replica.outstanding and replica in self._leaving:
                self._leaving[replica].set()

    async def drained(self, replica: Replica, limit_s: float) -> None:
        """Give it nothing more, and wait until it has nothing left, or so long."""
        self.shut(replica)
        if not replica.outstanding:
            return
        done = self._leaving[replica] = asyncio.Event()
        waiting = asyncio.ensure_future(done.wait())
        try:
            await asyncio.wait((waiting, replica.end_of_life), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            del self._leaving[replica]

    async def passed(self, replicas: Iterable[Replica], awaited: Test, passed: Test) -> list[Replica]:
        """The engines that ``passed`` a stage, once somebody has and nobody is ``awaited``: of ``replicas``, and of
        those to which something happens meanwhile."""
        stage = _Round(awaited, passed, replicas)
        self._rounds.append(stage)
        try:
            await self.unless_failed(stage.complete)
        finally:
            self._rounds.remove(stage)
        return list(stage.passed)

    def notify(self, replica: Replica) -> None:
        """Something happened to ``replica``: whoever waits looks again."""
        for stage in self._rounds:
            stage.look(replica)

    def fail(self, error: Exception) -> None:
        """Raise ``error`` in every call that waits for the engines. A final failure replaces an earlier ``LinkLost``."""
        if not isinstance(error, LinkLost):
            self.mend()
        if not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # Nobody may be waiting.

    def mend(self) -> None:
        """Go on after a failure that was made good: a lost link. Any other is final."""
        if self._failure.done() and isinstance(self._failure.exception(), LinkLost):
            self._failure = asyncio.get_running_loop().create_future()

    def check(self) -> None:
        """Raises what ended everything, if something has."""
        if self._failure.done():
            self._failure.result()

    async def unless_failed(self, awaitable: Awaitable[T]) -> T:
        """What ``awaitable`` gives. Raises what ends everything, should that be known first."""
        work = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait((work, self._failure), return_when=asyncio.FIRST_COMPLETED)
            self.check()
            return work.result()
        finally:
            work.cancel()

    def _change(self, replica: Replica, requests: int) -> None:
        self._by_load[replica.outstanding].pop(replica, None)
        replica.outstanding += requests
        if replica in self._serving:
            self._file(replica)

    def _file(self, replica: Replica) -> None:
        self._by_load[replica.outstanding][replica] = None
        self._lowest = min(self._lowest, replica.outstanding)


class _Round:
    """A stage of which it is known at any moment who is through and who is waited for."""

    def __init__(self, awaited: Test, passed: Test, replicas: Iterable[Replica]) -> None:
        self._awaited, self._has_passed = awaited, passed
        self._left: set[Replica] = set()
        self.passed: dict[Replica, None] = {}
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for replica in replicas:
            self._sort(replica)
        self._settle()

    def look(self, replica: Replica) -> None:
        self._sort(replica)
        self._settle()

    def _sort(self, replica: Replica) -> None:
        if self._has_passed(replica):
            self.passed[replica] = None
        else:
            self.passed.pop(replica, None)
        if self._awaited(replica):
            self._left.add(replica)
        else:
            self._left.discard(replica)

    def _settle(self) -> None:
        if self.passed and not self._left and not self.complete.done():
            self.complete.set_result(None)
