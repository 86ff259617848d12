"""The buffer's law: staleness stays within its bound, groups leave once and in order, barren runs end."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.buffer import RolloutBuffer
from shared.errors import NothingToLearn
from tests.fakes import make_group
from tests.pace import scaled


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


async def admitted(buffer: RolloutBuffer, first: int = 0, limit: int = 100) -> int:
    """Admit and register groups until the buffer makes us wait; returns how many."""
    for group_id in range(first, first + limit):
        task = asyncio.ensure_future(buffer.admit())
        await settle()
        if not task.done():
            task.cancel()
            await settle()
            return group_id - first
        buffer.enter(group_id)
    return limit


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_admission_stops_at_the_steps_that_may_be_ahead(max_staleness):
    buffer = RolloutBuffer(4, max_staleness, 100)
    assert await admitted(buffer) == 4 * (max_staleness + 1)
    assert (buffer.in_flight, buffer.ready) == (4 * (max_staleness + 1), 0)


async def test_only_a_release_gives_slots_back():
    buffer = RolloutBuffer(2, 0, 100)
    assert await admitted(buffer) == 2
    for group_id in (0, 1):
        await buffer.put(make_group(group_id), True)
    await buffer.take()
    assert await admitted(buffer, first=2) == 0
    await buffer.release(5)
    assert await admitted(buffer, first=2) == 2


async def test_a_discarded_group_gives_its_slot_back_at_once():
    buffer = RolloutBuffer(2, 0, 100)
    assert await admitted(buffer) == 2
    await buffer.discard(0)
    assert await admitted(buffer, first=2) == 1
    assert buffer.members == [1, 2]


async def test_groups_leave_in_admission_order_whatever_order_they_are_scored_in():
    buffer = RolloutBuffer(3, 0, 100)
    await admitted(buffer)
    taking = asyncio.ensure_future(buffer.take())
    for group_id in (2, 1):
        await buffer.put(make_group(group_id), True)
        await settle()
    assert not taking.done()  # Two are ready, but the oldest is not.
    assert buffer.ready == 2
    await buffer.put(make_group(0), True)
    assert [group.group_id for group in await taking] == [0, 1, 2]
    assert (buffer.in_flight, buffer.ready) == (3, 0)


async def test_discarding_the_oldest_frees_the_head_of_the_line():
    buffer = RolloutBuffer(2, 1, 100)
    await admitted(buffer)
    taking = asyncio.ensure_future(buffer.take())
    for group_id in (1, 2):
        await buffer.put(make_group(group_id), True)
    await buffer.discard(0)
    assert [group.group_id for group in await taking] == [1, 2]


async def test_no_more_groups_are_admitted_than_the_batches_left_can_use():
    buffer = RolloutBuffer(2, 3, 100)
    assert await admitted(buffer) == 8
    for group_id in range(2):
        await buffer.put(make_group(group_id), True)
    await buffer.take()
    await buffer.release(3)
    assert await admitted(buffer, first=8) == 0  # Six are in flight, as many as three batches take.
    await buffer.discard(2)
    assert await admitted(buffer, first=8) == 1


async def test_ids_must_rise_and_releases_must_match():
    buffer = RolloutBuffer(2, 0, 100)
    await admitted(buffer)
    with pytest.raises(AssertionError):
        buffer.enter(1)
    await buffer.release(1)
    with pytest.raises(AssertionError):
        await buffer.release(1)
    with pytest.raises(KeyError):
        await buffer.discard(9)


@pytest.mark.parametrize("leave", ["put", "replace", "hole"])
async def test_the_barren_limit_counts_groups_in_a_row(leave):
    async def barren(buffer, group_id):
        # What counts is what the caller says: with several functions equal sums may still carry a signal.
        await (buffer.put(make_group(group_id), False) if leave == "put" else buffer.replace(group_id))

    buffer = RolloutBuffer(4, 1, 3, 0 if leave == "hole" else 100)
    await admitted(buffer)
    for group_id in (0, 1):
        await barren(buffer, group_id)
    await buffer.put(make_group(2, (1.0, 1.0)), True)  # One group with signal starts the count anew.
    for group_id in (3, 4):
        await barren(buffer, group_id)
    with pytest.raises(NothingToLearn, match=r"3 groups in a row.*barren_limit"):
        await barren(buffer, 5)


async def test_a_warning_comes_once_in_a_run_and_well_before_the_limit(capsys):
    buffer = RolloutBuffer(8, 0, 6)
    await admitted(buffer)
    said = []
    for group_id, signal in enumerate([False] * 5 + [True] + [False] * 5):
        await buffer.put(make_group(group_id), signal)
        said.append(capsys.readouterr().out[:13])
    assert said == ["", "", "warning[W307]"] + [""] * 8


async def test_failed_groups_are_not_barren():
    buffer = RolloutBuffer(4, 0, 2)
    await admitted(buffer)
    for group_id in range(4):
        await buffer.discard(group_id)
    assert buffer.members == []


# --- the law, under random timing ---


class Simulation:
    """Producers, a trainer and a delivery with random delays, wired as the controller wires them."""

    def __init__(self, seed: int, groups_per_step: int, max_staleness: int, steps: int) -> None:
        self.chance = random.Random(seed)
        self.per_step, self.bound, self.steps = groups_per_step, max_staleness, steps
        self.buffer = RolloutBuffer(groups_per_step, max_staleness, 10**6, self.chance.choice((0, 1, 10**6)))
        self.version = self.served = 0
        """Steps done by the trainer, and the version that the engines sample with."""
        self.admitted: list[int] = []
        self.taken: list[int] = []
        self.discarded: list[int] = []
        self.worst = self.batches = 0
        self.pace = [self.chance.choice((1, 4, 20)) for _ in range(3)]

    async def pause(self, kind: int) -> None:
        for _ in range(self.chance.randrange(self.pace[kind])):
            await asyncio.sleep(0)

    async def produce(self) -> None:
        async with asyncio.TaskGroup() as groups:
            for group_id in range(10**6):
                await self.buffer.admit()
                assert self.buffer.in_flight <= self.per_step * (self.bound + 1)
                self.buffer.enter(group_id)
                self.admitted.append(group_id)
                groups.create_task(self.roll_out(group_id))

    async def roll_out(self, group_id: int) -> None:
        version = self.served
        await self.pause(0)
        if self.chance.random() < 0.2:
            self.discarded.append(group_id)
            await (self.buffer.replace if self.chance.random() < 0.5 else self.buffer.discard)(group_id)
        else:
            await self.buffer.put(make_group(group_id, version=version), True)

    async def train(self) -> None:
        delivery = None
        while self.version < self.steps:
            groups = await self.buffer.take()
            self.batches += 1
            self.taken += [group.group_id for group in groups]
            self.worst = max([self.worst, *(group.staleness(self.version) for group in groups)])
            await self.pause(1)
            if not groups or self.chance.random() < 0.1:  # A step that the optimizer refused.
                await self.buffer.release(self.steps - self.version)
                continue
            self.version += 1
            if delivery is not None:
                await delivery
            delivery = asyncio.ensure_future(self.deliver(self.version))
        await delivery

    async def deliver(self, version: int) -> None:
        await self.pause(2)
        self.served = version
        await self.buffer.release(self.steps - version)

    async def run(self) -> None:
        producer, trainer = asyncio.ensure_future(self.produce()), asyncio.ensure_future(self.train())
        await asyncio.wait({producer, trainer}, timeout=scaled(30), return_when=asyncio.FIRST_COMPLETED)
        producer.cancel()
        (ended,) = await asyncio.gather(producer, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError), ended
        assert trainer.done(), "the trainer waits for groups that never come"
        await trainer


@settings(derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    groups_per_step=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    steps=st.integers(1, 12),
)
def test_the_bound_holds_and_every_group_leaves_exactly_once(seed, groups_per_step, max_staleness, steps):
    run = Simulation(seed, groups_per_step, max_staleness, steps)
    asyncio.run(run.run())
    assert run.worst <= max_staleness
    holes = run.buffer.holes
    assert run.batches >= steps
    assert run.batches * groups_per_step - holes <= len(run.taken) <= run.batches * groups_per_step
    assert run.taken == sorted(run.taken)
    gone = run.taken + run.discarded
    assert len(gone) == len(set(gone))
    # Groups in flight at the end are cancelled ones; all others left, and nothing left that was not admitted.
    assert set(gone) <= set(run.admitted)
    assert run.admitted == list(range(len(run.admitted)))
    assert set(run.buffer.members) == set(run.admitted) - set(gone)
    assert run.buffer.in_flight >= len(run.admitted) - len(gone)


def test_the_simulation_reaches_every_bound():
    """The bound is tight: some timing uses groups exactly as stale as allowed, so a smaller one would be noticed."""
    for bound in range(4):
        worst = set()
        for seed in range(12):
            run = Simulation(seed, 2, bound, 10)
            asyncio.run(run.run())
            worst.add(run.worst)
        assert max(worst) == bound
