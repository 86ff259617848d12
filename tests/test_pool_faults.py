"""The pool where several things happen at once: closed, scaled or overtaken while requests and proofs are under way."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest

from shared.errors import EngineFailed, FleetExhausted
from tests import test_weight_relay
from tests.engine_worlds import ask, deliver, publication, recovered, texts, until
from tests.test_weight_relay import full, published

hosts = test_weight_relay.world  # A fixture.


async def busy(pool, world, *groups):
    """Groups under way, which no engine finishes."""
    for actor in world.actors:
        actor.go.clear()
    tasks = ask(pool, *groups)
    await until(lambda: sum(actor.requests for actor in world.actors) == len(groups))
    return tasks


async def begun(work):
    """``work`` as a task that has come as far as it can."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0.01)
    assert not task.done()
    return task


async def give_up(*tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- closing ---


@pytest.mark.parametrize("waits_for", ["completions", "a proof", "an engine", "a publication"])
async def test_who_waits_hears_of_the_close(make_pool, waits_for):
    pool, world = await make_pool(1)
    if waits_for == "completions":
        (waiting,) = await busy(pool, world, 0)
    elif waits_for == "a proof":
        world.prove_gate.clear()
        await pool.receive(publication(1))
        waiting = await begun(ask(pool, 0)[0])
    elif waits_for == "an engine":
        await pool.reset()
        waiting = await begun(ask(pool, 0)[0])
    else:
        world.receive_gate.clear()
        waiting = await begun(pool.receive(publication(1)))
    await pool.close()
    with pytest.raises(EngineFailed, match="the engines are closed"):
        await asyncio.wait_for(waiting, 1)
    with pytest.raises(EngineFailed, match="the engines are closed"):
        await ask(pool, 9)[0]


@pytest.mark.parametrize("given_up", [True, False])
async def test_an_engine_on_its_way_out_ends_with_the_pool(make_pool, given_up):
    pool, world = await make_pool(2)
    tasks = await busy(pool, world, 0, 1)
    scaling = await begun(pool.scale(1))
    if given_up:
        await give_up(*tasks, scaling)
    await pool.close()
    await asyncio.gather(*tasks, scaling, return_exceptions=True)
    assert [actor.killed for actor in world.actors] == [True, True]
    await asyncio.sleep(0.05)
    assert len(world.actors) == 2


async def test_scaling_that_was_given_up_before_it_began_to_wait_leaves_no_engine_behind(make_pool):
    pool, world = await make_pool(2)
    tasks = await busy(pool, world, 0, 1)
    scaling = asyncio.ensure_future(pool.scale(1))
    await asyncio.sleep(0)
    await give_up(scaling)
    await pool.close()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [actor.killed for actor in world.actors] == [True, True]


async def test_scaling_that_was_given_up_leaves_nothing_behind(make_pool):
    pool, world = await make_pool(2)
    tasks = await busy(pool, world, 0, 1)
    before = asyncio.all_tasks()
    scaling = await begun(pool.scale(1))
    await give_up(scaling)
    assert world.last(1).killed
    assert world.places.engines[1].freed
    assert (pool._traffic._leaving, pool._fleet._leaving) == ({}, set())
    world.last(0).go.set()
    assert texts(await asyncio.gather(*tasks)) == ["0.0", "0.0"]
    assert asyncio.all_tasks() <= before


async def test_closed_engines_cannot_be_scaled(make_pool):
    pool, world = await make_pool(2)
    await pool.close()
    for engines in (1, 3):
        with pytest.raises(EngineFailed, match="the engines are closed"):
            await pool.scale(engines)
    assert len(world.actors) == 2


# --- scaling ---


async def test_an_engine_that_is_lost_on_its_way_out_does_not_come_back(make_pool):
    pool, world = await make_pool(2)
    tasks = await busy(pool, world, 0, 1)
    scaling = await begun(pool.scale(1))
    world.last(1).die()
    assert await scaling == "2 -> 1 engines; gone: engine-1"
    world.last(0).go.set()
    assert texts(await asyncio.gather(*tasks)) == ["0.0", "0.0"]
    assert recovered(pool, restarts=0, healthy=1)
    assert len(world.actors) == 2


async def test_an_engine_that_was_taken_out_has_no_further_life(make_pool):
    pool, world = await make_pool(2)
    pool._fleet._take_out()
    world.last(1).die()
    await until(lambda: pool.metrics()["engines/healthy"] == 1)
    await asyncio.sleep(0.02)
    assert len(world.actors) == 2


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 1)])
async def test_who_scales_down_twice_at_once_gets_what_was_asked(make_pool, before, after):
    pool, world = await make_pool(before)
    first, second = await asyncio.gather(pool.scale(after), pool.scale(after))
    assert first == f"{before} -> {after} engines; gone: engine-{after}"
    assert second == f"{after} -> {after} engines"
    assert [actor.killed for actor in world.actors] == [False] * after + [True]


