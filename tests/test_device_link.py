"""A device link over scripted engines and ranks: whoever is lost, whenever, both ends are built again from the newest checkpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from launch.delivery import Delivery
from launch.parts import Parts
from launch.run import Session
from launch.run_folder import RunFolder
from learner import learner_group
from learner.learner_group import LearnerGroup
from rollout.prompts import PromptStream
from shared.actors import ActorDied, Call
from shared.errors import FleetExhausted, LearnerLost, LinkLost, WeightProofFailed
from shared.ledger import TimeLedger
from shared.metrics import read_metrics
from shared.types import StepReport
from shared.weights import NCCL_BACKEND, Canary, Link, Publication, TensorMeta
from tests.engine_worlds import ask, deliver, publication, recovered, shielded, texts, until
from tests.fakes import FakeActor, FakeEngines, FakeLearners, FakeRewards, FakeSlot, make_prompt

NEW = publication(1, NCCL_BACKEND)


async def linked(make_pool, engines=2, **changes):
    """A pool in a link, with publication 0 taken and proved over it."""
    pool, world = await make_pool(engines, published=False, **changes)
    await pool.link.join(Link("host", 1, pool.workers))
    await deliver(pool, publication(0, NCCL_BACKEND))
    return pool, world


async def relink(pool, version=9):
    """What a run does when the learner is there again."""
    await pool.reset()
    await pool.link.complete(3.0)
    await pool.link.join(Link("host", 2, pool.workers))
    await deliver(pool, publication(version, NCCL_BACKEND))


# --- the engines' end ---


async def test_an_engine_that_is_lost_takes_the_link_with_it_and_waits_for_the_next(make_pool, capsys):
    pool, world = await linked(make_pool)
    pool.check()
    world.last(0).die()
    await until(lambda: world.last(0).life == 1 and len(pool._fleet.running()) == 2)
    with pytest.raises(LinkLost, match=r"engine-0, which took part in the device link: engine-0 died"):
        pool.check()
    assert texts(await asyncio.gather(*ask(pool, *range(4)))) == ["1.0"] * 4  # The other still serves.
    with pytest.raises(LinkLost):
        await pool.receive(NEW)
    assert world.last(0).rank is None
    await relink(pool)
    assert recovered(pool)
    assert [world.last(i).rank for i in (0, 1)] == [1, 2]
    assert [world.last(i).holds.version for i in (0, 1)] == [9, 9]
    assert "engine-0 serves again" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["dies", "refuses", "is given up"])
async def test_every_engine_that_does_not_get_through_a_broadcast_is_replaced(make_pool, way):
    """NCCL has no way out of a broadcast: the process of an engine that waits in it may hang for good."""
    pool, world = await linked(make_pool, 3)
    hangs = asyncio.Event()
    first, second, third = world.actors
    second.do_receive = lambda _: hangs.wait()
    if way == "refuses":
        first.fail["receive"] = [ValueError("nccl")]
    else:
        first.do_receive = lambda _: hangs.wait()
    taking = asyncio.ensure_future(pool.receive(NEW))
    await until(lambda: third.holds is NEW)
    if way == "dies":
        first.die()
    elif way == "is given up":
        taking.cancel()
    with pytest.raises(asyncio.CancelledError if way == "is given up" else LinkLost):
        await taking
    with pytest.raises(LinkLost):
        pool.check()
    await until(lambda: first.killed and second.killed)
    assert not third.killed
    await relink(pool)
    assert recovered(pool, restarts=2, healthy=3)


async def test_an_engine_that_is_lost_after_a_broadcast_fails_its_proof(make_pool):
    pool, world = await linked(make_pool)
    await pool.receive(NEW)
    world.last(1).die()
    with pytest.raises(LinkLost, match="engine-1"):
        await pool.prove(NEW, NEW.digest)
    await relink(pool)
    assert recovered(pool)


async def test_one_engine_with_other_weights_is_replaced_and_if_all_have_them_the_run_ends(make_pool):
    pool, world = await linked(make_pool)
    world.altering.add((0, 0, 1))
    await pool.receive(NEW)
    with pytest.raises(LinkLost, match=r"engine-0.*received \['x'\], sent d1"):
        await pool.prove(NEW, NEW.digest)
    await relink(pool, 2)
    world.altering |= {(0, 1, 3), (1, 0, 3)}
    later = publication(3, NCCL_BACKEND)
    await pool.receive(later)
    with pytest.raises(WeightProofFailed, match=r"received \['x'\], sent d3"):
        await pool.prove(later, later.digest)


async def test_the_last_engine_without_a_restart_left_ends_the_run_although_the_link_was_lost_first(make_pool):
    pool, world = await linked(make_pool, 1, **{"run.max_restarts": 0})
    world.last(0).die()
    await until(pool._fleet.retired)
    with pytest.raises(FleetExhausted):
        pool.check()
    await pool.reset()
    with pytest.raises(FleetExhausted):
        await pool.link.complete(3.0)


@pytest.mark.parametrize("colocate", [False, True])
async def test_a_link_does_not_wait_for_ever_for_an_engine_without_a_place(make_pool, colocate, capsys):
    pool, world = await linked(make_pool, **{"rollout.colocate": colocate})
    world.places.engines[0].there.clear()
    world.last(0).die()
    await until(lambda: len(pool._fleet.running()) == 1)
    with pytest.raises(LinkLost):
        pool.check()
    await pool.reset()
    if colocate:  # The learner's rank on that GPU would wait for it.
        with pytest.raises(LinkLost, match=r"1 of 2 engines run after 0\.01 s"):
            await pool.link.complete(0.01)
        return
    await pool.link.complete(0.01)
    assert "without the engines that do not run yet: 1 of 2 do" in capsys.readouterr().out
    await pool.link.join(Link("host", 2, pool.workers))
    await deliver(pool, NEW)
    assert (world.last(0).holds.version, world.last(1).rank) == (0, 1)


async def test_an_engine_that_does_not_join_fails_the_link(make_pool):
    pool, world = await linked(make_pool)
    world.last(1).fail["connect"] = [RuntimeError("timed out after 300 seconds")]
    with pytest.raises(LinkLost, match="an engine did not join: timed out after 300 seconds"):
        await pool.link.join(Link("host", 1, 2))
    with pytest.raises(LinkLost, match="2 engines run, the link is for 3 workers"):
        await pool.link.join(Link("host", 1, 3))


# --- both ends ---


class Hanging(FakeLearners):
    """A sender that hangs in a broadcast, as NCCL does, and says who called it meanwhile."""

    def __init__(self):
        super().__init__()
        self.sending, self.ended = asyncio.Event(), asyncio.Event()

    async def send(self, _):
        self.sending.set()
        await self.ended.wait()
        return "d1"


async def test_the_side_that_waits_is_given_up_as_soon_as_the_other_has_failed():
    learners, engines = Hanging(), FakeEngines()
    engines.crash_on["receive", 1] = LinkLost("engine-0 died")
    way = Delivery(learners, engines)
    assert await way.ended_well()
    with pytest.raises(LearnerLost, match="version 1 did not arrive: engine-0 died"):
        await asyncio.wait_for(way.bring(NEW), 3)
    assert not await way.ended_well()
    others = Delivery(learners, FakeEngines(receive_delay=60))

    async def fails(_):
        raise RuntimeError("connection closed by peer")

    learners.send = fails
    with pytest.raises(LearnerLost, match="version 1 did not arrive: connection closed by peer"):
        await asyncio.wait_for(others.bring(NEW), 3)


async def test_a_broadcast_goes_on_to_its_end_although_nobody_waits_for_it_any_more():
    learners, engines = Hanging(), FakeEngines()
    way = Delivery(learners, engines)
    bringing = asyncio.ensure_future(way.bring(NEW))
    await learners.sending.wait()
    bringing.cancel()
    await asyncio.wait([bringing])
    asyncio.get_running_loop().call_later(0.01, learners.ended.set)
    assert await way.ended_well()
    assert engines.received == [1]


async def test_a_sender_does_not_begin_alone():
    learners, engines = Hanging(), FakeEngines()

    def lost():
        raise LinkLost("engine-0 died")

    engines.check = lost
    with pytest.raises(LinkLost):
        await Delivery(learners, engines).bring(NEW)
    assert not learners.sending.is_set()


class Wire:
    """A broadcast between processes that may be killed: it ends when all are in it, and never once one is missing."""

    def __init__(self):
        self.members, self.inside, self.broadcasts = set(), set(), 0
        self.through = asyncio.Event()
        self.plan = {}
        """Number of a broadcast -> what happens in it."""

    async def take_part(self, who):
        self.inside.add(who)
        if self.inside == self.members and not any(member.killed for member in self.members):
            self.broadcasts += 1
            if (strike := self.plan.pop(self.broadcasts, None)) is not None:
                strike()
                await asyncio.Event().wait()
            self.through.set()
            self.through, self.inside = asyncio.Event(), set()
        else:
            await self.through.wait()


def on_disk(directory):
    return Path(directory, "version")


class Rank(FakeActor):
    """A learner rank that is killed like a process: what it was doing never ends, and calls say that it died."""

    def __init__(self, wire, rank):
        self.wire, self.rank, self.version, self.saving = wire, rank, 0, 0
        self.busy, self.ledger = asyncio.Lock(), TimeLedger(f"learner-{rank}")
        self.death = asyncio.get_running_loop().create_future()

    def kill(self):
        self.killed = True
        if not self.death.done():
            self.death.set_result(None)

    def call(self, method, *arguments):
        answer = asyncio.ensure_future(shielded(self._call(method, arguments)))
        answer.add_done_callback(lambda task: task.cancelled() or task.exception())
        return Call(answer, answer.cancel)

    async def _call(self, method, arguments):
        async def in_turn():
            async with self.busy:
                return await getattr(self, method)(*arguments)

        work = asyncio.ensure_future(in_turn())
        await asyncio.wait((work, self.death), return_when=asyncio.FIRST_COMPLETED)
        if self.death.done():
            work.cancel()
            raise ActorDied(f"rank {self.rank} was killed")
        return await work

    async def open_sender(self, _):
        return None

    async def listen(self, host):
        return 1

    async def connect(self, link):
        self.wire.inside, self.wire.through = set(), asyncio.Event()
        if self.rank == 0:
            self.wire.members = {self}

    async def times(self):
        return self.ledger.take()

    async def publish(self, canary):
        proof = Canary(canary, np.zeros(len(canary) - 1, np.float32))
        meta = TensorMeta("w", "float32", (1,), 0, 4)
        return Publication(self.version, NCCL_BACKEND, "", (meta,), "", proof) if self.rank == 0 else None

    async def train_and_publish(self, groups, canary):
        self.version += 1
        trained = {group.group_id: [1.0] * len(group.rewards) for group in groups}
        return StepReport(
            self.version, True, {"advantages/abs_mean": 1.0, "train_tokens": 8.0}, trained
        ), await self.publish(canary)

    async def send(self, check=False):
        if check:
            return "blake3"
        if self.rank == 0:
            await self.wire.take_part(self)
        return "sent" if self.rank == 0 else ""

    async def save(self, directory):
        self.saving += 1
        on_disk(directory).write_text(str(self.version))

    async def load(self, directory):
        self.version = int(on_disk(directory).read_text())


STEPS = 6


def knows_of_a_loss(pool):
    try:
        pool.check()
    except LinkLost:
        return True
    return False


@pytest.mark.parametrize(
    ("strike", "at", "newest"),
    [
        ("engine before", 3, 3),
        ("engine in", 4, 2),
        ("engine after", 4, 3),
        ("rank 0 in", 4, 2),
        ("rank 1 in", 4, 2),
        ("engine in, every time", 4, 2),
    ],
)
@pytest.mark.parametrize("staleness", [0, 1])
async def test_whoever_is_lost_the_link_is_built_again_from_the_newest_checkpoint(
    make_pool, monkeypatch, tmp_path, capsys, strike, at, newest, staleness
):
    wire, ranks = Wire(), []
    changes = {
        "run.steps": STEPS, "run.checkpoint_every": 2, "run.max_restarts": 2, "reward.max_failed_share": 1.0,
        "learner.num_ranks": 2, "rollout.max_staleness": staleness, "rollout.group_size": 1,
        "algorithm.zero_variance": "keep",
    }  # fmt: skip
    pool, world = await make_pool(2, published=False, **changes)
    config = pool._config

    def spawn(_config, rank, *_):
        ranks.append(Rank(wire, rank))
        return ranks[-1]

    slots = [FakeSlot(spawn) for _ in range(2)]
    for slot in slots:
        slot.share = lambda groups: groups

    async def address(_):
        return "127.0.0.1", 1

    monkeypatch.setattr(LearnerGroup, "_free_address", address)
    monkeypatch.setattr(learner_group, "ECHO_S", 0.05)
    monkeypatch.setattr("launch.run_folder.draw_curves", lambda *_: None)
    world.wire = wire
    learners = LearnerGroup(config, "test", slots, {})
    await learners.start()
    parts = Parts(pool, FakeRewards(), learners, linked=True)
    await parts.link()

    def hit():
        victim = ranks[int(strike[5]) - 2] if strike.startswith("rank") else world.last(0)
        victim.kill() if strike.startswith("rank") else victim.die()
        if strike.endswith("every time"):
            wire.plan[wire.broadcasts + 1] = hit

    if " in" in strike:
        wire.plan[at] = hit
    else:
        prove = pool.prove

        async def proved(published, digest):
            if "after" in strike and published.version == at - 1 and not pool.metrics()["engines/restarts"]:
                hit()
            figures = await prove(published, digest)
            if "before" in strike and published.version == at - 1 and not pool.metrics()["engines/restarts"]:
                hit()
                await until(lambda: knows_of_a_loss(pool))
            return figures

        monkeypatch.setattr(pool, "prove", proved)
    stream = PromptStream([make_prompt(i) for i in range(7)], seed=0)
    folder = RunFolder(config, tmp_path / "run")
    session = Session(SimpleNamespace(config=config, held_out=[]), "run.toml", folder.path, stream, None, 0.0)
    loaded = []
    load = LearnerGroup.load

    async def noted(self, directory):
        loaded.append(int(on_disk(directory).read_text()))
        await load(self, directory)

    monkeypatch.setattr(LearnerGroup, "load", noted)
    run = asyncio.wait_for(session._lives(folder, parts), 10)
    if strike.endswith("every time"):
        with pytest.raises(LearnerLost, match="did not arrive"):
            await run
        assert loaded == [2, 2]
    else:
        await run
        assert loaded == [newest]
        assert [row["step"] for row in read_metrics(folder.path)] == list(range(1, STEPS + 1))
        assert folder.samples.counts["groups/trained"] == 2 * STEPS
        assert [rank.version for rank in ranks[-2:]] == [STEPS, STEPS]
        assert {actor.holds.version for actor in (world.last(0), world.last(1))} == {STEPS}
        assert len(ranks) == 4
    assert "W903" not in capsys.readouterr().out
    folder.finish()
    learners.close()
