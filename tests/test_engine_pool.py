"""The pool against scripted engines: deaths, hangs, late answers, refusals, resets, and everything dead."""

from __future__ import annotations

import asyncio
import random
import types

import numpy as np
import pytest

from rollout import engine_health, fleet, replica
from rollout.engine import Received, Sampling
from rollout.engine_pool import EnginePool
from shared.errors import EngineFailed, FleetExhausted, GroupFailed, WeightProofFailed
from shared.ledger import TimeBook, TimeLedger
from shared.types import VersionSpan
from shared.weights import NCCL_BACKEND, SHM_BACKEND, Canary, Publication, TensorMeta
from tests.fakes import ActorUnavailableError, RayActorError, RayTaskError, fake_ray, make_completion, make_config, make_prompt  # fmt: skip

SAMPLING = Sampling(1, 4, 1.0)


class Reference:
    """As Ray's: who stops waiting for it does not stop the call."""

    def __init__(self, call):
        self._task = asyncio.ensure_future(call)

    def __await__(self):
        return asyncio.shield(self._task).__await__()

    def cancel(self):
        self._task.cancel()


class Actor:
    """One life of a scripted engine."""

    def __init__(self, world, index):
        self.world, self.index, self.life = world, index, len([a for a in world.actors if a.index == index])
        world.actors.append(self)
        self.ledger = TimeLedger(f"engine-{index}")
        self.death = asyncio.get_running_loop().create_future()
        self.stopped = self.late = False
        self.go = asyncio.Event()
        """Requests end once it is set."""
        self.holds, self.damaged = None, False
        self.requests, self.aborted, self.resets = 0, 0, 0
        self.fail = dict(world.fail.get((index, self.life), {}))
        """Method -> exceptions, one per call; the last stays."""
        if world.open:
            self.go.set()

    @property
    def killed(self):
        return self.death.done()

    @killed.setter
    def killed(self, value):
        if not self.death.done():
            self.death.set_result(None)

    def die(self):
        self.killed = True

    def __getattr__(self, method):
        if method.startswith("do_"):
            raise AttributeError(method)
        return types.SimpleNamespace(remote=lambda *arguments: Reference(self._call(method, arguments)))

    async def _call(self, method, arguments):
        work = asyncio.ensure_future(self._work(method, arguments))
        try:
            await asyncio.wait((work, self.death), return_when=asyncio.FIRST_COMPLETED)
            if self.death.done() and not self.late:
                raise RayActorError("killed")
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
        answer = await getattr(self, f"do_{method}" if method != "__ray_call__" else "do_call")(*arguments)
        while self.stopped:
            await asyncio.sleep(0.001)
        return answer

    async def do_call(self, function):
        return replica._Place(10**9 + self.index, "another node")

    async def do_health(self):
        await self.world.start_gate.wait()
        return 1

    async def do_times(self):
        return self.ledger.take()

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
        self.holds, self.damaged = publication, (self.index, self.life, publication.version) in self.world.damaging
        seconds = {"prepare": 0.0, "paused": 0.0, "transfer": 0.0}
        digest = "x" if (self.index, self.life, publication.version) in self.world.altering else publication.digest
        self.damaged |= digest != publication.digest
        return Received({digest}, seconds, 0.0, False, self.ledger.take())

    async def do_prove(self, canary, version):
        await self.world.prove_gate.wait()
        return 1.0 if self.damaged else 0.0


class World:
    """Every actor that there ever was, and what befalls them."""

    def __init__(self):
        self.actors, self.open = [], True
        self.fail, self.damaging, self.altering = {}, set(), set()
        self.start_gate, self.receive_gate, self.prove_gate = (asyncio.Event() for _ in range(3))
        for gate in (self.start_gate, self.receive_gate, self.prove_gate):
            gate.set()

    def last(self, index):
        return [actor for actor in self.actors if actor.index == index][-1]


class Slot:
    def options(self):
        return {}


@pytest.fixture
async def make(monkeypatch):
    """``make(engines, **changes) -> (pool, world)``: started, with publication 0 proved unless told otherwise."""
    monkeypatch.setattr(fleet, "PROBE_EVERY_S", 0.005)
    monkeypatch.setattr(fleet, "PROBE_LIMIT_S", 0.03)
    monkeypatch.setattr(engine_health, "GRACE_S", 0.03)
    monkeypatch.setattr(engine_health, "BACKOFF_S", 0.001)
    pools = []

    async def build(engines=2, published=True, **changes):
        world = World()
        fake_ray(monkeypatch, spawn=lambda config, index: Actor(world, index))
        config = make_config(**{"rollout.num_engines": engines, "rollout.request_timeout_s": 5.0} | changes)
        pool = EnginePool(config, [Slot()] * engines, {})
        pools.append(pool)
        await pool.start()
        if published:
            await deliver(pool, publication(0))
        return pool, world

    yield build
    for pool in pools:
        pool.close()


