"""vLLM inside this process, stepped by one thread: what an ``Engine`` runs on CPUs.

``AsyncLLM`` keeps vLLM's core in a process of its own and every sampled token crosses between the two as a message. A GPU
hides that cost; on CPUs it takes a fifth of the throughput. Invariant: vLLM is touched by its thread alone, which
does what others ask for between two steps. An engine of several workers has them in processes of their own, which the same
thread calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from shared.errors import EngineFailed, one_line


def build(arguments: dict[str, Any]) -> Any:
    """Return vLLM's ``LLMEngine`` without a process of its own, which prefills every prompt in one step.

    A prompt that a step's limit of tokens cuts is sampled from after each piece. For a seeded request vLLM then winds
    the random generator back by an offset, which generators on CPUs do not have: the engine would end. Without cuts, a
    prompt waits for the next step, and its completions do not depend on what runs beside it.
    """
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    config = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
    config.scheduler_config.enable_chunked_prefill = (
        False  # As an argument it brings a warning of other models' faults.
    )
    return LLMEngine(config, Executor.get_class(config), log_stats=False, usage_context=UsageContext.LLM_CLASS)


class InProcessLLM:
    """The part of ``AsyncLLM``'s interface that ``Engine`` needs."""

    def __init__(self, arguments: dict[str, Any], name: str, threads: int = 1, cores: set[int] | None = None) -> None:
        """``arguments`` are vLLM's own; ``name`` is what errors call this engine; ``cores`` binds its threads."""
        self._name, self._threads, self._cores = name, threads, cores
        self._asked: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._answers: dict[str, Future[Any]] = {}
        self._ended: EngineFailed | None = None
        started: Future[None] = Future()
        # Threads of torch and their cores are set for one thread: it builds vLLM and steps it.
        self._thread = threading.Thread(target=self._live, args=(arguments, started), name="vllm", daemon=True)
        self._thread.start()
        started.result()

    # --- what Engine calls ---

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._llm.get_tokenizer()

    async def generate(self, prompt: Any, parameters: Any, request_id: str) -> AsyncIterator[Any]:
        """The finished ``RequestOutput``; a caller that goes away aborts its request."""
        answer: Future[Any] = Future()

        def add() -> None:
            self._llm.add_request(request_id, prompt, parameters)
            self._answers[request_id] = answer

        try:
            await self._do(add)
            yield await asyncio.shield(asyncio.wrap_future(answer))
        finally:
            if not answer.done():
                self._ask(lambda: self._answers.pop(request_id, None) and self._llm.abort_request([request_id]))

    @property
    def engine_core(self) -> InProcessLLM:
        """Where ``AsyncLLM`` has some of its calls; here there is no second object."""
        return self

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        """Stop before the next step; with ``mode`` keep, running requests freeze in place."""
        await self._do(lambda: self._core.pause_scheduler(mode, clear_cache))

    async def resume_generation(self) -> None:
        """Let them go on."""
        await self._do(self._core.resume_scheduler)

    async def is_paused(self) -> bool:
        """Whether requests are frozen."""
        return bool(await self._do(self._core.is_scheduler_paused))

    async def init_weight_transfer_engine(self, request: Any) -> None:
        """Let the workers join a link with the learner."""
        await self.collective_rpc("init_weight_transfer_engine", {"init_info": request.init_info})

    async def start_weight_update(self) -> None:
        """First stage of a round."""
        await self.collective_rpc("start_weight_update")

    async def update_weights(self, request: Any) -> None:
        """Second stage."""
        await self.collective_rpc("update_weights", {"update_info": request.update_info})

    async def finish_weight_update(self, version: str) -> None:
        """Third stage; ``version`` labels what is sampled from now on."""
        await self.collective_rpc("finish_weight_update")
        await self._do(lambda: self._core.set_weight_version(version))

    async def get_weight_version(self) -> str:
        """The label of the weights in use."""
        return str(await self._do(self._core.get_weight_version))

    async def reset_prefix_cache(self) -> bool:
        """Forget all keys and values; False while a request holds some."""
        return bool(await self._do(self._core.reset_prefix_cache))

    async def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Call a method of every worker, between two steps; return their answers in order of rank."""
        answers: list[Any] = await self._do(lambda: self._core.collective_rpc(method, None, (), kwargs))
        return answers

    async def check_health(self) -> None:
        """Answer at once, however long a step takes. Raises ``EngineFailed`` if the thread or a worker process has ended."""
        if self._ended is not None:
            raise self._ended
        # Only the executor of worker processes has this field; the thread itself may wait for the dead one for seconds.
        if getattr(self._core.model_executor, "is_failed", False):
            raise EngineFailed(f"{self._name}: a worker process of vLLM has ended")

    def shutdown(self) -> None:
        """End the thread and vLLM."""
        self._asked.put(None)
        self._thread.join()

    # --- the thread ---

    def _live(self, arguments: dict[str, Any], started: Future[None]) -> None:
        try:
            import torch

            if self._cores:
                os.sched_setaffinity(0, self._cores)
            torch.set_num_threads(self._threads)  # The environment is too late where torch was there before.
            self._llm = build(arguments)
            self._core = self._llm.engine_core.engine_core
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        failure = EngineFailed(f"{self._name}: closed")
        try:
            while self._do_what_was_asked():
                self._step()
        except BaseException as error:
            text = f"{type(error).__name__}: {one_line(error, 400)}"
            failure = EngineFailed(f"{self._name}: vLLM failed in a step: {text}")
        # vLLM does not survive a failed step: everybody who waits is told, and who asks from now on.
        self._ended = failure
        for answer in self._answers.values():
            answer.set_exception(failure)
        self._refuse()
        self._llm.engine_core.shutdown()

    def _step(self) -> None:
        for output in self._llm.step():
            if output.finished and output.request_id in self._answers:
                self._answers.pop(output.request_id).set_result(output)

    def _do_what_was_asked(self) -> bool:
        """Also waits while there is nothing to step; False at the end."""
        while True:
            idle = self._core.is_scheduler_paused() or not self._llm.has_unfinished_requests()
            try:
                asked = self._asked.get(block=idle)
            except Empty:
                return True
            if asked is None:
                return False
            call, done = asked
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

    # --- from other threads ---

    def _ask(self, call: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        self._asked.put((call, done))
        if self._ended is not None:  # Set before the thread looks for the last time: one of the two sees it.
            self._refuse()
        return done

    def _refuse(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                if (asked := self._asked.get_nowait()) is not None:
                    asked[1].set_exception(self._ended)

    async def _do(self, call: Callable[[], Any]) -> Any:
        # Shielded: what was asked is done even if the caller goes away.
        return await asyncio.shield(asyncio.wrap_future(self._ask(call)))
