"""The pool against scripted engines: deaths, hangs, late answers, refusals, resets, and everything dead."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from rollout import engine_health, fleet
from rollout.engine import Received, Sampling
from rollout.engine_pool import EnginePool
from shared.actors import ActorDied, ActorUnreachable, Call
from shared.errors import EngineFailed, FleetExhausted, GroupFailed, InputError, WeightProofFailed
from shared.ledger import TimeBook, TimeLedger
from shared.types import VersionSpan
from shared.weights import NCCL_BACKEND, SHM_BACKEND, Canary, Link, Publication, TensorMeta
from tests.fakes import FakeActor, FakePlaces, make_completion, make_config, make_prompt

SAMPLING = Sampling(1, 4, 1.0)


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
        self.actors, self.open, self.full = [], True, False
        self.fail, self.damaging, self.altering = {}, set(), set()
        self.start_gate, self.receive_gate, self.prove_gate = (asyncio.Event() for _ in range(3))
        for gate in (self.start_gate, self.receive_gate, self.prove_gate):
            gate.set()

    def last(self, index):
        return [actor for actor in self.actors if actor.index == index][-1]


@pytest.fixture
async def make(monkeypatch):
    """``make(engines, **changes) -> (pool, world)``: started, with publication 0 proved unless told otherwise."""
    monkeypatch.setattr(fleet, "PROBE_EVERY_S", 0.005)
    monkeypatch.setattr(fleet, "PROBE_LIMIT_S", 0.03)
    monkeypatch.setattr(engine_health, "GRACE_S", 0.03)
    monkeypatch.setattr(engine_health, "BACKOFF_S", 0.001)
    pools = []

    async def build(engines=2, published=True, prepare=lambda world: None, **changes):
        world = World()
        prepare(world)
        places = world.places = FakePlaces(engines, lambda config, index: Actor(world, index))
        places.full = world.full
        config = make_config(**{"rollout.num_engines": engines, "rollout.request_timeout_s": 5.0} | changes)
        pool = EnginePool(config, places, {})
        pools.append(pool)
        await pool.start()
        if published:
            await deliver(pool, publication(0))
        return pool, world

    yield build
    for pool in pools:
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
        ActorDied("gone"),
        EngineFailed("engine-0: vLLM failed in a step: RuntimeError: kernel"),
        type("EngineDeadError", (Exception,), {})(),
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
    with pytest.raises(GroupFailed, match="no engine was healthy for"):
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
    world.last(0).fail["generate"] = [ActorUnreachable("partition")]
    assert texts(await asyncio.gather(*ask(pool, *range(8)))) == ["1.0"] * 8
    world.last(0).fail.clear()
    await until(lambda: recovered(pool, restarts=0))


async def test_a_fault_of_ours_travels(make):
    pool, world = await make()
    world.last(0).fail["generate"] = [ValueError("ours")]
    with pytest.raises(ValueError, match="ours"):
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
            world.last(index).fail["generate"] = [ActorDied(f"blow {life}")]
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
    world.fail = {(0, life): {"health": [ActorDied("no memory")]} for life in (1, 2)}
    world.last(0).die()
    await until(lambda: world.last(0).life == 2 and world.last(0).killed)
    assert recovered(pool, restarts=2, healthy=1)
    assert texts(await asyncio.gather(*ask(pool, 0))) == ["1.0"]  # The other goes on alone.


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda world: world.start_gate.clear(), "engine-0 did not answer health within 0.05 s"),
        (lambda world: world.fail.update({(0, 0): {"health": [ActorDied("no model")]}}), "engine-0 died in health"),
    ],
)
async def test_a_fleet_that_does_not_start_says_why_at_once(make, prepare, message):
    with pytest.raises(EngineFailed, match=message):
        await make(1, prepare=prepare, **{"rollout.start_timeout_s": 0.05})


async def test_a_fault_in_the_supervision_reaches_those_who_wait(make, monkeypatch):
    pool, world = await make(1)
    monkeypatch.setattr(fleet.Fleet, "_spawn", lambda *_: 1 / 0)
    world.last(0).die()
    with pytest.raises(ZeroDivisionError):
        await ask(pool, 0)[0]


# --- weights ---


REFUSAL = WeightProofFailed("segment: hashed x, the learner sent d1")


async def test_results_wait_for_the_proof_of_the_weights_that_sampled_them(make):
    pool, world = await make()
    for actor in world.actors:
        actor.go.clear()
    world.prove_gate.clear()
    tasks = ask(pool, 0, 1)
    await until(lambda: all(actor.requests for actor in world.actors))
    new = publication(1)
    await pool.receive(new)
    for actor in world.actors:
        actor.go.set()
    proving = asyncio.create_task(pool.prove(new, new.digest))
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in tasks)
    world.prove_gate.set()
    assert (await proving)["sync/canary_gap"] == 0.0
    spans = [completions[0].version_spans for completions in await asyncio.gather(*tasks)]
    assert spans == [(VersionSpan(0, 0, 1), VersionSpan(1, 1, 2))] * 2


async def test_a_refused_round_is_repeated(make):
    pool, world = await make()
    calls = iter([REFUSAL, REFUSAL])
    actor, receive = world.last(0), world.last(0).do_receive

    async def refusing(published):
        if error := next(calls, None):
            raise error
        return await receive(published)

    actor.do_receive = refusing
    figures = await deliver(pool, publication(1))
    assert {"sync/seconds", "sync/proof_seconds", "sync/canary_gap"} <= figures.keys()
    assert recovered(pool, restarts=0)


@pytest.mark.parametrize("failure", ["refuses", "dies", "proof dies", "other bytes", "other weights", "bug in proof"])
async def test_one_engine_that_fails_a_publication_is_quarantined_and_takes_it_in_its_next_life(make, failure):
    pool, world = await make()
    first, new = world.last(0), publication(1)
    if failure == "refuses":
        first.fail["receive"] = [REFUSAL]
    elif failure == "dies":
        first.fail["receive"] = [ActorDied("gone")]
    elif failure == "proof dies":
        first.fail["prove"] = [ActorDied("gone")]
    elif failure == "bug in proof":
        first.fail["prove"] = [IndexError("x")]
    elif failure == "other bytes":
        world.altering.add((0, 0, 1))
    else:
        world.damaging.add((0, 0, 1))
    first.go.clear()
    tasks = ask(pool, *range(4))
    await until(lambda: first.requests == 2)
    figures = await deliver(pool, new)
    assert figures["sync/canary_gap"] == 0.0
    first.go.set()
    assert set(texts(await asyncio.gather(*tasks))) <= {"1.0", "0.1"}
    await until(lambda: recovered(pool))
    assert first.killed
    assert [world.last(i).holds for i in (0, 1)] == [new, new]
    await deliver(pool, publication(2))
    assert recovered(pool)


@pytest.mark.parametrize("failure", ["refuses", "proof"])
async def test_weights_that_no_engine_takes_end_the_run_at_once(make, failure):
    pool, world = await make(3)
    for actor in world.actors:
        if failure == "refuses":
            actor.fail["receive"] = [REFUSAL]
        else:
            world.damaging.add((actor.index, 0, 1))
    match = (
        "refused version 1 3 times" if failure == "refuses" else "canary log-probs differ from the learner's by 1 nats"
    )
    with pytest.raises(WeightProofFailed, match=f"engine-., .*{match}|engine-. {match}"):
        await deliver(pool, publication(1))


async def test_weights_that_the_others_refuse_in_their_next_life_end_the_run_too(make):
    pool, world = await make()
    world.last(0).fail["receive"] = [REFUSAL]
    world.last(1).die()
    world.fail = {(index, 1): {"receive": [REFUSAL]} for index in (0, 1)}
    with pytest.raises(WeightProofFailed, match="refused version 1"):
        await deliver(pool, publication(1))


@pytest.mark.parametrize("stage", ["receive", "prove"])
async def test_with_every_engine_dead_a_publication_waits_for_the_first_that_comes_back(make, stage):
    pool, world = await make()
    new = publication(1)
    if stage == "prove":
        await pool.receive(new)
    for actor in list(world.actors):
        actor.die()
    figures = await (deliver(pool, new) if stage == "receive" else pool.prove(new, new.digest))
    assert figures["sync/canary_gap"] == 0.0
    await until(lambda: recovered(pool, restarts=2))
    assert [world.last(i).holds for i in (0, 1)] == [new, new]


async def test_a_silent_engine_does_not_hold_up_the_others(make):
    pool, world = await make()
    world.last(0).stopped = True
    figures = await deliver(pool, publication(1))
    assert figures["sync/canary_gap"] == 0.0
    assert not world.last(0).killed  # It is suspected, no more.
    assert pool.metrics()["engines/healthy"] == 1
    assert texts(await asyncio.gather(*ask(pool, 0, 1))) == ["1.0", "1.0"]
    world.last(0).stopped = False
    await until(lambda: recovered(pool, restarts=0))
    assert world.last(0).holds.version == 1


async def test_a_silent_engine_that_missed_a_publication_gets_no_work_before_it_has_followed(make, monkeypatch):
    pool, world = await make()
    first, gate = world.last(0), asyncio.Event()
    receive = first.do_receive

    async def slow(published):
        await gate.wait()
        return await receive(published)

    first.do_receive, first.stopped = slow, True
    await deliver(pool, publication(1))
    first.stopped = False
    await asyncio.sleep(0.02)
    assert texts(await asyncio.gather(*ask(pool, *range(4)))) == ["1.0"] * 4
    gate.set()
    await until(lambda: recovered(pool, restarts=0))


async def test_an_engine_on_its_way_back_takes_the_newest_publication(make):
    pool, world = await make()
    world.receive_gate.clear()
    world.last(0).die()
    await until(lambda: world.last(0).life == 1)
    await asyncio.sleep(0.02)  # It is at publication 0.
    world.receive_gate.set()
    for version in range(1, 6):
        await deliver(pool, publication(version))
    await until(lambda: recovered(pool))
    assert world.last(0).holds.version == 5


async def test_a_publication_whose_memory_was_used_again_is_no_refusal(make):
    pool, world = await make()
    gate = asyncio.Event()
    world.start_gate.clear()
    world.last(0).die()
    await until(lambda: world.last(0).life == 1)
    late = world.last(0)
    receive = late.do_receive

    async def overwritten(published):
        await gate.wait()
        if published.version < 3:
            raise WeightProofFailed("segment: hashed d2, the learner sent d0")
        return await receive(published)

    late.do_receive = overwritten
    world.start_gate.set()
    await asyncio.sleep(0.02)
    for version in (1, 2, 3):
        await deliver(pool, publication(version))
    gate.set()
    await until(lambda: recovered(pool))
    assert late.holds.version == 3


async def test_a_publication_that_is_no_snapshot_fails_with_its_engine(make):
    pool, world = await make()
    await pool.connect(Link("host", 1, 2))
    assert [actor.rank for actor in world.actors] == [1, 2]
    world.last(0).fail["receive"] = [ValueError("nccl")]
    with pytest.raises(WeightProofFailed, match="engine-0 refused version 1 1 times"):
        await pool.receive(publication(1, NCCL_BACKEND))
    world.last(1).die()
    with pytest.raises(EngineFailed, match="engine-1 died"):
        await asyncio.gather(*ask(pool, *range(4)))


# --- reset ---


async def test_after_a_reset_nothing_from_before_reaches_anyone(make):
    pool, world = await make()
    world.prove_gate.clear()
    await pool.receive(publication(1))
    world.last(0).go.clear()
    running = ask(pool, *range(4))
    await until(lambda: world.last(0).requests == 2 and world.last(1).requests == 2)
    await asyncio.sleep(0.01)
    await pool.reset()  # Two run, and two wait for a proof.
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert [(type(outcome), outcome.cause) for outcome in outcomes] == [(GroupFailed, "reset")] * 4
    assert [actor.resets for actor in world.actors] == [1, 1]
    assert world.last(0).aborted == 2
    world.prove_gate.set()
    world.last(0).go.set()
    waiting = ask(pool, 9)
    await asyncio.sleep(0.01)
    assert not waiting[0].done()  # Until the engines hold weights again.
    assert pool.metrics()["engines/healthy"] == 0
    await deliver(pool, publication(0))
    assert texts([await waiting[0]]) == ["0.0"]


async def test_an_engine_that_was_lost_before_a_reset_does_not_take_the_old_weights(make):
    pool, world = await make()
    world.receive_gate.clear()
    world.last(0).die()
    await until(lambda: world.last(0).life == 1)
    await asyncio.sleep(0.02)
    await pool.reset()
    world.receive_gate.set()
    await asyncio.sleep(0.02)
    assert pool.metrics()["engines/healthy"] == 0
    new = publication(0)
    await deliver(pool, new)
    await until(lambda: recovered(pool))
    assert world.last(0).holds is world.last(1).holds is new


async def test_an_engine_that_does_not_answer_a_reset_is_replaced(make, monkeypatch):
    monkeypatch.setattr("rollout.engine_pool.RESET_LIMIT_S", 0.02)
    pool, world = await make()
    world.last(0).stopped = True
    await pool.reset()
    await until(lambda: world.last(0).life == 1)
    await deliver(pool, publication(1))
    await until(lambda: recovered(pool))


# --- more and fewer engines ---


async def test_an_engine_that_is_added_serves_with_the_newest_weights(make):
    pool, world = await make()
    await deliver(pool, publication(1))
    assert await pool.scale(4) == "2 -> 4 engines; starting: engine-2, engine-3"
    await until(lambda: recovered(pool, restarts=0, healthy=4))
    assert [world.last(i).holds.version for i in range(4)] == [1] * 4
    for actor in world.actors:
        actor.go.clear()
    tasks = ask(pool, *range(8))
    await until(lambda: [actor.requests for actor in world.actors] == [2] * 4)
    for actor in world.actors:
        actor.go.set()
    await asyncio.gather(*tasks)
    await deliver(pool, publication(2))
    assert {actor.holds.version for actor in world.actors} == {2}


async def test_an_engine_goes_when_its_requests_are_done(make):
    pool, world = await make(3)
    for actor in world.actors:
        actor.go.clear()
    tasks = ask(pool, *range(6))
    await until(lambda: sum(actor.requests for actor in world.actors) == 6)
    going = asyncio.create_task(pool.scale(2))
    await asyncio.sleep(0.01)
    extra = ask(pool, 6, 7)
    await until(lambda: sum(actor.requests for actor in world.actors) == 8)
    assert [actor.requests for actor in world.actors] == [3, 3, 2]  # It gets nothing more,
    await deliver(pool, publication(1))  # holds up no publication,
    assert not going.done()
    world.last(2).go.set()
    assert await going == "3 -> 2 engines; gone: engine-2"  # and what it has is kept.
    assert world.last(2).killed
    assert world.places.engines[2].freed
    for actor in world.actors:
        actor.go.set()
    assert sorted(texts(await asyncio.gather(*tasks, *extra))) == ["0.0"] * 3 + ["1.0"] * 3 + ["2.0"] * 2
    assert pool.metrics()["engines/redispatched"] == 0


async def test_what_an_engine_does_not_finish_in_time_goes_to_others(make):
    pool, world = await make(**{"rollout.request_timeout_s": 0.05, "run.max_restarts": 0})
    world.last(1).go.clear()
    world.last(0).go.clear()
    pool._config = pool._config.model_copy(
        update={"rollout": pool._config.rollout.model_copy(update={"request_timeout_s": 0.2})}
    )
    tasks = ask(pool, 0, 1)
    await until(lambda: world.last(1).requests == 1)
    pool._config = pool._config.model_copy(
        update={"rollout": pool._config.rollout.model_copy(update={"request_timeout_s": 0.01})}
    )
    assert await pool.scale(1) == "2 -> 1 engines; gone: engine-1"
    world.last(0).go.set()
    assert texts(await asyncio.gather(*tasks)) == ["0.0", "0.0"]
    assert len(world.actors) == 2  # It is not started again.


async def test_engines_beyond_those_that_are_needed_join_when_there_is_room(make, capsys, monkeypatch):
    monkeypatch.setattr(fleet, "PLACE_TOLD_AFTER_S", 0.02)
    pool, world = await make(1, prepare=lambda world: setattr(world, "full", True), **{"rollout.max_engines": 3})
    assert len(world.actors) == 1
    await until(lambda: "engine-2 waits for resources" in capsys.readouterr().out)
    world.places.engines[2].there.set()
    await until(lambda: recovered(pool, restarts=0, healthy=2))
    assert world.last(2).holds.version == 0
    # One that does not serve goes before one that does.
    assert await pool.scale(2) == "3 -> 2 engines; gone: engine-1"


async def test_an_engine_whose_host_is_lost_waits_for_another(make):
    pool, world = await make()
    world.places.engines[0].there.clear()
    world.last(0).die()
    await until(lambda: pool.metrics()["engines/healthy"] == 1)
    await asyncio.sleep(0.03)
    assert len(world.actors) == 2
    assert texts(await asyncio.gather(*ask(pool, 0))) == ["1.0"]
    world.places.engines[0].there.set()
    await until(lambda: recovered(pool))


async def test_weights_that_all_who_began_refuse_end_the_run_although_others_wait_for_room(make):
    pool, world = await make(1, prepare=lambda world: setattr(world, "full", True), **{"rollout.max_engines": 3})
    world.last(0).fail["receive"] = [REFUSAL]
    with pytest.raises(WeightProofFailed):
        await deliver(pool, publication(1))


@pytest.mark.parametrize(
    ("engines", "linked", "changes"),
    [(0, False, {}), (3, True, {}), (3, False, {"rollout.colocate": True})],
)
async def test_what_cannot_be_scaled_is_refused(make, engines, linked, changes):
    pool, world = await make(**changes)
    if linked:
        await pool.connect(Link("host", 1, 2))
    with pytest.raises(InputError, match="cannot scale") as excinfo:
        await pool.scale(engines)
    assert excinfo.value.code == "E507"
    assert len(world.actors) == 2


# --- time, processes ---


async def test_the_time_of_a_lost_engine_is_accounted_for(make):
    pool, world = await make(**{"run.max_restarts": 1})
    book = TimeBook()

    async def settle():
        await pool.close_books()
        for piece in pool.slices:
            book.add(piece)
        pool.slices.clear()

    await settle()
    world.last(0).die()
    await until(lambda: recovered(pool))
    await settle()
    world.last(0).die()
    await until(lambda: world.last(0).killed and len(pool._fleet.running()) == 1)
    await asyncio.sleep(0.02)
    await settle()
    assert book.totals["engine-0"]["lost"] > 0.02
    assert "lost" not in book.totals["engine-1"]
    assert max(book.residues().values()) < 1e-3  # Of the Unix clock's digits.
    walls = book.walls()
    assert walls["engine-0"] == pytest.approx(walls["engine-1"], abs=0.02)


async def test_closing_ends_the_supervision(make):
    pool, world = await make()
    await pool.close()
    await asyncio.sleep(0.05)
    assert len(world.actors) == 2
    assert all(actor.killed for actor in world.actors)


# --- chaos ---


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_every_group_is_answered_once_by_proved_weights(make, seed):
    source = random.Random(seed)
    pool, world = await make(3, **{"run.max_restarts": 1000, "rollout.request_timeout_s": 2.0})
    published, ended = [0], asyncio.Event()

    async def harm():
        while not ended.is_set():
            await asyncio.sleep(source.uniform(0.001, 0.01))
            victim = world.last(source.randrange(2))  # One is spared, so that no publication is refused by all.
            kind = source.choice(["die", "stop", "refuse", "damage", "alter", "late"])
            if kind == "die":
                victim.die()
            elif kind == "stop":
                victim.stopped = True
            elif kind == "late":
                victim.stopped = victim.late = True
            elif kind == "refuse":
                victim.fail["receive"] = [REFUSAL]
            else:
                chosen = world.damaging if kind == "damage" else world.altering
                chosen.add((victim.index, victim.life, published[0] + 1))

    async def publish():
        while not ended.is_set():
            await asyncio.sleep(0.01)
            published[0] += 1
            await deliver(pool, publication(published[0]))

    async def group(number):
        await asyncio.sleep(source.uniform(0, 0.5))
        before = published[0]
        (completion,) = await pool.generate(number, make_prompt(number), SAMPLING)
        assert completion.text != "damaged"
        assert before - 2 <= completion.oldest_version <= published[0]
        return number

    others = [asyncio.create_task(harm()), asyncio.create_task(publish())]
    answers = await asyncio.gather(*(group(number) for number in range(200)))
    ended.set()
    await asyncio.gather(*others)
    assert answers == list(range(200))
    for actor in world.actors:
        actor.stopped = False
    await until(lambda: pool.metrics()["engines/healthy"] == 3)
    assert pool.metrics()["engines/restarts"] > 3
