"""One vLLM replica: it generates groups, takes weights and proves them.

``EnginePool`` runs it as an async Ray actor; a test may build it in-process. A group is one request with n = G, so
its prompt is prefilled once. Invariant: a token's log-prob is that of the distribution it was sampled from, and
its version span names the weights that produced it.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rollout.in_process import InProcessLLM
from shared.config import Config, Rollout
from shared.errors import WeightProofFailed
from shared.ledger import TimeLedger, TimeSlice
from shared.types import Completion, IntArray, VersionSpan
from shared.weights import IPC_BACKEND, NCCL_BACKEND, SHM_BACKEND, Canary, Link, Publication

COLOCATED_SHARE = 0.4
"""Share of a GPU's memory that an engine takes beside a learner rank, unless rollout.vllm says otherwise."""


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
    def training(cls, rollout: Rollout) -> Sampling:
        """How training groups are sampled."""
        return cls(
            rollout.group_size,
            rollout.max_new_tokens,
            rollout.temperature,
            stop=tuple(rollout.stop),
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
        )


def engine_environment(config: Config, index: int) -> dict[str, str]:
    """Environment variables of engine number ``index``; they must be set before vLLM is imported."""
    eager = bool(config.rollout.vllm.get("enforce_eager"))
    return {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": _binding(config, index),  # Of worker processes, where there are any.
        "OMP_NUM_THREADS": str(config.rollout.cpu_threads),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # Pages of 2 MB.
        # Without a compiled model vLLM would still compile its log-prob ranking: ten seconds in the first request.
        **({"TORCH_COMPILE_DISABLE": "1"} if eager else {}),
    }


def _binding(config: Config, index: int) -> str:
    lists = config.rollout.cpu_cores.split("|")
    return lists[index] if len(lists) > 1 else lists[0]


def _cores(config: Config, index: int) -> set[int] | None:
    """Cores of engine number ``index``, for example of ``0-3,6``; None: wherever the system puts it."""
    found: set[int] = set()
    for part in _binding(config, index).split(","):
        first, _, last = part.partition("-")
        if not first.isdigit():
            return None
        found |= set(range(int(first), int(last or first) + 1))
    return found


def engine_arguments(config: Config, index: int, load_format: str) -> dict[str, Any]:
    """vLLM's arguments of engine number ``index``; the user's own table is merged over ours."""
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    on_cpu, colocated = current_platform.is_cpu(), config.rollout.colocate
    backend = SHM_BACKEND if on_cpu else IPC_BACKEND if colocated else NCCL_BACKEND
    arguments: dict[str, Any] = {
        "model": config.model.path,
        "tokenizer": config.model.tokenizer or config.model.path,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": config.model.dtype,
        "seed": config.run.seed + index,
        "load_format": load_format,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.rollout.tensor_parallel_size,
        "enable_prefix_caching": True,
        # Raw log-probs would be those before the temperature: not the distribution that was sampled.
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=backend),
        "worker_extension_cls": "rollout.weight_receiver.MillraceWorker",
        "disable_log_stats": True,
        "max_num_seqs": config.max_num_seqs,
    }
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = int(config.rollout.kv_cache_gib) << 30
        if config.rollout.tensor_parallel_size == 1:
            # No worker process, and no message queue to it: a quarter faster, and starts sooner.
            from vllm.v1.executor.uniproc_executor import UniProcExecutor

            arguments["distributed_executor_backend"] = UniProcExecutor
    elif colocated:
        arguments["gpu_memory_utilization"] = COLOCATED_SHARE
    return arguments | config.rollout.vllm


def sampling_parameters(sampling: Sampling) -> Any:
    """``sampling`` as vLLM's ``SamplingParams``, with the log-probs of the sampled tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        stop=list(sampling.stop) or None,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class Received(NamedTuple):
    """What an engine answers to a publication."""

    digests: set[str]
    """Of the bytes that its workers took."""
    seconds: dict[str, float]
    """``prepare``: hashing and packing while generation goes on; ``paused``: without it; ``transfer``: of that, loading."""
    times: TimeSlice


def _start_vllm(config: Config, index: int, load_format: str) -> Any:
    """vLLM behind ``AsyncLLM``'s interface."""
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = engine_arguments(config, index, load_format)
    if current_platform.is_cpu():
        return InProcessLLM(arguments, f"engine-{index}", config.rollout.cpu_threads, _cores(config, index))
    # vLLM's limits for offline work: a server's smaller ones would split what is in flight into waves.
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)


