"""The ranks as one object, without DeepSpeed or Ray actors: what is published, who is lost, who only failed."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

import shared.threads
from learner import learner_group
from learner.learner import Learner
from learner.learner_group import START_TIMEOUT_S, LearnerGroup
from rollout.fleet import Fleet
from shared.actors import ActorDied
from shared.errors import LearnerFailed, LearnerLost, LinkLost, WeightProofFailed
from shared.threads import gpu_threads
from shared.types import StepReport
from shared.weights import Canary, Link, Publication, stage_limit
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
    group._config, group._checking = make_config(**{"learner.step_timeout_s": limit}), None
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


def make_sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)


async def test_a_large_model_has_more_time_to_start(tmp_path):
    make_sparse(tmp_path / "model.safetensors", 145 * 10**9)  # Of 72 billion weights in bfloat16.
    config = make_config(**{"model.path": str(tmp_path)})
    assert LearnerGroup(make_config(), "run", [None] * 8, {})._start_limit_s == START_TIMEOUT_S
    assert LearnerGroup(config, "run", [None] * 8, {})._start_limit_s == START_TIMEOUT_S + 8 * 1450
    assert Fleet(config, [], {}, None)._start_limit_s == config.rollout.start_timeout_s + 1450


@pytest.mark.parametrize(("cores", "gpus", "threads"), [(2, 0, 2), (16, 1, 8), (64, 8, 8), (16, 8, 2), (4, 8, 1)])
def test_a_gpu_s_process_has_its_share_of_the_cores(monkeypatch, tmp_path, cores, gpus, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(shared.threads, "NVIDIA", tmp_path)
    for number in range(gpus):
        (tmp_path / str(number)).touch()
    assert gpu_threads() == threads


async def test_what_was_sent_first_and_then_every_so_often_is_checked_while_nobody_waits(monkeypatch):
    class Sender(FakeActor):
        def __init__(self):
            self.sent = self.checked = 0

        async def send(self, check=False):
            self.sent, self.checked = self.sent + (not check), self.checked + check
            if check and self.sent > 2:
                raise WeightProofFailed("the learner's GPU and CPU find different fingerprints: w")
            return "blake3" if check else "prints"

        async def save(self, _):
            return None

    monkeypatch.setattr(learner_group, "CHECK_EVERY", 2)
    group = group_of()
    sender, group._sends, group._checking = Sender(), 0, None
    group._ranks = [sender]
    collective = replace(PUBLICATION, backend="millrace_nccl", digest="")
    for sent, checked in ((1, 1), (2, 1)):
        assert await group.send(collective) == "prints"
        await group.save("x")
        assert (sender.sent, sender.checked) == (sent, checked)
    assert await group.send(collective) == "prints"
    with pytest.raises(WeightProofFailed, match="GPU and CPU"):
        await group.save("x")
    group._ranks = []
    assert await group.send(PUBLICATION) == "digest"


async def test_ranks_that_sent_different_weights_are_refused():
    async def call(method, *_, timeout_s):
        assert timeout_s == stage_limit(PUBLICATION)
        return ["prints", "", "others"]

    group = group_of()
    group._call = call
    with pytest.raises(LearnerFailed, match="different weights of version 1"):
        await group.send(replace(PUBLICATION, backend="millrace_ipc"))


async def test_a_link_of_which_one_end_fails_is_a_lost_learner():
    group = group_of((0.0, None))
    group._host, group._start_limit_s = "h", 5.0

    async def listen(host):
        return 7

    async def connect(link):
        await asyncio.sleep(60)

    group._ranks[0].listen, group._ranks[0].connect = listen, connect

    async def engines_connect(link):
        assert link == Link("h", 7, 2)
        raise LinkLost("an engine did not join")

    with pytest.raises(LearnerLost, match="no link to the engines: an engine did not join"):
        await group.connect(engines_connect, 2)
    group._start_limit_s = 0.01
    with pytest.raises(LearnerLost, match="no link to the engines"):
        await group.connect(lambda _: asyncio.sleep(60), 2)


@pytest.mark.parametrize(
    ("durations", "limit"),
    [([], 600), ([1.0] * 4, 600), ([1.0] * 5, 120), ([20.0] * 5, 200), ([20.0] * 4 + [500.0], 200), ([100.0] * 5, 600)],
)
def test_a_step_is_given_up_after_ten_times_the_usual(durations, limit):
    group = group_of(limit=600.0)
    group._durations = deque(durations)
    assert group._step_limit() == limit
