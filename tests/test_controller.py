"""The loop with fakes, in milliseconds: steps, staleness, overlap, failures, stalls, evaluation."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from launch.controller import Controller
from launch.failures import TooManyFailures
from launch.parts import Parts
from launch.run import Session
from launch.run_folder import RunFolder
from rollout.prompts import PromptStream
from shared.errors import (
    EngineFailed,
    FleetExhausted,
    GroupFailed,
    LearnerFailed,
    LearnerLost,
    NothingToLearn,
    Stalled,
    WeightProofFailed,
)
from shared.metrics import read_metrics
from shared.sample_ledger import SampleLedger
from tests.fakes import FakeEngines, FakeLearners, FakeRecorder, FakeRewards, make_config, make_prompt
from tests.pace import scaled

SLOW, FAST = 0.006, 0.0


class Loop:
    """A controller with its four fakes."""

    def __init__(self, engines=None, rewards=None, learners=None, held_out=0, **changes) -> None:
        self.engines, self.rewards = engines or FakeEngines(), rewards or FakeRewards()
        self.learners, self.recorder = learners or FakeLearners(), FakeRecorder()
        changes = {"run.steps": 5, "run.stall_timeout_s": 2.0, "reward.max_failed_share": 1.0} | changes
        self.config = make_config(**changes)
        self.stream = PromptStream([make_prompt(i) for i in range(7)], seed=0)
        held = [make_prompt(100 + i) for i in range(held_out)]
        parts = (self.engines, self.rewards, self.learners, self.recorder)
        self.controller = Controller(self.config, self.stream, held, *parts)

    async def run(self) -> Loop:
        """To the end; a loop that hangs fails the test, and so does one that leaves tasks behind."""
        before = asyncio.all_tasks()
        try:
            await asyncio.wait_for(self.controller.run(), scaled(10))
        finally:
            assert asyncio.all_tasks() <= before
            assert self.engines.active == 0
        return self


async def fails_with(error: type[Exception], loop: Loop) -> Exception:
    """Run ``loop``, which must end quickly with exactly this type of error."""
    started = time.monotonic()
    with pytest.raises(Exception) as excinfo:
        await loop.run()
    assert type(excinfo.value) is error, f"ended with {excinfo.value!r}"
    assert time.monotonic() - started < scaled(5)
    return excinfo.value


# --- the plain run ---


async def test_a_run_takes_its_steps_and_publishes_each():
    loop = await Loop().run()
    assert [step for step, _, _ in loop.recorder.steps] == [1, 2, 3, 4, 5]
    assert loop.learners.calls == 5
    assert loop.engines.received == loop.engines.proved == [0, 1, 2, 3, 4, 5]
    assert loop.recorder.samples.counts["groups/trained"] == 10


async def test_groups_are_trained_in_admission_order_each_once():
    delays = iter(np.random.default_rng(0).random(1000) * 0.004)
    engines = FakeEngines(delay=lambda _: next(delays))
    loop = await Loop(engines, **{"rollout.max_staleness": 2, "run.steps": 8, "learner.prompts_per_step": 3}).run()
    assert loop.learners.order == list(range(24))
    # What is recorded for a step is what was trained in it.
    assert [[g.group_id for g in groups] for _, _, groups in loop.recorder.steps] == loop.learners.trained


async def test_a_group_is_one_request_of_n_completions():
    loop = await Loop(**{"rollout.group_size": 4, "rollout.temperature": 0.7, "rollout.stop": ["."]}).run()
    for _, sampling in loop.engines.sampled:
        assert (sampling.n, sampling.max_new_tokens, sampling.temperature, sampling.stop) == (4, 4, 0.7, (".",))
    assert all(len(group.completions) == 4 for _, _, groups in loop.recorder.steps for group in groups)


async def test_the_record_of_a_step():
    loop = await Loop(**{"rollout.max_staleness": 0}).run()
    _, metrics, groups = loop.recorder.steps[1]
    assert metrics["policy_version"] == 2
    assert metrics["reward"] == 0.5
    assert metrics["staleness/max"] == 0
    assert metrics["sync/canary_gap"] == 0
    assert metrics["num_tokens"] == 2 * 2 * 2 * (3 + 4)  # Two steps, two groups, two completions, prompt and answer.
    assert metrics["groups/trained"] == 4
    assert metrics["throughput/samples_per_second"] > 0
    assert groups[0].reward_parts["exact_match"].tolist() == [0, 1]
    history = [{"step": 5, "reward": metrics["reward"]}]
    epoch = loop.stream.epoch
    assert loop.rewards.state == {"global_step": 5, "max_steps": 5, "epoch": epoch, "log_history": history}


# --- staleness and overlap ---


@pytest.mark.parametrize("train", [SLOW, FAST], ids=["slow learner", "fast learner"])
@pytest.mark.parametrize("generate", [SLOW, FAST], ids=["slow engines", "fast engines"])
@pytest.mark.parametrize("deliver", [SLOW, FAST], ids=["slow delivery", "fast delivery"])
@pytest.mark.parametrize("bound", [0, 2])
async def test_staleness_at_use_never_exceeds_the_bound(bound, deliver, generate, train):
    engines = FakeEngines(delay=lambda group: generate * (1 + group % 3) / 2, receive_delay=deliver)
    loop = await Loop(engines, learners=FakeLearners(train), **{"rollout.max_staleness": bound, "run.steps": 6}).run()
    assert max(loop.learners.staleness) <= bound
    assert max(metrics["staleness/max"] for _, metrics, _ in loop.recorder.steps) == max(loop.learners.staleness)
    if bound and train == SLOW and generate == FAST:
        assert max(loop.learners.staleness) == bound  # Fast engines use the whole allowance.


@pytest.mark.parametrize("bound", [0, 1, 2])
async def test_generation_goes_on_while_training_unless_synchronous(bound):
    learners = FakeLearners(delay=0.01)
    loop = Loop(FakeEngines(delay=lambda _: 0.001), learners=learners, **{"rollout.max_staleness": bound})
    learners.during = lambda: (loop.engines.started, loop.engines.active)
    await loop.run()
    started_meanwhile = [after[0] - before[0] for before, after in learners.observed]
    busy = [before[1] > 0 or after[0] > before[0] for before, after in learners.observed]
    assert any(busy) is (bound > 0)
    assert (sum(started_meanwhile) > 0) is (bound > 0)


async def test_a_group_in_flight_lives_through_a_delivery():
    """A long group spans versions, which its staleness counts from its oldest token."""
    engines = FakeEngines()
    engines.hold[3] = 1
    loop = await Loop(engines, **{"rollout.max_staleness": 1}).run()
    (long,) = [g for _, _, groups in loop.recorder.steps for g in groups if g.group_id == 3]
    assert [span.version for span in long.completions[0].version_spans] == [0, 1]
    assert 3 in loop.learners.trained[1]
    assert loop.learners.staleness[3] == 1


# --- failures end the run ---


def at(group_id: int, error: Exception):
    return lambda current: error if current == group_id else None


@pytest.mark.parametrize("bound", [0, 1])
@pytest.mark.parametrize(
    ("error", "part"),
    [
        (EngineFailed("engine-0 died"), "generate"),
        (WeightProofFailed("refused"), "receive"),
        (WeightProofFailed("canary"), "prove"),
        (RuntimeError("reward worker bug"), "score"),
        (LearnerFailed("rank 1 died"), "train"),
        (ValueError("a bug"), "train"),
        (OSError(28, "No space left on device"), "record"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_a_crash_on_either_side_ends_the_run_with_its_own_error(part, error, bound):
    loop = Loop(**{"rollout.max_staleness": bound, "run.steps": 1000})
    loop.engines.delay = lambda _: 0.001
    if part == "generate":
        loop.engines.fail = at(5, error)
    elif part == "score":
        loop.rewards.fail = at(5, error)
    elif part == "train":
        loop.learners.fail = at(2, error)
    elif part == "record":
        loop.recorder.fail = at(2, error)
    else:
        loop.engines.crash_on[part, 2] = error
    assert await fails_with(type(error), loop) is error


@pytest.mark.parametrize("part", ["receive", "prove"])
async def test_a_failure_of_the_first_publication_ends_the_run_before_any_sampling(part):
    loop = Loop()
    loop.engines.crash_on[part, 0] = WeightProofFailed("no")
    await fails_with(WeightProofFailed, loop)
    assert loop.engines.started == 0


# --- failed groups ---


@pytest.mark.parametrize("side", ["engines", "rewards"])
async def test_a_failed_group_is_dropped_and_counted_never_scored(side):
    loop = Loop(**{"run.steps": 4})
    getattr(loop, side).fail = lambda group: GroupFailed(group, "timeout", "> 10 s") if group in (1, 4) else None
    await loop.run()
    assert loop.learners.order == [0, 2, 3, 5, 6, 7, 8, 9]
    assert loop.recorder.samples.counts["groups/failed"] == 2
    assert loop.recorder.steps[-1][1]["groups/timeout"] == 2


async def test_too_many_failed_groups_are_e310_with_the_numbers():
    rewards = FakeRewards(lambda group: GroupFailed(group, "E304", "ValueError: bad") if group % 2 else None)
    loop = Loop(rewards=rewards, **{"run.steps": 1000, "reward.max_failed_groups": 3})
    error = await fails_with(TooManyFailures, loop)
    assert (error.code, error.exit_code) == ("E310", 2)
    assert "4 dropped groups (4 E304)" in error.found
    assert "ValueError: bad (saved: failed/7-0.json)" in str(error)
    assert [failure.group_id for failure in loop.recorder.failures] == [1, 3, 5, 7]
    assert "reward.max_failed_groups = 3" in error.expected
    assert loop.recorder.samples.reasons == {"E304": 4}


async def test_too_large_a_share_of_failed_groups_is_e310():
    rewards = FakeRewards(lambda group: GroupFailed(group, "timeout", "") if group % 4 == 0 else None)
    changes = {"run.steps": 1000, "reward.max_failed_groups": 1000, "reward.max_failed_share": 0.1}
    loop = Loop(rewards=rewards, **changes)
    assert (await fails_with(TooManyFailures, loop)).code == "E310"
    assert loop.recorder.samples.reasons == {"timeout": 21}  # 10 % of the last 200 are 20.


async def test_failures_within_both_caps_do_not_end_a_long_run():
    rewards = FakeRewards(lambda group: GroupFailed(group, "timeout", "") if group % 15 == 0 else None)
    changes = {"run.steps": 200, "reward.max_failed_groups": 1000, "reward.max_failed_share": 0.1}
    loop = await Loop(rewards=rewards, **changes).run()
    assert loop.recorder.samples.reasons["timeout"] > 21


@pytest.mark.parametrize("zero_variance", ["keep", "drop", "resample"])
async def test_equal_rewards_without_end_are_nothing_to_learn(zero_variance):
    changes = {"run.steps": 1000, "algorithm.zero_variance": zero_variance, "algorithm.barren_limit": 30}
    error = await fails_with(NothingToLearn, Loop(rewards=FakeRewards(barren=lambda _: True), **changes))
    assert "30 groups in a row" in str(error)


async def test_resampling_replaces_groups_without_signal():
    rewards = FakeRewards(barren=lambda group: group % 3 == 0)
    loop = await Loop(rewards=rewards, **{"algorithm.zero_variance": "resample"}).run()
    assert loop.learners.order == [1, 2, 4, 5, 7, 8, 10, 11, 13, 14]
    assert loop.recorder.samples.reasons["no_signal"] >= 5


@pytest.mark.parametrize("zero_variance", ["keep", "drop"])
async def test_without_resampling_groups_without_signal_reach_the_learner(zero_variance):
    rewards = FakeRewards(barren=lambda group: group % 3 == 0)
    loop = await Loop(rewards=rewards, **{"algorithm.zero_variance": zero_variance}).run()
    assert loop.learners.order == list(range(10))


# --- steps that the optimizer refused ---


async def test_a_refused_step_does_not_raise_the_version():
    learners = FakeLearners(refuse=lambda call: call in (1, 2))
    loop = await Loop(learners=learners, **{"learner.max_skipped_steps": 3}).run()
    assert learners.calls == 7
    assert learners.version == 5
    assert loop.engines.received == [0, 1, 2, 3, 4, 5]
    assert [step for step, _, _ in loop.recorder.steps] == [1, 2, 3, 4, 5]


async def test_refused_steps_in_a_row_end_the_run():
    learners = FakeLearners(refuse=lambda call: call % 4 != 0)
    error = await fails_with(LearnerFailed, Loop(learners=learners, **{"learner.max_skipped_steps": 3}))
    assert "3 steps in a row" in str(error)
    assert "policy version 1" in str(error)
    assert learners.calls == 4


async def test_an_applied_step_starts_the_count_of_refused_ones_anew():
    learners = FakeLearners(refuse=lambda call: call % 3 != 0)
    await Loop(learners=learners, **{"learner.max_skipped_steps": 3}).run()
    assert learners.version == 5


async def test_steps_with_nothing_to_train_are_not_counted_as_refused():
    learners = FakeLearners(refuse=lambda call: call < 10)
    learners.unapplied_metrics = {"groups/trained": 0.0}
    await Loop(learners=learners, **{"learner.max_skipped_steps": 3}).run()
    assert learners.version == 5


def spent(loop):
    """The run's share of useful tokens, its tokens, and samples by fate."""
    counts = {fate: loop.recorder.samples.counts[f"samples/{fate}"] for fate in ("trained", "filtered", "failed")}
    return loop.recorder.summaries[-1]["goodput"]["work"], loop.recorder.steps[-1][1]["num_tokens"], counts


