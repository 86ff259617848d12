"""The pool: repeats, replacements, constant capacity and counters with scripted actors; and with Ray for real."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rollout.code_tests import PARALLEL
from rollout.reward_pool import GRACE_S, RewardPool
from rollout.scores import Scores
from shared.actors import ActorDied
from shared.errors import GroupFailed, RewardFailed
from shared.types import Completion, Prompt
from tests.fakes import FakeActor, FakeSlot, make_completion, make_config
from tests.pace import scaled


def completions(*texts: str) -> tuple[Completion, ...]:
    return tuple(make_completion(text, len(text)) for text in texts)


def prompt(**columns) -> Prompt:
    return Prompt(0, np.zeros(1, np.int32), "q", columns)


class Actor(FakeActor):
    """An actor whose calls follow ``script``: an exception to raise, ``"hang"``, or a warning that comes with scores."""

    def __init__(self, script: list, calls: list):
        self.score = lambda groups, _: self._call(groups, script, calls)

    async def ready(self):
        return True

    async def _call(self, groups, script, calls):
        calls.append([group_id for group_id, *_ in groups])
        step = script.pop(0) if script else "ok"
        await asyncio.sleep(0)
        if callable(step):
            step = step(groups)
        if step == "hang":
            await asyncio.Event().wait()
        if isinstance(step, Exception):
            raise step
        if self.killed:
            raise ActorDied("killed")
        warnings = [step] if step != "ok" else []
        parts = [{"exact_match": np.full(len(c), group_id, np.float32)} for group_id, _, c in groups]
        return [Scores(part, seconds={"exact_match": 0.25}, warnings=warnings) for part in parts]


@pytest.fixture
async def make():
    """``make(script, **changes) -> (pool, actors, calls)``: every actor that it ever had, and the groups of every call."""
    pools = []

    def pool(script: list, **changes):
        actors, calls = [], []
        slot = FakeSlot(lambda *_: actors.append(Actor(script, calls)) or actors[-1])
        config = make_config(**{"reward.timeout_s": 0.05} | changes)
        pools.append(RewardPool(config, [slot] * config.reward.workers, {}))
        return pools[-1], actors, calls

    yield pool
    for one in pools:
        for task in one._serving:
            task.cancel()


@pytest.mark.parametrize(("gpus", "seen"), [(0.0, ""), (0.25, None)])
async def test_a_worker_that_reserved_no_gpu_sees_none(gpus, seen):
    """Ray leaves every GPU visible to an actor without one: its models would take memory that others have measured."""
    found = []

    class Slot(FakeSlot):
        def spawn(self, kind, *arguments, environment, concurrency=1):
            found.append(environment.get("CUDA_VISIBLE_DEVICES"))

    RewardPool(make_config(**{"reward.functions": [{"model": "judge", "gpus": gpus}]}), [Slot(None)], {})
    assert found == [seen]


BAD = RewardFailed("E304", "reward raised", "f, sample 1 of group 7", "ValueError", "a number", "correct it", 1, "bad text", "the trace")  # fmt: skip
SLOW = RewardFailed("E305", "reward too slow", "f", "> 1 s", "<= 1", "speed it up", -1, "", "")
GONE = ActorDied("gone")


@pytest.mark.parametrize(
    ("script", "counters", "killed"),
    [
        (["ok"], {}, 0),
        ([BAD, "ok"], {"retries": 1}, 0),
        ([SLOW, "ok"], {"retries": 1, "timeouts": 1}, 0),
        (["hang", "ok"], {"retries": 1, "timeouts": 1, "worker_restarts": 1}, 1),
        ([GONE, BAD, "ok"], {"retries": 2, "worker_restarts": 1}, 1),
    ],
)
async def test_a_failed_call_is_repeated_on_a_live_worker(make, script, counters, killed):
    pool, actors, _ = make([*script])
    await pool.start()
    scores = await pool.score(3, prompt(), completions("a", "b"))
    assert scores.parts["exact_match"].tolist() == [3, 3]
    assert dict(+pool.counters) == counters
    assert [actor.killed for actor in actors] == [True] * killed + [False]


@pytest.mark.parametrize(
    ("failure", "cause", "counted"),
    [
        ("hang", "timeout", {"timeouts": 3, "worker_restarts": 3}),
        (SLOW, "timeout", {"timeouts": 3}),
        (BAD, "E304", {}),
        (GONE, "worker_died", {"worker_restarts": 3}),
    ],
)
async def test_after_the_last_try_the_group_fails_with_its_cause(make, failure, cause, counted):
    pool, actors, calls = make([failure] * 3, **{"reward.workers": 2})
    with pytest.raises(GroupFailed) as excinfo:
        await pool.score(7, prompt(), completions("a", "b"))
    assert (excinfo.value.group_id, excinfo.value.cause) == (7, cause)
    assert [actor.killed for actor in actors].count(False) == 2  # Capacity is constant.
    totals = {"retries": 2, "failed_samples": 2, "dropped_groups": 1, f"dropped_groups/{cause}": 1}
    assert dict(+pool.counters) == totals | counted
    assert (await pool.score(8, prompt(), completions("a"))).parts["exact_match"].tolist() == [8]
    assert calls == [[7], [7], [7], [8]]


async def test_the_failure_carries_its_sample_text_and_trace(make):
    pool, _, _ = make([BAD], **{"reward.retries": 0})
    with pytest.raises(GroupFailed) as excinfo:
        await pool.score(7, prompt(), completions("a", "bad text"))
    failure = excinfo.value
    assert (failure.sample, failure.text, failure.trace) == (1, "bad text", "the trace")
    assert "sample 1 of group 7" in failure.detail


async def test_a_bug_of_ours_is_no_group_failure(make):
    pool, _, _ = make([AttributeError("ours")])
    with pytest.raises(AttributeError, match="ours"):
        await pool.score(1, prompt(), completions("a"))
    assert (await pool.score(2, prompt(), completions("a"))).parts["exact_match"].tolist() == [2]


async def together(pool: RewardPool, *ids: int) -> list:
    return await asyncio.gather(*(pool.score(i, prompt(), completions("a")) for i in ids), return_exceptions=True)


async def test_waiting_groups_share_a_call_and_each_gets_its_own_values(make):
    pool, _, calls = make([], **{"reward.groups_per_call": 3})
    scores = await together(pool, *range(7))
    assert calls == [[0, 1, 2], [3, 4, 5], [6]]
    assert [s.parts["exact_match"][0] for s in scores] == list(range(7))


async def test_what_failed_in_company_is_tried_alone(make):
    pool, _, calls = make([BAD], **{"reward.groups_per_call": 3})
    scores = await together(pool, 0, 1, 2)
    assert calls == [[0, 1, 2], [0], [1], [2]]
    assert [s.parts["exact_match"][0] for s in scores] == [0, 1, 2]


def poisonous(groups):
    """Group 0 fails whoever is with it."""
    return BAD if any(group_id == 0 for group_id, *_ in groups) else "ok"


async def test_a_failed_group_does_not_join_fresh_ones(make):
    pool, _, calls = make([poisonous] * 99, **{"reward.groups_per_call": 2})
    first = asyncio.ensure_future(together(pool, 0, 1))
    for _ in range(4):
        await asyncio.sleep(0)
    await asyncio.gather(first, together(pool, 2, 3, 4))
    assert [call for call in calls if 0 in call] == [[0, 1], [0], [0]]


async def test_without_retries_a_group_that_failed_in_company_has_one_try_alone(make):
    pool, _, _ = make([poisonous] * 99, **{"reward.groups_per_call": 2, "reward.retries": 0})
    failed, good = await together(pool, 0, 1)
    assert isinstance(failed, GroupFailed)
    assert good.parts["exact_match"].tolist() == [1]


async def test_a_hang_delays_only_its_own_worker(make):
    pool, _, calls = make(["hang"], **{"reward.workers": 2, "reward.timeout_s": 0.3})
    started = asyncio.get_running_loop().time()
    slow = asyncio.ensure_future(pool.score(0, prompt(), completions("a")))
    await asyncio.sleep(0)
    await together(pool, 1, 2, 3, 4)
    assert asyncio.get_running_loop().time() - started < 0.25
    await slow
    assert calls == [[0], [1], [2], [3], [4], [0]]


async def test_many_hangs_leave_the_capacity_as_it_was(make):
    pool, actors, _ = make(["hang"] * 12, **{"reward.workers": 3, "reward.retries": 0})
    outcomes = await together(pool, *range(12))
    assert {outcome.cause for outcome in outcomes} == {"timeout"}
    assert pool.metrics()["workers"] == [actor.killed for actor in actors].count(False) == 3
    assert len(actors) == 15
    assert all(isinstance(scores, Scores) for scores in await together(pool, *range(6)))


async def test_the_metrics_of_the_pool(make):
    pool, _, _ = make(["ok", BAD, "ok"])
    await together(pool, 0, 1)
    metrics = pool.metrics()
    assert {"retries": 1, "timeouts": 0, "dropped_groups": 0, "workers": 1, "queue_depth": 0}.items() <= metrics.items()
    assert [metrics[f"exact_match/latency_s_{q}"] for q in ("p50", "p95", "max")] == [0.25] * 3
    assert 0 < metrics["busy_frac"] <= 1
    assert metrics["queue_s_mean"] > 0
    again = pool.metrics()
    assert again["retries"] == 1  # Counters go on; latencies and load start anew.
    assert "exact_match/latency_s_p50" not in again
    assert (again["busy_frac"], again["queue_s_mean"]) == (0, 0)


async def test_a_warning_is_printed_once(make, capsys):
    line = "warning[W306] f: stdout cut at 64 KB"
    pool, _, _ = make([line, line])
    await together(pool, 0, 1)
    assert capsys.readouterr().out == line + "\n"


def test_the_pools_deadline_leaves_isolated_functions_time_to_end_their_children(make):
    def limit(*functions):
        return make([], **{"reward.functions": [*functions], "reward.timeout_s": 2.0})[0]._limit_s

    assert limit({"function": "exact_match"}) == 2
    assert limit({"function": "exact_match"}, {"function": "final_number", "timeout_s": 5}) == 7
    assert limit({"function": "exact_match", "isolation": "subprocess"}) == 2 + GRACE_S


def test_the_pools_deadline_grows_with_the_tests_of_a_program(make):
    def limit(tests, **fields):
        pool = make([], **{"reward.functions": [{"function": "code_tests", **fields}]})[0]
        return pool._code_s([(0, prompt(tests=tests), completions("x"))])

    assert limit(["f(1)"] * 101) - limit(["f(1)"]) == pytest.approx(200 * (1 + 1 / PARALLEL))
    assert limit(["f(1)"] * 101, cpu_s=5) - limit(["f(1)"], cpu_s=5) == pytest.approx(500 * (1 + 1 / PARALLEL))
    assert limit(["f(1)"], timeout_s=90) > 90
    assert limit(None) == limit("def (") < 20


async def test_close_ends_every_worker_in_a_way_that_ray_does_not_warn_of(make):
    pool, actors, _ = make([], **{"reward.workers": 3})
    await together(pool, 0)
    pool.close()
    assert [actor.released for actor in actors] == [True] * 3


# --- Ray for real ---

CODE = """
import os, time
def marked(completions, mode, number):
    if "hang" in mode: time.sleep(60)
    if "crash" in mode: os.kill(os.getpid(), 11)
    return [n + len(c) / 100 for c, n in zip(completions, number)]
