"""The lives, the number and the places of scripted engines: lost, started again, more, fewer, and without room."""

from __future__ import annotations

import asyncio

import pytest

from rollout import engine_health, fleet
from shared.actors import ActorDied
from shared.errors import EngineFailed, InputError, WeightProofFailed
from shared.ledger import TimeBook
from shared.weights import Link
from tests.engine_worlds import REFUSAL, ask, deliver, publication, recovered, texts, until

# --- lives ---


async def test_an_idle_engine_that_dies_is_replaced(make_pool):
    pool, world = await make_pool()
    world.last(1).die()
    await until(lambda: recovered(pool))
    assert world.last(1).life == 1
    assert world.last(1).holds.version == 0


async def test_an_engine_whose_work_stays_stuck_is_replaced_although_it_answers_probes(make_pool):
    pool, world = await make_pool(**{"rollout.request_timeout_s": 0.05})
    world.last(0).go.clear()
    answers = await asyncio.gather(*ask(pool, *range(6)))
    assert texts(answers) == ["1.0"] * 6
    await until(lambda: recovered(pool))
    assert world.actors[0].killed
    assert not world.actors[1].killed


async def test_an_engine_that_has_just_finished_something_is_not_probed(make_pool):
    pool, world = await make_pool(1)
    pool._fleet.running()[0].finished_at = float("inf")
    await asyncio.sleep(0.02)
    probes = []

    async def probed():
        probes.append(1)

    world.last(0).do_health = probed
    await asyncio.sleep(0.05)
    assert not probes


async def test_an_engine_waits_before_its_next_life(make_pool, monkeypatch):
    pool, world = await make_pool()
    monkeypatch.setattr(engine_health, "BACKOFF_S", 60.0)
    world.last(0).die()
    await until(lambda: pool.metrics()["engines/restarts"] == 1)
    await asyncio.sleep(0.02)
    assert len(world.actors) == 2


async def test_recovery_counts_from_the_first_of_several_losses(make_pool):
    pool, world = await make_pool()
    world.start_gate.clear()
    world.last(0).die()
    await until(lambda: world.last(0).life == 1)
    await asyncio.sleep(0.05)
    world.last(0).die()
    world.start_gate.set()
    await until(lambda: recovered(pool, restarts=2))
    assert pool.metrics()["engines/recovery_seconds"] > 0.05


async def test_a_life_that_does_not_start_counts_as_one(make_pool):
    pool, world = await make_pool(**{"run.max_restarts": 2})
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
async def test_a_fleet_that_does_not_start_says_why_at_once(make_pool, prepare, message):
    with pytest.raises(EngineFailed, match=message):
        await make_pool(1, prepare=prepare, **{"rollout.start_timeout_s": 0.05})


async def test_the_time_of_a_lost_engine_is_accounted_for(make_pool):
    pool, world = await make_pool(**{"run.max_restarts": 1})
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


async def test_closing_ends_the_supervision(make_pool):
    pool, world = await make_pool()
    await pool.close()
    await asyncio.sleep(0.05)
    assert len(world.actors) == 2
    assert all(actor.killed for actor in world.actors)


# --- scaling ---


async def test_an_engine_that_is_added_serves_with_the_newest_weights(make_pool):
    pool, world = await make_pool()
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


async def test_an_engine_goes_when_its_requests_are_done(make_pool):
    pool, world = await make_pool(3)
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


async def test_an_engine_that_does_not_serve_goes_at_once(make_pool):
    pool, world = await make_pool()
    for actor in world.actors:
        actor.go.clear()
    tasks = ask(pool, 0, 1)
    await until(lambda: [actor.requests for actor in world.actors] == [1, 1])
    pool._fleet.tell(pool._fleet.running()[1], "outdated")
    async with asyncio.timeout(1):
        assert await pool.scale(1) == "2 -> 1 engines; gone: engine-1"
    world.last(0).go.set()
    assert texts(await asyncio.gather(*tasks)) == ["0.0", "0.0"]