async def test_tokens_of_refused_steps_and_dropped_groups_were_sampled():
    """4 tokens of an answer and 3 of a prompt in each sample; 2 samples in each of 2 groups a step."""
    whole = await Loop(**{"run.steps": 6, "rollout.max_staleness": 0}).run()
    assert spent(whole) == (1.0, 6 * 4 * 7, {"trained": 24, "filtered": 0, "failed": 0})
    refusing = FakeLearners(refuse=lambda call: call % 2 == 0)
    half = await Loop(learners=refusing, **{"run.steps": 6, "rollout.max_staleness": 0}).run()
    assert spent(half) == (0.5, 12 * 4 * 7, {"trained": 24, "filtered": 24, "failed": 0})
    assert [metrics["goodput/work"] for _, metrics, _ in half.recorder.steps] == [0.5] * 6
    rewards = FakeRewards(fail=lambda group: GroupFailed(group, "timeout", "") if group % 3 == 0 else None)
    failing = await Loop(rewards=rewards, **{"run.steps": 6, "rollout.max_staleness": 0}).run()
    work, tokens, counts = spent(failing)
    assert counts["trained"] == 24
    assert counts["failed"] > 8
    assert work == pytest.approx(24 / (24 + counts["failed"]))
    assert tokens == 7 * (24 + counts["failed"])


