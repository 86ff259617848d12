"""The ranks as one object, without DeepSpeed or Ray actors: what is published, who is lost, who only failed."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from learner.learner import Learner
from learner.learner_group import LearnerGroup
from shared.actors import ActorDied
from shared.errors import LearnerLost
from shared.types import StepReport
from shared.weights import Canary, Publication
from tests.fakes import FakeActor, make_config
from tests.pace import scaled

CANARY = np.array([5, 6], np.int32)
PUBLICATION = Publication(1, "millrace_shm", "s", (), "digest", Canary(CANARY, np.zeros(1, np.float32)))


@pytest.mark.parametrize("applied", [True, False])
def test_a_rank_publishes_an_applied_step_alone(monkeypatch, applied):
    report = StepReport(1, applied, {})
    monkeypatch.setattr(Learner, "train_step", lambda self, groups: report)
    monkeypatch.setattr(Learner, "publish", lambda self, canary: PUBLICATION)
    expected = (report, PUBLICATION if applied else None)
    assert Learner.__new__(Learner).train_and_publish([], CANARY) == expected


@pytest.mark.parametrize("applied", [True, False])
def test_a_group_merges_publications_of_an_applied_step_alone(monkeypatch, applied):
    report = StepReport(1, applied, {})
    group = LearnerGroup.__new__(LearnerGroup)
    group._ranks, group.slices, group._durations, group._config = [None], [], deque(), make_config()
    group._node, group._checking = "here", None

    async def call(self, *arguments, timeout_s=None):
        return [(report, PUBLICATION if applied else None), (report, None)]

    monkeypatch.setattr(LearnerGroup, "_call", call)
    found, publication = asyncio.run(group.train_step([], CANARY))
    assert found is report
    assert (publication == replace(PUBLICATION, node="here")) if applied else publication is None


class Rank(FakeActor):
    """A rank whose calls end as told."""

    def __init__(self, outcome):
        self.outcome = outcome

    async def save(self, *_):
        delay, result = self.outcome
        await asyncio.sleep(delay)
        if isinstance(result, BaseException):
            raise result
        return result


def group_of(*outcomes, limit=5.0):
    group = LearnerGroup.__new__(LearnerGroup)
    group._ranks = [Rank(outcome) for outcome in outcomes]
    group._config = make_config(**{"learner.step_timeout_s": limit})
    return group


async def test_a_death_is_told_even_if_the_collective_of_another_rank_breaks_first():
    group = group_of((0.0, RuntimeError("connection closed by peer")), (0.05, ActorDied("rank 1 died")))
    with pytest.raises(LearnerLost, match="a learner rank died: rank 1 died"):
        await group._call("save", "x")


async def test_a_bug_in_a_rank_is_no_loss():
    group = group_of((0.0, RuntimeError("bug")), (0.0, "done"))
    with pytest.raises(RuntimeError, match="bug"):
        await group._call("save", "x")


async def test_a_rank_that_hangs_is_lost_at_the_deadline():
    started = time.monotonic()
    with pytest.raises(LearnerLost, match=r"no answer from the learner within 0\.05 s"):
        await group_of((0.0, "done"), (60, "late"), limit=0.05)._call("save", "x")
    assert time.monotonic() - started < scaled(10)


async def test_a_call_that_is_cancelled_leaves_nothing_behind():
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    call = asyncio.create_task(group_of((60, "late"), (60, "late"))._call("save", "x"))
    await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    del call
    gc.collect()
    await asyncio.sleep(0.01)
    assert not told, "what nobody has retrieved is told when it is collected"


async def test_a_full_disk_is_an_oserror():
    error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        await group_of((0.0, error))._call("save", "x")


@pytest.mark.parametrize(
    ("durations", "limit"),
    [([], 600), ([1.0] * 4, 600), ([1.0] * 5, 120), ([20.0] * 5, 200), ([20.0] * 4 + [500.0], 200), ([100.0] * 5, 600)],
)
def test_a_step_is_given_up_after_ten_times_the_usual(durations, limit):
    group = group_of(limit=600.0)
    group._durations = deque(durations)
    assert group._step_limit() == limit