async def test_what_an_engine_does_not_finish_in_time_goes_to_others(make_pool):
    pool, world = await make_pool(**{"rollout.request_timeout_s": 0.05, "run.max_restarts": 0})
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


@pytest.mark.parametrize(
    ("engines", "linked", "changes"),
    [(0, False, {}), (3, True, {}), (3, False, {"rollout.colocate": True})],
)
async def test_what_cannot_be_scaled_is_refused(make_pool, engines, linked, changes):
    pool, world = await make_pool(**changes)
    if linked:
        await pool.link.join(Link("host", 1, 2))
    with pytest.raises(InputError, match="cannot scale") as excinfo:
        await pool.scale(engines)
    assert excinfo.value.code == "E507"
    assert len(world.actors) == 2


# --- places ---


async def test_engines_beyond_those_that_are_needed_join_when_there_is_room(make_pool, capsys, monkeypatch):
    monkeypatch.setattr(fleet, "PLACE_TOLD_AFTER_S", 0.02)
    pool, world = await make_pool(1, prepare=lambda world: setattr(world, "full", True), **{"rollout.max_engines": 3})
    assert len(world.actors) == 1
    await until(lambda: "engine-2 waits for resources" in capsys.readouterr().out)
    world.places.engines[2].there.set()
    await until(lambda: recovered(pool, restarts=0, healthy=2))
    assert world.last(2).holds.version == 0
    # One that does not serve goes before one that does.
    assert await pool.scale(2) == "3 -> 2 engines; gone: engine-1"


async def test_an_engine_without_a_place_says_so_less_and_less_often(make_pool, capsys, monkeypatch):
    monkeypatch.setattr(fleet, "PLACE_TOLD_AFTER_S", 0.01)
    await make_pool(1, prepare=lambda world: setattr(world, "full", True), **{"rollout.max_engines": 2})
    await asyncio.sleep(0.15)
    assert 1 <= capsys.readouterr().out.count("engine-1 waits for resources") <= 8  # Of 15 chances.


async def test_an_engine_that_goes_no_longer_waits_for_its_place(make_pool):
    pool, _ = await make_pool(1, prepare=lambda world: setattr(world, "full", True), **{"rollout.max_engines": 2})
    await asyncio.sleep(0.01)
    assert await pool.scale(1) == "2 -> 1 engines; gone: engine-1"
    await asyncio.sleep(0.01)
    assert not [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == "FakeSlot.ready"]


async def test_an_engine_whose_host_is_lost_waits_for_another(make_pool):
    pool, world = await make_pool()
    world.places.engines[0].there.clear()
    world.last(0).die()
    await until(lambda: pool.metrics()["engines/healthy"] == 1)
    await asyncio.sleep(0.03)
    assert len(world.actors) == 2
    assert texts(await asyncio.gather(*ask(pool, 0))) == ["1.0"]
    world.places.engines[0].there.set()
    await until(lambda: recovered(pool))


async def test_with_nobody_running_but_one_to_come_back_groups_wait(make_pool):
    pool, world = await make_pool(**{"run.max_restarts": 1})
    world.places.engines[1].there.clear()
    world.last(1).die()
    await until(lambda: recovered(pool, restarts=1, healthy=1))
    world.last(0).die()
    await until(lambda: recovered(pool, restarts=2, healthy=1))
    world.last(0).die()
    await until(lambda: pool._fleet.retired() == ["engine-0"])
    assert pool.size == 1
    tasks = ask(pool, 0)
    await asyncio.sleep(0.01)
    world.places.engines[1].there.set()
    assert texts(await asyncio.gather(*tasks)) == ["1.1"]


async def test_weights_that_all_who_began_refuse_end_the_run_although_others_wait_for_room(make_pool):
    pool, world = await make_pool(1, prepare=lambda world: setattr(world, "full", True), **{"rollout.max_engines": 3})
    world.last(0).fail["receive"] = [REFUSAL]
    with pytest.raises(WeightProofFailed):
        await deliver(pool, publication(1))