"""


@pytest.mark.stack
async def test_with_ray_hangs_and_crashes_lose_nothing(private_ray, tmp_path):
    from launch.cluster import worker_environment
    from launch.ray_actors import RaySlot

    (tmp_path / "marked.py").write_text(CODE)
    function = {"function": f"{tmp_path / 'marked.py'}:marked", "isolation": "subprocess", "timeout_s": scaled(0.5)}
    config = make_config(**{"reward.functions": [function], "reward.workers": 2, "reward.retries": 0})
    modes = ["hang" if i % 20 == 3 else "crash" if i % 20 == 13 else "good" for i in range(200)]
    pool = RewardPool(config, [RaySlot({})] * 2, worker_environment())

    def ask(i: int, mode: str):
        return pool.score(i, prompt(mode=mode, number=float(i)), completions(*("x" * j for j in range(4))))

    try:
        await pool.start()
        outcomes = await asyncio.gather(*(ask(i, mode) for i, mode in enumerate(modes)), return_exceptions=True)
        failed = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, GroupFailed)}
        assert {i: outcome.cause for i, outcome in failed.items()} == {
            i: "timeout" if mode == "hang" else "E304" for i, mode in enumerate(modes) if mode != "good"
        }
        for i, scores in enumerate(outcomes):
            if i not in failed:
                expected = [i, i + 0.01, i + 0.02, i + 0.03]
                assert scores.parts["marked"].tolist() == pytest.approx(expected, rel=1e-6)
        assert pool.counters["worker_restarts"] == 0  # The children were replaced, not the actors.
        assert pool.metrics()["workers"] == 2
        again = await asyncio.gather(*(ask(i, "good") for i in range(20)))
        assert len(again) == 20
    finally:
        pool.close()