# --- stalls ---


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("engines", ["policy version 0", "0 scored groups wait", "4 groups are generated"]),
        ("learners", ["policy version 0", "a publication is not under way"]),
        ("delivery", ["policy version 2", "still on its way"]),
    ],
)
async def test_a_stall_raises_and_says_who_waits_for_whom(part, said):
    loop = Loop(**{"run.stall_timeout_s": 0.2})
    if part == "engines":
        loop.engines.delay = lambda _: 60
    elif part == "learners":
        loop.learners.delay = 60
    else:
        real = loop.engines.receive

        async def receive(publication):
            loop.engines.receive_delay = 60 if publication.version == 1 else 0
            return await real(publication)

        loop.engines.receive = receive
    error = await fails_with(Stalled, loop)
    for text in ["run.stall_timeout_s = 0.2 s", *said]:
        assert text in str(error)


async def test_slow_steps_within_the_limit_are_no_stall():
    await Loop(learners=FakeLearners(0.05), **{"run.stall_timeout_s": 0.3, "run.steps": 8}).run()


# --- evaluation ---


async def test_without_held_out_rows_nothing_is_evaluated():
    assert (await Loop().run()).recorder.evaluations == []


async def test_evaluation_before_and_after():
    loop = await Loop(held_out=3, **{"eval.max_new_tokens": 9}).run()
    assert [version for version, _ in loop.recorder.evaluations] == [0, 5]
    shape = {"eval/mean_length": 4.0, "eval/clipped_ratio": 0.0}
    assert loop.recorder.evaluations[0][1] == {"eval/rewards/exact_match/mean": 0.0, "eval/reward": 0.0} | shape
    greedy = [(group, s) for group, s in loop.engines.sampled if group < 0]
    assert sorted(group for group, _ in greedy) == [-3, -3, -2, -2, -1, -1]
    assert all((s.n, s.temperature, s.max_new_tokens) == (1, 0.0, 9) for _, s in greedy)
    assert loop.recorder.samples.counts["groups/trained"] == 10  # Held-out rows are in no ledger.


