"""The thread that steps vLLM: order, cancellation, pauses and failures, on a vLLM made of three lists."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from rollout import in_process
from rollout.in_process import InProcessLLM
from shared.errors import EngineFailed


class FakeLLM:
    """Finishes a request after as many steps as its prompt says; every call notes its thread."""

    def __init__(self):
        self.left, self.aborted, self.threads, self.paused, self.down = {}, [], set(), False, False
        self.stepped = threading.Event()
        self.error = None
        self.core = SimpleNamespace(
            model_executor=None,
            pause_scheduler=lambda mode, clear: self.note(paused=(mode, clear) == ("keep", False)),
            resume_scheduler=lambda: self.note(paused=False),
            is_scheduler_paused=lambda: self.paused,
            set_weight_version=lambda version: self.note(version=version),
            get_weight_version=lambda: self.version,
            reset_prefix_cache=lambda: not self.left,
            collective_rpc=lambda *call: [call],
        )
        self.engine_core = SimpleNamespace(engine_core=self.core, shutdown=lambda: self.note(down=True))

    def note(self, **values):
        self.threads.add(threading.current_thread().name)
        vars(self).update(values)

    def add_request(self, request_id, prompt, parameters):
        self.note()
        if prompt < 0:
            raise ValueError("a bad prompt")
        self.left[request_id] = prompt

    def abort_request(self, ids):
        self.aborted += ids
        for request_id in ids:
            self.left.pop(request_id)

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        assert not self.paused
        self.note()
        self.stepped.set()
        if self.error:
            raise self.error
        self.left = {name: steps - 1 for name, steps in self.left.items()}
        done = [name for name, steps in self.left.items() if steps <= 0]
        for name in done:
            del self.left[name]
        running = [SimpleNamespace(request_id=name, finished=False) for name in self.left]
        return running + [SimpleNamespace(request_id=name, finished=True) for name in done]


@pytest.fixture
def vllm(monkeypatch):
    fake = FakeLLM()
    monkeypatch.setattr(in_process, "build", lambda arguments: fake)
    llm = InProcessLLM({}, "engine-3")
    yield llm, fake
    llm.shutdown()
    assert fake.down


async def finished(llm, name, steps):
    return [output async for output in llm.generate(steps, None, name)]


def test_every_request_gets_its_own_finished_output(vllm):
    llm, fake = vllm

    async def run():
        return await asyncio.gather(*(finished(llm, str(i), 1 + 5 * i) for i in range(6)))

    answers = asyncio.run(run())
    assert [[o.request_id for o in outputs] for outputs in answers] == [[str(i)] for i in range(6)]
    assert fake.threads == {"vllm"}


def test_a_refused_request_fails_alone(vllm):
    llm, fake = vllm

    async def run():
        return await asyncio.gather(finished(llm, "a", -1), finished(llm, "b", 3), return_exceptions=True)

    refused, served = asyncio.run(run())
    assert isinstance(refused, ValueError)
    assert served[0].request_id == "b"
    assert not fake.left


def test_who_goes_away_aborts_the_request(vllm):
    llm, fake = vllm

    async def run():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(finished(llm, "long", 10**9), 0.05)
        await llm.is_paused()
        return await finished(llm, "next", 2)

    assert asyncio.run(run())[0].request_id == "next"
    assert fake.aborted == ["long"]


def test_the_health_is_known_during_a_step_that_takes_long(vllm):
    llm, fake = vllm
    step, go_on = fake.step, threading.Event()
    fake.step = lambda: go_on.wait() and step()

    async def run():
        waiting = asyncio.create_task(finished(llm, "a", 1))
        await asyncio.sleep(0.02)
        await asyncio.wait_for(llm.check_health(), 0.5)
        go_on.set()
        return await waiting

    assert asyncio.run(run())[0].request_id == "a"


def test_the_prefix_cache_is_forgotten_once_no_request_holds_blocks(vllm):
    llm, _ = vllm

    async def run():
        waiting = asyncio.create_task(finished(llm, "a", 10**9))
        await asyncio.sleep(0.02)
        before = await llm.reset_prefix_cache()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return before, await llm.reset_prefix_cache()

    assert asyncio.run(run()) == (False, True)


def test_no_step_happens_while_paused(vllm):
    llm, fake = vllm

    async def run():
        task = asyncio.create_task(finished(llm, "a", 10**9))
        await asyncio.to_thread(fake.stepped.wait)
        await llm.engine_core.pause_scheduler_async("keep", False)
        assert await llm.is_paused()
        left = dict(fake.left)
        await llm.start_weight_update()
        await llm.update_weights(SimpleNamespace(update_info={"segment": "x"}))
        await llm.finish_weight_update("7")
        assert (await llm.collective_rpc("method", {"a": 1})) == [("method", None, (), {"a": 1})]
        await asyncio.sleep(0.02)
        assert fake.left == left
        assert await llm.get_weight_version() == "7"
        await llm.resume_generation()
        await llm.is_paused()
        await asyncio.sleep(0.02)
        assert fake.left != left
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_a_failed_step_is_told_to_all_who_wait_and_all_who_come(vllm):
    llm, fake = vllm

    async def run():
        tasks = [asyncio.create_task(finished(llm, str(i), 10**9)) for i in range(3)]
        await asyncio.to_thread(fake.stepped.wait)
        await llm.is_paused()
        fake.error = RuntimeError("the kernel broke")
        return await asyncio.gather(*tasks, finished(llm, "late", 1), llm.is_paused(), return_exceptions=True)

    failures = asyncio.run(run())
    assert all(isinstance(failure, EngineFailed) for failure in failures[:4])
    assert "engine-3: vLLM failed in a step: RuntimeError: the kernel broke" in str(failures[0])

    async def after():
        with pytest.raises(EngineFailed, match="kernel"):
            await llm.check_health()

    asyncio.run(after())


def test_closing_tells_those_who_wait_and_those_who_come(monkeypatch):
    fake = FakeLLM()
    monkeypatch.setattr(in_process, "build", lambda arguments: fake)
    llm = InProcessLLM({}, "engine-3")

    async def run():
        waiting = asyncio.create_task(finished(llm, "long", 10**9))
        await asyncio.to_thread(fake.stepped.wait)
        await llm.check_health()
        await asyncio.to_thread(llm.shutdown)
        return await asyncio.gather(waiting, llm.check_health(), return_exceptions=True)

    failures = asyncio.run(run())
    assert [str(failure) for failure in failures] == ["engine-3: closed"] * 2


def test_a_vllm_that_does_not_start_says_why(monkeypatch):
    def broken(arguments):
        raise RuntimeError("no such model")

    monkeypatch.setattr(in_process, "build", broken)
    with pytest.raises(RuntimeError, match="no such model"):
        InProcessLLM({}, "engine-3")


@pytest.mark.parametrize(
    ("lists", "index", "cores"),
    [
        ("nobind", 0, None),
        ("3", 0, {3}),
        ("0-2,5", 0, {0, 1, 2, 5}),
        ("0-1|2-3", 1, {2, 3}),
        ("nobind|4", 0, None),
    ],
)
def test_cores_of_an_engine(lists, index, cores):
    from tests.fakes import make_config

    engines = lists.count("|") + 1
    assert make_config(**{"rollout.cpu_cores": lists, "rollout.num_engines": engines}).rollout.cores(index) == cores


def test_the_thread_runs_on_its_cores(monkeypatch):
    import os

    fake, seen = FakeLLM(), []
    before = os.sched_getaffinity(0)
    core = min(before)
    monkeypatch.setattr(in_process, "build", lambda arguments: seen.append(os.sched_getaffinity(0)) or fake)
    InProcessLLM({}, "engine-0", 1, {core}).shutdown()
    assert seen == [{core}]
    assert os.sched_getaffinity(0) == before


def test_vllm_is_built_and_stepped_with_its_own_number_of_threads(monkeypatch):
    import torch

    fake, seen = FakeLLM(), []
    # Once vLLM has run in a process, torch's own setting is inert there; in the actor it comes first.
    monkeypatch.setattr(
        torch, "set_num_threads", lambda threads: seen.append((threading.current_thread().name, threads))
    )
    monkeypatch.setattr(in_process, "build", lambda arguments: seen.append("built") or fake)
    InProcessLLM({}, "engine-0", 3).shutdown()
    assert seen == [("vllm", 3), "built"]


def test_an_engine_whose_worker_process_ended_is_not_healthy_even_while_its_thread_waits(vllm):
    llm, fake = vllm
    fake.core.model_executor = SimpleNamespace(is_failed=False)
    asyncio.run(llm.check_health())
    fake.core.model_executor.is_failed = True
    with pytest.raises(EngineFailed, match="engine-3: a worker process of vLLM has ended"):
        asyncio.run(llm.check_health())


def test_who_goes_away_before_the_thread_comes_by_leaves_it_alive(vllm):
    llm, _ = vllm
    release = threading.Event()

    async def run():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm._do(lambda: release.wait(10)), 0.02)
        release.set()
        assert not await asyncio.wait_for(llm.is_paused(), 10)

    asyncio.run(run())


def test_nothing_is_kept_of_a_request_that_is_gone(vllm):
    llm, fake = vllm

    async def run():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(finished(llm, "long", 10**9), 0.05)
        await finished(llm, "short", 2)
        with pytest.raises(ValueError, match="bad"):
            await finished(llm, "bad", -1)
        await llm.is_paused()

    asyncio.run(run())
    assert not llm._answers
    assert fake.aborted == ["long"]


def test_what_is_asked_during_the_step_that_fails_or_after_it_is_refused(vllm):
    llm, fake = vllm
    asked = []

    def step():
        asked.append(llm._ask(lambda: None))
        raise RuntimeError("the kernel broke")

    fake.step = step

    async def run():
        with pytest.raises(EngineFailed):
            await finished(llm, "a", 5)

    asyncio.run(run())
    assert isinstance(asked[0].exception(10), EngineFailed)
    assert isinstance(llm._ask(lambda: None).exception(10), EngineFailed)  # And from now on.


def test_an_idle_thread_takes_no_steps(vllm):
    llm, fake = vllm

    async def run():
        await llm.is_paused()
        await asyncio.sleep(0.02)
        assert not fake.stepped.is_set()

    asyncio.run(run())
