"""Admission, order and the staleness bound, in asyncio alone.

A group is admitted when fewer than ``(max_staleness + 1) * groups_per_step`` are in flight, and keeps its slot
until the weights of the step that used it are published. Groups leave in admission order. Together this bounds
staleness: at most ``max_staleness`` steps can lie between a group's admission and its use.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict

from shared.errors import NothingToLearn
from shared.types import RolloutGroup


class RolloutBuffer:
    """Groups between admission and training; each leaves exactly once: taken, or discarded with a reason."""

    def __init__(self, groups_per_step: int, max_staleness: int, barren_limit: int) -> None:
        self._groups_per_step, self._steps_ahead = groups_per_step, max_staleness + 1
        self._capacity = groups_per_step * self._steps_ahead
        self._barren_limit = barren_limit
        self._slots = 0
        self._waiting: OrderedDict[int, RolloutGroup | None] = OrderedDict()
        self._changed = asyncio.Condition()
        self._barren = 0
        self.fates: Counter[str] = Counter()
        """Groups that left, by fate."""

    @property
    def in_flight(self) -> int:
        """Slots taken: groups being generated, scored, queued or trained."""
        return self._slots

    @property
    def ready(self) -> int:
        """Scored groups that wait for the learner."""
        return sum(group is not None for group in self._waiting.values())

    async def admit(self) -> None:
        """Wait for a free slot and take it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._slots < self._capacity)
            self._slots += 1

    def enter(self, group_id: int) -> None:
        """Register an admitted group; ids must rise."""
        assert not self._waiting or group_id > next(reversed(self._waiting))
        self._waiting[group_id] = None

    async def put(self, group: RolloutGroup) -> None:
        """A registered group is scored."""
        async with self._changed:
            self._waiting[group.group_id] = group
            self._count_signal(group.has_signal())
            self._changed.notify_all()

    async def discard(self, group_id: int, fate: str) -> None:
        """A registered group will not be trained: give its slot back at once."""
        async with self._changed:
            del self._waiting[group_id]
            self.fates[fate] += 1
            self._slots -= 1
            if fate == "no_signal":
                self._count_signal(False)
            self._changed.notify_all()

    async def take(self, count: int) -> list[RolloutGroup]:
        """The next ``count`` groups in admission order; waits for the oldest even if younger ones are ready."""
        taken: list[RolloutGroup] = []
        while len(taken) < count:
            async with self._changed:
                await self._changed.wait_for(self._head_is_ready)
                _, group = self._waiting.popitem(last=False)
                assert group is not None
                taken.append(group)
        self.fates["taken"] += count
        return taken

    async def release(self, count: int, steps_left: int) -> None:
        """The weights of the step that took ``count`` groups are published: admit as many, if steps are left for them."""
        async with self._changed:
            self._slots -= count
            assert self._slots >= 0
            self._capacity = self._groups_per_step * min(self._steps_ahead, steps_left)
            self._changed.notify_all()

    def _head_is_ready(self) -> bool:
        return bool(self._waiting) and next(iter(self._waiting.values())) is not None

    def _count_signal(self, signal: bool) -> None:
        self._barren = 0 if signal else self._barren + 1
        if self._barren >= self._barren_limit:
            raise NothingToLearn(
                f"{self._barren} groups in a row had equal rewards (algorithm.barren_limit): "
                "check the reward function and the difficulty of the prompts"
            )
