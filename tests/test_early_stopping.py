"""What ends a run before its last step: evaluations that no longer improve, and too many failed groups."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from launch.controller import Controller
from launch.early_stopping import EARLY_STOPPING, NoStopping, Patience
from rollout.prompts import PromptStream
from rollout.scores import Scores
from shared.errors import InputError
from tests.fakes import FakeEngines, FakeLearners, FakeRecorder, FakeRewards, make_config, make_prompt

NAN, INF = float("nan"), float("inf")
THREE = {"patience": 3}


def course(values, **arguments):
    """Versions 0, 10, 20 ... score ``values``: which were the best so far, and whether the run ends after each."""
    stopping = Patience(**arguments)
    improved, stops = [], []
    for i, value in enumerate(values):
        improved.append(stopping.observe({"eval/reward": value, "other": -value}, 10 * i))
        stops.append(stopping.stop)
    return stopping, improved, stops


# --- patience ---


@pytest.mark.parametrize(
    ("arguments", "values", "improved", "stops"),
    [
        (THREE, [1, 2, 3, 4], "1111", "0000"),
        (THREE, [3, 2, 2.5, 1, 9], "10001", "00010"),  # Three in a row are needed; after that it is the caller's.
        (THREE, [3, 2, 2, 4, 1, 1, 1], "1001000", "0000001"),
        (THREE, [3, 3, 3, 3], "1000", "0001"),  # Being as good is no improvement.
        ({"patience": 1}, [1, 2, 2], "110", "001"),
        (THREE | {"min_delta": 0.5}, [1, 1.5, 1.6, 1.9], "1010", "0000"),  # By more than 0.5, of the best.
        (THREE | {"min_delta": 0.5}, [1, 1.4, 1.45, 1.5], "1000", "0001"),
        (THREE | {"mode": "min"}, [3, 2, 2.5, 1], "1101", "0000"),
        (THREE | {"mode": "min", "min_delta": 0.5}, [3, 2.5, 2.6, 2.51], "1000", "0001"),
        (THREE | {"mode": "min"}, [1, 2, 3, 4], "1000", "0001"),
        (THREE, [NAN, 1, NAN, NAN, NAN], "01000", "00001"),
        (THREE, [NAN, NAN, NAN, 1], "0001", "0010"),
        (THREE, [1, NAN, 2, NAN], "1010", "0000"),
        (THREE, [-INF, -1, 0], "111", "000"),
        (THREE | {"min_steps": 40}, [3, 2, 2, 2, 2, 4], "100001", "000010"),
        (THREE | {"min_steps": 30}, [3, 2, 2, 2], "1000", "0001"),  # From that version on.
        (THREE | {"metric": "other"}, [1, 2, 3, 4], "1000", "0001"),
        (THREE | {"metric": "other", "mode": "min"}, [1, 2, 3, 4], "1111", "0000"),
    ],
)
def test_patience(arguments, values, improved, stops):
    _, found, ends = course(values, **arguments)
    assert "".join(str(int(x)) for x in found) == improved
    assert "".join(str(int(x)) for x in ends) == stops


def test_the_best_evaluation_is_remembered():
    stopping, _, _ = course([1.0, 3.0, 2.0, NAN])
    assert (stopping.best, stopping.best_version, stopping.without) == (3.0, 10, 2)
    stopping, _, _ = course([NAN])
    assert (stopping.best_version, stopping.without) == (-1, 1)


def test_an_unknown_metric_suggests_the_nearest():
    with pytest.raises(InputError) as caught:
        Patience(metric="eval/rewards").observe({"eval/reward": 1.0, "eval/failed": 0.0}, 0)
    error = caught.value
    assert (error.code, error.place) == ("E107", "eval.early_stopping.metric")
    assert (error.found, error.expected) == ("eval/rewards", "one of eval/reward, eval/failed")
    assert error.fix == '"eval/reward"'


def test_without_early_stopping_nothing_stops_or_is_kept():
    stopping = EARLY_STOPPING["none"]()
    assert isinstance(stopping, NoStopping)
    assert [stopping.observe({"x": 1.0}, version) for version in range(9)] == [False] * 9
    assert not stopping.stop


# --- in the loop ---


class Graded(FakeRewards):
    """Scores held-out prompts by the policy version that the engines serve."""

    def __init__(self, engines, grades):
        super().__init__()
        self.engines, self.grades = engines, grades

    async def score(self, group_id, prompt, completions):
        if group_id >= 0:
            return await super().score(group_id, prompt, completions)
        return Scores({"exact_match": np.float32([self.grades[self.engines.version]])})


async def graded_run(grades, updates=1, **changes):
    engines, learners, recorder = FakeEngines(), FakeLearners(), FakeRecorder()
    learners.updates = updates
    defaults = {"run.steps": 8, "run.stall_timeout_s": 2.0, "eval.every_steps": 1}
    defaults |= {"eval.early_stopping": {"name": "patience", "patience": 2}}
    stream, held_out = PromptStream([make_prompt(i) for i in range(7)], seed=0), [make_prompt(100)]
    parts = (engines, Graded(engines, grades), learners, recorder)
    controller = Controller(make_config(**defaults | changes), stream, held_out, *parts)
    await asyncio.wait_for(controller.run(), 5)
    assert engines.active == 0
    return learners, recorder


@pytest.mark.parametrize("bound", [0, 1, 3])
async def test_early_stopping_ends_the_run_and_keeps_the_best(bound):
    grades = [0.1, 0.5, 0.4, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9]
    learners, recorder = await graded_run(grades, **{"rollout.max_staleness": bound})
    assert [version for version, _ in recorder.evaluations] == [0, 1, 2, 3]  # And none twice.
    assert [step for step, _, _ in recorder.steps] == [1, 2, 3]
    assert learners.version == 3
    assert [version for _, version in learners.saved] == [1, 3]  # The best, and the last.
    assert [state["stopping"]["best_version"] for _, state, _ in recorder.commits] == [1, 1]


async def test_a_run_that_goes_on_improving_takes_all_its_steps():
    learners, recorder = await graded_run([i / 10 for i in range(9)])
    assert learners.version == 8
    assert [version for _, version in learners.saved] == list(range(1, 9))  # Version 0 is the model it began with.
    assert [version for version, _ in recorder.evaluations] == list(range(9))


async def test_nothing_stops_before_its_first_steps():
    stopping = {"name": "patience", "patience": 2, "min_steps": 6}
    learners, _ = await graded_run([0.5] * 9, **{"eval.early_stopping": stopping})
    assert learners.version == 6


async def test_early_stopping_counts_evaluations_and_not_updates():
    changes = {"learner.steps_per_batch": 2, "eval.every_steps": 3, "run.steps": 20}
    learners, recorder = await graded_run([0.5] * 21, updates=2, **changes)
    assert [version for version, _ in recorder.evaluations] == [0, 4, 6]
    assert learners.version == 6


async def test_without_early_stopping_no_evaluation_saves_a_checkpoint():
    learners, _ = await graded_run([i / 10 for i in range(9)], **{"eval.early_stopping": {"name": "none"}})
    assert [version for _, version in learners.saved] == [8]


async def test_a_metric_that_no_evaluation_has_ends_the_run():
    stopping = {"name": "patience", "metric": "eval/rewrad"}
    with pytest.raises(InputError, match="E107"):
        await graded_run([0.5] * 9, **{"eval.early_stopping": stopping})