async def test_evaluation_every_so_many_steps_sees_the_delivered_weights():
    loop = Loop(held_out=1, engines=FakeEngines(receive_delay=0.003), **{"eval.every_steps": 2})
    served = []
    loop.recorder.evaluated = lambda version, *_: served.append((version, loop.engines.version))
    await loop.run()
    assert served == [(0, 0), (2, 2), (4, 4), (5, 5)]


async def test_a_held_out_group_that_fails_does_not_end_the_run():
    loop = Loop(held_out=3)
    loop.rewards.fail = lambda group: GroupFailed(group, "timeout", "> 10 s") if group == -2 else None
    await loop.run()
    assert [version for version, _ in loop.recorder.evaluations] == [0, 5]


# --- checkpoints ---


async def test_checkpoints_come_at_their_steps_and_at_the_end():
    loop = await Loop(**{"run.checkpoint_every": 2}).run()
    assert [version for _, version in loop.learners.saved] == [2, 4, 5]
    states = [state for _, state, _ in loop.recorder.commits]
    assert [state["version"] for state in states] == [2, 4, 5]
    assert [state["samples"]["counts"]["groups/trained"] for state in states] == [4, 8, 10]
    for (_, state, queued), version in zip(loop.recorder.commits, (2, 4, 5), strict=True):
        # What is in flight at that moment is what has no fate yet, and the groups that wait for the learner lie beside.
        still = [group_id for group_id, *_ in state["samples"]["open"]]
        assert still == list(range(2 * version, state["cursor"]))
        assert {group.group_id for group in queued} <= set(still)
    assert loop.recorder.steps[2][1]["checkpoint/pause_seconds"] >= 0


