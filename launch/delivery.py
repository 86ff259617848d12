"""Brings new weights from the learner to the engines: as a snapshot, or as a broadcast in which both sides take part.

A broadcast runs to its end even if the run is ending, because a learner that waits in a broadcast cannot save a checkpoint.
Invariant: every broadcast ends, either complete or with ``LearnerLost``.
"""

from __future__ import annotations

import asyncio

from launch.partners import Engines, Learners
from shared.errors import LearnerLost, one_line
from shared.weights import Publication

Delivered = tuple[str, dict[str, float]]
"""The digest of what was sent, and the engines' figures."""


class Delivery:
    """Brings publications to the engines, one at a time."""

    def __init__(self, learners: Learners, engines: Engines) -> None:
        self._learners, self._engines = learners, engines
        self._broadcast: asyncio.Future[Delivered] | None = None

    async def bring(self, publication: Publication) -> Delivered:
        """Send ``publication`` and let the engines take it. Raises ``LinkLost`` before, or ``LearnerLost`` in, a broadcast."""
        if not publication.collective:
            return await asyncio.gather(self._learners.send(publication), self._engines.receive(publication))
        self._engines.check()  # A sender that begins alone hangs.
        self._broadcast = asyncio.ensure_future(self._together(publication))
        self._broadcast.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._broadcast)

    async def ended_well(self) -> bool:
        """Wait for a broadcast that is under way. Return True if the learner is free for other calls."""
        if self._broadcast is None:
            return True
        await asyncio.wait([self._broadcast])
        return not self._broadcast.cancelled() and self._broadcast.exception() is None

    async def _together(self, publication: Publication) -> Delivered:
        """Run both sides of a broadcast; if one fails, cancel the other, which would wait for ever. Raises ``LearnerLost``."""
        sides = self._learners.send(publication), self._engines.receive(publication)
        calls = [asyncio.ensure_future(side) for side in sides]
        try:
            digest, figures = await asyncio.gather(*calls)
            return digest, figures  # type: ignore[return-value]
        except Exception as error:
            raise LearnerLost(f"version {publication.version} did not arrive: {one_line(error, 400)}") from error
        finally:
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
