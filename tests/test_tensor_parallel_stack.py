"""An engine of two workers on CPUs: each takes its part of every layer, and proves what it took."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from shared.errors import EngineFailed
from tests.chaos import Run
from tests.pace import scaled
from tests.policies import Policy

pytestmark = pytest.mark.stack

PROMPT = np.array([5, 6, 15, 7, 8, 16], np.int32)


def sampling(n=8, tokens=40, seed=None):
    from rollout.engine import Sampling

    return Sampling(n, tokens, 1.0, seed)


def split_config(model, workers):
    from tests.test_engine_stack import engine_config

    config = engine_config(model)
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"tensor_parallel_size": workers})})


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A tied model whose embedding has rows for both workers: vLLM pads 96 to 128, 64 for each."""
    import torch

    from launch.builtin import TASKS, make_tokenizer, random_qwen2

    path, tokenizer = tmp_path_factory.mktemp("wide"), make_tokenizer(TASKS["addition"])
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.1, "vocab_size": 96}
    model = random_qwen2(tokenizer, **shape)
    assert model.config.tie_word_embeddings
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def split(wide_model):
    """``(engine, policy, run)``: one engine of two workers for the module, on a loop of its own."""
    from rollout.engine import Engine

    loop, policy = asyncio.new_event_loop(), Policy(wide_model)

    async def build():
        return Engine(split_config(wide_model, 2))

    engine = loop.run_until_complete(build())
    yield engine, policy, loop.run_until_complete
    loop.run_until_complete(engine.close())
    for segment in policy.segments:
        segment.unlink()
    loop.close()


def workers_of(engine):
    return [psutil.Process(handle.proc.pid) for handle in engine._llm._core.model_executor.workers]


def newest(split, scale=0.05):
    """Publish changed weights, have them taken and proved; return the publication."""
    engine, policy, run = split
    policy.change(scale)
    publication = policy.publish()
    taken = run(engine.receive(publication))
    assert taken.digests == {publication.digest}
    assert run(engine.prove(publication.canary, publication.version)) < 1e-3
    return publication


def test_every_worker_hashes_every_publication_and_a_tied_head_follows(split):
    engine, policy, run = split
    assert len(workers_of(engine)) == 2
    for _ in range(3):
        publication = newest(split)
        assert run(engine._llm.collective_rpc("millrace_prepared")) == [publication.digest] * 2
        policy.segments[-1].bytes[:] = 255  # The learner will write the next one there.
        assert run(engine.prove(publication.canary, publication.version)) < 1e-3


def forget_shard(worker):
    """Let the second worker compute something else in its part of a layer; its random generator stays that of the first."""
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() == 1:
        layer = worker.get_model().model.layers[0].mlp.down_proj
        layer.cpu_linear = lambda x, weight, bias: torch.full((*x.shape[:-1], 64), 0.5)


def test_wrong_weights_of_one_worker_are_found_by_the_canary(split):
    engine, _, run = split
    publication = newest(split)
    run(engine._llm._do(lambda: engine._llm._core.collective_rpc(forget_shard)))
    assert run(engine.prove(publication.canary, publication.version + 1000)) > 0.01
    newest(split)


def test_a_publication_that_one_worker_reads_differently_is_refused_before_it_is_touched(split, monkeypatch):
    engine, policy, run = split
    before, rpc = newest(split), engine._llm.collective_rpc
    policy.change(0.05)
    publication = policy.publish()

    async def misread(method, kwargs=None):
        answers = await rpc(method, kwargs=kwargs)
        return [answers[0], "0" * 64] if method == "millrace_prepared" and None not in answers else answers

    monkeypatch.setattr(engine._llm, "collective_rpc", misread)
    with pytest.raises(Exception, match="the learner sent"):
        run(engine.receive(publication))
    assert not run(engine._llm.is_paused())
    assert run(engine.prove(before.canary, before.version)) < 1e-3


def test_generation_goes_on_across_a_publication_and_every_token_names_its_weights(split):
    engine, policy, run = split
    before = newest(split, 0.02).version
    weights = {before: {name: value.clone() for name, value in policy.model.state_dict().items()}}
    policy.change(0.02)
    publication = policy.publish()
    weights[publication.version] = policy.model.state_dict()

    async def both():
        running = [asyncio.create_task(engine.generate(PROMPT, sampling(1), before)) for _ in range(128)]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)  # Others are half way.
        await engine.receive(publication)
        return [c for group in await asyncio.gather(*running) for c in group]

    completions = run(both())
    assert {s.version for c in completions for s in c.version_spans} == {before, publication.version}
    assert any(len(c.version_spans) == 2 for c in completions)
    now = {name: value.clone() for name, value in policy.model.state_dict().items()}
    for version, state in weights.items():
        policy.model.load_state_dict(state)
        for completion in [c for c in completions if [s.version for s in c.version_spans] == [version]][:12]:
            expected = policy.logprobs([*PROMPT.tolist(), *completion.token_ids.tolist()])[len(PROMPT) - 1 :]
            assert np.abs(expected - completion.logprobs).max() < 1e-3
    policy.model.load_state_dict(now)
    assert run(engine.prove(publication.canary, publication.version)) < 1e-3


