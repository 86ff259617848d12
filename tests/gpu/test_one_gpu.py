"""One GPU of 80 GB, ten minutes: publications over CUDA IPC, speed, memory and resuming, with a model of 1.5 billion parameters.

``make test-gpu`` runs these, and fails without a GPU. Nothing is fetched. They have not been run by those who wrote them
unless the README gives figures of a GPU.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from launch.hardware import DEVICES
from launch.memory import Sizes, learner_bytes, total
from shared.types import Completion, Prompt, RolloutGroup
from tests.conftest import ROOT
from tests.fakes import make_config
from tests.test_architectures_stack import EngineHost, LearnerHost, Remote

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
QUICKSTART = "launch/configs/quickstart.toml"
CANARY = np.arange(5, 37, dtype=np.int32)
PROMPT = np.arange(5, 69, dtype=np.int32)
TOKENS = 16_384
SECONDS_PER_GB = 0.5
"""Longest pause of an engine for a gigabyte of weights."""


def config_of(path, **changes):
    """A learner rank and an engine on one GPU; the engine's cache has a size of its own, so that neither measures the other."""
    vllm = {"kv_cache_memory_bytes": 8 << 30, "gpu_memory_utilization": 0.3}
    common = {"model.path": str(path), "model.dtype": "bfloat16", "rollout.colocate": True, "rollout.vllm": vllm}
    common |= {"rollout.max_prompt_tokens": 128, "rollout.max_new_tokens": 896, "algorithm.kl": {"coef": 0.0}}
    return make_config(**common | {"learner.max_tokens_per_microbatch": TOKENS} | changes)


class GpuEngineHost(EngineHost):
    """An engine that can also take weights while it samples."""

    def timed_take(self, publication):
        """The canary's gap, and seconds until the weights were in use."""
        started = time.monotonic()
        gap = self.take(publication)
        return gap, time.monotonic() - started

    def take_while_sampling(self, publication, config, after):
        """Completions of ``PROMPT`` during which, after ``after`` seconds, the engine took ``publication``."""
        from rollout.engine import Sampling

        async def both():
            sampling = Sampling.training(config, 0)
            sampled = asyncio.create_task(self.engine.generate(PROMPT, sampling, publication.version - 1))
            await asyncio.sleep(after)
            await self.engine.receive(publication)
            await self.engine.prove(publication.canary, publication.version)
            return await sampled

        return self.events.run_until_complete(both())


class GpuLearnerHost(LearnerHost):
    """A learner that measures its own steps."""

    def timed_steps(self, groups, count):
        """Seconds of the fastest of ``count`` steps, and the most bytes that torch held."""
        import torch

        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(count):
            torch.cuda.synchronize()
            started = time.monotonic()
            self.learner.train_step(groups)
            torch.cuda.synchronize()
            seconds.append(time.monotonic() - started)
        return min(seconds), torch.cuda.max_memory_allocated()


def groups_of(tokens, length=960):
    """Groups of eight random completions of ``length`` tokens, of ``tokens`` tokens together."""
    random = np.random.default_rng(0)

    def completion():
        return Completion(
            random.integers(5, 1000, length).astype(np.int32), np.full(length, -8, np.float32), "", "stop"
        )

    count = tokens // (8 * length)
    return [
        RolloutGroup(
            i, Prompt(i, PROMPT, ""), tuple(completion() for _ in range(8)), random.random(8).astype(np.float32)
        )
        for i in range(count)
    ]


def flops(sizes, tokens, length):
    """FLOPs of a forward and a backward pass over ``tokens`` in rows of ``length``: products with weights, and attention."""
    return 6 * sizes.parameters * tokens + 12 * sizes.layers * sizes.hidden * tokens * length / 2


@pytest.fixture
def hosts():
    learner, engine = Remote(GpuLearnerHost), Remote(GpuEngineHost)
    yield learner, engine
    learner.end()
    engine.end()


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-3), ("bfloat16", 0.25)])
def test_a_publication_over_ipc_is_proved_and_pauses_the_engine_shortly(hosts, big_model, told, dtype, most):
    learner, engine = hosts
    config = config_of(big_model, **{"model.dtype": dtype})
    learner.open(config)
    first = learner("publish")  # The learner starts first; the engine then finds what it leaves.
    engine.open(config)
    gap, _ = engine("timed_take", first)
    _, publication = learner("train", groups_of(8 * 960))
    later, seconds = engine("timed_take", publication)
    size = sum(meta.nbytes for meta in publication.tensors) / 1e9
    told(canary_gap=max(gap, later), take_s_per_gb=seconds / size, publish_s_per_gb=publication.seconds / size)
    assert max(gap, later) < most
    assert seconds / size < SECONDS_PER_GB


def test_an_update_in_the_middle_of_sampling_is_seen_in_the_spans(hosts, big_model):
    learner, engine = hosts
    config = config_of(big_model)
    learner.open(config)
    first = learner("publish")
    engine.open(config)
    engine("take", first)
    _, publication = learner("train", groups_of(8 * 960))
    completions = engine("take_while_sampling", publication, config, 1.0)
    spans = {tuple(span.version for span in completion.version_spans) for completion in completions}
    assert (0, 1) in spans


def test_tokens_per_second_are_those_of_raw_vllm_with_graphs(big_model, told):
    settings = [f"model.path={big_model}", "rollout.vllm.enforce_eager=false", "rollout.max_new_tokens=256"]
    command = [sys.executable, "-m", "launch.bench", "rollout", "--dtype", "bfloat16", "--rounds", "3", "--json"]
    done = subprocess.run([*command, "--set", *settings], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    told(**{name: value for name, value in result.items() if isinstance(value, int | float)})
    assert result["of_raw"] > 0.9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_fast_and_takes_the_memory_that_the_dry_run_tells(hosts, big_model, told, checkpointing):
    learner, _ = hosts
    config = config_of(big_model, **{"learner.gradient_checkpointing": checkpointing})
    groups, sizes = groups_of(4 * TOKENS), Sizes.of(config)
    learner.open(config)
    seconds, peak = learner("timed_steps", groups, 4)
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    mfu = flops(sizes, tokens, 1024) / seconds / DEVICES["h100-80"].flops
    parts = learner_bytes(config, sizes, on_gpu=True)
    expected = total(parts) - parts["CUDA"]  # torch does not count the context.
    told(mfu=mfu, step_s=seconds, peak_gb=peak / 1e9, expected_gb=expected / 1e9)
    assert mfu > 0.25
    assert peak == pytest.approx(expected, rel=0.15)


def test_a_run_goes_on_where_it_was_killed(run_millrace, tmp_path):
    folder = tmp_path / "run"
    changes = {"run.output_dir": folder, "run.steps": 6, "run.checkpoint_every": 3, "rollout.colocate": "true"}
    changes |= {"model.dtype": "bfloat16", "eval.max_rows": 16}
    first = run_millrace(QUICKSTART, *(f"--{key}={value}" for key, value in changes.items()), timeout=200)
    assert first.returncode == 0, first.stderr[-3000:]
    command = [sys.executable, "-m", "launch.cli", "resume", str(folder), "--run.steps", "12"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy_version"] for row in rows if "staleness/max" in row] == list(range(1, 13))
