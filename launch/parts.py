"""The three parts of a run, started side by side on what the cluster has: engines, reward workers, learner ranks.

``run.py`` trains with them; ``millrace bench`` measures them. Everything that was started ends with the block.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from launch.cluster import reserve, worker_environment
from launch.placement import Needs
from learner.learner_group import LearnerGroup
from rollout.engine_pool import EnginePool
from rollout.reward_pool import RewardPool
from shared.config import Config
from shared.weights import NCCL_BACKEND, backend_of, remove_segments


@dataclass(frozen=True)
class Parts:
    """The facades of a run; all of their actors answer."""

    engines: EnginePool
    rewards: RewardPool
    learners: LearnerGroup
    linked: bool
    """Weights travel over a link that learner and engines have to join."""

    async def link(self) -> None:
        """Open it, if there is one; again whenever the learner is a new one."""
        if self.linked:
            await self.learners.connect(self.engines.connect, self.engines.workers)


@asynccontextmanager
async def started(config: Config, needs: Needs) -> AsyncIterator[Parts]:
    """The parts of a run with ``config``, in a session of Ray that has what it ``needs``."""
    run_id = uuid.uuid4().hex[:12]
    try:
        reservation = await reserve(needs)
        environment = worker_environment()
        rewards = RewardPool(config, reservation.rewards, environment)
        learners = LearnerGroup(config, run_id, reservation.ranks, environment)
        engines = EnginePool(config, reservation, environment)
        try:
            await asyncio.gather(engines.start(), learners.start(), rewards.start())
            parts = Parts(engines, rewards, learners, backend_of(config, needs.on_gpu) == NCCL_BACKEND)
            await parts.link()
            yield parts
        finally:  # It would start engines again for as long as it lives.
            await engines.close()
    finally:
        remove_segments(run_id)
