"""Learner ranks and reward workers that only let time pass, and the slots that spawn them: what the real controller and
pools simulate with.

Each is an object with the methods of the real actor, in this process; a slot spawns the one whose real class it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from launch.simulated_engine import SimulatedActor, SimulatedEngine
from launch.timings import Timings
from rollout.reward_worker import Group
from rollout.scores import Scores
from shared.config import Config
from shared.ledger import TimeLedger, TimeSlice
from shared.types import RolloutGroup, StepReport
from shared.weights import Canary, Publication, TensorMeta

_counted: tuple[list[RolloutGroup], int] = ([], 0)


def _count(groups: list[RolloutGroup]) -> int:
    """Tokens of a step, each prompt's once; counted by the first rank that asks."""
    global _counted
    if _counted[0] is not groups:
        total = sum(len(g.prompt.token_ids) + sum(len(c.token_ids) for c in g.completions) for g in groups)
        _counted = groups, total
    return _counted[1]


class SimulatedLearner(SimulatedActor):
    """A rank: its share of a step's tokens takes its time; all ranks end together."""

    def __init__(self, timings: Timings, config: Config, rank: int, world_size: int, _: tuple[str, int]) -> None:
        self._timings, self._config, self._rank, self._ranks = timings, config, rank, world_size
        self._ledger = TimeLedger(f"learner-{rank}", "wait_for_groups")
        self._version = 0

    async def open_sender(self, run_id: str) -> None:
        """Nothing to open."""

    async def times(self) -> TimeSlice:
        """See ``Learner``."""
        return self._ledger.take()

    async def save(self, directory: str) -> None:
        """Nothing to save."""
        Path(directory).mkdir(parents=True, exist_ok=True)

    async def publish(self, canary: np.ndarray) -> Publication | None:
        """See ``Learner``."""
        with self._ledger.during("gather"):
            await asyncio.sleep(self._timings.publish_s)
        if self._rank:
            return None
        proof = Canary(canary, np.zeros(len(canary) - 1, np.float32))
        return Publication(self._version, "simulated", "", (TensorMeta("w", "float32", (1,), 0, 4),), "digest", proof)

    async def train_and_publish(
        self, groups: list[RolloutGroup], canary: np.ndarray
    ) -> tuple[StepReport, Publication | None]:
        """See ``Learner``."""
        updates = self._config.updates_per_batch
        tokens = _count(groups)
        with self._ledger.during("backward"):
            share = self._timings.train_token_s * tokens / self._ranks * self._config.learner.epochs_per_batch
            fixed = self._timings.train_step_s + (self._timings.ranks_s if self._ranks > 1 else 0.0)
            await asyncio.sleep(updates * fixed + share)
        self._version += updates
        advantages = {group.group_id: [1.0] * len(group.completions) for group in groups} if not self._rank else {}
        metrics = {"train_tokens": float(tokens), "advantages/abs_mean": 1.0}
        publication = await self.publish(canary)
        return StepReport(self._version, True, metrics, advantages, self._ledger.take()), publication


class SimulatedRewards(SimulatedActor):
    """A worker whose rewards are fair coins."""

    def __init__(self, timings: Timings, names: list[str], seed: int, index: str) -> None:
        self._timings, self._names = timings, names
        self._rng = np.random.default_rng(seed)
        self._ledger = TimeLedger(index, "wait_for_groups")

    async def ready(self) -> bool:
        """At once."""
        return True

    async def times(self) -> TimeSlice:
        """See ``RewardWorker``."""
        return self._ledger.take()

    async def score(self, groups: list[Group], _: dict[str, Any]) -> list[Scores]:
        """See ``RewardWorker``."""
        await asyncio.sleep(self._timings.score_call_s)
        with self._ledger.during("score"):
            await asyncio.sleep(self._timings.score_s * len(groups))
        scores = [Scores({name: self._coins(len(c)) for name in self._names}) for _, _, c in groups]
        scores[0].times = self._ledger.take()
        return scores

    def _coins(self, count: int) -> np.ndarray:
        coins = self._rng.integers(0, 2, count).astype(np.float32)
        coins[0] = 1 - coins[-1]  # Always something to learn.
        return coins


class SimulatedSlot:
    """A place for any of them."""

    def __init__(self, timings: Timings, config: Config) -> None:
        self._timings, self._config = timings, config

    async def ready(self) -> None:
        """At once."""

    def spawn(self, kind: type, *arguments: Any, environment: dict[str, str], concurrency: int = 1) -> Any:
        """The stand-in for ``kind``."""
        if kind.__name__ == "Engine":
            return SimulatedEngine(self._timings, *arguments)
        if kind.__name__ == "Learner":
            return SimulatedLearner(self._timings, *arguments)
        names = [f.name or f.function or "reward" for f in self._config.reward.functions]
        return SimulatedRewards(self._timings, names, self._config.run.seed, arguments[-1])

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Nothing is asked of a host that is not there but for an address."""
        return ("", 0)

    def share(self, value: Any) -> Any:
        """Itself."""
        return value

    def free(self) -> None:
        """Nothing to give back."""


class SimulatedPlaces:
    """Room for whatever is asked."""

    def __init__(self, timings: Timings, config: Config) -> None:
        self._slot = SimulatedSlot(timings, config)
        self.engines = [self._slot] * config.rollout.num_engines
        self.ranks = [self._slot] * config.learner.num_ranks
        self.rewards = [self._slot] * config.reward.workers

    def another_engine(self) -> SimulatedSlot:
        """At once."""
        return self._slot

    def on(self, node: str) -> SimulatedSlot:
        """All are on one."""
        return self._slot
