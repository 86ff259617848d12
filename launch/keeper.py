"""Saves checkpoints for the controller: the learner stands still only while it writes, the rest happens beside the run."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from launch.partners import Learners, Recorder
from shared.ledger import TimeLedger
from shared.types import RolloutGroup

DISK_LIMIT_S = 600.0


class Keeper:
    """At most one checkpoint is on its way to the disk."""

    def __init__(self, learners: Learners, recorder: Recorder, ledger: TimeLedger) -> None:
        """``ledger`` is the controller's own."""
        self._learners, self._recorder, self._time = learners, recorder, ledger
        self.version = 0
        """Policy version of the last one that was begun; the model that a run begins with needs none."""
        self._task: asyncio.Task[bool] | None = None
        self._pause: dict[str, float] = {}

    async def save(self, state: dict[str, Any], queued: list[RolloutGroup]) -> None:
        """Begin the checkpoint of ``state["version"]``, unless there is one; return when the learner may go on."""
        await self.finish()
        version = state["version"]
        if self.version == version:
            return
        self.version, started = version, time.monotonic()
        with self._time.during("save"):
            try:
                draft = self._recorder.draft(version)
                await self._learners.save(str(draft))
            except OSError as error:
                self.version = 0
                self._recorder.unsaved(version, error)
                return
        self._pause = {"checkpoint/pause_seconds": time.monotonic() - started}
        self._task = asyncio.create_task(self._recorder.commit(draft, state, queued))

    async def save_for_good(self, state: dict[str, Any], queued: list[RolloutGroup]) -> None:
        """The last checkpoint, once more should the disk not let it at first."""
        for _ in range(2):
            await self.save(state, queued)
            await self.finish()
            if self.version == state["version"]:
                break

    async def finish(self) -> None:
        """Wait until the last one is on the disk, or cannot be; then ``version`` is 0."""
        if self._task is None:
            return
        task, self._task = self._task, None
        written, version = False, self.version
        try:
            async with asyncio.timeout(DISK_LIMIT_S):
                written = await asyncio.shield(task)
        except TimeoutError:
            self._recorder.unsaved(version, OSError(f"not on the disk after {DISK_LIMIT_S:g} s"))
        finally:
            self.version = version if written else 0

    def metrics(self) -> dict[str, float]:
        """Seconds that the learner stood still for the last one, once."""
        pause, self._pause = self._pause, {}
        return pause
