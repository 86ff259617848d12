"""The three parts of a run, started side by side on what the cluster has: engines, reward workers, learner ranks.

``run.py`` trains with them; ``millrace bench`` measures them. Everything that was started ends with the block.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import addresses, check_files, reserve, worker_environment
from launch.placement import Needs
from launch.shared_memory import check_hosts
from learner.learner_group import LearnerGroup
from rollout.engine_pool import EnginePool
from rollout.reward_pool import RewardPool
from shared.config import Config
from shared.errors import LearnerLost
from shared.weights import COLLECTIVE, backend_of, remove_segments

ROOM_TOLD_EVERY_S, ROOM_LIMIT_S = 10.0, 600.0


@dataclass(frozen=True)
class Parts:
    """The facades of a run; all of their actors answer."""

    engines: EnginePool
    rewards: RewardPool
    learners: LearnerGroup
    linked: bool
    """Weights travel while learner and engines both take part."""

    async def rebuild_learner(self) -> None:
        """New ranks for lost ones, and engines without weights. Where a lost host left no room for the ranks, engines make it.

        Engines that made room come back when the cluster has grown again. Raises ``LearnerLost`` if there is no room.
        """
        wanted, waited = self.engines.size, 0.0
        self.learners.end()
        await self.engines.reset()  # Its weights are gone: an engine that comes back meanwhile must not ask for them.
        while not await self.learners.has_place(ROOM_TOLD_EVERY_S):
            waited += ROOM_TOLD_EVERY_S
            print(f"the learner waits for resources, {waited:.0f} s so far", flush=True)
            if waited >= ROOM_LIMIT_S:
                raise LearnerLost(f"no place for the learner's ranks within {ROOM_LIMIT_S:g} s")
            if self.engines.scalable and self.engines.size > 1:
                print(f"{await self.engines.scale(self.engines.size - 1)}: it makes room for the learner", flush=True)
        await self.learners.start()
        if self.engines.size < wanted:
            print(f"{await self.engines.scale(wanted)} as soon as there is room", flush=True)
        await self.link()

    async def where(self) -> str:
        """Who lives on which host."""
        hosts = addresses()
        found: dict[str, list[str]] = {}
        ranks = {f"learner-{i}": node for i, node in enumerate(await self.learners.nodes())}
        for name, node in (ranks | await self.engines.nodes()).items():
            found.setdefault(hosts.get(node, node), []).append(name)
        return "; ".join(f"{host}: {', '.join(names)}" for host, names in sorted(found.items()))

    async def link(self) -> None:
        """Open the link between learner and engines, if there is one; again whenever the learner is a new one."""
        if self.linked:
            await self.engines.link.complete(ROOM_LIMIT_S)
            await self.learners.connect(self.engines.link.join, self.engines.workers)


@asynccontextmanager
async def started(config: Config, needs: Needs, output: Path | None = None) -> AsyncIterator[Parts]:
    """The parts of a run with ``config``, in a session of Ray that has what it ``needs``, writing into ``output``."""
    run_id = uuid.uuid4().hex[:12]
    try:
        reservation = await reserve(needs)
        await check_hosts(config, reservation)
        if output is not None:
            await check_files(config, output, reservation)
        environment = worker_environment(output)
        rewards = RewardPool(config, reservation.rewards, environment)
        learners = LearnerGroup(config, run_id, reservation.ranks, environment)
        engines = EnginePool(config, reservation, environment)
        try:
            starts = {"engines": engines.start(), "learner": learners.start(), "reward workers": rewards.start()}
            await asyncio.gather(*(_ready(name, start, output is not None) for name, start in starts.items()))
            parts = Parts(engines, rewards, learners, backend_of(config, needs.on_gpu) in COLLECTIVE)
            await parts.link()
            yield parts
        finally:  # It would start engines again for as long as it lives.
            await engines.close()
    finally:
        remove_segments(run_id)


async def _ready(name: str, start: Awaitable[None], told: bool) -> None:
    """Wait for a part of the run; say how long it took if that is to be ``told``."""
    began = time.monotonic()
    await start
    if told:
        print(f"{name} ready after {time.monotonic() - began:.0f} s", flush=True)