async def test_a_retired_engine_gives_its_place_back(make_pool):
    pool, world = await make_pool(2, **{"run.max_restarts": 0})
    world.last(0).die()
    await until(lambda: world.places.engines[0].freed)
    assert await pool.scale(2) == "1 -> 2 engines; starting: engine-2"
    await until(lambda: recovered(pool, restarts=0))
    assert not world.places.engines[1].freed


async def test_a_retired_engine_leaves_the_place_that_it_shares_to_the_learner_s_rank(make_pool):
    pool, world = await make_pool(2, **{"run.max_restarts": 0, "rollout.colocate": True})
    for actor in world.actors:
        actor.die()
    with pytest.raises(FleetExhausted):
        await ask(pool, 0)[0]
    assert not any(slot.freed for slot in world.places.engines)


# --- publications that have been overtaken ---


async def test_no_completion_of_weights_that_failed_their_proof_leaves(make_pool):
    pool, world = await make_pool(2)
    first, gate = world.last(0), asyncio.Event()
    (task,) = await busy(pool, world, 0)
    prove = first.do_prove

    async def late(canary, version):
        gap = await prove(canary, version)
        await gate.wait()
        return gap

    first.do_prove = late
    world.damaging.add((0, 0, 1))
    newest = publication(1)
    await pool.receive(newest)
    first.go.set()  # The group ends under version 1, and waits for the proof.
    pool._fleet.tell(pool._fleet.running()[0], "probe_missed")  # The others go on without it.
    await pool.prove(newest, newest.digest)
    await deliver(pool, publication(2))
    assert not task.done()
    world.last(1).go.set()
    gate.set()
    assert texts([await asyncio.wait_for(task, 2)]) == ["1.0"]
    await until(lambda: recovered(pool))
    assert world.last(0).holds.version == 2


async def test_the_last_engine_may_fail_the_proof_of_weights_that_were_overtaken(make_pool):
    pool, world = await make_pool(1)
    world.prove_gate.clear()
    world.damaging.add((0, 0, 1))
    await pool.receive(publication(1))
    receiving = await begun(pool.receive(publication(2)))
    world.prove_gate.set()
    await asyncio.wait_for(receiving, 2)
    await until(lambda: recovered(pool, healthy=1))


def spread(pool, world, places, *nodes):
    """From now on the engines live on ``nodes``."""
    pool._relays._places = places
    for actor, node in zip(world.actors, nodes, strict=True):

        async def where(node=node):
            return node

        actor.node = where


def shipped(places, version):
    """A publication whose bytes lie on ``home``."""
    return replace(publication(version), segment=published(places, version).segment, node="home")


async def test_a_publication_that_was_overtaken_on_its_way_costs_no_engine(make_pool, hosts):
    pool, world = await make_pool(2)
    spread(pool, world, hosts, "home", "x")
    hosts.gates["x"] = asyncio.Event()
    receiving = await begun(pool.receive(shipped(hosts, 1)))
    await pool.reset()
    hosts.dead.add("x")
    hosts.last("x").kill()
    await until(lambda: not pool._relays._carries)
    await give_up(receiving)
    hosts.dead.clear()
    hosts.gates.clear()
    await deliver(pool, shipped(hosts, 2))
    assert recovered(pool, restarts=0)


async def test_a_host_without_space_costs_the_run_its_engines_alone(make_pool, hosts, monkeypatch):
    pool, world = await make_pool(2, published=False)
    spread(pool, world, hosts, "home", "x")
    new = shipped(hosts, 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    figures = await asyncio.wait_for(deliver(pool, new), 3)
    assert figures["sync/canary_gap"] == 0.0
    assert texts(await asyncio.gather(*ask(pool, 0))) == ["0.0"]


async def test_a_run_whose_only_host_has_no_space_for_a_while_goes_on(make_pool, hosts, monkeypatch):
    pool, world = await make_pool(1, published=False)
    spread(pool, world, hosts, "x")
    failures, allocate = [1], os.posix_fallocate

    def full_at_first(*arguments):
        return full() if failures and failures.pop() else allocate(*arguments)

    new = shipped(hosts, 0)
    monkeypatch.setattr(os, "posix_fallocate", full_at_first)
    await asyncio.wait_for(deliver(pool, new), 3)
    await until(lambda: recovered(pool, healthy=1))