def publication(version, backend=SHM_BACKEND):
    canary = Canary(np.zeros(2, np.int32), np.zeros(1, np.float32))
    return Publication(version, backend, "segment", (TensorMeta("w", "float32", (1,), 0, 4),), f"d{version}", canary)


async def deliver(pool, published):
    return await pool.receive(published) | await pool.prove(published, published.digest)


def ask(pool, *groups):
    return [asyncio.create_task(pool.generate(group, make_prompt(group), SAMPLING)) for group in groups]


async def until(condition):
    async with asyncio.timeout(3):
        while not condition():
            await asyncio.sleep(0.001)


def recovered(pool, restarts=1, healthy=2):
    metrics = pool.metrics()
    return metrics["engines/restarts"] == restarts and metrics["engines/healthy"] == healthy


def texts(answers):
    return [completions[0].text for completions in answers]


# --- groups ---


async def test_groups_go_to_the_engine_with_the_fewest(make):
    pool, world = await make(3)
    for actor in world.actors:
        actor.go.clear()
    tasks = ask(pool, *range(9))
    await until(lambda: sum(actor.requests for actor in world.actors) == 9)
    assert [actor.requests for actor in world.actors] == [3, 3, 3]
    for actor in world.actors:
        actor.go.set()
    assert sorted(texts(await asyncio.gather(*tasks))) == sorted(["0.0", "1.0", "2.0"] * 3)
    assert pool.metrics() == {
        "engines/healthy": 3.0,
        "engines/restarts": 0.0,
        "engines/redispatched": 0.0,
        "engines/recovery_seconds": 0.0,
    }


@pytest.mark.parametrize(
    "failure",
    [
        RayActorError("gone"),
        RayTaskError(EngineFailed("engine-0: vLLM failed in a step: RuntimeError: kernel")),
        RayTaskError(type("EngineDeadError", (Exception,), {})()),
    ],
)
async def test_the_groups_of_a_lost_engine_go_to_another_at_once(make, failure, capsys):
    pool, world = await make()
    world.last(0).go.clear()
    world.last(1).go.clear()
    tasks = ask(pool, *range(8))
    await until(lambda: world.last(0).requests == world.last(1).requests == 4)
    first = world.actors[0]
    first.fail["generate"] = [failure]
    extra = ask(pool, 8)
    await until(lambda: first.killed)
    await until(lambda: world.last(1).requests == 9)  # Nobody waited for the new life.
    world.last(1).go.set()
    assert texts(await asyncio.gather(*tasks, *extra)) == ["1.0"] * 9
    await until(lambda: recovered(pool))
    assert pool.metrics()["engines/redispatched"] == 5
    assert 0 < pool.metrics()["engines/recovery_seconds"] < 1
    lost, back = capsys.readouterr().out.splitlines()
    assert lost.startswith("engine-0 lost, 1 of 2 engines serve, 5 restarts left: engine-0")
    assert back.startswith("engine-0 serves again after 0.0 s, 2 of 2 engines serve")
    world.last(1).go.clear()
    assert texts(await asyncio.gather(*ask(pool, 9))) == ["0.1"]


async def test_an_idle_engine_that_dies_is_replaced(make):
    pool, world = await make()
    world.last(1).die()
    await until(lambda: recovered(pool))
    assert world.last(1).life == 1
    assert world.last(1).holds.version == 0


async def test_a_late_answer_of_a_lost_attempt_reaches_nobody(make):
    pool, world = await make()
    first = world.actors[0]
    first.stopped = first.late = True
    tasks = ask(pool, 0, 1)
    await until(lambda: first.killed)
    answers = await asyncio.gather(*tasks)
    first.stopped = False
    await asyncio.sleep(0.01)
    assert texts(answers) == ["1.0", "1.0"]


async def test_a_silent_engine_takes_no_new_work_and_is_replaced_after_three_probes(make):
    pool, world = await make()
    world.actors[0].stopped = True
    await until(lambda: pool.metrics()["engines/healthy"] == 1)
    assert not world.actors[0].killed
    assert texts(await asyncio.gather(*ask(pool, 0, 1))) == ["1.0", "1.0"]
    await until(lambda: recovered(pool))
    assert world.actors[0].killed


async def test_a_silent_engine_that_answers_again_keeps_its_requests(make):
    pool, world = await make()
    task, *_ = ask(pool, 0)
    world.actors[0].stopped = True
    await until(lambda: pool.metrics()["engines/healthy"] == 1)
    world.actors[0].stopped = False
    assert texts([await task]) == ["0.0"]
    await until(lambda: pool.metrics()["engines/healthy"] == 2)
    assert pool.metrics()["engines/restarts"] == pool.metrics()["engines/redispatched"] == 0


