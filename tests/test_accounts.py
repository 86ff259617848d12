"""Goodput, throughput, the summary at the end, and the sentence that says what bounds a run."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from launch.accounts import Accounts, tokens_of, useful_tokens, verdict
from launch.placement import Needs, Node
from launch.room import Room, room_of
from shared.errors import EngineFailed
from shared.ledger import TimeBook, TimeLedger, TimeSlice
from shared.types import Completion, Prompt, RolloutGroup
from tests.fakes import make_config


def group(lengths, advantages, finish="stop"):
    completions = tuple(Completion(np.zeros(n, np.int32), np.zeros(n, np.float32), "", finish) for n in lengths)
    given = None if advantages is None else np.array(advantages, np.float32)
    return RolloutGroup(0, Prompt(0, np.zeros(3, np.int32), ""), completions, np.zeros(len(lengths)), advantages=given)


def test_useful_tokens_are_those_that_moved_the_policy():
    groups = [group([5, 7], [1.0, 0.0]), group([11, 13], None), group([2, 3], [-1.0, 1.0], "length")]
    assert useful_tokens(groups, mask_truncated=False) == 5 + 2 + 3
    assert useful_tokens(groups, mask_truncated=True) == 5
    assert tokens_of(groups) == 5 + 7 + 11 + 13 + 2 + 3


class Part:
    """Actors whose books are given."""

    def __init__(self, *late):
        self.slices, self.late = [], list(late)

    async def close_books(self):
        if self.late:
            self.slices.append(self.late.pop(0))


def piece(process, begin, /, **states):
    intervals, now = [], begin
    for state, seconds in states.items():
        intervals.append((state, now, now := now + seconds))
    return TimeSlice(process, begin, now, tuple(intervals))


def test_a_step_and_the_summary(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("launch.accounts.time.monotonic", lambda: now[0])
    engine = Part(piece("engine-0", 0, start=50), piece("engine-0", 54, generate=1))
    learner = Part(piece("learner-0", 0, start=50), piece("learner-0", 54, wait_for_groups=1))
    accounts = Accounts(make_config(), TimeBook(), TimeLedger("controller"), (engine, learner))
    asyncio.run(accounts.begin())
    engine.slices.append(piece("engine-0", 50, generate=3, wait_for_prompts=1))
    learner.slices.append(piece("learner-0", 50, forward=2, wait_for_groups=2))
    now[0] = 54.0
    accounts.wasted(Prompt(1, np.zeros(6, np.int32), ""), 2, 20)  # Two completions of a group that was replaced.
    row = accounts.step([group([5, 7], [1.0, 0.0]), group([4, 4], [1.0, -1.0])], 99.0, 1)
    assert row["time/step"] == 4
    assert row["throughput/rollout_tokens_per_second"] == pytest.approx(20 / 4)
    assert row["throughput/train_tokens_per_second"] == pytest.approx(99 / 4)
    assert row["throughput/samples_per_second"] == pytest.approx(4 / 4)
    assert row["num_tokens"] == 20 + 3 * 4 + 20 + 6 * 2
    assert row["goodput"] == pytest.approx(13 / 4 / 2)  # One engine, one rank.
    assert row["goodput/work"] == pytest.approx(13 / 40)
    assert row["goodput/time"] == pytest.approx((3 + 2) / 8)
    assert (row["time/engine-0/generate"], row["time/learner-0/wait_for_groups"]) == (3, 2)
    assert "time/engine-0/start" not in row
    now[0] = 55.0
    accounts.wasted(Prompt(2, np.zeros(6, np.int32), ""), 1, 12)  # After the last step.
    summary = asyncio.run(accounts.finish())
    assert summary["training_seconds"] == 5
    assert summary["goodput"]["tokens_per_device_second"] == pytest.approx(13 / 5 / 2)
    assert summary["goodput"]["work"] == pytest.approx(13 / 52)
    assert summary["goodput"]["time"] == pytest.approx((4 + 2) / 10)
    assert summary["processes"]["engine-0"]["wall"] == pytest.approx(55)
    assert summary["processes"]["engine-0"]["states"]["start"] == 50
    assert summary["processes"]["engine-0"]["residue"] < 1e-9


def test_goodput_counts_the_engines_that_there_are(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("launch.accounts.time.monotonic", lambda: now[0])
    config = make_config(**{"rollout.tensor_parallel_size": 2, "rollout.pipeline_parallel_size": 2})
    accounts = Accounts(config, TimeBook(), TimeLedger("controller"), ())
    asyncio.run(accounts.begin())
    goodput = []
    for engines, seconds in ((1, 2.0), (3, 4.0)):  # One rank beside 4, then 12 workers.
        now[0] += seconds
        goodput.append(accounts.step([group([130], [1.0])], 1.0, engines)["goodput"])
    assert goodput == pytest.approx([130 / 2 / 5, 130 / 4 / 13])
    summary = asyncio.run(accounts.finish())
    assert summary["goodput"]["tokens_per_device_second"] == pytest.approx(260 / (2 * 5 + 4 * 13))


def test_time_in_no_state_is_said(capsys):
    lost = Part(piece("engine-0", 0, generate=10), piece("engine-0", 20, generate=10))
    accounts = Accounts(make_config(), TimeBook(), TimeLedger("controller"), (lost,))
    asyncio.run(accounts.begin())
    asyncio.run(accounts.finish())
    assert "warning[W901] engine-0: 33.3% of its time is in no state" in capsys.readouterr().out


def times(generate, wait, update, work, idle, score=0.1, evaluate=0.0):
    return {
        "engine-0": {"generate": generate, "wait_for_prompts": wait, "receive": update / 2, "pause": update / 2},
        "learner-0": {"forward": work / 2, "backward": work / 2, "wait_for_groups": idle},
        "reward-0": {"score": score, "wait_for_groups": 1 - score},
        "controller": {"evaluate": evaluate, "train": 1 - evaluate},
    }


@pytest.mark.parametrize(
    ("spent", "changes", "bound", "setting"),
    [
        (times(0.5, 0.4, 0.1, 0.95, 0.05), {}, "learner bounds", "learner.num_ranks"),
        (times(0.95, 0.0, 0.05, 0.5, 0.5), {}, "engines bound", "rollout.num_engines"),
        (times(0.3, 0.6, 0.1, 0.3, 0.7), {}, "Neither", "rollout.max_staleness"),
        (times(0.5, 0.4, 0.1, 0.5, 0.5), {"rollout.max_staleness": 0}, "wait for each other", "rollout.max_staleness"),
        (times(0.5, 0.2, 0.3, 0.5, 0.5), {}, "Weight updates", "learner.prompts_per_step"),
        (times(0.3, 0.6, 0.1, 0.3, 0.7, score=0.95), {}, "reward workers bound", "reward.workers"),
        (times(0.3, 0.6, 0.1, 0.3, 0.7, evaluate=0.4), {}, "Evaluation", "eval.every_steps"),
    ],
)
def test_one_sentence_names_what_bounds_a_run_and_the_setting(spent, changes, bound, setting):
    config = make_config(**{"rollout.max_staleness": 2} | changes)
    said = verdict(spent, config)
    assert bound in said
    assert setting in said
    assert said.endswith(".")
    assert said.count(". ") == 0


LEARNER, ENGINES = times(0.5, 0.4, 0.1, 0.95, 0.05), times(0.95, 0.0, 0.05, 0.5, 0.5)
REWARDS = times(0.3, 0.6, 0.1, 0.3, 0.7, score=0.95)
URL = {"reward.functions": [{"url": "https://judge.example/score"}]}
FULL, FREE = Room(2, 0, 0, 0, False), Room(8, 4, 0, 0, False)


@pytest.mark.parametrize(
    ("spent", "changes", "room", "said"),
    [
        (LEARNER, {}, FREE, "raise learner.num_ranks (now 1)."),
        (LEARNER, {}, FULL, "all 2 cores are in use, and a higher learner.num_ranks (now 1) would not help"),
        (LEARNER, {"learner.cpu_threads": 5}, FREE, "all 8 cores are in use"),
        (ENGINES, {}, FREE, "raise rollout.num_engines (now 1)."),
        (ENGINES, {}, FULL, "; a larger machine would, or shorter completions."),
        (ENGINES, {}, Room(1, 0, 0, 0, False), "the only core is in use"),
        (ENGINES, {}, Room(64, 60, 8, 0, True), "all 8 GPUs are in use"),
        (ENGINES, {}, Room(64, 0, 8, 1, True), "raise rollout.num_engines (now 1)."),
        (ENGINES, {"rollout.tensor_parallel_size": 2}, Room(64, 60, 8, 1, True), "would not help"),
        (REWARDS, {}, FULL, "would not help; a larger machine would, or faster functions."),
        (REWARDS, {}, FREE, "raise reward.workers (now 1)."),
        (REWARDS, URL, FULL, "raise reward.workers (now 1)."),
    ],
)
def test_nothing_is_advised_that_the_machine_has_no_room_for(spent, changes, room, said):
    sentence = verdict(spent, make_config(**{"rollout.max_staleness": 2} | changes), room)
    assert said in sentence
    assert ("raise" in sentence) == ("raise" in said)


def test_the_room_of_a_machine_is_its_cores_less_what_the_run_uses(monkeypatch, tmp_path):
    here = [Node("here", {"CPU": 32.0, "GPU": 2.0})]
    monkeypatch.setattr("launch.cluster.nodes", lambda: here)
    monkeypatch.setattr("launch.cluster.free", lambda: [Node("here", {"CPU": 5.0, "GPU": 1.0})])
    monkeypatch.setattr("launch.room.os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("launch.room.QUOTA", tmp_path / "cpu.max")
    needs = Needs.of(make_config(**{"rollout.cpu_threads": 4, "reward.workers": 3}), on_gpu=False)
    assert room_of(needs) == Room(16, 16 - 4 - 1 - 3, 2, 1, False)
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert room_of(needs) == Room(2, 0, 2, 1, False)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert room_of(needs).cores == 16
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert room_of(needs) == Room(32, 5, 2, 1, False)


async def test_times_that_are_missing_are_said_and_a_fault_of_ours_travels(capsys):
    async def close_books():
        raise error

    part = Part()
    part.close_books = close_books
    accounts = Accounts(make_config(), TimeBook(), TimeLedger("controller"), (part,))
    error = EngineFailed("engine-0 died")
    await accounts.begin()
    assert "warning[W901] times of some processes are missing: engine-0 died" in capsys.readouterr().out
    error = ValueError("ours")
    with pytest.raises(ValueError, match="ours"):
        await accounts.begin()


def test_colocated_engines_take_no_devices_of_their_own(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("launch.accounts.time.monotonic", lambda: now[0])
    config = make_config(**{"rollout.colocate": True, "rollout.num_engines": 2, "learner.num_ranks": 2})
    accounts = Accounts(config, TimeBook(), TimeLedger("controller"), ())
    now[0] = 4.0
    assert accounts.step([group([80], [1.0])], 1.0, 2)["goodput"] == pytest.approx(80 / 4 / 2)


def test_busy_reward_workers_bound_nothing_while_the_learner_is_busier():
    said = verdict(times(0.5, 0.4, 0.1, 0.95, 0.05, score=0.9), make_config(**{"rollout.max_staleness": 2}))
    assert said.startswith("The learner bounds this run")
