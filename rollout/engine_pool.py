"""The engines as one object: routes groups, takes every engine through publications, and replaces those that are lost.

Invariants: no completion leaves the pool before the weights that sampled it were proved on their engine, by the digest of
the received bytes and by the canary's log-probs; a group has one answer, of the attempt made last. An engine that dies,
hangs or holds wrong weights is given another life (``Fleet``) while the others go on. Engines are updated
independently; one that comes back takes the newest publication by itself.
"""

from __future__ import annotations

import asyncio
import time

from rollout.device_link import DeviceLink
from rollout.engine import Sampling
from rollout.fleet import Fleet
from rollout.relays import NotBrought, Relays
from rollout.replica import Replica, Unanswered, Unreachable, slowest
from shared.actors import Places
from shared.config import Config
from shared.errors import EngineFailed, GroupFailed, InputError, WeightProofFailed
from shared.ledger import TimeSlice
from shared.types import Completion, Prompt
from shared.weights import Publication, stage_limit

RESET_LIMIT_S = 30.0
CATCH_UP_TRIES = 20
"""Publications that may overtake an engine on its way back."""


class EnginePool:
    """``config.rollout.num_engines`` engines and, as room appears, up to ``max_engines``; or as many as ``scale`` says."""

    def __init__(self, config: Config, places: Places, environment: dict[str, str]) -> None:
        self._config, self._places = config, places
        self._relays = Relays(places, environment)
        self._fleet = Fleet(config, places.engines, environment, self._follow)
        self._traffic, self.link = self._fleet.traffic, DeviceLink(config, self._fleet)
        self._newest: Publication | None = None
        self._refused: set[int] = set()
        """Engines that do not take ``_newest``."""
        self._updates: set[asyncio.Task[None]] = set()
        self._sampling: set[asyncio.Future[tuple[Completion, ...]]] = set()
        self._redispatched = 0
        self.slices: list[TimeSlice] = []
        """What the engines did, as far as their answers told."""

    @property
    def size(self) -> int:
        """Engines that serve, start, or wait for a place."""
        return self._fleet.size

    @property
    def scalable(self) -> bool:
        """False where engines are tied to a device link or to learner ranks."""
        return not self._fleet.linked and not self._config.rollout.colocate

    async def nodes(self) -> dict[str, str]:
        """Engines that run, and where in the cluster each lives."""
        return {replica.name: await replica.node() for replica in self._fleet.running()}

    @property
    def workers(self) -> int:
        """Engine workers over all engines."""
        return len(self._fleet.running()) * self._config.rollout.workers_per_engine

    async def start(self) -> None:
        """Start all engines side by side and wait until each answers. Raises ``EngineFailed``."""
        await self._fleet.start()
        if self._config.rollout.max_engines > self.size:
            await self._fleet.scale(self._config.rollout.max_engines, self._places, 0.0)

    async def scale(self, engines: int) -> str:
        """Bring the fleet to so many ``engines``; new ones serve as soon as they hold the newest weights.

        Returns what was begun. Raises ``InputError`` where the number cannot change.
        """
        if engines < 1 or not self.scalable:
            expected = ">= 1, and engines not tied to a device link or to learner ranks"
            fix = 'rollout.weights = "host"'
            raise InputError("E507", "cannot scale", "command line:--engines", str(engines), expected, fix)
        return await self._fleet.scale(engines, self._places, self._config.rollout.request_timeout_s)

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

    def check(self) -> None:
        """Raise what ended the work of the engines, if something has: ``LinkLost``, ``FleetExhausted``."""
        self._traffic.check()

    async def receive(self, publication: Publication) -> dict[str, float]:
        """Bring the engines to ``publication``; on return all that serve sample with it. Returns the slowest's figures.

        A suspect is not waited for: it is stale until it has followed. Raises ``WeightProofFailed`` if every engine
        refuses the publication.
        """
        self._newest, self._refused = publication, set()
        if publication.collective:
            replicas = await self.link.take(publication, self._take)
        else:
            replicas = [replica for replica in self._fleet.running() if not replica.catching_up]
            for replica in replicas:
                update = asyncio.create_task(self._follow(replica))
                self._updates.add(update)
                update.add_done_callback(self._updates.discard)

        scope = set(replicas)
        there = await self._traffic.passed(
            self._fleet.running(),
            awaited=lambda r: r in scope and r.trusted and r.publication is not publication,
            passed=lambda r: r.runs and r.publication is publication,
        )
        for replica in replicas:
            if replica.publication is not publication:
                self._fleet.tell(replica, "outdated")
        return slowest([replica.taken for replica in there])

    async def prove(self, publication: Publication, digest: str) -> dict[str, float]:
        """Compare the engines' digests and canary log-probs with the learner's; then results flow.

        Raises ``WeightProofFailed`` if every engine fails.
        """
        if publication.collective:
            await asyncio.gather(*(self._prove_linked(r, publication, digest) for r in self._fleet.linked if r.runs))

        assert publication.digest in ("", digest)
        proved = await self._traffic.passed(
            self._fleet.running(),
            awaited=lambda r: r.trusted and r.publication is publication and not r.proved,
            passed=lambda r: r.runs and r.publication is publication and r.proved,
        )
        return slowest([replica.proof for replica in proved])

    async def reset(self) -> None:
        """Forget all weights, requests, keys and values: version numbers may name other weights from now on.

        Groups that wait for completions fail; engines serve again after the next publication.
        """
        self._newest, self._refused, self._fleet.linked = None, set(), set()
        self._traffic.mend()
        dropped, self._sampling = self._sampling, set()
        for work in dropped:
            work.cancel()
        for replica in self._fleet.running():
            replica.doubt()
            self._fleet.tell(replica, "outdated")
        await asyncio.gather(*(self._reset(replica) for replica in self._fleet.running()))

    def metrics(self) -> dict[str, float]:
        """Engines that serve now, and what losses have cost since the start."""
        return {
            "engines/healthy": float(self._traffic.serving),
            "engines/restarts": float(self._fleet.restarts),
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
        self.slices += [TimeSlice(name, now, now, (("start", now, now),)) for name in self._fleet.retired()]

    async def close(self) -> None:
        """Kill the engines, and remove the weights from other hosts."""
        self._fleet.close()
        await self._relays.close()

    # --- groups ---

    async def _sample(self, group_id: int, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]:
        limit, overdue = self._config.rollout.request_timeout_s, 0
        while True:
            replica = await self._idlest(group_id, limit)
            dispatched = time.monotonic()
            try:
                with self._traffic.occupied(replica):
                    completions = await self._answer(replica, prompt, sampling)
                if not replica.ended:
                    return completions
            except EngineFailed as error:
                self._fleet.lose(replica, error)
            except Unreachable:
                if replica.serves:
                    self._fleet.tell(replica, "probe_missed")
            except Unanswered:
                self._fleet.tell(replica, "overdue" if replica.finished_at > dispatched else "stuck")
                overdue += 1
                if overdue == 2:
                    detail = f"> {limit:g} s on {replica.name}, the second time"
                    raise GroupFailed(group_id, "generation_timeout", detail) from None
            self._redispatched += 1

    async def _answer(self, replica: Replica, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]:
        """What ``replica`` samples, once its weights are proved or it is lost."""
        completions = await replica.generate(prompt, sampling, self._config.rollout.request_timeout_s)
        self._fleet.tell(replica, "progressed")
        if not replica.proved:
            await self._traffic.unless_failed(replica.settled())
        return completions

    async def _idlest(self, group_id: int, limit_s: float) -> Replica:
        """The healthy engine with the fewest requests, as soon as there is one."""
        if self._traffic.serving:
            return await self._traffic.idlest()
        try:
            async with asyncio.timeout(limit_s):
                return await self._traffic.idlest()
        except TimeoutError:
            raise GroupFailed(group_id, "generation_timeout", f"no engine was healthy for {limit_s:g} s") from None

    # --- weights ---

    async def _reset(self, replica: Replica) -> None:
        try:
            await replica.ask("reset", timeout_s=RESET_LIMIT_S)
        except EngineFailed as error:
            self._fleet.lose(replica, error)

    async def _take(self, replica: Replica, publication: Publication) -> None:
        node = await replica.node()
        here = await self._relays.bring(publication, node, stage_limit(publication))
        try:
            self.slices.append(await replica.take(publication, here))
        except WeightProofFailed:
            self._relays.forget(publication, node)
            raise
        self._traffic.notify(replica)

    async def _prove_linked(self, replica: Replica, publication: Publication, digest: str) -> None:
        try:
            await self._prove(replica, publication, digest)
        except (EngineFailed, WeightProofFailed) as error:
            if isinstance(error, WeightProofFailed):
                self._refuse(replica, error)
            self._fleet.lose(replica, error)

    async def _prove(self, replica: Replica, publication: Publication, digest: str) -> None:
        await replica.prove(publication, digest)
        if publication is not self._newest:
            return
        self._refused.discard(replica.index)
        self._fleet.tell(replica, "synced")
        self._traffic.notify(replica)

    async def _follow(self, replica: Replica) -> None:
        """Bring one engine to the newest publication, whatever the others do; one that fails is lost."""
        replica.catching_up = True
        try:
            await self._catch_up(replica)
        except (EngineFailed, WeightProofFailed) as error:
            self._fleet.lose(replica, error)
        except Exception as error:  # A fault of ours: whoever waits must hear of it.
            self._traffic.fail(error)
        finally:
            replica.catching_up = False

    async def _catch_up(self, replica: Replica) -> None:
        for _ in range(CATCH_UP_TRIES):
            newest = self._newest
            if newest is None or newest.collective:  # The next one, or the next link, will include this engine.
                return
            try:
                await self._take(replica, newest)
                await self._prove(replica, newest, newest.digest)
            except (NotBrought, WeightProofFailed) as error:
                if newest is not self._newest and replica.publication is not newest:
                    continue  # Not taken: the memory of one that has been overtaken may hold another by now, or be gone.
                if newest is self._newest and isinstance(error, WeightProofFailed):
                    self._refuse(replica, error)
                raise
            if newest is self._newest:
                return
        raise EngineFailed(f"{replica.name} was overtaken by {CATCH_UP_TRIES} publications")

    def _refuse(self, replica: Replica, error: WeightProofFailed) -> None:
        """An engine does not take the newest publication. If none does, it is the weights and not the engines."""
        self._refused.add(replica.index)
        if self._fleet.all_left_in(self._refused):
            self._traffic.fail(error)