class Engine:
    """A vLLM engine with the six calls that a rollout needs."""

    def __init__(self, config: Config, index: int = 0, load_format: str = "dummy") -> None:
        """Start vLLM. With ``load_format`` dummy the weights are random until the first publication arrives."""
        ledger = TimeLedger(f"engine-{index}")
        os.environ.update(engine_environment(config, index))
        self.index = index
        self._ledger = ledger
        self._llm = _start_vllm(config, index, load_format)
        self._tokenizer = self._llm.get_tokenizer()
        self._requests = self._running = 0
        self._ledger.enter("wait_for_prompts")

    async def generate(self, token_ids: IntArray, sampling: Sampling, version: int) -> tuple[Completion, ...]:
        """Sample ``sampling.n`` completions of one prompt ``[P]``; ``version`` is the newest proved policy version."""
        outputs = await self._request(token_ids, sampling_parameters(sampling), version)
        texts = self._tokenizer.batch_decode([o.token_ids for o in outputs], skip_special_tokens=True)
        return tuple(
            Completion(
                token_ids=np.asarray(output.token_ids, dtype=np.int32),
                logprobs=np.asarray(output.logprobs.logprobs, dtype=np.float32),  # Of the sampled tokens alone.
                text=text,
                finish_reason=output.finish_reason,
                version_spans=tuple(
                    VersionSpan(_version(s.version), s.start, s.end) for s in output.weight_versions or ()
                ),
            )
            for output, text in zip(outputs, texts, strict=True)
        )

    async def prompt_logprobs(self, token_ids: IntArray, version: int) -> np.ndarray:
        """Log-probs ``[T - 1] float32`` of ``token_ids[1:]`` under the engine's weights, at temperature 1."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        result = await self._run(token_ids, parameters, version)
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

        Running requests freeze in place and go on under the new weights. Raises ``WeightProofFailed`` before anything
        is touched if a snapshot's bytes are damaged. A round that fails later leaves the engine paused: vLLM recovers
        exactly from a repeated round, and dies if it resumes on half-loaded weights.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        digests, begun = set[str](), time.monotonic()
        if publication.segment:
            digests.add(await asyncio.to_thread(publication.hash_segment))
            if digests != {publication.digest}:
                raise WeightProofFailed(
                    f"segment {publication.segment}: hashed {digests}, the learner sent {publication.digest}"
                )
            await self._llm.beside("millrace_prepare", {"update_info": publication.update_info()})
        started = time.monotonic()
        self._ledger.enter("pause")
        # Not ``pause_generation``: it adds 20 ms of sleep, for an order of results that nobody here needs.
        await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        self._ledger.enter("receive")
        paused = time.monotonic()
        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=publication.update_info()))
        transferred = time.monotonic()
        await self._llm.finish_weight_update(str(publication.version))
        await self._llm.resume_generation()
        self._ledger.enter(self._working())
        seconds = {"prepare": started - begun, "paused": time.monotonic() - started, "transfer": transferred - paused}
        digests = digests or set(await self._llm.collective_rpc("millrace_received"))
        return Received(digests, seconds, self._ledger.take())

    async def prove(self, canary: Canary, version: int) -> float:
        """Largest absolute difference between the engine's and the learner's log-probs of the canary, in nats."""
        ours = await self.prompt_logprobs(canary.token_ids, version)
        return float(np.max(np.abs(ours - canary.logprobs)))

    async def weight_version(self) -> str:
        """The label of the weights in use."""
        return await self._llm.get_weight_version()

    async def health(self) -> int:
        """The process id, if the engine answers."""
        await self._llm.check_health()
        return os.getpid()

    async def times(self) -> TimeSlice:
        """What this engine did since it was asked last."""
        return self._ledger.take()

    async def close(self) -> None:
        """Stop vLLM's processes."""
        self._llm.shutdown()

    async def _request(self, token_ids: IntArray, parameters: Any, version: int) -> list[Any]:
        result = await self._run(token_ids, parameters, version)
        return sorted(result.outputs, key=lambda output: output.index)

    async def _run(self, token_ids: IntArray, parameters: Any, version: int) -> Any:
        self._requests += 1
        # The salt keeps a new request from reusing prefix-cache blocks computed under older weights.
        prompt = {"prompt_token_ids": [int(t) for t in token_ids], "cache_salt": str(version)}
        self._change(+1)
        try:
            async for result in self._llm.generate(prompt, parameters, f"{self.index}-{self._requests}"):
                final = result
            return final
        finally:
            self._change(-1)

    def _change(self, running: int) -> None:
        """``running`` requests more or less; an update under way keeps its state."""
        before = self._working()
        self._running += running
        if self._ledger.state == before:
            self._ledger.enter(self._working())

    def _working(self) -> str:
        return "generate" if self._running else "wait_for_prompts"


def _version(label: str) -> int:
    """The policy version that vLLM's label names; -1 for weights loaded from disk."""
    return -1 if label == "default" else int(label)
