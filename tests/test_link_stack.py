"""Whole runs over a device link between real processes, with gloo in the place of NCCL: whoever is killed, they go on to the end."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import psutil
import pytest

from launch.run import prepare_session
from launch.run_folder import WEIGHTS
from shared.config_loader import load_config
from shared.metrics import read_metrics
from shared.weights import NCCL_BACKEND
from tests.fakes import write_config, write_rows
from tests.gloo_link import GlooEngine, GlooLearner

pytestmark = [pytest.mark.stack, pytest.mark.chaos, pytest.mark.timeout(1800)]
STEPS = 5


@pytest.fixture
def over_gloo(monkeypatch, tmp_path, model_dir):
    """``run(**changes) -> folder``: a run in this process, with engines and ranks of ``gloo_link``."""
    import ray

    from launch.ray_actors import RaySlot

    if ray.is_initialized():
        ray.shutdown()
    spawn, kinds = RaySlot.spawn, {"Engine": GlooEngine, "Learner": GlooLearner}

    def swapped(self, kind, *arguments, **options):
        return spawn(self, kinds.get(kind.__name__, kind), *arguments, **options)

    monkeypatch.setattr(RaySlot, "spawn", swapped)
    monkeypatch.setattr("launch.parts.backend_of", lambda *_: NCCL_BACKEND)
    digits = np.random.default_rng(0).integers(0, 10, (13, 4))
    write_rows(tmp_path / "train.jsonl", [{"prompt": "".join(map(str, row))} for row in digits])

    async def run(**changes):
        settings = {
            "run": {"output_dir": str(tmp_path / "run"), "steps": STEPS, "checkpoint_every": 2, "max_restarts": 4},
            "model.path": str(model_dir),
            "data.train": str(tmp_path / "train.jsonl"),
            "rollout": {"num_engines": 2, "group_size": 4, "max_prompt_tokens": 8, "max_new_tokens": 12},
            "rollout.vllm": {"enforce_eager": True},
            "rollout.start_timeout_s": 900.0,
            "reward.functions": [{"function": "length"}],
            "learner.prompts_per_step": 2,
            "learner.lr": 1e-3,
        }
        source = write_config(tmp_path / "run.toml", **settings | changes)
        session = prepare_session(load_config([str(source)]), source)
        began = time.monotonic()
        await session.run()
        print(f"the run took {time.monotonic() - began:.0f} s")
        return tmp_path / "run"

    yield run
    ray.shutdown()


async def test_a_run_goes_on_whoever_is_killed_before_or_in_a_broadcast(over_gloo, monkeypatch, capfd):
    """An engine between two broadcasts, one in that of version 3, the rank that sends in that of 4."""
    from learner.learner_group import LearnerGroup
    from rollout.engine_pool import EnginePool

    learners, due = [], {"between", "engine in", "rank in"}
    receive, prove, start = EnginePool.receive, EnginePool.prove, LearnerGroup.start

    def strikes(what, version, at):
        if version == at and what in due:
            due.remove(what)
            return True
        return False

    async def process_of(actor):
        return (await actor._process).pid

    async def received(pool, publication):
        if strikes("engine in", publication.version, 3):
            victim = pool._fleet._members[0].replica._actor
            await victim.call("arm", "sync.after_pause:1:kill").answer
        if strikes("rank in", publication.version, 4):
            os.kill(await process_of(learners[-1]._ranks[0]), signal.SIGKILL)
        return await receive(pool, publication)

    async def proved(pool, publication, digest):
        figures = await prove(pool, publication, digest)
        if strikes("between", publication.version, 1):
            victim = pool._fleet._members[1].replica
            os.kill(await process_of(victim._actor), signal.SIGKILL)
            await asyncio.wait([victim.end_of_life])
        return figures

    async def started(group):
        learners.append(group)
        await start(group)

    monkeypatch.setattr(EnginePool, "receive", received)
    monkeypatch.setattr(EnginePool, "prove", proved)
    monkeypatch.setattr(LearnerGroup, "start", started)
    folder = await over_gloo()
    output = capfd.readouterr().out
    assert not due
    assert output.count("warning[W902]") == 3, output
    assert output.count("warning[W902] device link lost") == 1, output
    assert "W903" not in output
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, STEPS + 1))
    assert len((folder / WEIGHTS).read_text().splitlines()) >= STEPS
    assert not [p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name()]


async def test_engines_of_two_workers_take_every_publication(over_gloo):
    """Tensor parallel, with two ZeRO-3 ranks: one sends, the other takes part in gathering alone."""
    changes = {"rollout.tensor_parallel_size": 2, "rollout.num_engines": 1, "rollout.max_staleness": 1, "run.steps": 3}
    folder = await over_gloo(**changes | {"learner.num_ranks": 2, "learner.zero_stage": 3})
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sync/canary_gap"] < 1e-3 for row in rows)
