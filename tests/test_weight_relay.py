"""Weights on their way to other hosts: whole, once to each, past relays that die or are slow; and removed at the end."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rollout import weight_relay
from rollout.weight_relay import Relays, WeightRelay
from shared.actors import ActorDied
from shared.errors import EngineFailed
from shared.weights import SHM_BACKEND, SHM_DIR, Canary, Publication, Segment, TensorMeta, digest, views
from tests.fakes import FakeActor, FakeSlot

SIZE = 1000
TENSORS = (TensorMeta("a", "uint8", (600,), 0, 600), TensorMeta("b", "uint8", (360,), 640, 360))


class Host(FakeActor):
    """A relay in this process; what it offers is computed at once and awaited where it is used, as Ray does."""

    def __init__(self, world, node, name):
        self.world, self.node_name, self.relay = world, node, WeightRelay(name)
        world.spawned[node] += 1

    def offer(self, method, *arguments):
        answer = asyncio.ensure_future(getattr(self, method)(*arguments))
        answer.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self, answer

    async def piece(self, segment, start, stop):
        return np.array(self.relay.piece(segment, start, stop))

    async def begin(self, size):
        return self.relay.begin(size)

    async def take(self, segment, start, offered):
        host, answer = offered
        if host is not self:
            self.world.sent[host.node_name, self.node_name] += 1
        if self.world.dying.get(self.node_name, 0) > 0:
            self.world.dying[self.node_name] -= 1
            raise ActorDied("gone")
        piece = await asyncio.shield(answer)
        await self.world.gates.get(self.node_name, self.world.open).wait()
        self.relay.take(segment, start, piece)
        return piece

    pass_on = take

    async def close(self):
        self.relay.close()


class World:
    def __init__(self):
        self.spawned, self.sent, self.dying = Counter(), Counter(), {}
        """Relays by host; pieces by sender and receiver; calls that will fail."""
        self.open, self.gates = asyncio.Event(), {}
        self.open.set()

    def on(self, node):
        return FakeSlot(lambda name: Host(self, node, name))


@pytest.fixture
async def world(monkeypatch):
    monkeypatch.setattr(weight_relay, "PIECE_BYTES", 128)
    world = World()
    world.relays = Relays(world, {})
    world.made = []
    yield world
    await world.relays.close()
    for segment in world.made:
        segment.unlink()


def published(world, version):
    segment = Segment(f"millrace-test-{uuid.uuid4().hex[:8]}", SIZE)
    segment.bytes[:] = np.random.default_rng(version).integers(0, 256, SIZE).astype(np.uint8)
    world.made.append(segment)
    canary = Canary(np.zeros(2, np.int32), np.zeros(1, np.float32))
    hashed = digest(views(segment.bytes, TENSORS))
    return Publication(version, SHM_BACKEND, segment.name, TENSORS, hashed, canary, node="home")


async def test_every_host_gets_all_bytes_once(world):
    first = published(world, 1)
    here = await asyncio.gather(*(world.relays.bring(first, node, 5) for node in ("x", "y", "x", "home")))
    assert here[3] is first
    assert here[0] is here[2]
    assert len({publication.segment for publication in here}) == 3
    assert [publication.hash_segment() for publication in here] == [first.digest] * 4
    assert world.sent == {("home", "x"): 8, ("home", "y"): 8}
    assert world.spawned == {"home": 1, "x": 1, "y": 1}
    assert await world.relays.bring(first, "x", 5) is here[0]  # A new life there finds it.


async def test_many_hosts_pass_pieces_on(world):
    hosts = ["a", "b", "c", "d"]
    for version in (1, 2, 3):
        publication = published(world, version)
        here = await asyncio.gather(*(world.relays.bring(publication, host, 5) for host in hosts))
        assert [one.hash_segment() for one in here] == [publication.digest] * 4
        if version == 1:  # Who takes part is known from the last time.
            assert world.sent == {("home", host): 8 for host in hosts}
        world.sent.clear() if version < 3 else None
    # Eight pieces: two to each host from the sender, and each passes its two on to the three others.
    assert world.sent == {("home", host): 2 for host in hosts} | {(a, b): 2 for a in hosts for b in hosts if a != b}


@pytest.mark.parametrize("how", ["slow", "dies", "gone"])
async def test_what_a_host_does_not_pass_on_comes_from_the_sender(world, monkeypatch, how):
    monkeypatch.setattr(weight_relay, "PATIENCE_S", 0.02)
    hosts = ["a", "b", "c", "d"]
    first = published(world, 1)
    await asyncio.gather(*(world.relays.bring(first, host, 5) for host in hosts))
    second = published(world, 2)
    if how == "slow":
        world.gates["b"] = asyncio.Event()
    elif how == "dies":
        world.dying["b"] = 1000
    others = [host for host in hosts if host != "b"]
    slow = asyncio.create_task(world.relays.bring(second, "b", 5)) if how != "gone" else None
    here = await asyncio.wait_for(asyncio.gather(*(world.relays.bring(second, host, 5) for host in others)), 2)
    assert [one.hash_segment() for one in here] == [second.digest] * 3
    if how == "slow":
        assert not slow.done()
        world.gates["b"].set()
        assert (await slow).hash_segment() == second.digest
    elif how == "dies":
        with pytest.raises(EngineFailed):
            await slow


async def test_a_sender_that_is_replaced_half_way_costs_nobody_a_piece(world, monkeypatch):
    monkeypatch.setattr(weight_relay, "PATIENCE_S", 0.01)
    hosts = ["a", "b", "c", "d"]
    first = published(world, 1)
    await asyncio.gather(*(world.relays.bring(first, host, 5) for host in hosts))
    second, world.gates["c"] = published(world, 2), asyncio.Event()
    slow = asyncio.create_task(world.relays.bring(second, "c", 5))
    await asyncio.sleep(0.01)
    world.dying["a"] = 1000  # For which the sender's relay is given up too.
    with pytest.raises(EngineFailed):
        await world.relays.bring(second, "a", 5)
    assert world.spawned["home"] > 1
    world.gates["c"].set()
    assert (await slow).hash_segment() == second.digest
    assert (await world.relays.bring(second, "b", 5)).hash_segment() == second.digest


async def test_two_publications_take_turns_in_memory(world):
    names = []
    for version in range(1, 6):
        publication = published(world, version)
        here = await world.relays.bring(publication, "x", 5)
        assert here.hash_segment() == publication.digest
        names.append(here.segment)
    assert names[0] == names[2] == names[4] != names[1] == names[3]


async def test_a_publication_without_bytes_of_its_own_goes_nowhere(world):
    bare = Publication(1, "millrace_nccl", "", TENSORS, "", Canary(np.zeros(2, np.int32), np.zeros(1, np.float32)))
    assert await world.relays.bring(bare, "x", 5) is bare
    assert world.spawned == {}


async def test_a_slow_host_does_not_hold_up_another(world):
    world.gates["slow"] = asyncio.Event()
    publication = published(world, 1)
    slow = asyncio.create_task(world.relays.bring(publication, "slow", 5))
    here = await asyncio.wait_for(world.relays.bring(publication, "x", 5), 1)
    assert here.hash_segment() == publication.digest
    assert not slow.done()
    # Overtaken: what comes late lies in a segment of its own.
    newer = published(world, 2)
    late = asyncio.create_task(world.relays.bring(newer, "slow", 5))
    await asyncio.sleep(0.01)
    world.gates["slow"].set()
    assert (await slow).hash_segment() == publication.digest
    assert (await late).hash_segment() == newer.digest


async def test_a_relay_that_dies_is_replaced(world):
    world.dying["x"] = 1
    publication = published(world, 1)
    here = await world.relays.bring(publication, "x", 5)
    assert here.hash_segment() == publication.digest
    assert world.spawned["x"] == 2


@pytest.mark.parametrize("how", ["dies", "hangs"])
async def test_a_host_that_cannot_be_reached_costs_its_engines_alone(world, how):
    if how == "dies":
        world.dying["x"] = 1000
    else:
        world.gates["x"] = asyncio.Event()
    publication = published(world, 1)
    with pytest.raises(EngineFailed, match=r"weights did not reach host x: (gone|> 0\.05 s)"):
        await world.relays.bring(publication, "x", 0.05)
    assert (await world.relays.bring(publication, "y", 5)).hash_segment() == publication.digest
    world.dying.clear()
    world.gates.clear()
    assert (await world.relays.bring(publication, "x", 5)).hash_segment() == publication.digest  # Tried afresh.


async def test_what_was_refused_is_brought_again(world):
    publication = published(world, 1)
    await world.relays.bring(publication, "x", 5)
    world.relays.forget("x")
    await world.relays.bring(publication, "x", 5)
    assert world.sent["home", "x"] == 16


async def test_nothing_is_left_in_memory(world):
    here = await world.relays.bring(published(world, 1), "x", 5)
    assert (SHM_DIR / here.segment).exists()
    await world.relays.close()
    assert not (SHM_DIR / here.segment).exists()


async def test_a_publication_from_nowhere_is_taken_as_it_is(world):
    publication = replace(published(world, 1), node="")
    assert await world.relays.bring(publication, "x", 5) is publication
    assert world.spawned == {}


async def test_who_comes_late_with_a_failure_does_not_undo_what_was_brought_since(world):
    publication = published(world, 1)
    await world.relays.bring(publication, "x", 5)
    earlier = asyncio.create_task(asyncio.sleep(0))
    world.relays.forget("x", earlier)
    await earlier
    await world.relays.bring(publication, "x", 5)
    assert world.sent["home", "x"] == 8


async def test_two_hosts_pass_pieces_on_already(world):
    for version in (1, 2):
        world.sent.clear()
        publication = published(world, version)
        await asyncio.gather(*(world.relays.bring(publication, host, 5) for host in ("a", "b")))
    assert world.sent == {("home", "a"): 4, ("home", "b"): 4, ("a", "b"): 4, ("b", "a"): 4}


async def test_relays_end_with_the_run(world):
    await world.relays.bring(published(world, 1), "x", 5)
    relays = list(world.relays._actors.values())
    await world.relays.close()
    assert [relay.killed for relay in relays] == [True, True]


async def test_an_engine_that_goes_away_leaves_the_weights_to_the_others_of_its_host(world):
    publication, world.gates["x"] = published(world, 1), asyncio.Event()
    first, second = (asyncio.create_task(world.relays.bring(publication, "x", 5)) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    world.gates["x"].set()
    assert (await second).hash_segment() == publication.digest
