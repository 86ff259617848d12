"""Batches of several updates, dynamic sampling with its cap, and what a truncated completion is worth."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from launch.controller import Controller
from rollout.buffer import RolloutBuffer
from rollout.prompts import PromptStream
from rollout.scores import Scores, penalise_truncated
from shared.errors import NothingToLearn
from tests.fakes import (
    FakeEngines,
    FakeLearners,
    FakeRecorder,
    FakeRewards,
    make_completion,
    make_config,
    make_group,
    make_prompt,
)

NAN = float("nan")
RESAMPLE = {"algorithm.zero_variance": "resample"}


class Loop:
    """A controller with its four fakes; ``updates`` is what a call of the learner does."""

    def __init__(self, engines=None, rewards=None, learners=None, **changes) -> None:
        self.engines, self.rewards = engines or FakeEngines(), rewards or FakeRewards()
        self.learners, self.recorder = learners or FakeLearners(), FakeRecorder()
        self.config = make_config(**{"run.steps": 5, "run.stall_timeout_s": 2.0, "rollout.max_staleness": 0} | changes)
        self.learners.updates = self.config.updates_per_batch
        stream = PromptStream([make_prompt(i) for i in range(7)], seed=0)
        parts = (self.engines, self.rewards, self.learners, self.recorder)
        self.controller = Controller(self.config, stream, [], *parts)

    async def run(self) -> Loop:
        await asyncio.wait_for(self.controller.run(), 5)
        assert self.engines.active == 0
        return self


# --- several updates per batch ---


@pytest.mark.parametrize(("steps_per_batch", "epochs"), [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("bound", [0, 1, 2, 3, 4, 7])
async def test_staleness_counts_updates_and_keeps_its_bound(bound, steps_per_batch, epochs):
    updates = steps_per_batch * epochs
    changes = {"rollout.max_staleness": bound, "run.steps": 10 * updates}
    changes |= {"learner.steps_per_batch": steps_per_batch, "learner.epochs_per_batch": epochs}
    loop = await Loop(FakeEngines(delay=lambda _: 0.0002), learners=FakeLearners(delay=0.004), **changes).run()
    assert loop.learners.calls == 10
    assert all(len(batch) == 2 * steps_per_batch for batch in loop.learners.trained)
    assert loop.learners.order == list(range(20 * steps_per_batch))
    assert max(loop.learners.staleness) == bound // updates * updates  # Whole batches ahead, never more.
    assert [step for step, _, _ in loop.recorder.steps] == [updates * i for i in range(1, 11)]
    assert loop.engines.received == [updates * i for i in range(11)]


@pytest.mark.parametrize("bound", [0, 2, 4])
async def test_no_more_groups_are_sampled_than_the_updates_left_need(bound):
    changes = {"rollout.max_staleness": bound, "run.steps": 10, "learner.steps_per_batch": 2}
    loop = await Loop(learners=FakeLearners(delay=0.002), **changes).run()
    assert loop.engines.started == 5 * 4


async def test_the_batches_left_are_rounded_up():
    loop = Loop(**{"run.steps": 12, "learner.steps_per_batch": 3})
    assert [loop.config.batches_left(version) for version in (0, 3, 4, 9, 11, 12)] == [4, 3, 3, 1, 1, 0]


async def test_an_update_that_was_refused_makes_a_batch_rise_by_less():
    learners = FakeLearners()
    learners.during = lambda: setattr(learners, "updates", 1 if learners.calls in (1, 3) else 2)
    loop = await Loop(learners=learners, **{"run.steps": 8, "learner.steps_per_batch": 2}).run()
    assert [step for step, _, _ in loop.recorder.steps] == [1, 3, 4, 6, 8]
    assert loop.engines.started == 5 * 4


# --- dynamic sampling ---


async def test_beyond_the_cap_the_batch_is_smaller():
    rewards = FakeRewards(barren=lambda group: group % 4 != 0)
    loop = await Loop(rewards=rewards, **RESAMPLE, **{"algorithm.max_resampled_groups": 3}).run()
    # 1, 2, 3 are replaced by 2, 3, 4. Then 5, 6, 7 use the cap up, and 9, which came for 7, leaves a hole.
    assert loop.learners.trained == [[0, 4], [8], [12], [16], [20, 24]]
    assert loop.recorder.samples.counts["groups/trained"] == 7
    assert loop.recorder.steps[-1][1]["groups/holes"] == 3


async def test_within_the_cap_every_batch_is_full():
    rewards = FakeRewards(barren=lambda group: group % 4 != 0)
    loop = await Loop(rewards=rewards, **RESAMPLE, **{"algorithm.max_resampled_groups": 7}).run()
    assert loop.learners.trained == [[0, 4], [8, 12], [16, 20], [24, 28], [32, 36]]
    assert loop.controller.buffer.holes == 0


@pytest.mark.parametrize("bound", [0, 1, 2])
async def test_a_batch_without_any_group_is_skipped(bound):
    rewards = FakeRewards(barren=lambda group: 2 <= group < 12)
    changes = RESAMPLE | {"algorithm.max_resampled_groups": 2, "rollout.max_staleness": bound}
    loop = await Loop(rewards=rewards, **changes).run()
    assert [] not in loop.learners.trained
    assert loop.learners.order[:4] == [0, 1, 12, 13]
    assert [step for step, _, _ in loop.recorder.steps] == [1, 2, 3, 4, 5]
    assert loop.learners.calls == 5
    # The groups of the skipped batches are in the next record, which says how hard the prompts were.
    shares = [metrics["frac_reward_zero_std"] for _, metrics, _ in loop.recorder.steps]
    if bound == 0:
        assert shares == pytest.approx([0, 10 / 12, 0, 0, 0])
    assert sum(2 / (1 - share) - 2 for share in shares) == pytest.approx(10)  # Each is in exactly one record.


async def test_replaced_groups_are_in_the_share_without_variance():
    rewards = FakeRewards(barren=lambda group: group % 4 != 0)
    loop = await Loop(rewards=rewards, **RESAMPLE).run()
    shares = [metrics["frac_reward_zero_std"] for _, metrics, _ in loop.recorder.steps]
    assert shares == pytest.approx([3 / 5, 6 / 8, 6 / 8, 6 / 8, 6 / 8])
    assert loop.recorder.steps[0][1]["frac_reward_zero_std/all_best"] == pytest.approx(3 / 5)
    assert loop.recorder.steps[0][1]["frac_reward_zero_std/all_worst"] == 0
    assert loop.recorder.steps[0][1]["reward"] == 0.5  # Of what trained.


class Opposed(FakeRewards):
    """Two functions whose sum is the same for every completion."""

    async def score(self, group_id, prompt, completions):
        values = np.float32([i % 2 for i in range(len(completions))])
        return Scores({"a": values, "b": 1 - values})


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
async def test_by_part_equal_sums_are_a_signal(combine):
    functions = [{"function": "exact_match", "name": name} for name in "ab"]
    changes = {"algorithm.combine": combine, "reward.functions": functions, "algorithm.barren_limit": 20}
    loop = Loop(rewards=Opposed(), **RESAMPLE, **changes)
    if combine == "sum_then_normalize":
        with pytest.raises(NothingToLearn):
            await loop.run()
    else:
        assert (await loop.run()).learners.order == list(range(10))


async def admitted(buffer, count):
    for group_id in range(count):
        await buffer.admit()
        buffer.enter(group_id)


async def test_a_hole_keeps_its_slot_and_its_place():
    buffer = RolloutBuffer(2, 0, 100, max_resampled=1)
    await admitted(buffer, 2)
    await buffer.replace(1)
    assert buffer.in_flight == 1  # Replaced: the slot is free for a fresh prompt.
    await buffer.admit()
    buffer.enter(2)
    await buffer.replace(2)
    assert (buffer.in_flight, buffer.ready) == (2, 0)  # A hole: it is not.
    await buffer.put(make_group(0), True)
    assert [group.group_id for group in await buffer.take()] == [0]
    assert (buffer.holes, buffer.members) == (1, [])
    await buffer.release(5)
    assert buffer.in_flight == 0


async def test_every_batch_has_the_whole_cap():
    buffer = RolloutBuffer(1, 1, 100, max_resampled=1)
    for first in (0, 3):
        for group_id in (first, first + 1):
            await buffer.admit()
            buffer.enter(group_id)
        await buffer.replace(first)
        await buffer.admit()
        buffer.enter(first + 2)
        for group_id in (first + 1, first + 2):
            await buffer.put(make_group(group_id), True)
        for group_id in (first + 1, first + 2):
            assert [group.group_id for group in await buffer.take()] == [group_id]
            await buffer.release(9)
    assert buffer.holes == 0


# --- truncated completions ---


@pytest.mark.parametrize(
    ("penalty", "rewards", "expected"),
    [
        (0.5, [1, 2, -1, NAN], [1, 1, -1, NAN]),
        (0.0, [1, 2, -1, NAN], [1, 0, -1, NAN]),
        (1.0, [1, 2, -1, NAN], [1, 2, -1, NAN]),
        (-0.5, [1, 2, -1, NAN], [1, -0.5, -1, NAN]),  # No reward applied: there is none to replace.
        (0.5, [1, -2, 3, 4], [1, -1, 3, 2]),
        (-2.0, [1, 0, 3, 4], [1, -2, 3, -2]),
    ],
)
def test_a_truncated_completion_is_worth_less(penalty, rewards, expected):
    cut = [False, True, False, True]
    completions = [replace(make_completion(), finish_reason="length" if c else "stop") for c in cut]
    found = penalise_truncated(np.float32(rewards), completions, penalty)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.float32(expected), equal_nan=True)


class Cutting(FakeEngines):
    """The first completion of every group hits the limit."""

    async def generate(self, group_id, prompt, sampling):
        first, *rest = await super().generate(group_id, prompt, sampling)
        return (replace(first, finish_reason="length"), *rest)


@pytest.mark.parametrize(
    ("penalty", "rewards"), [(None, [1.0, 1.0]), (0.5, [0.5, 1.0]), (0.0, [0.0, 1.0]), (-1.0, [-1.0, 1.0])]
)
async def test_the_penalty_comes_before_the_look_for_a_signal(penalty, rewards):
    changes = RESAMPLE | {"algorithm.truncation_penalty": penalty, "algorithm.barren_limit": 20}
    loop = Loop(Cutting(), FakeRewards(barren=lambda _: True), **changes)
    if penalty is None:
        with pytest.raises(NothingToLearn):
            await loop.run()
        return
    await loop.run()
    group = loop.recorder.steps[0][2][0]
    assert group.rewards.tolist() == rewards
    assert group.reward_parts["exact_match"].tolist() == [1.0, 1.0]  # What the function said stays.
