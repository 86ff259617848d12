"""``millrace bench rollout``: tokens per second of a running system's engine, and of raw ``vllm.LLM`` on the same requests.

Ours is measured as it runs: Ray actors, weights published and proved, the learner idle. The raw engine has the same
arguments and lives in a process of its own; the two take turns, each idle while the other works.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from launch import bench_workloads
from launch.bench_workloads import WORKLOADS, print_table, workload_config
from rollout.engine import Sampling, sampling_parameters
from rollout.vllm_setup import engine_arguments, engine_environment
from shared.config import Config
from shared.types import Prompt


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this workload."""
    bench_workloads.add_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each; the first is left out")
    parser.add_argument("--groups", type=int, help="groups in a round; by default eight steps' worth")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder:
        config = workload_config(options, Path(folder))
        groups = options.groups or 8 * WORKLOADS[options.shape].prompts_per_step
        ours, raw = asyncio.run(alternate(config, options.rounds, groups))
    result = {
        "bench": "rollout",
        "workload": options.shape,
        "tokens_per_s": statistics.median(ours),
        "raw_vllm_tokens_per_s": statistics.median(raw),
        "of_raw": statistics.median(a / b for a, b in zip(ours, raw, strict=True)),
        "dtype": config.model.dtype,
    }
    print_table([result])
    return result


async def alternate(config: Config, rounds: int, groups: int, with_raw: bool = True) -> tuple[list[float], list[float]]:
    """Tokens per second of every round but the first: ours, and raw vLLM's unless it is not asked for."""
    from launch.cluster import check_resources, ray_session
    from launch.parts import started
    from launch.preflight import prepare

    prompts = prepare(config, "bench.toml", Path(config.data.train[0].path).parent).train.prompts
    ours, raw = [], []
    async with ray_session(config), started(config, check_resources(config, "bench")) as parts:
        publication = await parts.learners.publish(prompts[0].token_ids)
        digest, _ = await asyncio.gather(parts.learners.send(publication), parts.engines.receive(publication))
        await parts.engines.prove(publication, digest)
        batches = [[prompts[(r * groups + i) % len(prompts)] for i in range(groups)] for r in range(rounds)]
        with _RawEngine(config) if with_raw else contextlib.nullcontext() as engine:
            for batch in batches:
                ours.append(await _ours(parts.engines, batch, Sampling.training(config, 0)))
                raw += [await asyncio.to_thread(engine.measure, batch)] if engine else []
    return ours[1:], raw[1:]


class _RawEngine:
    """Raw vLLM in a process of its own, for the length of the block."""

    def __init__(self, config: Config) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_raw_vllm, args=(config, there))
        self._process.start()
        there.close()  # So that its death ends our waiting.

    def __enter__(self) -> _RawEngine:
        self._pipe.recv()  # It is up.
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(20)
        self._process.kill()

    def measure(self, prompts: list[Prompt]) -> float:
        """Tokens per second of these requests."""
        self._pipe.send([p.token_ids.tolist() for p in prompts])
        rate: float = self._pipe.recv()
        return rate


async def _ours(engines: Any, prompts: list[Prompt], sampling: Sampling) -> float:
    started = time.monotonic()
    groups = await asyncio.gather(*(engines.generate(i, prompt, sampling) for i, prompt in enumerate(prompts)))
    return sum(len(c.token_ids) for group in groups for c in group) / (time.monotonic() - started)


def _raw_vllm(config: Config, pipe: Any) -> None:
    """A process of its own: answers lists of prompts with tokens per second, until it gets None."""
    os.environ |= engine_environment(config)
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():  # In this process, as ours: vLLM's default, with a second one (1), is slower there.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    llm = LLM(
        **(engine_arguments(config, 0, "safetensors") | {"worker_extension_cls": "", "weight_transfer_config": None})
    )
    sampling = sampling_parameters(Sampling.training(config, 0), llm.get_tokenizer())
    pipe.send("up")
    while (asked := pipe.recv()) is not None:
        started = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False)
        tokens = sum(len(o.token_ids) for output in outputs for o in output.outputs)
        pipe.send(tokens / (time.monotonic() - started))
    llm.llm_engine.engine_core.shutdown()
