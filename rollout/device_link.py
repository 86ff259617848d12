"""The engines that receive weights together with the learner, over NCCL or CUDA IPC.

Invariant: while the link exists, every engine in it is healthy. When one is lost, every call that waits for the engines raises
``LinkLost``, and the run rebuilds both ends from a checkpoint. An engine that did not finish a broadcast is replaced, because
NCCL cannot abort: the engine's process may hang for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rollout.fleet import Fleet
from rollout.replica import Replica
from shared.config import Config
from shared.errors import EngineFailed, LinkLost, one_line
from shared.weights import Link, Publication


class DeviceLink:
    """The engines' end of the link of a ``fleet``; ``fleet.linked`` names those that are in it."""

    def __init__(self, config: Config, fleet: Fleet) -> None:
        self._rollout, self._fleet = config.rollout, fleet

    async def complete(self, limit_s: float) -> None:
        """Wait until all engines run that are to take part. Raises ``LinkLost`` if too few do within ``limit_s``.

        After ``limit_s`` the link is built without the engines that are missing, unless every engine shares its GPU with a learner rank.
        """
        everyone = await self._fleet.complete(limit_s)
        running, wanted = len(self._fleet.running()), self._rollout.num_engines
        if not running or (self._rollout.colocate and running < wanted):
            raise LinkLost(f"{running} of {wanted} engines run after {limit_s:g} s")
        if not everyone:
            print(
                f"the link is built without the engines that do not run yet: {running} of {self._fleet.size} do",
                flush=True,
            )

    async def join(self, link: Link) -> None:
        """Let every worker of every engine that runs join ``link``, from rank 1 on. Raises ``LinkLost``."""
        workers, members = self._rollout.workers_per_engine, self._fleet.running()
        if len(members) * workers != link.workers:
            raise LinkLost(f"{len(members)} engines run, the link is for {link.workers} workers")
        self._fleet.linked = set(members)
        ranks = range(1, 1 + link.workers, workers)
        limit = self._rollout.start_timeout_s
        joining = (r.ask("connect", link, rank, timeout_s=limit) for r, rank in zip(members, ranks, strict=True))
        try:
            await self._fleet.traffic.unless_failed(asyncio.gather(*joining))
        except Exception as error:
            raise LinkLost(f"an engine did not join: {one_line(error, 400)}") from error

    async def take(
        self, publication: Publication, one_takes: Callable[[Replica, Publication], Awaitable[None]]
    ) -> list[Replica]:
        """Bring every engine of the link through a broadcast; those engines. Raises ``LinkLost`` if one does not get through.

        Then, or when this is cancelled, each engine that is not through is lost.
        """
        self._fleet.traffic.check()
        if self._rollout.colocate:  # Nothing was opened before: each engine's link is the memory of its GPU.
            self._fleet.linked = set(self._fleet.running())
        members = [replica for replica in self._fleet.running() if replica in self._fleet.linked]
        takes = [asyncio.ensure_future(one_takes(replica, publication)) for replica in members]
        reason = "the broadcast of weights was given up"
        try:
            waiting = asyncio.wait(takes, return_when=asyncio.FIRST_EXCEPTION)
            done, _ = await self._fleet.traffic.unless_failed(waiting)
            for task in done:
                task.result()
        except Exception as error:
            reason = one_line(error, 400)
            raise LinkLost(f"the broadcast of version {publication.version} failed: {reason}") from error
        finally:
            for replica, task in zip(members, takes, strict=True):
                if not task.done() or task.cancelled() or task.exception() is not None:
                    task.cancel()
                    self._fleet.lose(replica, EngineFailed(reason))
        return members