async def test_only_the_last_step_is_saved_where_none_in_between_is_wanted():
    loop = await Loop(**{"run.checkpoint_every": 0}).run()
    assert [version for _, version in loop.learners.saved] == [5]


async def test_a_checkpoint_without_room_is_passed_over():
    loop = Loop(**{"run.checkpoint_every": 2})
    loop.learners.fail_save = lambda _: OSError(28, "No space left on device") if loop.learners.version == 2 else None
    await loop.run()
    assert loop.recorder.unsaved_steps == [2]
    assert [version for _, version in loop.learners.saved] == [4, 5]


@pytest.mark.parametrize("bound", [0, 1])
async def test_what_was_learned_is_saved_before_a_run_ends_for_want_of_engines(bound):
    engines = FakeEngines(fail=lambda group: FleetExhausted("no engine is left") if group == 8 else None)
    loop = Loop(engines, learners=FakeLearners(delay=SLOW), **{"rollout.max_staleness": bound, "run.steps": 50})
    await fails_with(FleetExhausted, loop)
    (_, state, _) = loop.recorder.commits[-1]
    # The step that was being trained has ended and counts.
    assert state["version"] == loop.learners.version == len(loop.learners.trained)
    assert state["samples"]["counts"]["groups/trained"] == 2 * state["version"]


@pytest.mark.parametrize("error", [LearnerFailed("disagree"), LearnerLost("a rank died")])
async def test_a_learner_that_failed_is_not_asked_to_save(error):
    loop = Loop(learners=FakeLearners(fail=lambda call: error if call == 2 else None))
    await fails_with(type(error), loop)
    assert loop.learners.saved == []


