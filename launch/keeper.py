"""Saves checkpoints for the controller: the learner stands still only while it writes, the rest happens beside the run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from launch.partners import Learners, Recorder
from shared.errors import one_line
from shared.ledger import TimeLedger
from shared.types import RolloutGroup

DISK_LIMIT_S = 600.0
INTERRUPT_LIMIT_S = 120.0
"""Longest time in which a run that is interrupted saves what it has learned."""


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
        """Begin the checkpoint of ``state["version"]``, unless there is one; return when the learner may go on.

        A caller that is cancelled leaves the checkpoint on its way; ``finish`` waits for it.
        """
        await self.finish()
        if self.version == state["version"]:
            return
        self.version, files = state["version"], asyncio.Event()
        self._task = asyncio.create_task(self._write(state, queued, files))
        written = asyncio.ensure_future(files.wait())
        try:
            with self._time.during("save"):
                await asyncio.wait((self._task, written), return_when=asyncio.FIRST_COMPLETED)
        finally:
            written.cancel()
        if self._task.done():
            await self.finish()

    async def _write(self, state: dict[str, Any], queued: list[RolloutGroup], files: asyncio.Event) -> bool:
        """Write a checkpoint; ``files`` is set when those of the learner are written. False if the disk did not let it."""
        started = time.monotonic()
        try:
            draft = self._recorder.draft(state["version"])
            await self._learners.save(str(draft))
        except OSError as error:
            self._recorder.unsaved(state["version"], error)
            return False
        self._pause = {"checkpoint/pause_seconds": time.monotonic() - started}
        files.set()
        return await self._recorder.commit(draft, state, queued)

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
        done, _ = await asyncio.wait((self._task,), timeout=DISK_LIMIT_S)
        task, self._task, version = self._task, None, self.version
        self.version = 0
        if not done:
            self._recorder.unsaved(version, OSError(f"not on the disk after {DISK_LIMIT_S:g} s"))
        elif task.result():
            self.version = version

    def metrics(self) -> dict[str, float]:
        """Seconds that the learner stood still for the last one, once."""
        pause, self._pause = self._pause, {}
        return pause


@asynccontextmanager
async def rescuing(cause: BaseException, anything: bool) -> AsyncIterator[None]:
    """Save in the block what can be saved of a run that ends by ``cause``; what prevents it becomes warning W903.

    The block has a limit of time if the run was cancelled, for somebody waits for its end. ``anything``: it has work to do.
    """
    limit = INTERRUPT_LIMIT_S if isinstance(cause, asyncio.CancelledError) else None
    if limit and anything:
        print(f"saving what was learned, the step under way included, within {limit:g} s", flush=True)
    try:
        async with asyncio.timeout(limit):
            yield
    except Exception as error:
        why = f"no answer within {limit:g} s" if limit and isinstance(error, TimeoutError) else one_line(error)
        print(f"warning[W903] not all was saved before the end: {why}", flush=True)
