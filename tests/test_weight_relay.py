"""Weights on their way to other hosts: whole, once to each, past relays that die or are slow; and removed at the end."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter

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
    """A relay in this process; pieces are resolved where they are used, as Ray does."""

    def __init__(self, world, node, name):
        self.world, self.node_name, self.relay = world, node, WeightRelay(name)
        world.spawned[node] += 1

    def offer(self, method, *arguments):
        return method, self, arguments

    async def begin(self, size):
        return self.relay.begin(size)

    async def put(self, segment, start, piece):
        _, source, arguments = piece
        self.world.puts[self.node_name] += 1
        if self.world.dying.get(self.node_name, 0) > 0:
            self.world.dying[self.node_name] -= 1
            raise ActorDied("gone")
        await self.world.gates.get(self.node_name, self.world.open).wait()
        self.relay.put(segment, start, np.array(source.relay.piece(*arguments)))

    async def close(self):
        self.relay.close()


class World:
    def __init__(self):
        self.spawned, self.puts, self.dying = Counter(), Counter(), {}
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
    assert world.puts == {"x": 8, "y": 8}
    assert world.spawned == {"home": 1, "x": 1, "y": 1}
    assert await world.relays.bring(first, "x", 5) is here[0]  # A new life there finds it.


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
    assert world.puts["x"] == 16


async def test_nothing_is_left_in_memory(world):
    here = await world.relays.bring(published(world, 1), "x", 5)
    assert (SHM_DIR / here.segment).exists()
    await world.relays.close()
    assert not (SHM_DIR / here.segment).exists()
