"""The engines as one object: routes groups, takes every engine through publications, and replaces those that are lost.

Invariants: no completion leaves the pool before the weights that sampled it were proved on their engine, by the digest of
the received bytes and by the canary's log-probs; a group has one answer, of the attempt made last. An engine that dies,
hangs or holds wrong weights is given another life (``Fleet``) while the others go on. Engines are updated
independently; one that comes back takes the newest publication by itself.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from rollout.engine import Sampling
from rollout.fleet import Fleet
from rollout.replica import Replica, Unanswered, Unreachable
from shared.config import Config
from shared.errors import EngineFailed, GroupFailed, WeightProofFailed
from shared.ledger import TimeSlice
from shared.types import Completion, Prompt
from shared.weights import Link, Publication

RESET_LIMIT_S = 30.0
CATCH_UP_TRIES = 20
"""Publications that may overtake an engine on its way back."""


def _worst(reports: list[dict[str, float]]) -> dict[str, float]:
    names = {name for report in reports for name in report}
    return {name: max(report[name] for report in reports if name in report) for name in names}


class EnginePool:
    """``config.rollout.num_engines`` engines; ``slots`` holds the place of each in the cluster."""

    def __init__(self, config: Config, slots: list[Any], environment: dict[str, str]) -> None:
        self._config = config
        self._fleet = Fleet(config, slots, environment, self._follow)
        self._newest: Publication | None = None
        self._refused: set[int] = set()
        """Engines that do not take ``_newest``."""
        self._updates: set[asyncio.Task[None]] = set()
        self._sampling: set[asyncio.Future[tuple[Completion, ...]]] = set()
        self._redispatched = 0
        self.slices: list[TimeSlice] = []
        """What the engines did, as far as their answers told."""

    @property
    def workers(self) -> int:
        """Engine workers over all engines."""
        return self._config.rollout.num_engines * self._config.rollout.tensor_parallel_size

    async def start(self) -> None:
        """Start all engines side by side and wait until each answers. Raises ``EngineFailed``."""
        await self._fleet.start()

    async def generate(self, group_id: int, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]:
        """Sample one prompt on the least busy engine, and again on another if that one is lost.

        Raises ``GroupFailed`` if two requests exceed their deadline, if no engine is healthy for as long, or at a
        ``reset``; ``FleetExhausted`` when no engine is left. Who goes away aborts the request.
        """
        work = asyncio.ensure_future(self._sample(group_id, prompt, sampling))
        self._sampling.add(work)
        try:
            await asyncio.wait((work,))
            if work not in self._sampling:
                raise GroupFailed(group_id, "reset", "dispatched before the engines were reset")
            return work.result()
        finally:
            self._sampling.discard(work)
            work.cancel()

    async def connect(self, link: Link) -> None:
        """Join the learner's link; every engine's workers get ranks of their own in it."""
        self._fleet.replaceable = False
        per_engine = self._config.rollout.tensor_parallel_size
        limit = self._config.rollout.start_timeout_s
        await asyncio.gather(
            *(r.ask("connect", link, 1 + r.index * per_engine, timeout_s=limit) for r in self._fleet.running())
        )

    async def receive(self, publication: Publication) -> dict[str, float]:
        """Bring the engines to ``publication``; on return all that serve sample with it. Returns the slowest's figures.

        A suspect is not waited for: it is stale until it has followed. Raises ``WeightProofFailed`` if every engine
        refuses the publication.
        """
        self._newest, self._refused = publication, set()
        replicas = [replica for replica in self._fleet.running() if not replica.catching_up]
        if publication.collective:  # An engine that fails in a broadcast takes the link with it: no other life for it.
            await asyncio.gather(*(self._take(replica, publication) for replica in replicas))
        for replica in replicas if not publication.collective else ():
            update = asyncio.create_task(self._follow(replica))
            self._updates.add(update)
            update.add_done_callback(self._updates.discard)

        def holding() -> list[Replica]:
            awaited = any(r.publication is not publication and self._fleet.is_trusted(r) for r in replicas)
            return [] if awaited else [r for r in self._fleet.running() if r.publication is publication]

        there = await self._fleet.until(holding)
        for replica in replicas:
            if replica not in there:
                self._fleet.tell(replica, "outdated")
        return _worst([replica.taken for replica in there])

    async def prove(self, publication: Publication, digest: str) -> dict[str, float]:
        """Compare the engines' digests and canary log-probs with the learner's; then results flow.

        Raises ``WeightProofFailed`` if every engine fails.
        """
        if publication.collective:
            await asyncio.gather(*(self._prove(r, publication, digest) for r in self._fleet.running()))

        def proved() -> list[Replica]:
            there = [r for r in self._fleet.running() if r.publication is publication]
            awaited = any(not r.proved and self._fleet.is_trusted(r) for r in there)
            return [] if awaited else [r for r in there if r.proved]

        assert publication.digest in ("", digest)
        return _worst([replica.proof for replica in await self._fleet.until(proved)])

    async def reset(self) -> None:
        """Forget all weights, requests, keys and values: version numbers may name other weights from now on.

        Groups that wait for completions fail; engines serve again after the next publication.
        """
        self._newest, self._refused = None, set()
        dropped, self._sampling = self._sampling, set()
        for work in dropped:
            work.cancel()
        for replica in self._fleet.running():
            replica.proved = False
            self._fleet.tell(replica, "outdated")
        await asyncio.gather(*(self._reset(replica) for replica in self._fleet.running()))

    def metrics(self) -> dict[str, float]:
        """Engines that serve now, and what losses have cost since the start."""
        return {
            "engines/healthy": float(sum(map(self._fleet.is_healthy, self._fleet.running()))),
            "engines/restarts": float(sum(health.restarts for health in self._fleet.health)),
            "engines/redispatched": float(self._redispatched),
            "engines/recovery_seconds": self._fleet.recovery_s,
        }

    async def close_books(self) -> None:
        """Ask the engines for what is still missing in ``slices``; one that is lost now has nothing to add."""
        limit = self._config.rollout.request_timeout_s
        calls = [replica.ask("times", timeout_s=limit) for replica in self._fleet.running()]
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(answer, TimeSlice):
                self.slices.append(answer)
        now = time.time()
        for index, health in enumerate(self._fleet.health):
            if health.state == "retired":
                self.slices.append(
                    TimeSlice(f"engine-{index}", now, now, (("start", now, now),))
                )  # Of no life any more.

    def close(self) -> None:
        """Kill the engines."""
        self._fleet.close()

    # --- groups ---

    async def _sample(self, group_id: int, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]:
        limit, overdue = self._config.rollout.request_timeout_s, 0
        while True:
            replica = await self._idlest(group_id, limit)
            dispatched = time.monotonic()
            try:
                completions = await replica.generate(prompt, sampling, limit)
                self._fleet.tell(replica, "progressed")
                await self._fleet.until(replica.settled)
                if not replica.ended:
                    return completions
            except EngineFailed as error:
                self._fleet.lose(replica, error)
            except Unreachable:
                if self._fleet.is_healthy(replica):
                    self._fleet.tell(replica, "probe_missed")
            except Unanswered:
                self._fleet.tell(replica, "overdue" if replica.finished_at > dispatched else "stuck")
                overdue += 1
                if overdue == 2:
                    detail = f"> {limit:g} s on {replica.name}, the second time"
                    raise GroupFailed(group_id, "generation_timeout", detail) from None
            self._redispatched += 1

    async def _idlest(self, group_id: int, limit_s: float) -> Replica:
        """The healthy engine with the fewest requests, as soon as there is one."""
        try:
            async with asyncio.timeout(limit_s):
                return await self._fleet.until(self._fleet.idlest)
        except TimeoutError:
            raise GroupFailed(group_id, "generation_timeout", f"no engine was healthy for {limit_s:g} s") from None

    # --- weights ---

    async def _reset(self, replica: Replica) -> None:
        try:
            await replica.ask("reset", timeout_s=RESET_LIMIT_S)
        except EngineFailed as error:
            self._fleet.lose(replica, error)

    async def _take(self, replica: Replica, publication: Publication) -> None:
        self.slices.append(await replica.take(publication))
        self._fleet.notify()

    async def _prove(self, replica: Replica, publication: Publication, digest: str) -> None:
        await replica.prove(publication, digest)
        if publication is not self._newest:
            return
        self._refused.discard(replica.index)
        self._fleet.tell(replica, "synced")
        self._fleet.notify()

    async def _follow(self, replica: Replica) -> None:
        """Bring one engine to the newest publication, whatever the others do; one that fails is lost."""
        replica.catching_up = True
        try:
            await self._catch_up(replica)
        except (EngineFailed, WeightProofFailed) as error:
            self._fleet.lose(replica, error)
        except Exception as error:  # A fault of ours: whoever waits must hear of it.
            self._fleet.fail(error)
        finally:
            replica.catching_up = False

    async def _catch_up(self, replica: Replica) -> None:
        for _ in range(CATCH_UP_TRIES):
            newest = self._newest
            if newest is None:  # The next one will include this engine.
                return
            try:
                await self._take(replica, newest)
                await self._prove(replica, newest, newest.digest)
                if newest is self._newest:
                    return
            except WeightProofFailed as error:
                # The memory of a publication that has been overtaken may hold another by now.
                if newest is self._newest:
                    self._refuse(replica, error)
                    raise
        raise EngineFailed(f"{replica.name} was overtaken by {CATCH_UP_TRIES} publications")

    def _refuse(self, replica: Replica, error: WeightProofFailed) -> None:
        """An engine does not take the newest publication. If none does, it is the weights and not the engines."""
        self._refused.add(replica.index)
        if self._fleet.all_left_in(self._refused):
            self._fleet.fail(error)
