"""Admission, order and the staleness bound, in asyncio alone.

A group is admitted when fewer than ``(batches_ahead + 1) * groups_per_batch`` are in flight, and keeps its slot
until the weights of the batch that used it are published. Groups leave in admission order. Together this bounds
staleness: at most ``batches_ahead`` batches can lie between a group's admission and its use.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict

from shared.errors import NothingToLearn
from shared.types import RolloutGroup


class _Hole:
    """The place of a group that will not come."""


class RolloutBuffer:
    """Groups between admission and training; each leaves exactly once: taken, or discarded with a reason."""

    def __init__(self, groups_per_batch: int, batches_ahead: int, barren_limit: int, max_resampled: int = 0) -> None:
        """``batches_ahead``: batches that may be begun before the weights of the first are published."""
        self._groups_per_batch, self._batches_ahead = groups_per_batch, batches_ahead + 1
        self._capacity = groups_per_batch * self._batches_ahead
        self._barren_limit, self._max_resampled = barren_limit, max_resampled
        self._resampled = 0
        self._slots = 0
        self._waiting: OrderedDict[int, RolloutGroup | _Hole | None] = OrderedDict()
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
        return sum(isinstance(group, RolloutGroup) for group in self._waiting.values())

    async def admit(self) -> None:
        """Wait for a free slot and take it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._slots < self._capacity)
            self._slots += 1

    def enter(self, group_id: int) -> None:
        """Register an admitted group; ids must rise."""
        assert not self._waiting or group_id > next(reversed(self._waiting))
        self._waiting[group_id] = None

    async def put(self, group: RolloutGroup, signal: bool) -> None:
        """A registered group is scored; ``signal`` says whether its rewards differ."""
        async with self._changed:
            self._waiting[group.group_id] = group
            self._count_signal(signal)
            self._changed.notify_all()

    async def discard(self, group_id: int, fate: str) -> None:
        """A registered group will not be trained: give its slot back at once."""
        async with self._changed:
            del self._waiting[group_id]
            self.fates[fate] += 1
            self._slots -= 1
            self._changed.notify_all()

    async def replace(self, group_id: int) -> None:
        """A registered group has no signal: its slot goes to a fresh prompt, until too many went that way.

        Then it leaves a hole in its batch, which becomes smaller; the order, and with it the staleness bound, stays.
        """
        async with self._changed:
            self.fates["no_signal"] += 1
            self._resampled += 1
            if self._resampled > self._max_resampled:
                self._waiting[group_id] = _Hole()
                self.fates["holes"] += 1
            else:
                del self._waiting[group_id]
                self._slots -= 1
            self._count_signal(False)
            self._changed.notify_all()

    async def take(self) -> list[RolloutGroup]:
        """The next batch in admission order; waits for the oldest group even if younger ones are ready."""
        taken: list[RolloutGroup] = []
        for _ in range(self._groups_per_batch):
            async with self._changed:
                await self._changed.wait_for(self._head_is_ready)
                _, group = self._waiting.popitem(last=False)
                if isinstance(group, RolloutGroup):
                    taken.append(group)
        self._resampled = 0
        self.fates["taken"] += len(taken)
        return taken

    async def release(self, batches_left: int) -> None:
        """The weights of the batch taken last are published: admit another, if it will still be needed."""
        async with self._changed:
            self._slots -= self._groups_per_batch
            assert self._slots >= 0
            self._capacity = self._groups_per_batch * min(self._batches_ahead, batches_left)
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
