"""The engines of a pool over all their lives: watched, and started again whenever one dies, hangs or is quarantined.

``EnginePool`` routes work over those that are healthy and brings each new life to the newest weights. Invariant: a lost
engine is reported, killed and replaced exactly once, whoever finds out; who waits hears when nothing can go on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from rollout.engine_health import EngineHealth, Event
from rollout.replica import Replica, Unanswered
from shared.config import Config
from shared.errors import EngineFailed, FleetExhausted, one_line

PROBE_EVERY_S, PROBE_LIMIT_S = 1.0, 5.0

T = TypeVar("T")


class Fleet:
    """One place per engine; ``slots`` holds where each is in the cluster."""

    def __init__(
        self,
        config: Config,
        slots: list[Any],
        environment: dict[str, str],
        follow: Callable[[Replica], Awaitable[None]],
    ) -> None:
        """``follow`` brings a new life to the newest weights, or loses it."""
        self._config, self._slots, self._environment, self._follow = config, slots, environment, follow
        self.health = [EngineHealth(config.run.max_restarts) for _ in range(config.rollout.num_engines)]
        self._replicas: list[Replica] = []
        """The last life of each."""
        self._lost: dict[int, tuple[float, Exception]] = {}
        """Engines on their way back, or retired: since when (monotonic), and why they were lost last."""
        self.replaceable = True
        """False where an engine has a place in a link that no other can take."""
        self.recovery_s = 0.0
        """From the last loss that was made good to serving again."""
        self._failure: Exception | None = None
        self._changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start all engines side by side and wait until each answers. Raises ``EngineFailed``."""
        self._replicas = [self._spawn(index) for index in range(len(self.health))]
        await asyncio.gather(*(r.start(self._config.rollout.start_timeout_s) for r in self._replicas))
        for replica in self._replicas:
            self.tell(replica, "ready")
        self._supervisor = asyncio.create_task(self._supervise())

    def close(self) -> None:
        """Kill the engines."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        for replica in self._replicas:
            if replica.ended:
                replica.kill()
            else:
                replica.end(EngineFailed(f"{replica.name} is closed"))
                replica.release()

    def running(self) -> list[Replica]:
        """Engines that have started and are not lost."""
        return [replica for replica in self._replicas if self.health[replica.index].runs]

    def idlest(self) -> Replica | None:
        """The healthy engine with the fewest requests."""
        return min(filter(self.is_healthy, self._replicas), key=lambda replica: replica.outstanding, default=None)

    def is_healthy(self, replica: Replica) -> bool:
        """Whether it may be given requests."""
        return not replica.ended and self.health[replica.index].state == "healthy"

    def is_trusted(self, replica: Replica) -> bool:
        """Whether there is reason to wait for it: it runs and nothing is suspected."""
        return not replica.ended and self.health[replica.index].state in ("stale", "healthy")

    async def until(self, look: Callable[[], T | None]) -> T:
        """What ``look`` finds, now or after a change. Raises what ends the fleet."""
        while True:
            if self._failure is not None:
                raise self._failure
            if found := look():
                return found
            await self._changed.wait()

    def notify(self) -> None:
        """Something changed: whoever waits looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def fail(self, error: Exception) -> None:
        """Nothing can go on: whoever waits gets ``error``."""
        self._failure = error
        self.notify()

    def all_left_in(self, places: set[int]) -> bool:
        """Whether every engine that is not retired is among ``places``."""
        return {index for index, health in enumerate(self.health) if health.state != "retired"} <= places

    def tell(self, replica: Replica, event: Event, why: str = "") -> None:
        """What happened to ``replica``; ``why`` is the reason should that be its end."""
        if replica.ended:
            return
        before, after = self.health[replica.index].state, self.health[replica.index].on(event)
        if after == "dead":
            self.lose(replica, EngineFailed(f"{replica.name} {why}"))
        elif after == "healthy" and replica.index in self._lost:
            since, _ = self._lost.pop(replica.index)
            self.recovery_s = time.monotonic() - since
            print(f"{replica.name} serves again after {self.recovery_s:.1f} s, {self._who_serves()}", flush=True)
        if after != before:
            self.notify()

    def lose(self, replica: Replica, error: Exception) -> None:
        """Quarantine an engine: whoever waits for it hears of it, and its keeper gives it another life."""
        if replica.ended:
            return
        health = self.health[replica.index]
        if health.state != "dead":
            health.on("died")
        since, _ = self._lost.get(replica.index, (time.monotonic(), None))
        self._lost[replica.index] = since, error
        replica.end(EngineFailed(one_line(error, 400)))
        left = f"{health.restarts_left} restarts left"
        print(f"{replica.name} lost, {self._who_serves()}, {left}: {one_line(error, 400)}", flush=True)
        if not self.replaceable:
            self.fail(error)
        self.notify()

    def _who_serves(self) -> str:
        return f"{sum(health.state == 'healthy' for health in self.health)} of {len(self.health)} engines serve"

    def _spawn(self, index: int) -> Replica:
        return Replica(self._config, index, self._slots[index], self._environment)

    async def _supervise(self) -> None:
        try:
            await asyncio.gather(*(self._keep(index) for index in range(len(self.health))))
        except Exception as error:  # A fault of ours: whoever waits must hear of it.
            self.fail(error)

    async def _keep(self, index: int) -> None:
        """Engine ``index``, watched, and given another life whenever it is lost, until it has none left."""
        health = self.health[index]
        await self._watch(self._replicas[index])
        while health.on("restarted") == "restarting":
            await asyncio.sleep(health.backoff_s)
            replica = self._replicas[index] = self._spawn(index)
            await asyncio.gather(self._bring_back(replica), self._watch(replica))
        if self.all_left_in(set()):
            why = "; ".join(one_line(error) for _, (_, error) in sorted(self._lost.items()))
            restarts = self._config.run.max_restarts
            self.fail(FleetExhausted(f"no engine is left, run.max_restarts = {restarts} each; {why}"))

    async def _bring_back(self, replica: Replica) -> None:
        try:
            await replica.start(self._config.rollout.start_timeout_s)
        except EngineFailed as error:
            self.lose(replica, error)
        else:
            self.tell(replica, "ready")
            await self._follow(replica)

    async def _watch(self, replica: Replica) -> None:
        """Probe an engine until it is lost, then see to its end."""
        while not await replica.ends_within(PROBE_EVERY_S):
            if not self.health[replica.index].runs:
                continue  # It starts, with a deadline of its own.
            try:
                await replica.try_ask("health", timeout_s=PROBE_LIMIT_S)
                self.tell(replica, "probe_ok", "answers probes, but two requests in a row exceeded their deadline")
            except EngineFailed as error:
                self.lose(replica, error)
            except Unanswered as error:
                self.tell(replica, "probe_missed", str(error))
        replica.kill()
