"""How vLLM is started: the environment, cores and arguments of an engine; what each is for stands beside it.

Called where an engine is spawned (``EnginePool``), where it lives (``Engine``) and by the benchmark's ceiling, so that all
three run the same vLLM.
"""

from __future__ import annotations

import os
from typing import Any

from rollout.in_process import InProcessLLM
from shared.config import Config
from shared.threads import gpu_threads
from shared.weights import backend_of

COLOCATED_SHARE = 0.4
"""Share of a GPU's memory that an engine takes beside a learner rank, unless rollout.vllm says otherwise."""

CPU_BLOCK_TOKENS = 32
"""Tokens of a block of keys and values, the fewest that the CPU kernels take; vLLM's default is 128 there.

Completions of a prompt share its full blocks only. With prompts of 100 tokens, 8 completions each, 32 instead of 128 took
0.44 of the CPU time for completions of 16 tokens, 0.73 for 64 and 0.76 for 128.
"""

CPU_STEP_TOKENS = 4096
"""Tokens of a step of vLLM on a CPU, unless its table says otherwise."""


def engine_environment(config: Config) -> dict[str, str]:
    """Return the environment variables of an engine; they must be set before vLLM is imported."""
    eager = bool(config.rollout.vllm.get("enforce_eager"))
    return {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        # The context is checked before the start (E407); vLLM does not know that YaRN multiplies it.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        # Worker processes inherit the cores of the thread that starts them; vLLM's own binding would set other counts of threads.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(config.rollout.cpu_threads),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # Pages of 2 MB.
        # Products of float32 in Triton's attention are TF32 otherwise: log-probs would differ from the learner's by 1e-3 to 1e-2.
        "TRITON_F32_DEFAULT": "ieee",
        # Without a compiled model vLLM would still compile its log-prob ranking: ten seconds in the first request.
        **({"TORCH_COMPILE_DISABLE": "1"} if eager else {}),
    }


def engine_arguments(config: Config, index: int, load_format: str) -> dict[str, Any]:
    """vLLM's arguments of engine number ``index``; the user's own table is merged over ours."""
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    on_cpu, workers = bool(current_platform.is_cpu()), config.rollout.workers_per_engine
    arguments: dict[str, Any] = {
        "model": config.model.path,
        "tokenizer": config.model.tokenizer or config.model.path,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": config.model.dtype,
        "seed": config.run.seed + index,
        "load_format": load_format,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.rollout.tensor_parallel_size,
        "pipeline_parallel_size": config.rollout.pipeline_parallel_size,
        "enable_prefix_caching": True,
        # Raw log-probs would be those before the temperature: not the distribution that was sampled.
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=backend_of(config, not on_cpu)),
        "worker_extension_cls": "rollout.weight_receiver.MillraceWorker",
        "disable_log_stats": True,
        "max_num_seqs": config.max_num_seqs,
    }
    if workers > 1:
        # Processes of the engine's own. In a placement group vLLM would choose Ray, which needs a bundle for every worker.
        arguments["distributed_executor_backend"] = "mp"
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = (int(config.rollout.kv_cache_gib) << 30) // workers  # Of each worker.
        arguments["block_size"] = CPU_BLOCK_TOKENS
        if workers == 1:
            # No worker process, and no message queue to it: a quarter faster, and starts sooner.
            from vllm.v1.executor.uniproc_executor import UniProcExecutor

            arguments["distributed_executor_backend"] = UniProcExecutor
    elif config.rollout.colocate:
        arguments["gpu_memory_utilization"] = COLOCATED_SHARE
    arguments |= config.rollout.vllm
    return arguments | _room_for_whole_prompts(arguments) if on_cpu else arguments


def _room_for_whole_prompts(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which a step has room for the longest prompt beside every running completion.

    Engines on CPUs never cut a prompt (``in_process.build``): one that did not fit into a step would wait for ever.
    """
    longest, running = arguments["max_model_len"], arguments["max_num_seqs"]
    whole: dict[str, Any] = {"enable_chunked_prefill": None, "long_prefill_token_threshold": 0}
    whole["max_num_scheduled_tokens"] = None
    if arguments.get("max_num_batched_tokens", CPU_STEP_TOKENS) < longest + running:
        whole["max_num_batched_tokens"] = min(longest + running, longest * running)
    return whole


def start_vllm(config: Config, index: int, load_format: str) -> Any:
    """vLLM behind ``AsyncLLM``'s interface."""
    from vllm.platforms import current_platform

    arguments = engine_arguments(config, index, load_format)
    if current_platform.is_cpu():
        return InProcessLLM(arguments, f"engine-{index}", config.rollout.cpu_threads, config.rollout.cores(index))
    os.environ["OMP_NUM_THREADS"] = str(gpu_threads())  # Of its own processes: one thread would load a model slowly.
    return start_async(arguments)


def start_async(arguments: dict[str, Any]) -> Any:
    """Start ``AsyncLLM``, which keeps vLLM's core in a process of its own: what serves on GPUs."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    # vLLM's limits for offline work: a server's smaller ones would split what is in flight into waves.
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
