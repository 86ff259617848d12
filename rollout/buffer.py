"""Admission, order and the staleness bound, in asyncio alone.

A group is admitted when fewer than ``(batches_ahead + 1) * groups_per_batch`` are in flight, and keeps its slot
until the weights of the batch that used it are published. Groups leave in admission order. Together this bounds
staleness: at most ``batches_ahead`` batches can lie between a group's admission and its use.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from shared.errors import NothingToLearn
from shared.types import RolloutGroup

WARN_STEPS = 20
"""Steps without any signal after which the user is warned, if they come before half the limit."""


class _Hole:
    """The place of a group that will not come."""


class RolloutBuffer:
    """Groups between admission and training; each leaves exactly once: taken, or discarded with a reason."""

    def __init__(self, groups_per_batch: int, batches_ahead: int, barren_limit: int, max_resampled: int = 0) -> None:
        """``batches_ahead``: batches that may be begun before the weights of the first are published."""
        self._groups_per_batch, self._batches_ahead = groups_per_batch, batches_ahead + 1
        self._capacity = groups_per_batch * self._batches_ahead
        self._barren_limit, self._max_resampled = barren_limit, max_resampled
        self._warn_at = min(WARN_STEPS * groups_per_batch, barren_limit // 2)
        self._warned = False
        self._resampled = 0
        self._slots = 0
        self._waiting: OrderedDict[int, RolloutGroup | _Hole | None] = OrderedDict()
        self._taken: list[RolloutGroup] = []
        """Groups of a batch that is not complete yet."""
        self._changed = asyncio.Condition()
        self._barren = 0
        self.holes = 0
        """Places that were left empty because too many groups had been replaced."""

    @property
    def in_flight(self) -> int:
        """Slots taken: groups being generated, scored, queued or trained."""
        return self._slots

    @property
    def ready(self) -> int:
        """Scored groups that wait for the learner."""
        return sum(isinstance(group, RolloutGroup) for group in self._waiting.values())

    def status(self) -> str:
        """Where the groups are, for a log."""
        elsewhere = self.in_flight - self.ready
        return f"{self.ready} scored groups wait for the learner, {elsewhere} groups are generated, scored or trained"

    def metrics(self) -> dict[str, float]:
        """How full it is, and how many places stayed empty."""
        depth = {"buffer/ready": self.ready, "buffer/in_flight": self.in_flight, "groups/holes": self.holes}
        return {name: float(value) for name, value in depth.items()}

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

    async def discard(self, group_id: int) -> None:
        """A registered group will not be trained: give its slot back at once."""
        async with self._changed:
            del self._waiting[group_id]
            self._slots -= 1
            self._changed.notify_all()

    async def replace(self, group_id: int) -> None:
        """A registered group has no signal: its slot goes to a fresh prompt, until too many went that way.

        Then it leaves a hole in its batch, which becomes smaller; the order, and with it the staleness bound, stays.
        """
        async with self._changed:
            self._resampled += 1
            if self._resampled > self._max_resampled:
                self._waiting[group_id] = _Hole()
                self.holes += 1
            else:
                del self._waiting[group_id]
                self._slots -= 1
            self._count_signal(False)
            self._changed.notify_all()

    async def take(self) -> list[RolloutGroup]:
        """The next batch in admission order; waits for the oldest group even if younger ones are ready."""
        self._taken = taken = []
        for _ in range(self._groups_per_batch):
            async with self._changed:
                await self._changed.wait_for(self._head_is_ready)
                _, group = self._waiting.popitem(last=False)
                if isinstance(group, RolloutGroup):
                    taken.append(group)
        self._resampled, self._taken = 0, []
        return taken

    async def release(self, batches_left: int) -> None:
        """The weights of the batch taken last are published: admit another, if it will still be needed."""
        async with self._changed:
            self._slots -= self._groups_per_batch
            assert self._slots >= 0
            self.limit(batches_left)
            self._changed.notify_all()

    def limit(self, batches_left: int) -> None:
        """Admit no more than will still be needed."""
        self._capacity = self._groups_per_batch * min(self._batches_ahead, batches_left)

    # --- what a checkpoint holds ---

    @property
    def members(self) -> list[int]:
        """Ids of the groups between admission and training."""
        waiting = [group_id for group_id, group in self._waiting.items() if not isinstance(group, _Hole)]
        return [*(group.group_id for group in self._taken), *waiting]

    @property
    def unfinished(self) -> list[int]:
        """Ids of the groups that are being generated or scored."""
        return [group_id for group_id, group in self._waiting.items() if group is None]

    def queued(self) -> list[RolloutGroup]:
        """Scored groups that wait for the learner, in admission order."""
        return [group for group in self._waiting.values() if isinstance(group, RolloutGroup)]

    def state(self) -> dict[str, Any]:
        """Everything but the groups themselves."""
        empty = [group_id for group_id, group in self._waiting.items() if isinstance(group, _Hole)]
        return {"barren": self._barren, "resampled": self._resampled, "empty": empty}

    def restore(self, state: dict[str, Any], queued: Iterable[RolloutGroup], unfinished: Iterable[int]) -> None:
        """Take the places again that groups had: scored ones, empty places, and those to be rolled out once more."""
        places: dict[int, RolloutGroup | _Hole | None] = dict.fromkeys(unfinished)
        places |= {group_id: _Hole() for group_id in state["empty"]}
        places |= {group.group_id: group for group in queued}
        self._waiting = OrderedDict(sorted(places.items()))
        self._slots = len(places)
        self._barren, self._resampled = state["barren"], state["resampled"]

    def _head_is_ready(self) -> bool:
        return bool(self._waiting) and next(iter(self._waiting.values())) is not None

    def _count_signal(self, signal: bool) -> None:
        self._barren = 0 if signal else self._barren + 1
        what, place = "nothing to learn", "reward.functions"
        found, expected = f"{self._barren} groups in a row with equal rewards", "some spread"
        fix = "check the reward function and the difficulty of the prompts"
        if self._barren >= self._barren_limit:
            expected += f" within algorithm.barren_limit = {self._barren_limit}"
            raise NothingToLearn("E307", what, place, found, expected, fix)
        if self._barren == self._warn_at and not self._warned:
            self._warned = True
            fix += f"; at {self._barren_limit} (algorithm.barren_limit) the run ends"
            print(f"warning[W307] {what} — {place}. Found {found}, expected {expected}. Fix: {fix}", flush=True)
