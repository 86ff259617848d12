"""Two real engines under Ray: killed, stopped, broken and misled one at a time, while the other goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager

import numpy as np
import psutil
import pytest
import pytest_asyncio

from shared.errors import FleetExhausted, GroupFailed
from shared.types import Prompt
from tests.fakes import make_config
from tests.pace import scaled
from tests.policies import Policy

pytestmark = [pytest.mark.stack, pytest.mark.asyncio(loop_scope="module")]

PROMPT = Prompt(0, np.array([5, 6, 15, 7, 8, 16], np.int32), "a prompt")
GROUPS = 16
"""In flight at any time."""


class Fleet:
    """The pool, a policy that publishes to it, and all that they did."""

    def __init__(self, pool, policy):
        self.pool, self.policy, self.weights = pool, policy, {}
        self.starts, self.pids, self.groups, self.answers = [], set(), 0, {}

    async def publish(self):
        self.policy.change(0.02)
        publication = self.policy.publish()
        self.weights[publication.version] = {k: v.clone() for k, v in self.policy.model.state_dict().items()}
        await self.pool.receive(publication)
        await self.pool.prove(publication, publication.digest)

    def replica(self, index):
        return self.pool._fleet._members[index].replica

    def pid(self, index):
        return self.replica(index)._actor._process.result().pid

    async def inside(self, index, function):
        """Call ``function(engine)`` in the engine's process."""
        return await self.replica(index)._actor.call("__ray_call__", function).answer

    @asynccontextmanager
    async def traffic(self):
        """Groups at all times, and a publication every second; each is answered exactly once."""
        ended = asyncio.Event()

        async def groups():
            from rollout.engine import Sampling

            while not ended.is_set():
                self.groups += 1
                number = self.groups
                completions = await self.pool.generate(number, PROMPT, Sampling(4, 40, 1.0))
                assert number not in self.answers
                self.answers[number] = completions

        async def publications():
            while not ended.is_set():
                await asyncio.sleep(1)
                await self.publish()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(GROUPS):
                tasks.create_task(groups())
            tasks.create_task(publications())
            await asyncio.sleep(0.5)
            yield
            ended.set()
        assert set(self.answers) == set(range(1, self.groups + 1))

    async def healthy(self, number, within):
        """Seconds until so many engines are healthy."""
        begun = time.monotonic()
        async with asyncio.timeout(within):
            while self.pool.metrics()["engines/healthy"] != number:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return time.monotonic() - begun

    async def recovery(self, detected_within, fault):
        """``fault()`` hits engine 0 under load: figures of its loss and return, and checks of what must hold."""
        await self.pool.close_books()
        self.pool.slices.clear()
        restarts, lost = self.pool.metrics()["engines/restarts"], self.replica(0)
        pid = lost._actor._process.result().pid
        async with self.traffic():
            begun = time.time()
            await fault()
            detected = await self.healthy(1, detected_within)
            serving = await self.healthy(2, 60)
            await self.pool.close_books()
            idle = self.idle(1, begun, time.time())
            await asyncio.sleep(0.5)
        self.check_versions()
        assert lost.ended
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert self.pool.metrics()["engines/restarts"] == restarts + 1
        own, took = self.starts[-1], self.pool.metrics()["engines/recovery_seconds"]
        print(
            f"detected {detected:.2f} s, serving {took:.1f} s after that, of which start {own:.1f}; the other idle {idle:.2f} s"
        )
        assert took < own + 2
        assert idle < 0.1 * serving  # What it waits for are proofs: its callers ask again when they have an answer.

    def idle(self, index, begun, ended):
        """Seconds in which the engine waited for prompts."""
        mine = [i for piece in self.pool.slices if piece.process == f"engine-{index}" for i in piece.intervals]
        waits = [(max(a, begun), min(b, ended)) for state, a, b in mine if state in ("wait_for_prompts", "lost")]
        return sum(max(b - a, 0.0) for a, b in waits)

    def check_versions(self):
        """Every token was sampled by the weights that its span names; versions never fall within a completion."""
        alone = {}
        for completions in self.answers.values():
            for completion in completions:
                versions = [span.version for span in completion.version_spans]
                assert versions == sorted(set(versions))
                assert set(versions) <= set(self.weights)
                if len(versions) == 1:
                    alone.setdefault(versions[0], []).append(completion)
        now = {k: v.clone() for k, v in self.policy.model.state_dict().items()}
        for version, completions in alone.items():
            self.policy.model.load_state_dict(self.weights[version])
            for completion in completions[:: max(len(completions) // 12, 1)]:
                whole = [*PROMPT.token_ids.tolist(), *completion.token_ids.tolist()]
                expected = self.policy.logprobs(whole)[len(PROMPT.token_ids) - 1 :]
                assert np.abs(expected - completion.logprobs).max() < 1e-3
        self.policy.model.load_state_dict(now)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(model_dir):
    import ray

    from launch.cluster import connect, reserve, worker_environment
    from launch.placement import Needs
    from rollout import fleet as lives
    from rollout.engine_pool import EnginePool
    from rollout.replica import Replica

    config = make_config(
        **{
            "model.path": str(model_dir),
            "run.max_restarts": 9,
            "rollout.num_engines": 2,
            "rollout.max_new_tokens": 40,
            "rollout.request_timeout_s": 60.0,
            "rollout.vllm": {"enforce_eager": True},
        }
    )
    if ray.is_initialized():  # By the tests before; this one is ended.
        ray.shutdown()
    patch = pytest.MonkeyPatch()
    patch.setattr(lives, "PROBE_LIMIT_S", 1.0)
    start = Replica.start

    async def timed(replica, timeout_s):
        begun = time.monotonic()
        await start(replica, timeout_s)
        fleet.starts.append(time.monotonic() - begun)
        fleet.pids.add((await replica._actor._process).pid)

    patch.setattr(Replica, "start", timed)
    connect(config)
    try:
        reservation = await reserve(Needs.of(config, on_gpu=False))
        fleet = Fleet(EnginePool(config, reservation, worker_environment()), Policy(model_dir))
        await fleet.pool.start()
        print("started", fleet.starts)
        await fleet.publish()
        yield fleet
        await fleet.pool.close()
    finally:  # Later tests of this process must not meet what was patched.
        ray.shutdown()
        patch.undo()
    for segment in fleet.policy.segments:
        segment.unlink()


def what_runs(engine):
    """Calls, whether vLLM has requests, and the share of its KV blocks in use."""
    llm = engine._llm
    usage = llm._core.scheduler.kv_cache_manager.usage
    return len(engine._calls), llm._llm.has_unfinished_requests(), usage


def arm(value):
    """Arms fault points in the process that calls it."""

    def inside(engine):
        from shared import faults

        faults.point = faults.Armed(faults.parse(value)).point

    return inside


async def test_a_killed_engine_comes_back(fleet):
    async def fault():
        os.kill(fleet.pid(0), signal.SIGKILL)

    await fleet.recovery(2, fault)
    assert fleet.pool.metrics()["engines/redispatched"] > 0


@pytest.mark.chaos
async def test_a_stopped_engine_is_replaced(fleet):
    async def fault():
        os.kill(fleet.pid(0), signal.SIGSTOP)

    # An engine that has answered within a second is not probed: up to two until a probe, and its limit of one.
    await fleet.recovery(3.5, fault)


@pytest.mark.chaos
async def test_an_engine_whose_vllm_failed_in_a_step_is_replaced(fleet):
    def broken(engine):
        def step():
            raise RuntimeError("the kernel broke")

        engine._llm._llm.step = step

    async def fault():
        await fleet.inside(0, broken)

    await fleet.recovery(2, fault)


async def test_a_flipped_byte_is_refused_and_the_round_repeated(fleet):
    restarts = fleet.pool.metrics()["engines/restarts"]
    await fleet.inside(0, arm("sync.after_hash:1:flip,sync.after_hash:2:flip"))
    async with fleet.traffic():
        await fleet.publish()
    fleet.check_versions()
    assert fleet.pool.metrics()["engines/restarts"] == restarts


@pytest.mark.chaos
async def test_an_engine_that_refuses_a_round_three_times_is_replaced(fleet):
    value = "sync.after_hash:1:flip,sync.after_pause:1:raise,sync.before_version:1:raise"
    await fleet.recovery(5, lambda: fleet.inside(0, arm(value)))  # Noticed by the next publication.


async def test_after_a_reset_no_request_runs_and_no_key_is_kept(fleet):
    from rollout.engine import Sampling

    running = [asyncio.create_task(fleet.pool.generate(-i, PROMPT, Sampling(4, 40, 1.0))) for i in range(64)]
    await asyncio.sleep(0.1)
    await fleet.pool.reset()
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert {outcome.cause for outcome in outcomes if isinstance(outcome, GroupFailed)} == {"reset"}
    for index in (0, 1):
        pool = "engine._llm._core.scheduler.kv_cache_manager.block_pool"
        used = await fleet.inside(
            index,
            lambda engine: (
                len(engine._calls),
                engine._llm._llm.has_unfinished_requests(),
                engine._llm._core.scheduler.kv_cache_manager.usage,
            ),
        )
        assert used == (0, False, 0.0), pool
    fleet.policy.segments.pop().unlink()
    fleet.policy.version -= 1  # The same version again, with other weights.
    await fleet.publish()
    assert fleet.pool.metrics()["engines/healthy"] == 2
    async with fleet.traffic():
        await asyncio.sleep(0.2)


async def test_who_goes_away_aborts_the_request_in_vllm(fleet):
    from rollout.engine import Sampling

    tasks = [asyncio.create_task(fleet.pool.generate(-i, PROMPT, Sampling(4, 40, 1.0))) for i in range(32)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    end, running = time.monotonic() + scaled(0.8), [(1, True, 1.0)]  # To their ends they take longer.
    while any(count for count, *_ in running) and time.monotonic() < end:
        await asyncio.sleep(0.1)
        running = [await fleet.inside(index, what_runs) for index in (0, 1)]
    assert running == [(0, False, 0.0)] * 2


async def test_with_no_restart_left_all_who_wait_hear_why_and_no_process_is_left(fleet):
    from rollout.engine import Sampling

    for health in (member.health for member in fleet.pool._fleet._members.values()):
        health._max_restarts = health.restarts
    waiting = [asyncio.create_task(fleet.pool.generate(-i, PROMPT, Sampling(4, 40, 1.0))) for i in range(8)]
    await asyncio.sleep(0.05)
    begun = time.monotonic()
    for index in (0, 1):
        os.kill(fleet.pid(index), signal.SIGKILL)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    seconds = time.monotonic() - begun
    failures = [outcome for outcome in outcomes if not isinstance(outcome, tuple)]
    assert failures
    assert {type(failure) for failure in failures} == {FleetExhausted}
    assert "engine-0" in str(failures[0])
    assert "engine-1" in str(failures[0])
    print(f"exhausted after {seconds:.2f} s: {failures[0]}")
    assert seconds < 3
    await asyncio.sleep(0.5)
    assert len(fleet.pids) >= 3  # Of all lives so far.
    alive = [
        pid for pid in fleet.pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]
    assert alive == []
