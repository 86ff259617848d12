"""Groups and publications against scripted engines: deaths, late answers, refusals, resets, and all of it at random."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest

from rollout.engine import Engine
from rollout.stale_kv import StaleKV
from shared.actors import ActorDied, ActorUnreachable, Call
from shared.errors import EngineFailed, GroupFailed, WeightProofFailed
from shared.ledger import TimeLedger
from shared.types import VersionSpan
from shared.weights import IPC_BACKEND, NCCL_BACKEND, SHM_BACKEND, Canary, Link, TensorMeta, stage_limit
from tests.engine_worlds import REFUSAL, SAMPLING, ask, deliver, publication, recovered, texts, until
from tests.fakes import make_prompt

# --- groups ---


@pytest.mark.parametrize(
    "failure",
    [
        ActorDied("gone"),
        EngineFailed("engine-0: vLLM failed in a step: RuntimeError: kernel"),
        type("EngineDeadError", (Exception,), {})(),
    ],
)
async def test_the_groups_of_a_lost_engine_go_to_another_at_once(make_pool, failure, capsys):
    pool, world = await make_pool()
    world.last(0).go.clear()
    world.last(1).go.clear()
    tasks = ask(pool, *range(8))
    await until(lambda: world.last(0).requests == world.last(1).requests == 4)
    first = world.actors[0]
    first.fail["generate"] = [failure]
    extra = ask(pool, 8)
    await until(lambda: first.killed)
    await until(lambda: world.last(1).requests == 9)  # Nobody waited for the new life.
    world.last(1).go.set()
    assert texts(await asyncio.gather(*tasks, *extra)) == ["1.0"] * 9
    await until(lambda: recovered(pool))
    assert pool.metrics()["engines/redispatched"] == 5
    assert 0 < pool.metrics()["engines/recovery_seconds"] < 1
    lost, back = capsys.readouterr().out.splitlines()
    assert lost.startswith("engine-0 lost, 1 of 2 engines serve, 5 restarts left: engine-0")
    assert back.startswith("engine-0 serves again after 0.0 s, 2 of 2 engines serve")
    assert sorted(texts(await asyncio.gather(*ask(pool, 9, 10)))) == ["0.1", "1.0"]


async def test_a_late_answer_of_a_lost_attempt_reaches_nobody(make_pool):
    pool, world = await make_pool()
    first = world.actors[0]
    first.stopped = first.late = True
    tasks = ask(pool, 0, 1)
    await until(lambda: first.killed)
    answers = await asyncio.gather(*tasks)
    first.stopped = False
    await asyncio.sleep(0.01)
    assert texts(answers) == ["1.0", "1.0"]


async def test_an_answer_that_comes_together_with_the_end_is_not_taken(make_pool):
    pool, world = await make_pool()
    replica, answer = pool._fleet.running()[0], asyncio.get_running_loop().create_future()
    world.last(0).call = lambda *_: Call(answer, answer.cancel)
    asking = asyncio.create_task(replica.ask("times", timeout_s=1))
    await asyncio.sleep(0)
    answer.set_result(1)
    pool._fleet.lose(replica, EngineFailed("lost"))
    with pytest.raises(EngineFailed, match="lost"):
        await asking


async def test_a_call_that_is_late_goes_on_to_its_end_unless_it_samples(make_pool):
    pool, world = await make_pool(1)
    gate, ended = asyncio.Event(), []

    async def slow():
        await gate.wait()
        ended.append(True)

    world.last(0).do_times = slow
    with pytest.raises(EngineFailed, match=r"engine-0 did not answer times within 0\.01 s"):
        await pool._fleet.running()[0].ask("times", timeout_s=0.01)
    gate.set()
    await until(lambda: ended)


async def test_an_overdue_request_is_sent_to_another_engine_once(make_pool):
    pool, world = await make_pool(**{"rollout.request_timeout_s": 0.05})
    world.last(0).go.clear()
    assert texts(await asyncio.gather(*ask(pool, 0))) == ["1.0"]
    await until(lambda: world.actors[0].aborted == 1)
    world.last(1).go.clear()
    with pytest.raises(GroupFailed, match=r"> 0.05 s on engine-\d, the second time") as excinfo:
        await ask(pool, 1)[0]
    assert (excinfo.value.group_id, excinfo.value.cause) == (1, "generation_timeout")
    await until(lambda: sum(actor.aborted for actor in world.actors) == 3)


async def test_groups_do_not_wait_for_ever(make_pool):
    pool, _ = await make_pool(1, published=False, **{"rollout.request_timeout_s": 0.05})
    with pytest.raises(GroupFailed, match="no engine was healthy for"):
        await ask(pool, 0)[0]


async def test_who_goes_away_aborts_the_request(make_pool):
    pool, world = await make_pool(1)
    world.last(0).go.clear()
    task, *_ = ask(pool, 0)
    await until(lambda: world.last(0).requests == 1)
    task.cancel()
    await until(lambda: world.last(0).aborted == 1)
    world.last(0).go.set()
    assert texts(await asyncio.gather(*ask(pool, 1))) == ["0.0"]


async def test_an_engine_out_of_reach_is_suspect_and_its_groups_go_elsewhere(make_pool):
    pool, world = await make_pool()
    world.last(0).fail["generate"] = [ActorUnreachable("partition")]
    assert texts(await asyncio.gather(*ask(pool, *range(8)))) == ["1.0"] * 8
    world.last(0).fail.clear()
    await until(lambda: recovered(pool, restarts=0))


async def test_a_fault_of_ours_travels(make_pool):
    pool, world = await make_pool()
    world.last(0).fail["generate"] = [ValueError("ours")]
    with pytest.raises(ValueError, match="ours"):
        await ask(pool, 0)[0]
    assert recovered(pool, restarts=0)


# --- publications ---


async def test_results_wait_for_the_proof_of_the_weights_that_sampled_them(make_pool):
    pool, world = await make_pool()
    for actor in world.actors:
        actor.go.clear()
    world.prove_gate.clear()
    tasks = ask(pool, 0, 1)
    await until(lambda: all(actor.requests for actor in world.actors))
    new = publication(1)
    await pool.receive(new)
    for actor in world.actors:
        actor.go.set()
    proving = asyncio.create_task(pool.prove(new, new.digest))
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in tasks)
    world.prove_gate.set()
    assert (await proving)["sync/canary_gap"] == 0.0
    spans = [completions[0].version_spans for completions in await asyncio.gather(*tasks)]
    assert spans == [(VersionSpan(0, 0, 1), VersionSpan(1, 1, 2))] * 2


async def test_a_refused_round_is_repeated(make_pool):
    pool, world = await make_pool()
    calls = iter([REFUSAL, REFUSAL])
    actor, receive = world.last(0), world.last(0).do_receive

    async def refusing(published):
        if error := next(calls, None):
            raise error
        return await receive(published)

    actor.do_receive = refusing
    figures = await deliver(pool, publication(1))
    assert {"sync/seconds", "sync/proof_seconds", "sync/canary_gap"} <= figures.keys()
    assert recovered(pool, restarts=0)


async def test_weights_that_an_engine_refuses_are_brought_to_its_host_again(make_pool):
    pool, world = await make_pool()
    forgotten = []
    pool._relays.forget = lambda *what: forgotten.append(what)
    world.last(0).fail["receive"] = [REFUSAL]
    await deliver(pool, new := publication(1))
    await until(lambda: recovered(pool))
    assert forgotten == [(new, "")]  # The host of this engine.


@pytest.mark.parametrize("failure", ["refuses", "dies", "proof dies", "other bytes", "other weights", "bug in proof"])
async def test_one_engine_that_fails_a_publication_is_quarantined_and_takes_it_in_its_next_life(make_pool, failure):
    pool, world = await make_pool()
    first, new = world.last(0), publication(1)
    if failure == "refuses":
        first.fail["receive"] = [REFUSAL]
    elif failure == "dies":
        first.fail["receive"] = [ActorDied("gone")]
    elif failure == "proof dies":
        first.fail["prove"] = [ActorDied("gone")]
    elif failure == "bug in proof":
        first.fail["prove"] = [IndexError("x")]
    elif failure == "other bytes":
        world.altering.add((0, 0, 1))
    else:
        world.damaging.add((0, 0, 1))
    first.go.clear()
    tasks = ask(pool, *range(4))
    await until(lambda: first.requests == 2)
    figures = await deliver(pool, new)
    assert figures["sync/canary_gap"] == 0.0
    first.go.set()
    assert set(texts(await asyncio.gather(*tasks))) <= {"1.0", "0.1"}
    await until(lambda: recovered(pool))
    assert first.killed
    assert [world.last(i).holds for i in (0, 1)] == [new, new]
    await deliver(pool, publication(2))
    assert recovered(pool)


async def test_log_probs_that_are_no_numbers_prove_nothing(make_pool):
    pool, world = await make_pool()
    first = world.last(0)

    async def broken(canary, version):
        return float("nan")

    first.do_prove = broken
    await deliver(pool, publication(1))
    await until(lambda: recovered(pool))
    assert first.killed


@pytest.mark.parametrize(
    ("ours", "gap"),
    [([-1.0, -2.0], 0.0), ([-1.0, -2.5], 0.5), ([-0.25, -2.5], 0.75), ([float("nan"), -2.0], float("nan"))],
)
async def test_the_gap_of_a_canary_is_the_largest_difference_to_either_side(ours, gap):
    async def prompt_logprobs(token_ids, version):
        return np.array(ours, np.float32)

    engine = object.__new__(Engine)  # Without a vLLM.
    engine._round, engine.prompt_logprobs = asyncio.Lock(), prompt_logprobs
    canary = Canary(np.zeros(3, np.int32), np.array([-1.0, -2.0], np.float32))
    assert await engine.prove(canary, 1) == pytest.approx(gap, nan_ok=True)


@pytest.mark.parametrize("failure", ["refuses", "proof"])
async def test_weights_that_no_engine_takes_end_the_run_at_once(make_pool, failure):
    pool, world = await make_pool(3)
    for actor in world.actors:
        if failure == "refuses":
            actor.fail["receive"] = [REFUSAL]
        else:
            world.damaging.add((actor.index, 0, 1))
    match = (
        "refused version 1 3 times" if failure == "refuses" else "canary log-probs differ from the learner's by 1 nats"
    )
    with pytest.raises(WeightProofFailed, match=f"engine-., .*{match}|engine-. {match}"):
        await deliver(pool, publication(1))


async def test_weights_that_the_others_refuse_in_their_next_life_end_the_run_too(make_pool):
    pool, world = await make_pool()
    world.last(0).fail["receive"] = [REFUSAL]
    world.last(1).die()
    world.fail = {(index, 1): {"receive": [REFUSAL]} for index in (0, 1)}
    with pytest.raises(WeightProofFailed, match="refused version 1"):
        await deliver(pool, publication(1))


@pytest.mark.parametrize("stage", ["receive", "prove"])
async def test_with_every_engine_dead_a_publication_waits_for_the_first_that_comes_back(make_pool, stage):
    pool, world = await make_pool()
    new = publication(1)
    if stage == "prove":
        await pool.receive(new)
    for actor in list(world.actors):
        actor.die()
    figures = await (deliver(pool, new) if stage == "receive" else pool.prove(new, new.digest))
    assert figures["sync/canary_gap"] == 0.0
    await until(lambda: recovered(pool, restarts=2))
    assert [world.last(i).holds for i in (0, 1)] == [new, new]


async def test_an_engine_on_its_way_back_takes_the_newest_publication(make_pool):
    pool, world = await make_pool()
    world.receive_gate.clear()
    world.last(0).die()
    await until(lambda: world.last(0).life == 1)
    await asyncio.sleep(0.02)  # It is at publication 0.
    world.receive_gate.set()
    for version in range(1, 6):
        await deliver(pool, publication(version))
    await until(lambda: recovered(pool))
    assert world.last(0).holds.version == 5


async def test_a_publication_whose_memory_was_used_again_is_no_refusal(make_pool):
    pool, world = await make_pool()
    gate = asyncio.Event()
    world.start_gate.clear()
    world.last(0).die()
    await until(lambda: world.last(0).life == 1)
    late = world.last(0)
    receive = late.do_receive

    async def overwritten(published):
        await gate.wait()
        if published.version < 3:
            raise WeightProofFailed("segment: hashed d2, the learner sent d0")
        return await receive(published)

    late.do_receive = overwritten
    world.start_gate.set()
    await asyncio.sleep(0.02)
    for version in (1, 2, 3):
        await deliver(pool, publication(version))
    gate.set()
    await until(lambda: recovered(pool))
    assert late.holds.version == 3


async def test_every_worker_of_an_engine_has_a_rank_in_the_link(make_pool):
    pool, world = await make_pool(**{"rollout.tensor_parallel_size": 2})
    assert pool.workers == 4
    await pool.link.join(Link("host", 1, 4))
    assert [actor.rank for actor in world.actors] == [1, 3]


async def test_the_figures_of_a_publication_are_those_of_the_slowest(make_pool):
    pool, world = await make_pool()
    receive = world.last(0).do_receive

    async def slow(published):
        received = await receive(published)
        received.seconds["prepare"] = 3.0
        return received

    world.last(0).do_receive = slow
    assert (await deliver(pool, publication(1)))["sync/prepare_seconds"] == 3.0


def test_a_stage_may_take_a_second_for_100_megabytes():
    large = replace(publication(1), tensors=(TensorMeta("w", "float32", (250_000_000,), 0, 1_000_000_000),))
    assert stage_limit(large) == 30 + 10


async def test_closing_removes_the_weights_from_other_hosts(make_pool):
    pool, _ = await make_pool()
    closed = []

    async def close():
        closed.append(True)

    pool._relays.close = close
    await pool.close()
    assert closed


# --- reset ---


async def test_after_a_reset_nothing_from_before_reaches_anyone(make_pool):
    pool, world = await make_pool()
    world.prove_gate.clear()
    await pool.receive(publication(1))
    world.last(0).go.clear()
    running = ask(pool, *range(4))
    await until(lambda: world.last(0).requests == 2 and world.last(1).requests == 2)
    await asyncio.sleep(0.01)
    await pool.reset()  # Two run, and two wait for a proof.
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert [(type(outcome), outcome.cause) for outcome in outcomes] == [(GroupFailed, "reset")] * 4
    assert [actor.resets for actor in world.actors] == [1, 1]
    assert world.last(0).aborted == 2
    world.prove_gate.set()
    world.last(0).go.set()
    waiting = ask(pool, 9)
    await asyncio.sleep(0.01)
    assert not waiting[0].done()  # Until the engines hold weights again.
    assert pool.metrics()["engines/healthy"] == 0
    await deliver(pool, publication(0))
    assert texts([await waiting[0]]) == ["0.0"]


async def test_an_engine_that_was_lost_before_a_reset_does_not_take_the_old_weights(make_pool):
    pool, world = await make_pool()
    world.receive_gate.clear()
    world.last(0).die()
    await until(lambda: world.last(0).life == 1)
    await asyncio.sleep(0.02)
    await pool.reset()
    world.receive_gate.set()
    await asyncio.sleep(0.02)
    assert pool.metrics()["engines/healthy"] == 0
    new = publication(0)
    await deliver(pool, new)
    await until(lambda: recovered(pool))
    assert world.last(0).holds is world.last(1).holds is new


async def test_an_engine_that_does_not_answer_a_reset_is_replaced(make_pool, monkeypatch):
    monkeypatch.setattr("rollout.engine_pool.RESET_LIMIT_S", 0.02)
    pool, world = await make_pool()
    world.last(0).stopped = True
    await pool.reset()
    await until(lambda: world.last(0).life == 1)
    await deliver(pool, publication(1))
    await until(lambda: recovered(pool))


# --- chaos ---


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_every_group_is_answered_once_by_proved_weights(make_pool, seed):
    source = random.Random(seed)
    pool, world = await make_pool(3, **{"run.max_restarts": 1000, "rollout.request_timeout_s": 2.0})
    published, ended = [0], asyncio.Event()

    async def harm():
        while not ended.is_set():
            await asyncio.sleep(source.uniform(0.001, 0.01))
            victim = world.last(source.randrange(2))  # One is spared, so that no publication is refused by all.
            kind = source.choice(["die", "stop", "refuse", "damage", "alter", "late"])
            if kind == "die":
                victim.die()
            elif kind == "stop":
                victim.stopped = True
            elif kind == "late":
                victim.stopped = victim.late = True
            elif kind == "refuse":
                victim.fail["receive"] = [REFUSAL]
            else:
                chosen = world.damaging if kind == "damage" else world.altering
                chosen.add((victim.index, victim.life, published[0] + 1))

    async def publish():
        while not ended.is_set():
            await asyncio.sleep(0.01)
            published[0] += 1
            await deliver(pool, publication(published[0]))

    async def group(number):
        await asyncio.sleep(source.uniform(0, 0.5))
        before = published[0]
        (completion,) = await pool.generate(number, make_prompt(number), SAMPLING)
        assert completion.text != "damaged"
        assert before - 2 <= completion.oldest_version <= published[0]
        return number

    others = [asyncio.create_task(harm()), asyncio.create_task(publish())]
    answers = await asyncio.gather(*(group(number) for number in range(200)))
    ended.set()
    await asyncio.gather(*others)
    assert answers == list(range(200))
    for actor in world.actors:
        actor.stopped = False
    await until(lambda: pool.metrics()["engines/healthy"] == 3)
    assert pool.metrics()["engines/restarts"] > 3


@pytest.mark.parametrize("backend", [SHM_BACKEND, NCCL_BACKEND, IPC_BACKEND])
async def test_an_engine_hashes_nothing_on_the_host_while_it_stands_still(backend, monkeypatch):
    done = []

    class LLM:
        def __getattr__(self, name):
            async def call(*arguments, **__):
                done.append(arguments[0] if name == "collective_rpc" else name)
                return ["d1" * 32 if done[-1] == "millrace_prepared" else "prints"]

            return call

    engine = Engine.__new__(Engine)
    engine._llm = LLM()
    engine._llm.engine_core = engine._llm
    engine._round, engine._stale_kv, engine._ledger, engine._running = (
        asyncio.Lock(),
        StaleKV(0.0),
        TimeLedger("engine-0"),
        0,
    )
    published = replace(publication(1, backend), digest="d1" * 32, segment="s" if backend == SHM_BACKEND else "")
    received = await engine.receive(published)
    still = done[done.index("pause_scheduler_async") : done.index("resume_generation")]
    assert still == ["pause_scheduler_async", "start_weight_update", "update_weights", "finish_weight_update"]
    before = done[: done.index("pause_scheduler_async")]
    assert ("millrace_prepared" in before) == (backend == SHM_BACKEND)
    assert received.digests == ({"d1" * 32} if backend == SHM_BACKEND else {"prints"})