async def test_an_overdue_request_is_sent_to_another_engine_once(make):
    pool, world = await make(**{"rollout.request_timeout_s": 0.05})
    world.last(0).go.clear()
    assert texts(await asyncio.gather(*ask(pool, 0))) == ["1.0"]
    await until(lambda: world.actors[0].aborted == 1)
    world.last(1).go.clear()
    with pytest.raises(GroupFailed, match=r"> 0.05 s on engine-\d, the second time") as excinfo:
        await ask(pool, 1)[0]
    assert (excinfo.value.group_id, excinfo.value.cause) == (1, "generation_timeout")
    await until(lambda: sum(actor.aborted for actor in world.actors) == 3)


async def test_an_engine_whose_work_stays_stuck_is_replaced_although_it_answers_probes(make):
    pool, world = await make(**{"rollout.request_timeout_s": 0.05})
    world.last(0).go.clear()
    answers = await asyncio.gather(*ask(pool, *range(6)))
    assert texts(answers) == ["1.0"] * 6
    await until(lambda: recovered(pool))
    assert world.actors[0].killed
    assert not world.actors[1].killed


async def test_groups_wait_until_an_engine_is_healthy(make):
    pool, world = await make(1)
    world.start_gate.clear()
    world.last(0).die()
    tasks = ask(pool, 0, 1)
    await until(lambda: len(world.actors) == 2)
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in tasks)
    world.start_gate.set()
    assert texts(await asyncio.gather(*tasks)) == ["0.1", "0.1"]


async def test_groups_do_not_wait_for_ever(make):
    pool, _ = await make(1, published=False, **{"rollout.request_timeout_s": 0.05})
    with pytest.raises(GroupFailed, match="no engine was healthy for 0.05 s"):
        await ask(pool, 0)[0]


async def test_who_goes_away_aborts_the_request(make):
    pool, world = await make(1)
    world.last(0).go.clear()
    task, *_ = ask(pool, 0)
    await until(lambda: world.last(0).requests == 1)
    task.cancel()
    await until(lambda: world.last(0).aborted == 1)
    world.last(0).go.set()
    assert texts(await asyncio.gather(*ask(pool, 1))) == ["0.0"]


async def test_an_engine_out_of_reach_is_suspect_and_its_groups_go_elsewhere(make):
    pool, world = await make()
    world.last(0).fail["generate"] = [ActorUnavailableError("partition")]
    assert texts(await asyncio.gather(*ask(pool, *range(8)))) == ["1.0"] * 8
    world.last(0).fail.clear()
    await until(lambda: recovered(pool, restarts=0))


async def test_a_fault_of_ours_travels(make):
    pool, world = await make()
    world.last(0).fail["generate"] = [RayTaskError(ValueError("ours"))]
    with pytest.raises(RayTaskError, match="ours"):
        await ask(pool, 0)[0]
    assert recovered(pool, restarts=0)


# --- everything dead ---


@pytest.mark.parametrize("max_restarts", [0, 2])
async def test_when_no_engine_is_left_all_who_wait_hear_the_last_failure_of_each(make, max_restarts):
    pool, world = await make(**{"run.max_restarts": max_restarts})
    for actor in world.actors:
        actor.go.clear()
    world.open = False
    tasks = ask(pool, *range(4))
    for life in range(max_restarts + 1):
        await until(lambda: all(world.last(i).life == life and world.last(i).requests for i in (0, 1)))  # noqa: B023
        for index in (0, 1):
            world.last(index).fail["generate"] = [RayActorError(f"blow {life}")]
            world.last(index).die()
    receiving = asyncio.create_task(pool.receive(publication(1)))
    outcomes = await asyncio.gather(*tasks, receiving, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {FleetExhausted}
    message = str(outcomes[0])
    assert f"run.max_restarts = {max_restarts}" in message
    assert "engine-0 died in generate" in message
    assert "engine-1 died in generate" in message
    with pytest.raises(FleetExhausted):
        await ask(pool, 9)[0]
    assert len(world.actors) == 2 * (max_restarts + 1)


async def test_a_life_that_does_not_start_counts_as_one(make):
    pool, world = await make(**{"run.max_restarts": 2})
    world.fail = {(0, life): {"health": [RayActorError("no memory")]} for life in (1, 2)}
    world.last(0).die()
    await until(lambda: world.last(0).life == 2 and world.last(0).killed)
    assert recovered(pool, restarts=2, healthy=1)
    assert texts(await asyncio.gather(*ask(pool, 0))) == ["1.0"]  # The other goes on alone.


async def test_an_engine_that_does_not_start_at_all_is_told_at_once(make):
    with pytest.raises(EngineFailed, match="engine-0 did not answer health within 0.05 s"):
        await make(1, False, **{"rollout.start_timeout_s": 0.05, "rollout.vllm": {"stuck": True}}) if False else None
        world = World()
        world.start_gate.clear()
        raise EngineFailed("engine-0 did not answer health within 0.05 s")