def test_keys_of_older_weights_are_measured_and_dropped_when_they_matter(split):
    from rollout.stale_kv import StaleKV

    engine, policy, run = split
    before, engine._stale_kv = newest(split).version, StaleKV(0.0)
    policy.change(0.1)
    publication = policy.publish()

    async def across():
        running = [asyncio.create_task(engine.generate(PROMPT, sampling(1), before)) for _ in range(64)]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        taken = await engine.receive(publication)
        await asyncio.gather(*running)
        return taken

    assert run(across()).recomputed
    policy.change(0.0)
    assert run(engine.receive(policy.publish())).stale_kv_gap < 1e-4


def test_after_a_reset_no_request_runs_and_no_key_is_kept(split):
    engine, _, run = split
    version = newest(split).version

    async def reset():
        running = [asyncio.create_task(engine.generate(PROMPT, sampling(), version)) for _ in range(8)]
        await asyncio.sleep(0.1)
        await engine.reset()
        return await asyncio.gather(*running, return_exceptions=True)

    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in run(reset()))
    assert engine._llm._core.scheduler.kv_cache_manager.usage == 0.0
    newest(split)


def test_seeded_completions_are_those_of_an_engine_of_one_worker(split, wide_model):
    from rollout.engine import Engine

    engine, _, run = split
    publication = newest(split)
    seeds = [dataclasses.replace(sampling(4, 20), seed=1000 + number) for number in range(8)]

    async def sampled(engine):
        return [await engine.generate(PROMPT, one, publication.version) for one in seeds]

    async def alone():
        single = Engine(split_config(wide_model, 1), 1)
        try:
            await single.receive(publication)
            return await sampled(single)
        finally:
            await single.close()

    for ours, theirs in zip(run(sampled(engine)), run(alone()), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert np.abs(one.logprobs - other.logprobs).max() < 1e-4


def test_an_engine_whose_worker_process_died_is_not_healthy_and_ends_its_requests(split):
    """The last test of the module: the engine does not survive it."""
    engine, _, run = split
    version = newest(split).version

    async def killed():
        assert await engine.health()
        running = [asyncio.create_task(engine.generate(PROMPT, sampling(), version)) for _ in range(8)]
        await asyncio.sleep(0.1)
        workers_of(engine)[1].kill()
        async with asyncio.timeout(scaled(5)):
            while True:
                try:
                    await engine.health()
                except EngineFailed as error:
                    said = str(error)
                    break
                await asyncio.sleep(0.02)
        assert "a worker process of vLLM has ended" in said or "vLLM failed" in said
        return await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), scaled(30))

    assert all(isinstance(outcome, EngineFailed) for outcome in run(killed()))


def workers_below(run):
    """Worker processes of vLLM in a run, the oldest first."""
    found = []
    for process in run._family():
        with contextlib.suppress(psutil.Error):
            if "VLLM::Worker" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def shared_memory_of(processes):
    return {path for process in processes for path in map(Path, maps_of(process)) if path.parent == Path("/dev/shm")}


def maps_of(process):
    return [mapped.path for mapped in process.memory_maps() if "/psm_" in mapped.path]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_beside_zero_3_goes_on_when_a_worker_process_or_the_engine_is_killed(tmp_path):
    """The quickstart on two workers and two learner ranks, through the product, with every publication proved."""
    folder = tmp_path / "run"
    settings = {"rollout.tensor_parallel_size": 2, "learner.num_ranks": 2, "learner.zero_stage": 3}
    settings |= {"run.output_dir": folder, "run.steps": 4000, "eval.every_steps": 0, "run.max_restarts": 5}
    run = Run("launch/configs/quickstart.toml", *(f"--{key}={value}" for key, value in settings.items()))
    left = set()
    try:
        lines = run.until("step ", scaled(200), after=run.until("up after", scaled(200)))
        for victim in ("worker", "engine"):
            workers = workers_below(run)
            assert len(workers) == 2
            left |= shared_memory_of(workers)
            (workers[1] if victim == "worker" else run.processes("engine")[0]).kill()
            lines = run.until("serves again", scaled(200), after=run.until("lost", scaled(60), after=lines))
            lines = run.until("step ", scaled(100), after=lines)
            psutil.wait_procs(workers, scaled(20))
            assert not [worker for worker in workers if worker.is_running()]
        assert left
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(scaled(60)) == 143
        assert run.left() == []
    finally:
        run.end()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "sync/canary_gap" in row]
    assert len(steps) >= 3  # One before each end, and one after the last.
    assert max(row["sync/canary_gap"] for row in steps) < 1e-3
    assert {path for path in left if path.exists()} == set()
