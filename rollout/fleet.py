"""The engines of a pool over all their lives: watched, and started again whenever one dies, hangs or is quarantined.

``EnginePool`` routes work over those that are healthy and brings each new life to the newest weights. Invariants: a lost
engine is reported, killed and replaced exactly once, whoever finds out; who waits hears when nothing can go on; ``close``
ends all that ever began, and nothing begins after it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from rollout.engine_health import EngineHealth, Event
from rollout.replica import Replica, Unanswered
from rollout.traffic import Traffic
from shared.actors import Places, Slot
from shared.config import Config
from shared.errors import EngineFailed, FleetExhausted, LinkLost, one_line
from shared.weights import read_s

PROBE_EVERY_S, PROBE_LIMIT_S = 1.0, 5.0
PLACE_TOLD_AFTER_S = 10.0
"""An engine without a place says so then, and whenever it has waited twice as long."""


@dataclass(eq=False)
class _Member:
    """One engine over all its lives."""

    index: int
    slot: Slot
    health: EngineHealth
    replica: Replica | None = None
    """The last life."""
    lost: tuple[float, Exception] | None = None
    """On its way back, or retired: since when (monotonic), and why it was lost last."""
    keeper: asyncio.Task[None] | None = None


class Fleet:
    """One place per engine; ``slots`` holds where each is in the cluster."""

    def __init__(
        self,
        config: Config,
        slots: Iterable[Slot],
        environment: dict[str, str],
        follow: Callable[[Replica], Awaitable[None]],
    ) -> None:
        """``follow`` brings a new life to the newest weights, or loses it."""
        self._config, self._environment, self._follow = config, environment, follow
        self._start_limit_s = config.rollout.start_timeout_s + read_s(config.model.path)
        self._members: dict[int, _Member] = {}
        self._leaving: set[_Member] = set()
        """No members any more, but they may still have requests."""
        self._indices = 0
        """Names are not used twice."""
        self.traffic = Traffic()
        self.linked: set[Replica] = set()
        """Engines that take part in a device link: if one is lost, none of them can take weights before there is another link."""
        self._moved = asyncio.Event()
        self.restarts, self.recovery_s = 0, 0.0
        """Lives begun after the first; seconds from the last loss that was made good to serving again."""
        for slot in slots:
            self._enlist(slot)

    async def start(self) -> None:
        """Start all engines side by side and wait until each answers. Raises ``EngineFailed``."""
        replicas = [self._spawn(member) for member in self._members.values()]
        await asyncio.gather(*(r.start(self._start_limit_s) for r in replicas))
        for replica, member in zip(replicas, self._members.values(), strict=True):
            self.tell(replica, "ready")
            member.keeper = asyncio.create_task(self._guarded(self._keep(member)))

    def close(self) -> None:
        """Kill the engines; whoever waits for one hears of it."""
        for member in (*self._members.values(), *self._leaving):
            self._end(member, "is closed")
        self.traffic.fail(EngineFailed("the engines are closed"))

    # --- its size ---

    @property
    def size(self) -> int:
        """Engines that are not retired."""
        return len(self._in_service())

    async def scale(self, engines: int, places: Places, limit_s: float) -> str:
        """To so many ``engines``; those that go have ``limit_s`` for what they still sample. Returns what was begun."""
        self.traffic.check()
        before = self.size
        names = [self._add(places.another_engine()) for _ in range(engines - before)]
        leaving = [self._take_out() for _ in range(before - engines)]  # At once: the next who asks counts anew.
        names += await asyncio.gather(*(self._remove(member, limit_s) for member in leaving))
        verb = "starting" if engines > before else "gone"
        return f"{before} -> {engines} engines" + (f"; {verb}: {', '.join(names)}" if names else "")

    def _add(self, slot: Slot) -> str:
        """One engine more, in ``slot``; it serves as soon as it holds the newest weights. Returns its name."""
        member = self._enlist(slot)
        member.keeper = asyncio.create_task(self._guarded(self._join(member)))
        return f"engine-{member.index}"

    def _take_out(self) -> _Member:
        """One member less: one that does not serve, or the youngest."""
        found = self._in_service()
        assert len(found) > 1, "the last engine stays"
        member = next((m for m in reversed(found) if m.replica is None or not m.replica.serves), found[-1])
        self._leaving.add(self._members.pop(member.index))
        return member

    async def _remove(self, member: _Member, limit_s: float) -> str:
        """End one that was taken out, once its requests are done; after ``limit_s`` they go to others. Returns its name."""
        try:
            if (replica := member.replica) is not None and replica.serves:
                await self.traffic.drained(replica, limit_s)
        finally:
            self._leaving.discard(member)
            self._end(member, "was taken out of service")
            member.slot.free()
        return f"engine-{member.index}"

    def running(self) -> list[Replica]:
        """Engines that have started and are not lost."""
        return [m.replica for m in self._members.values() if m.replica is not None and m.replica.runs]

    async def complete(self, limit_s: float) -> bool:
        """Wait until every engine in service runs; whether that was so within ``limit_s``. Raises ``FleetExhausted``."""
        try:
            async with asyncio.timeout(limit_s):
                while len(self.running()) < self.size or not self.size:
                    self._moved.clear()
                    await self.traffic.unless_failed(self._moved.wait())
        except TimeoutError:
            return False
        return True

    def retired(self) -> list[str]:
        """Engines that have no life left."""
        return [f"engine-{m.index}" for m in self._members.values() if m.health.state == "retired"]

    def all_left_in(self, places: set[int]) -> bool:
        """Whether every engine that has begun, and is not retired, is among ``places``."""
        return {member.index for member in self._in_service() if member.replica is not None} <= places

    # --- what happens to them ---

    def tell(self, replica: Replica, event: Event, why: str = "") -> None:
        """What happened to ``replica``; ``why`` is the reason should that be its end."""
        if replica.ended:
            return
        before, after = replica.health.state, replica.health.on(event)
        if after == "dead":
            self.lose(replica, EngineFailed(f"{replica.name} {why}"))
        elif after != before:
            if after == "healthy":
                self._serves(replica)
            else:
                self.traffic.shut(replica)
            self.traffic.notify(replica)
            self._moved.set()

    def lose(self, replica: Replica, error: Exception) -> None:
        """Quarantine an engine: whoever waits for it hears of it, and its keeper gives it another life."""
        if replica.ended:
            return
        if replica.health.state != "dead":
            replica.health.on("died")
        if member := self._members.get(replica.index):
            since, _ = member.lost or (time.monotonic(), None)
            member.lost = since, error
        replica.end(EngineFailed(one_line(error, 400)))
        self.traffic.shut(replica)
        left = f"{replica.health.restarts_left} restarts left"
        print(f"{replica.name} lost, {self._who_serves()}, {left}: {one_line(error, 400)}", flush=True)
        if replica in self.linked:
            self.traffic.fail(LinkLost(f"{replica.name}, which took part in the device link: {one_line(error, 400)}"))
        self.traffic.notify(replica)
        self._moved.set()

    def _serves(self, replica: Replica) -> None:
        member = self._members.get(replica.index)
        if member is None:  # On its way out.
            return
        self.traffic.open(replica)
        if member.lost is not None:
            self.recovery_s, member.lost = time.monotonic() - member.lost[0], None
            print(f"{replica.name} serves again after {self.recovery_s:.1f} s, {self._who_serves()}", flush=True)

    def _who_serves(self) -> str:
        return f"{self.traffic.serving} of {len(self._members)} engines serve"

    def _in_service(self) -> list[_Member]:
        return [member for member in self._members.values() if member.health.state != "retired"]

    # --- their lives ---

    def _enlist(self, slot: Slot) -> _Member:
        member = _Member(self._indices, slot, EngineHealth(self._config.run.max_restarts))
        self._members[member.index] = member
        self._indices += 1
        return member

    def _spawn(self, member: _Member) -> Replica:
        member.replica = Replica(self._config, member.index, member.slot, self._environment, member.health)
        return member.replica

    async def _guarded(self, life: Awaitable[None]) -> None:
        try:
            await life
        except Exception as error:  # A fault of ours: whoever waits must hear of it.
            self.traffic.fail(error)

    async def _join(self, member: _Member) -> None:
        await self._live(member)
        await self._keep(member)

    async def _keep(self, member: _Member) -> None:
        """An engine, watched, and given another life whenever it is lost, until it has none left or is taken out."""
        assert member.replica is not None
        await self._watch(member.replica)
        while member.index in self._members:
            if member.health.on("restarted") != "restarting":
                self._retire(member)
                return
            self.restarts += 1
            await asyncio.sleep(member.health.backoff_s)
            await self._live(member)

    def _retire(self, member: _Member) -> None:
        """Another may have its place. If it was the last engine, nothing can go on."""
        if not self._config.rollout.colocate:  # There it is the place of a learner rank too.
            member.slot.free()
        self._moved.set()
        if not self._in_service():
            why = "; ".join(one_line(m.lost[1]) for m in self._members.values() if m.lost)
            restarts = self._config.run.max_restarts
            self.traffic.fail(FleetExhausted(f"no engine is left, run.max_restarts = {restarts} each; {why}"))

    async def _live(self, member: _Member) -> None:
        """One life, as soon as its place is there."""
        await self._place(member)
        replica = self._spawn(member)
        await asyncio.gather(self._bring_up(replica), self._watch(replica))

    async def _place(self, member: _Member) -> None:
        place, waited = asyncio.ensure_future(member.slot.ready()), 0.0
        try:
            while not (await asyncio.wait((place,), timeout=max(waited, PLACE_TOLD_AFTER_S)))[0]:
                waited += max(waited, PLACE_TOLD_AFTER_S)
                print(
                    f"engine-{member.index} waits for resources, {waited:.0f} s so far, {self._who_serves()}",
                    flush=True,
                )
            place.result()
        finally:
            place.cancel()

    async def _bring_up(self, replica: Replica) -> None:
        try:
            await replica.start(self._start_limit_s)
        except EngineFailed as error:
            self.lose(replica, error)
        else:
            self.tell(replica, "ready")
            await self._follow(replica)

    async def _watch(self, replica: Replica) -> None:
        """Probe an engine until it is lost, then see to its end."""
        while not await replica.ends_within(PROBE_EVERY_S):
            if not replica.runs or (replica.serves and time.monotonic() - replica.finished_at < PROBE_EVERY_S):
                continue  # It starts, with a deadline of its own; or has just shown that it lives.
            try:
                await replica.try_ask("health", timeout_s=PROBE_LIMIT_S)
                self.tell(replica, "probe_ok", "answers probes, but two requests in a row exceeded their deadline")
            except EngineFailed as error:
                self.lose(replica, error)
            except Unanswered as error:
                self.tell(replica, "probe_missed", str(error))
        replica.kill()

    def _end(self, member: _Member, why: str) -> None:
        if member.keeper is not None:
            member.keeper.cancel()
        replica = member.replica
        if replica is not None and replica.ended:
            replica.kill()
        elif replica is not None:
            replica.end(EngineFailed(f"{replica.name} {why}"))
            self.traffic.shut(replica)
            self.traffic.notify(replica)
            replica.release()
