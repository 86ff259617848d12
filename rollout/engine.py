"""One vLLM replica: it generates groups, takes weights and proves them.

``EnginePool`` runs it as an async Ray actor; a test may build it in-process. A group is one request with n = G, so
the full blocks of its prompt are prefilled once. Invariant: a token's log-prob is that of the distribution it was sampled from, and
its version span names the weights that produced it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rollout.stale_kv import StaleKV
from rollout.vllm_requests import completion, policy_version, sampling_parameters
from rollout.vllm_setup import engine_environment, start_vllm
from shared import faults
from shared.config import Config
from shared.errors import EngineFailed, WeightProofFailed
from shared.ledger import TimeLedger, TimeSlice
from shared.types import Completion, IntArray
from shared.weights import Canary, Link, Publication

PREPARED_EVERY_S, MOST_PREPARED_EVERY_S = 0.001, 0.05
"""Seconds between two questions whether workers have prepared a publication: at first, and at most."""


@dataclass(frozen=True)
class Sampling:
    """How a request is sampled; ``temperature`` 0 is greedy."""

    n: int
    max_new_tokens: int
    temperature: float
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def training(cls, config: Config, group_id: int) -> Sampling:
        """How a training group is sampled.

        In synchronous runs by a seed of its own, so that they repeat bit for bit whoever samples it and however often;
        in others, where tokens meet new weights is a matter of time, and a seed would repeat nothing.
        """
        rollout, seed = config.rollout, None
        if rollout.max_staleness == 0:
            seed = int(np.random.SeedSequence((config.run.seed, group_id)).generate_state(1)[0])
        return cls(
            rollout.group_size,
            rollout.max_new_tokens,
            rollout.temperature,
            seed,
            stop=tuple(rollout.stop),
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
        )


class Received(NamedTuple):
    """What an engine answers to a publication."""

    digests: set[str]
    """Of the bytes that its workers took."""
    seconds: dict[str, float]
    """``prepare``: hashing and packing while generation goes on; ``paused``: without it; ``transfer``: of that, loading."""
    stale_kv_gap: float
    """What old keys and values did to the log-probs sampled since the publication before, in nats."""
    recomputed: bool
    """Whether running requests go on over keys and values computed afresh."""
    times: TimeSlice


class Engine:
    """A vLLM engine with the calls that a rollout needs."""

    def __init__(self, config: Config, index: int = 0, load_format: str = "dummy") -> None:
        """Start vLLM. With ``load_format`` dummy the weights are random until the first publication arrives."""
        ledger = TimeLedger(f"engine-{index}")
        os.environ.update(engine_environment(config))
        self.index = index
        self._ledger = ledger
        self._llm = start_vllm(config, index, load_format)
        self._tokenizer = self._llm.get_tokenizer()
        self._requests = self._running = 0
        self._calls: set[asyncio.Task[Any]] = set()
        """Whose requests vLLM is running."""
        self._forgotten = False  # Reset, and no publication since.
        self._round = asyncio.Lock()
        """Held during a round and its proof: a caller that went away does not end them."""
        self._stale_kv = StaleKV(config.rollout.max_stale_kv_gap)
        self._ledger.enter("wait_for_prompts")

    async def generate(self, token_ids: IntArray, sampling: Sampling, version: int) -> tuple[Completion, ...]:
        """Sample ``sampling.n`` completions of one prompt ``[P]``; ``version`` is the newest proved policy version."""
        faults.point("engine.before_generate")
        if (
            self._forgotten
        ):  # It was on its way here: its keys would outlive the reset under a version that means other weights.
            raise EngineFailed("asked before the engine was reset")
        with self._cancellable():
            outputs = await self._request(token_ids, sampling_parameters(sampling, self._tokenizer), version)
            texts = self._tokenizer.batch_decode([o.token_ids for o in outputs], skip_special_tokens=True)
            completions = tuple(completion(output, text) for output, text in zip(outputs, texts, strict=True))
            if sampling.temperature > 0:
                await self._stale_kv.measure(completions, partial(self._rescore, token_ids, sampling))
        faults.point("engine.after_generate")
        return completions

    async def prompt_logprobs(self, token_ids: IntArray, version: int) -> np.ndarray:
        """Log-probs ``[T - 1] float32`` of ``token_ids[1:]`` under the engine's weights, at temperature 1."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        result = await self._run(token_ids, parameters, str(version))
        entries = result.prompt_logprobs[1:]
        values = [entry[int(token)].logprob for token, entry in zip(token_ids[1:], entries, strict=True)]
        return np.asarray(values, dtype=np.float32)

    async def connect(self, link: Link, rank_offset: int) -> None:
        """Join the learner's link with this engine's workers, from ``rank_offset`` on."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        where = {"master_address": link.host, "master_port": link.port}
        ranks = {"rank_offset": rank_offset, "world_size": 1 + link.workers, "packed": True}
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=where | ranks))

    async def receive(self, publication: Publication) -> Received:
        """Take ``publication``.

        Running requests freeze in place and go on under the new weights, over their keys and values so far unless those
        were measured to matter (``StaleKV``). Raises ``WeightProofFailed`` before anything
        is touched if a snapshot's bytes are damaged. A round that fails later leaves the engine paused: vLLM recovers
        exactly from a repeated round, and dies if it resumes on half-loaded weights.
        """
        self._forgotten = False
        async with self._round:
            return await self._receive(publication)

    async def _receive(self, publication: Publication) -> Received:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        digests, begun = set[str](), time.monotonic()
        if publication.segment:
            digests = await self._prepare(publication)
            if digests != {publication.digest}:
                raise WeightProofFailed(
                    f"segment {publication.segment}: hashed {digests}, the learner sent {publication.digest}"
                )
        started = time.monotonic()
        gap, recompute = self._stale_kv.take()
        self._ledger.enter("pause")
        # Not ``pause_generation``: it adds 20 ms of sleep, for an order of results that nobody here needs.
        await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=recompute)
        faults.point("sync.after_pause")
        self._ledger.enter("receive")
        paused = time.monotonic()
        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=publication.update_info()))
        transferred = time.monotonic()
        faults.point("sync.before_version")
        await self._llm.finish_weight_update(str(publication.version))
        await self._llm.resume_generation()
        self._ledger.enter(self._working())
        seconds = {"prepare": started - begun, "paused": time.monotonic() - started, "transfer": transferred - paused}
        digests = digests or set(await self._llm.collective_rpc("millrace_received"))
        return Received(digests, seconds, gap, recompute, self._ledger.take())

    async def _prepare(self, publication: Publication) -> set[str]:
        """Return the digests that the workers have of the segment's bytes; requests go on while they hash and pack."""
        await self._llm.collective_rpc("millrace_prepare", kwargs={"update_info": publication.update_info()})
        interval_s = PREPARED_EVERY_S
        while None in (answers := await self._llm.collective_rpc("millrace_prepared")):
            await asyncio.sleep(interval_s)
            interval_s = min(2 * interval_s, MOST_PREPARED_EVERY_S)
        first = bytearray.fromhex(answers[0])
        faults.point("sync.after_hash", first)
        return {first.hex(), *answers[1:]}

    async def prove(self, canary: Canary, version: int) -> float:
        """Largest absolute difference between the engine's and the learner's log-probs of the canary, in nats."""
        async with self._round:
            ours = await self.prompt_logprobs(canary.token_ids, version)
        return float(np.max(np.abs(ours - canary.logprobs)))

    async def weight_version(self) -> str:
        """The label of the weights in use."""
        return await self._llm.get_weight_version()

    async def reset(self) -> None:
        """Abort every request and forget all keys and values: version numbers may name other weights from now on."""
        self._forgotten = True
        async with self._round:
            running = set(self._calls)
            for call in running:
                call.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self._stale_kv.take()
            while not await self._llm.reset_prefix_cache():
                pass  # An aborted request still holds its blocks.

    async def health(self) -> int:
        """The process id, unless vLLM has failed; answers also during a long step, which has deadlines of its own."""
        await self._llm.check_health()
        return os.getpid()

    async def times(self) -> TimeSlice:
        """What this engine did since it was asked last."""
        return self._ledger.take()

    async def close(self) -> None:
        """Stop vLLM's processes."""
        self._llm.shutdown()

    async def _rescore(
        self, token_ids: IntArray, sampling: Sampling, completion: Completion, position: int
    ) -> tuple[int, float]:
        """What ``StaleKV`` compares with; the request's salt is its own, so that it finds nothing in the cache."""
        token = int(completion.token_ids[position])
        parameters = sampling_parameters(replace(sampling, n=1, max_new_tokens=1, stop=()), self._tokenizer)
        parameters.logprobs, parameters.flat_logprobs, parameters.logprob_token_ids = None, False, [token]
        prefix = np.concatenate([token_ids, completion.token_ids[:position]])
        output = (await self._run(prefix, parameters, f"afresh-{self._requests}")).outputs[0]
        return policy_version(output.weight_versions[0].version), output.logprobs[0][token].logprob

    async def _request(self, token_ids: IntArray, parameters: Any, version: int) -> list[Any]:
        result = await self._run(token_ids, parameters, str(version))
        return sorted(result.outputs, key=lambda output: output.index)

    async def _run(self, token_ids: IntArray, parameters: Any, salt: str) -> Any:
        self._requests += 1
        # The salt (the policy version) keeps a new request from reusing cache blocks computed under older weights.
        prompt = {"prompt_token_ids": [int(t) for t in token_ids], "cache_salt": salt}
        self._change(+1)
        try:
            with self._cancellable():
                async for result in self._llm.generate(prompt, parameters, f"{self.index}-{self._requests}"):
                    final = result
            return final
        finally:
            self._change(-1)

    @contextmanager
    def _cancellable(self) -> Iterator[None]:
        """Whoever is inside is cancelled by ``reset``, between two requests too."""
        call = asyncio.current_task()
        assert call is not None
        first = call not in self._calls
        self._calls.add(call)
        try:
            yield
        finally:
            if first:
                self._calls.discard(call)

    def _change(self, running: int) -> None:
        """``running`` requests more or less; an update under way keeps its state."""
        before = self._working()
        self._running += running
        if self._ledger.state == before:
            self._ledger.enter(self._working())

    def _working(self) -> str:
        return "generate" if self._running else "wait_for_prompts"
