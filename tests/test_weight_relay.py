"""Weights on their way to other hosts: whole, once to each, past relays that die or are slow; and removed at the end."""

from __future__ import annotations

import asyncio
import errno
import os
import uuid
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rollout import relays
from rollout.relays import NotBrought, Relays
from rollout.weight_relay import WeightRelay
from shared.actors import ActorDied, ArgumentLost, Call
from shared.weights import SHM_BACKEND, SHM_DIR, Canary, Publication, Segment, TensorMeta, digest, views
from tests.fakes import FakeActor, FakeSlot
from tests.pace import scaled

SIZE = 1000
TENSORS = (TensorMeta("a", "uint8", (600,), 0, 600), TensorMeta("b", "uint8", (360,), 640, 360))


class Host(FakeActor):
    """A relay in this process; what it offers is computed at once and awaited where it is used, as Ray does.

    Once it is ended it answers nothing more, and what it has not computed by then is lost.
    """

    def __init__(self, world, node, name):
        self.world, self.node_name, self.relay = world, node, WeightRelay(name)
        self.death, self.reads = asyncio.get_running_loop().create_future(), True
        world.spawned[node] += 1
        world.hosts.append(self)

    @property
    def killed(self):
        return self.death.done()

    def kill(self):
        if not self.killed:
            self.death.set_result(None)

    def call(self, method, *arguments):
        answer = self._begun(method, arguments, ActorDied("gone"))
        return Call(answer, answer.cancel)

    def offer(self, method, *arguments):
        return self, self._begun(method, arguments, ArgumentLost("gone with its host"))

    def _begun(self, method, arguments, error):
        work = asyncio.ensure_future(self._until_death(getattr(self, method)(*arguments), error))
        work.add_done_callback(lambda task: task.cancelled() or task.exception())
        return work

    async def _until_death(self, call, error):
        work = asyncio.ensure_future(call)
        work.add_done_callback(lambda task: task.cancelled() or task.exception())
        if not self.killed:
            await asyncio.wait((work, self.death), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            raise error
        return work.result()

    async def piece(self, segment, start, stop):
        if not self.reads:
            await asyncio.Event().wait()
        if self.world.lost and stop:
            self.world.lost -= 1
            raise ArgumentLost("evicted")
        return np.array(self.relay.piece(segment, start, stop))

    async def begin(self, number, size):
        if self.node_name in self.world.dead:
            await self.die()
        return self.relay.begin(number, size)

    async def take(self, number, start, offered):
        host, answer = offered
        if host is not self:
            self.world.sent[host.node_name, self.node_name] += 1
        if self.world.dying.get(self.node_name, 0) > 0:
            self.world.dying[self.node_name] -= 1
            await self.die()
        piece = await asyncio.shield(answer)
        for gate in [self.node_name] if host is self else [self.node_name, f"{host.node_name} to others"]:
            await self.world.gates.get(gate, self.world.open).wait()
        self.relay.take(number, start, piece)
        return piece

    pass_on = take

    async def close(self):
        self.relay.close()

    async def die(self):
        self.kill()
        await asyncio.Event().wait()


class World:
    def __init__(self):
        self.spawned, self.sent, self.dying = Counter(), Counter(), {}
        """Relays by host; pieces by sender and receiver; relays that will die of a piece."""
        self.dead, self.lost = set(), 0
        """Hosts without any relay that lives; pieces that the object store will lose."""
        self.open, self.gates = asyncio.Event(), {}
        self.open.set()
        self.hosts, self.made = [], []

    def last(self, node):
        return [host for host in self.hosts if host.node_name == node][-1]

    def on(self, node):
        return FakeSlot(lambda name: Host(self, node, name))


@pytest.fixture
async def world(monkeypatch):
    monkeypatch.setattr(relays, "PIECE_BYTES", 128)
    world = World()
    world.relays = Relays(world, {})
    yield world
    await world.relays.close()
    for host in world.hosts:
        host.relay.close()
    for segment in world.made:
        segment.unlink()


def published(world, version):
    segment = Segment(f"millrace-test-{uuid.uuid4().hex[:8]}", SIZE)
    segment.bytes[:] = np.random.default_rng(version).integers(0, 256, SIZE).astype(np.uint8)
    world.made.append(segment)
    canary = Canary(np.zeros(2, np.int32), np.zeros(1, np.float32))
    hashed = digest(views(segment.bytes, TENSORS))
    return Publication(version, SHM_BACKEND, segment.name, TENSORS, hashed, canary, node="home")


async def brought(world, publication, hosts, limit_s=5.0):
    """What became of it on each of ``hosts``."""
    return await asyncio.gather(*(world.relays.bring(publication, h, limit_s) for h in hosts), return_exceptions=True)


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
    monkeypatch.setattr(relays, "PATIENCE_S", 0.02)
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
        with pytest.raises(NotBrought):
            await slow
    assert [world.spawned[host] for host in ("home", *others)] == [1] * 4


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
    with pytest.raises(NotBrought, match=r"weights did not reach host x: (gone|> 0\.05 s)"):
        await world.relays.bring(publication, "x", 0.05)
    assert (await world.relays.bring(publication, "y", 5)).hash_segment() == publication.digest
    world.dying.clear()
    world.gates.clear()
    assert (await world.relays.bring(publication, "x", 5)).hash_segment() == publication.digest  # Tried afresh.


async def test_what_was_refused_is_brought_again(world):
    publication = published(world, 1)
    await world.relays.bring(publication, "x", 5)
    world.relays.forget(publication, "x")
    await world.relays.bring(publication, "x", 5)
    assert world.sent["home", "x"] == 16


async def test_what_an_overtaken_publication_is_refused_for_does_not_undo_the_newest(world):
    first, second = published(world, 1), published(world, 2)
    await world.relays.bring(first, "x", 5)
    here = await world.relays.bring(second, "x", 5)
    world.relays.forget(first, "x")
    assert await world.relays.bring(second, "x", 5) is here


# --- pieces that come late ---


async def test_a_piece_that_is_passed_on_late_is_not_written_over_a_newer_publication(world, monkeypatch):
    monkeypatch.setattr(relays, "PATIENCE_S", 0.02)
    hosts = ["a", "b", "c"]
    await brought(world, published(world, 1), hosts)
    uplink = world.gates["b to others"] = asyncio.Event()  # In 2 it is gone around.
    await brought(world, published(world, 2), hosts)
    del world.gates["b to others"]
    await brought(world, published(world, 3), hosts)
    newest = published(world, 4)
    here = await brought(world, newest, hosts)
    uplink.set()  # What b passes on of 2 arrives; 4 has been brought, its engines are about to hash it.
    await asyncio.sleep(0.02)
    assert [one.hash_segment() for one in here] == [newest.digest] * 3


def test_a_relay_keeps_the_newest_publication_whatever_else_comes():
    relay, piece = WeightRelay(f"test-{uuid.uuid4().hex[:8]}"), np.ones(4, np.uint8)
    try:
        older, newest = relay.begin(5, 4), relay.begin(7, 4)
        relay.take(7, 0, piece)
        assert relay.begin(7, 4) == newest  # Tried once more.
        assert relay.begin(6, 4) == older
        relay.take(5, 0, piece * 5)
        assert relay.piece(newest, 0, 4).tolist() == [1] * 4
        assert relay.piece(older, 0, 4).tolist() == [0] * 4
        assert relay.pass_on(5, 0, piece) is piece  # Others may want it yet.
        assert relay.begin(8, 4) == older
        relay._rooms[0].put(5, 0, piece)  # Found while it was 5's still.
        assert relay.piece(older, 0, 4).tolist() == [0] * 4
    finally:
        relay.close()


# --- who is to blame ---


async def test_a_dead_host_costs_its_own_engines_alone(world):
    world.dead.add("x")
    dead, *here = await brought(world, published(world, 1), ["x", "a", "b", "c"])
    assert isinstance(dead, NotBrought)
    assert not [one for one in here if isinstance(one, Exception)]
    assert world.spawned == {"home": 1, "x": 3, "a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("tries", [1, 2])
async def test_a_sender_that_dies_half_way_is_replaced_once_and_nobody_else_is(world, monkeypatch, tries):
    hosts = ["a", "b", "c"]
    await brought(world, published(world, 1), hosts)
    monkeypatch.setattr(relays, "TRIES", tries)  # It counts as one of whoever sees to it, not of the others.
    world.last("home").reads = False
    second = published(world, 2)
    bringing = asyncio.create_task(brought(world, second, hosts))
    await asyncio.sleep(0.01)
    world.last("home").kill()
    here = [one for one in await bringing if not isinstance(one, NotBrought)]
    assert [one.hash_segment() for one in here] == [second.digest] * (3 if tries > 1 else 2)
    assert world.spawned == {"home": 2, "a": 1, "b": 1, "c": 1}


async def test_a_try_is_not_counted_where_another_has_replaced_the_relay(world, monkeypatch):
    monkeypatch.setattr(relays, "TRIES", 1)
    gate = world.gates["x"] = asyncio.Event()
    overtaken = asyncio.create_task(world.relays.bring(published(world, 1), "x", 0.03))
    await asyncio.sleep(0.01)
    newest = published(world, 2)
    bringing = asyncio.create_task(world.relays.bring(newest, "x", 5))
    with pytest.raises(NotBrought, match=r"> 0\.03 s"):
        await overtaken
    gate.set()
    assert (await bringing).hash_segment() == newest.digest
    assert world.spawned["x"] == 2


async def test_pieces_that_are_lost_are_offered_again_by_the_same_sender(world):
    world.lost = 2
    publication = published(world, 1)
    here = await brought(world, publication, ["x", "y"])
    assert [one.hash_segment() for one in here] == [publication.digest] * 2
    assert world.spawned == {"home": 1, "x": 1, "y": 1}
    world.lost, second = 10**6, published(world, 2)
    with pytest.raises(NotBrought, match="weights did not reach host x: evicted"):
        await world.relays.bring(second, "x", 5)


async def test_a_sender_that_hangs_is_replaced(world):
    await world.relays.bring(published(world, 1), "x", 5)
    world.last("home").reads = False
    second = published(world, 2)
    here = await brought(world, second, ["x", "y"], limit_s=0.05)
    assert [one.hash_segment() for one in here] == [second.digest] * 2
    assert world.spawned["home"] == 2


async def test_a_sender_that_others_hear_of_is_not_replaced_for_a_slow_host(world):
    world.gates["slow"] = asyncio.Event()
    slow = asyncio.create_task(world.relays.bring(published(world, 1), "slow", 0.05))
    while not slow.done():
        await world.relays.bring(published(world, 2), "x", 5)
        await asyncio.sleep(0.01)
    with pytest.raises(NotBrought):
        await slow
    assert world.spawned == {"home": 1, "slow": 3, "x": 1}


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_a_host_without_space_costs_its_engines_alone_until_there_is_some(world, monkeypatch):
    publication = published(world, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(NotBrought, match=r"host x: .* No space left on device"):
            await world.relays.bring(publication, "x", 5)
    assert not list(SHM_DIR.glob(f"millrace-{world.relays._run}*"))
    assert (await world.relays.bring(publication, "x", 5)).hash_segment() == publication.digest
    assert world.spawned == {"home": 1, "x": 1}


async def test_weights_that_are_gone_with_the_learner_are_no_fault_of_ours(world):
    publication = published(world, 1)
    world.made.pop().unlink()
    with pytest.raises(NotBrought, match=r"host x: .* No such file"):
        await world.relays.bring(publication, "x", 5)


async def test_a_fault_of_ours_travels(world, monkeypatch):
    publication = published(world, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Host, "begin", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await world.relays.bring(publication, "x", 5)
    await world.relays.bring(publication, "x", 5)  # What failed is not kept.


# --- the end ---


async def test_nothing_is_carried_or_spawned_after_the_close(world):
    for host in ("x", "y"):
        world.gates[host] = asyncio.Event()
    first, second = published(world, 1), published(world, 2)
    bringing = [asyncio.create_task(world.relays.bring(one, host, 5)) for one in (first, second) for host in ("x", "y")]
    await asyncio.sleep(0.01)
    assert len(world.relays._carries) == 4  # Those of the first too, which has been overtaken.
    await world.relays.close()
    assert world.relays._carries == set()
    before = world.spawned.copy()
    await asyncio.wait(bringing, timeout=scaled(1))
    assert all(task.cancelled() for task in bringing)
    for host in ("x", "z"):
        with pytest.raises(NotBrought, match="closed"):
            await world.relays.bring(second, host, 5)
    assert world.spawned == before
    assert not list(SHM_DIR.glob(f"millrace-{world.relays._run}*"))


def test_a_relay_makes_no_room_after_its_end():
    relay = WeightRelay(f"test-{uuid.uuid4().hex[:8]}")
    name = relay.begin(1, 100)
    relay.close()
    with pytest.raises(AssertionError):
        relay.begin(2, 100)
    assert not (SHM_DIR / name).exists()


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
    publication, gate = published(world, 1), asyncio.Event()
    world.gates["x"] = gate
    late = asyncio.create_task(world.relays.bring(publication, "x", 0.02))
    await asyncio.sleep(0.01)
    world.relays.forget(publication, "x")
    since = asyncio.create_task(world.relays.bring(publication, "x", 5))
    with pytest.raises(NotBrought):
        await late
    gate.set()
    assert await world.relays.bring(publication, "x", 5) is await since


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
