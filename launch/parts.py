"""The three parts of a run, started on what the cluster has: engines, reward workers, learner ranks.

They start side by side, but for engines on the learner's GPUs, which start after it.

``run.py`` trains with them; ``millrace bench`` measures them. Everything that was started ends with the block.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import addresses, check_files, nodes, reserve, worker_environment
from launch.memory import Sizes, colocated
from launch.model_weights import count_parameters
from launch.placement import Needs
from launch.shared_memory import check_hosts
from learner.learner_group import LearnerGroup
from rollout.engine_pool import EnginePool
from rollout.reward_pool import RewardPool
from shared.config import Config
from shared.errors import LearnerLost
from shared.weights import COLLECTIVE, backend_of, remove_segments

ROOM_TOLD_EVERY_S, ROOM_LIMIT_S = 10.0, 600.0
START_TOLD_EVERY_S = 30.0
"""Seconds after which a start says again what it waits for."""


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
        async with _telling({"room on the cluster"}, output):
            reservation = await reserve(needs)
            await check_hosts(config, reservation)
            if output is not None:
                await check_files(config, output, reservation)
        environment = worker_environment(output)
        rewards = RewardPool(config, reservation.rewards, environment)
        learners = LearnerGroup(config, run_id, reservation.ranks, environment)
        engines = EnginePool(_sized(config, needs), reservation, environment)
        try:
            starts = {"engines": engines.start, "learner": learners.start, "reward workers": rewards.start}
            # What the learner takes and frees as it starts would confuse vLLM on the same GPU.
            await _start_all(starts, ["learner"] if needs.colocated else [], output)
            parts = Parts(engines, rewards, learners, backend_of(config, needs.on_gpu) in COLLECTIVE)
            async with _telling({"the link between learner and engines"}, output):
                await parts.link()
            yield parts
        finally:  # It would start engines again for as long as it lives.
            await engines.close()
    finally:
        remove_segments(run_id)


def _sized(config: Config, needs: Needs) -> Config:
    """Return ``config`` with the sizes of engines that share GPUs with the learner."""
    if not needs.colocated:
        return config
    return colocated(config, Sizes.of(config, count_parameters(Path(config.model.path))), nodes())


@asynccontextmanager
async def _telling(missing: set[str], output: Path | None) -> AsyncIterator[None]:
    """Say now and then what of ``missing`` the block still waits for, if the run has a folder, and where its logs are."""

    async def tell() -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(START_TOLD_EVERY_S)
            waited, names = time.monotonic() - began, " and ".join(sorted(missing))
            print(f"still waiting for {names}, {waited:.0f} s so far (logs: {output}/logs)", flush=True)

    task = asyncio.create_task(tell()) if output is not None else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


async def _start_all(
    starts: Mapping[str, Callable[[], Awaitable[None]]], first: list[str], output: Path | None
) -> None:
    """Start the parts that are ``first``, one after the other; then the rest together."""
    missing, told = set(starts), output is not None
    async with _telling(missing, output):
        for name in first:
            await _ready(name, starts[name](), missing, told)
        await asyncio.gather(*(_ready(name, starts[name](), missing, told) for name in starts if name not in first))


async def _ready(name: str, start: Awaitable[None], missing: set[str], told: bool) -> None:
    """Wait for a part of the run, and take it out of ``missing``; say how long it took if that is to be ``told``."""
    began = time.monotonic()
    await start
    missing.discard(name)
    if told:
        print(f"{name} ready after {time.monotonic() - began:.0f} s", flush=True)