async def test_a_learner_that_hangs_is_not_waited_for_after_a_stall():
    loop = Loop(learners=FakeLearners(delay=60), **{"run.stall_timeout_s": 0.1})
    await fails_with(Stalled, loop)
    assert loop.learners.saved == []


async def test_the_batch_of_a_refused_step_is_kept():
    loop = await Loop(learners=FakeLearners(refuse=lambda call: call == 1)).run()
    ((version, groups),) = loop.recorder.refusals
    assert (version, [group.group_id for group in groups]) == (1, [2, 3])
    assert loop.recorder.samples.reasons == {"step_refused": 2}


@pytest.mark.parametrize(("bound", "seeded"), [(0, True), (1, False)])
async def test_groups_of_a_synchronous_run_have_seeds_of_their_own(bound, seeded):
    loop = await Loop(**{"rollout.max_staleness": bound}).run()
    seeds = [sampling.seed for _, sampling in loop.engines.sampled]
    assert len(set(seeds)) == (len(seeds) if seeded else 1)
    assert (seeds[0] is not None) == seeded
    again = await Loop(**{"rollout.max_staleness": bound}).run()
    assert dict(again.engines.sampled) == dict(loop.engines.sampled)


async def test_a_final_evaluation_that_fails_costs_no_step():
    loop = Loop(held_out=2, **{"run.checkpoint_every": 0})
    loop.rewards.fail = lambda group: GroupFailed(group, "t", "") if group < 0 and loop.learners.version == 5 else None
    await fails_with(NothingToLearn, loop)
    assert [state["version"] for _, state, _ in loop.recorder.commits] == [5]


async def test_the_last_checkpoint_is_tried_twice():
    loop = Loop(**{"run.checkpoint_every": 0})
    tries = []
    loop.learners.fail_save = lambda n: tries.append(n) or (OSError(28, "full") if len(tries) == 1 else None)
    await loop.run()
    assert (loop.recorder.unsaved_steps, [version for _, version in loop.learners.saved]) == ([5], [5])


async def test_an_evaluation_that_a_failure_cut_off_is_made_up():
    loop = Loop(held_out=1, **{"eval.every_steps": 2, "run.steps": 6})
    state = loop.controller._state() | {"version": 4, "evaluated": 2, "cursor": 8}
    loop.learners.version = loop.engines.version = 4
    loop.controller.restore(state, [])
    await loop.run()
    assert [version for version, _ in loop.recorder.evaluations] == [4, 6]


async def test_reward_functions_and_token_counts_go_on_where_they_were():
    loop = await Loop().run()
    state = loop.recorder.commits[-1][1]
    assert state["trainer_state"]["global_step"] == 5
    again = Loop(**{"run.steps": 6})
    assert again.rewards.state["global_step"] == 0
    again.controller._samples = again.recorder.samples = SampleLedger(loop.recorder.samples._path)
    again.recorder.samples.rewind(state["samples"])
    again.controller.restore(state, [])
    assert again.rewards.state == state["trainer_state"]
    again.learners.version = again.engines.version = 5
    await again.run()
    before, after = loop.recorder.steps[-1][1]["num_tokens"], again.recorder.steps[-1][1]["num_tokens"]
    assert after > before


async def test_a_checkpoint_on_its_way_is_on_the_disk_before_another_life_begins():
    loop = Loop(
        learners=FakeLearners(fail=lambda call: LearnerLost("died") if call == 2 else None),
        **{"run.checkpoint_every": 2},
    )
    slow = loop.recorder.commit

    async def commit(*arguments):
        await asyncio.sleep(0.05)
        return await slow(*arguments)

    loop.recorder.commit = commit
    await fails_with(LearnerLost, loop)
    assert [state["version"] for _, state, _ in loop.recorder.commits] == [2]


async def test_books_that_cannot_be_closed_cost_no_step(capsys):
    loop = Loop()
    calls = []

    async def close_books():
        calls.append(loop.learners.version)
        if len(calls) == 2:
            raise LearnerLost("times: no answer")

    loop.learners.close_books = close_books
    await loop.run()
    assert calls == [0, 5]
    assert [state["version"] for _, state, _ in loop.recorder.commits] == [5]
    assert "warning[W901] times of some processes are missing: times: no answer" in capsys.readouterr().out


