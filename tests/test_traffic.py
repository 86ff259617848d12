"""Who of the scripted engines is given work, who is waited for, and what they hear who wait when nothing can go on."""

from __future__ import annotations

import asyncio

import pytest

from rollout import fleet
from rollout.traffic import Traffic
from shared.actors import ActorDied
from shared.errors import FleetExhausted
from tests.engine_worlds import ask, deliver, publication, recovered, texts, until

# --- who works ---


async def test_groups_go_to_the_engine_with_the_fewest(make_pool):
    pool, world = await make_pool(3)
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


async def test_groups_wait_until_an_engine_is_healthy(make_pool):
    pool, world = await make_pool(1)
    world.start_gate.clear()
    world.last(0).die()
    tasks = ask(pool, 0, 1)
    await until(lambda: len(world.actors) == 2)
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in tasks)
    world.start_gate.set()
    assert texts(await asyncio.gather(*tasks)) == ["0.1", "0.1"]


async def test_who_waits_for_an_engine_does_not_spin(make_pool):
    pool, world = await make_pool(1)
    world.start_gate.clear()
    world.last(0).die()
    await until(lambda: pool.metrics()["engines/healthy"] == 0)
    looks, wait = [], pool._traffic.unless_failed

    def counted(awaitable):
        looks.append(1)
        return wait(awaitable)

    pool._traffic.unless_failed = counted
    tasks = ask(pool, 0)
    await asyncio.sleep(0.02)
    assert len(looks) == 1
    world.start_gate.set()
    assert texts(await asyncio.gather(*tasks)) == ["0.1"]


async def test_who_stops_waiting_for_an_engine_leaves_nothing_behind():
    waiting = asyncio.create_task(Traffic().idlest())
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_silent_engine_takes_no_new_work_and_is_replaced_after_three_probes(make_pool):
    pool, world = await make_pool()
    world.actors[0].stopped = True
    await until(lambda: pool.metrics()["engines/healthy"] == 1)
    assert not world.actors[0].killed
    assert texts(await asyncio.gather(*ask(pool, 0, 1))) == ["1.0", "1.0"]
    await until(lambda: recovered(pool))
    assert world.actors[0].killed


async def test_a_silent_engine_that_answers_again_keeps_its_requests(make_pool):
    pool, world = await make_pool()
    task, *_ = ask(pool, 0)
    world.actors[0].stopped = True
    await until(lambda: pool.metrics()["engines/healthy"] == 1)
    world.actors[0].stopped = False
    assert texts([await task]) == ["0.0"]
    await until(lambda: pool.metrics()["engines/healthy"] == 2)
    assert pool.metrics()["engines/restarts"] == pool.metrics()["engines/redispatched"] == 0


async def test_a_silent_engine_that_missed_a_publication_gets_no_work_before_it_has_followed(make_pool, monkeypatch):
    pool, world = await make_pool()
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


async def test_an_engine_that_goes_waits_for_all_of_its_requests(make_pool):
    pool, world = await make_pool()
    for actor in world.actors:
        actor.go.clear()
    tasks = ask(pool, *range(4))
    await until(lambda: [actor.requests for actor in world.actors] == [2, 2])
    going = asyncio.create_task(pool.scale(1))
    await asyncio.sleep(0.01)
    tasks[1].cancel()
    await until(lambda: world.last(1).aborted == 1)
    extra = ask(pool, 4)
    await until(lambda: sum(actor.requests for actor in world.actors) == 5)
    assert [actor.requests for actor in world.actors] == [3, 2]  # It has fewer now, and gets nothing more all the same.
    assert not going.done()
    for actor in world.actors:
        actor.go.set()
    assert await going == "2 -> 1 engines; gone: engine-1"
    answers = await asyncio.gather(tasks[0], tasks[2], tasks[3], *extra)
    assert sorted(texts(answers)) == ["0.0"] * 3 + ["1.0"]


async def test_an_engine_that_goes_gets_no_work_when_it_is_no_longer_suspect(make_pool):
    pool, world = await make_pool()
    for actor in world.actors:
        actor.go.clear()
    tasks = ask(pool, 0, 1)
    await until(lambda: [actor.requests for actor in world.actors] == [1, 1])
    leaving = pool._fleet.running()[1]
    going = asyncio.create_task(pool.scale(1))
    await asyncio.sleep(0.01)
    pool._fleet.tell(leaving, "probe_missed")
    await until(lambda: leaving.serves)
    assert pool.metrics()["engines/healthy"] == 1
    for actor in world.actors:
        actor.go.set()
    await asyncio.gather(going, *tasks)


# --- who is waited for ---


async def test_a_silent_engine_does_not_hold_up_the_others(make_pool):
    pool, world = await make_pool()
    world.last(0).stopped = True
    figures = await deliver(pool, publication(1))
    assert figures["sync/canary_gap"] == 0.0
    assert not world.last(0).killed  # It is suspected, no more.
    assert pool.metrics()["engines/healthy"] == 1
    assert texts(await asyncio.gather(*ask(pool, 0, 1))) == ["1.0", "1.0"]
    world.last(0).stopped = False
    await until(lambda: recovered(pool, restarts=0))
    assert world.last(0).holds.version == 1


async def test_an_engine_that_took_a_publication_and_died_does_not_complete_it(make_pool):
    pool, world = await make_pool()
    new, gate, first, second = publication(1), asyncio.Event(), world.last(0), world.last(1)
    second.do_receive = lambda published: gate.wait()
    receiving = asyncio.create_task(pool.receive(new))
    await until(lambda: pool._fleet.running()[0].publication is new)
    world.start_gate.clear()
    first.die()
    await until(lambda: first.killed and len(pool._fleet.running()) == 1)
    second.die()
    await until(lambda: not pool._fleet.running())
    await asyncio.sleep(0.01)
    assert not receiving.done()
    world.start_gate.set()
    await receiving
    await until(lambda: recovered(pool, restarts=2))


async def test_a_stage_that_is_over_looks_at_nobody_any_more():
    traffic, engine, looks = Traffic(), object(), []
    assert await traffic.passed([engine], awaited=lambda r: False, passed=lambda r: not looks.append(r)) == [engine]
    traffic.notify(engine)
    assert looks == [engine]


# --- nothing can go on ---


@pytest.mark.parametrize("max_restarts", [0, 2])
async def test_when_no_engine_is_left_all_who_wait_hear_the_last_failure_of_each(make_pool, max_restarts):
    pool, world = await make_pool(**{"run.max_restarts": max_restarts})
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


async def test_a_fault_in_the_supervision_reaches_those_who_wait(make_pool, monkeypatch):
    pool, world = await make_pool(1)
    monkeypatch.setattr(fleet.Fleet, "_spawn", lambda *_: 1 / 0)
    world.last(0).die()
    with pytest.raises(ZeroDivisionError):
        await ask(pool, 0)[0]
