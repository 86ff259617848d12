"""An engine pool over scripted engines, and what befalls them: the fake world of the pool's, fleet's and traffic's tests.

The fixture ``make_pool`` in ``conftest.py`` builds them.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import numpy as np

from rollout import engine_health, fleet
from rollout.engine import Received, Sampling
from rollout.engine_pool import EnginePool
from shared.actors import ActorDied, Call
from shared.errors import WeightProofFailed
from shared.ledger import TimeLedger
from shared.weights import SHM_BACKEND, Canary, Publication, TensorMeta
from tests.fakes import FakeActor, FakePlaces, make_completion, make_config, make_prompt

SAMPLING = Sampling(1, 4, 1.0)
REFUSAL = WeightProofFailed("segment: hashed x, the learner sent d1")


async def shielded(work):
    return await asyncio.shield(work)


class Actor(FakeActor):
    """One life of a scripted engine."""

    def __init__(self, world, index):
        self.world, self.index, self.life = world, index, len([a for a in world.actors if a.index == index])
        world.actors.append(self)
        self.ledger = TimeLedger(f"engine-{index}")
        self.death = asyncio.get_running_loop().create_future()
        self.stopped = self.late = False
        self.go = asyncio.Event()
        """Requests end once it is set."""
        self.holds, self.damaged, self.biased = None, False, False
        self.requests, self.aborted, self.resets = 0, 0, 0
        self.rank = None
        """In a device link."""
        self.fail = dict(world.fail.get((index, self.life), {}))
        """Method -> exceptions, one per call; the last stays."""
        if world.open:
            self.go.set()

    @property
    def killed(self):
        return self.death.done()

    @killed.setter
    def killed(self, value):
        if value and not self.death.done():
            self.death.set_result(None)

    def die(self):
        self.killed = True

    def call(self, method, *arguments):
        work = asyncio.ensure_future(self._call(method, arguments))
        work.add_done_callback(lambda task: task.cancelled() or task.exception())
        return Call(asyncio.ensure_future(shielded(work)), work.cancel)

    async def _call(self, method, arguments):
        work = asyncio.ensure_future(self._work(method, arguments))
        try:
            await asyncio.wait((work, self.death), return_when=asyncio.FIRST_COMPLETED)
            if self.death.done() and not (self.late and method == "generate"):
                raise ActorDied("killed")
            return await work
        except asyncio.CancelledError:
            self.aborted += method == "generate"
            raise
        finally:
            work.cancel()

    async def _work(self, method, arguments):
        await asyncio.sleep(0)
        if script := self.fail.get(method):
            raise script.pop(0) if len(script) > 1 else script[0]
        answer = await getattr(self, f"do_{method}")(*arguments)
        while self.stopped:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return answer

    async def do_health(self):
        await self.world.start_gate.wait()
        return 1

    async def do_times(self):
        return self.ledger.take()

    async def do_connect(self, link, rank):
        self.rank = rank
        if self.world.wire is not None:
            self.world.wire.members.add(self)

    async def do_reset(self):
        self.resets += 1

    async def do_generate(self, token_ids, sampling, version):
        self.requests += 1
        begun = self.holds
        await self.go.wait()
        spans = {p.version: None for p in (begun, self.holds)}
        text = "damaged" if self.damaged else f"{self.index}.{self.life}"
        parts = tuple((version, i, i + 1) for i, version in enumerate(spans))
        return (make_completion(text, len(parts), parts),)

    async def do_receive(self, publication):
        await self.world.receive_gate.wait()
        if self.world.wire is not None:
            await self.world.wire.take_part(self)
        self.holds, self.biased = publication, (self.index, self.life, publication.version) in self.world.damaging
        seconds = {"prepare": 0.0, "paused": 0.0, "transfer": 0.0}
        digest = (
            "x" if (self.index, self.life, publication.version) in self.world.altering else publication.digest or "sent"
        )
        self.damaged = self.biased or digest == "x"
        return Received({digest}, seconds, 0.0, False, self.ledger.take())

    async def do_prove(self, canary, version):
        await self.world.prove_gate.wait()
        return 1.0 if self.biased else 0.0  # Other bytes are found by their digest alone.


class World:
    """Every actor that there ever was, and what befalls them."""

    def __init__(self):
        self.actors, self.open, self.full = [], True, False
        self.fail, self.damaging, self.altering = {}, set(), set()
        self.wire = None
        """What broadcasts go over, if they need all members (see ``test_device_link.py``)."""
        self.start_gate, self.receive_gate, self.prove_gate = (asyncio.Event() for _ in range(3))
        for gate in (self.start_gate, self.receive_gate, self.prove_gate):
            gate.set()

    def last(self, index):
        return [actor for actor in self.actors if actor.index == index][-1]


@asynccontextmanager
async def pools(monkeypatch):
    """``build(engines, **changes) -> (pool, world)``: started, with publication 0 proved unless told otherwise."""
    monkeypatch.setattr(fleet, "PROBE_EVERY_S", 0.005)
    monkeypatch.setattr(fleet, "PROBE_LIMIT_S", 0.03)
    monkeypatch.setattr(engine_health, "GRACE_S", 0.03)
    monkeypatch.setattr(engine_health, "BACKOFF_S", 0.001)
    built = []

    async def build(engines=2, published=True, prepare=lambda world: None, **changes):
        world = World()
        prepare(world)
        places = world.places = FakePlaces(engines, lambda config, index: Actor(world, index))
        places.full = world.full
        config = make_config(**{"rollout.num_engines": engines, "rollout.request_timeout_s": 5.0} | changes)
        pool = EnginePool(config, places, {})
        built.append(pool)
        await pool.start()
        if published:
            await deliver(pool, publication(0))
        return pool, world

    try:
        yield build
    finally:
        for pool in built:
            await pool.close()


def publication(version, backend=SHM_BACKEND):
    canary = Canary(np.zeros(2, np.int32), np.zeros(1, np.float32))
    return Publication(version, backend, "segment", (TensorMeta("w", "float32", (1,), 0, 4),), f"d{version}", canary)


async def deliver(pool, published):
    return await pool.receive(published) | await pool.prove(published, published.digest)


def ask(pool, *groups):
    return [asyncio.create_task(pool.generate(group, make_prompt(group), SAMPLING)) for group in groups]


async def until(condition):
    async with asyncio.timeout(3):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def recovered(pool, restarts=1, healthy=2):
    metrics = pool.metrics()
    return metrics["engines/restarts"] == restarts and metrics["engines/healthy"] == healthy


def texts(answers):
    return [completions[0].text for completions in answers]