# --- lives ---


class Mortal(FakeLearners):
    """Dies in the calls that ``deaths`` names: train, restart or load, each counted from 0."""

    def __init__(self, deaths):
        super().__init__()
        self.deaths, self.counts = set(deaths), Counter()

    def live(self, what):
        number, self.counts[what] = self.counts[what], self.counts[what] + 1
        if (what, number) in self.deaths:
            raise LearnerLost(f"died in {what}")

    async def train_step(self, groups, canary):
        self.live("train")
        return await super().train_step(groups, canary)

    def end(self):
        self.version = 0

    async def has_place(self, limit_s):
        return True

    async def start(self):
        self.live("restart")

    async def load(self, directory):
        self.live("load")


@pytest.mark.parametrize(
    ("deaths", "most", "ends"),
    [
        ([("train", 2)], 1, True),
        ([("train", 2)], 0, False),
        ([("train", 2), ("restart", 0)], 2, True),
        ([("train", 2), ("train", 4)], 2, True),
        ([("train", 2), ("train", 4)], 1, False),
    ],
)
async def test_a_learner_may_be_lost_so_often_wherever_it_is(tmp_path, monkeypatch, capsys, deaths, most, ends):
    config = make_config(**{"run.steps": 4, "run.max_restarts": most, "reward.max_failed_share": 1.0})
    stream = PromptStream([make_prompt(i) for i in range(7)], seed=0)
    learners, engines = Mortal(deaths), FakeEngines()
    engines.reset = lambda: asyncio.sleep(0)
    folder = RunFolder(config, tmp_path / "run")
    monkeypatch.setattr("launch.run_folder.draw_curves", lambda *_: None)
    parts = Parts(engines, FakeRewards(), learners, linked=False)
    session = Session(SimpleNamespace(config=config, held_out=[]), "run.toml", folder.path, stream, None, 0.0)
    lives = asyncio.wait_for(session._lives(folder, parts), 10)
    if ends:
        await lives
        assert learners.version == 4
        assert folder.samples.counts["groups/trained"] == 8
        assert [row["step"] for row in read_metrics(folder.path)] == [1, 2, 3, 4]
    else:
        with pytest.raises(LearnerLost):
            await lives
    assert "sending the first weights to the engines; then comes the next step\n" in capsys.readouterr().out
    folder.finish()


async def test_a_commit_that_fails_at_the_end_is_tried_again():
    loop = Loop(**{"run.checkpoint_every": 0})
    answers = iter([False, True])

    async def commit(draft, state, queued):
        return next(answers)

    loop.recorder.commit = commit
    await loop.run()
    assert [version for _, version in loop.learners.saved] == [5, 5]


async def test_a_step_in_the_learner_s_hands_counts_when_the_engines_are_gone():
    engines = FakeEngines(receive_delay=0.0)
    loop = Loop(engines, learners=FakeLearners(delay=0.05), **{"rollout.max_staleness": 3, "run.steps": 50})
    loop.learners.during = lambda: setattr(engines, "fail", lambda _: FleetExhausted("gone")) or loop.learners.version
    await fails_with(FleetExhausted, loop)
    (_, state, _) = loop.recorder.commits[-1]
    assert state["version"] == loop.learners.version == len(loop.recorder.steps) >= 1


async def test_what_was_evaluated_and_what_failed_is_remembered():
    patience = {"eval.early_stopping": {"name": "patience", "patience": 2}}
    loop = Loop(held_out=1, **patience)
    state = loop.controller._state() | {
        "stopping": {"best": 0.5, "best_version": 3, "without": 1},
        "failures": {"E304": 2},
    }
    loop.controller.restore(state | {"version": 4}, [])
    again = loop.controller._state()
    assert again["stopping"] == {"best": 0.5, "best_version": 3, "without": 1, "stop": False}
    assert again["failures"] == {"E304": 2}
    # One more without a gain ends the run; with less patience it would have ended before.
    strict = Loop(held_out=1, **{"eval.early_stopping": {"name": "patience", "patience": 1}})
    strict.controller.restore(state | {"version": 4}, [])
    assert strict.controller._state()["stopping"]["stop"]
