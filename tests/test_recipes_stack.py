"""Every recipe learns: the real controller, one shared vLLM engine, a real learner each, on the quickstart's task."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from shared.config_loader import load_config, recipes
from shared.types import RolloutGroup
from tests.fakes import FakePart, FakeRecorder

pytestmark = pytest.mark.stack
QUICKSTART = str(Path(__file__).parent.parent / "launch" / "configs" / "quickstart.toml")
STEPS = 16
TRUNCATED = {"rollout.top_p": "0.9", "rollout.top_k": "6", "rollout.min_p": "0.02", "rollout.temperature": "0.8"}


class LocalEngine(FakePart):
    """The engine in this process, as the controller sees a pool."""

    size = 1

    def __init__(self, engine):
        self.engine, self.version = engine, -1

    async def generate(self, _, prompt, sampling):
        return await self.engine.generate(prompt.token_ids, sampling, self.version)

    async def receive(self, publication):
        await self.engine.receive(publication)
        self.version = publication.version
        return {}

    def metrics(self):
        return {}

    async def prove(self, publication, _):
        return {"sync/canary_gap": await self.engine.prove(publication.canary, publication.version)}


class LocalLearner(FakePart):
    """A learner in this process, its calls made in a thread."""

    def __init__(self, config):
        from learner.learner import Learner

        self.learner = Learner(config)
        self.learner.open_sender(f"recipe-{config.algorithm.recipe}")

    async def train_step(self, groups, canary):
        return await asyncio.to_thread(self.learner.train_and_publish, groups, canary)

    async def publish(self, canary):
        return self.learner.publish(canary)

    async def save(self, directory):
        self.learner.save(directory)

    async def send(self, publication):
        return publication.digest


class LocalRewards(FakePart):
    """One reward worker in this process."""

    def __init__(self, config):
        from rollout.reward_worker import RewardWorker

        self.worker, self.state = RewardWorker(config.reward), {}

    async def score(self, group_id, prompt, completions):
        return self.worker.score([(group_id, prompt, completions)], self.state)[0]

    def metrics(self):
        return {}


class Rows(FakeRecorder):
    """Keeps what the controller records, and accepts no failure."""

    def summary(self, summary):
        assert all(process["residue"] < 0.005 for process in summary["processes"].values())

    def failed(self, failure, prompt):
        raise AssertionError(f"group {failure.group_id}: {failure.detail}")


def prepared(recipe, **changes):
    from launch.preflight import prepare

    overrides = {
        "algorithm.recipe": recipe,
        "run.steps": str(STEPS),
        "rollout.max_staleness": "0",
        "learner.prompts_per_step": "16",
        "learner.lr": "3e-4",
        "learner.schedule.warmup_steps": "2",
        "eval.max_rows": "256",
        "eval.every_steps": "0",
    }
    return prepare(load_config([QUICKSTART], overrides | changes), recipe, Path("."))


@pytest.fixture(scope="module")
def stack():
    from learner.distributed import join_group
    from rollout.engine import Engine

    loop, config = asyncio.new_event_loop(), prepared("grpo").config
    # Engine and learners share this process, and so its one process group: DeepSpeed has to make it.
    join_group(config, 0, 1, ("127.0.0.1", 0))

    async def build():
        return Engine(config)

    engine = loop.run_until_complete(build())
    yield LocalEngine(engine), loop.run_until_complete
    loop.run_until_complete(engine.close())
    loop.close()


def test_eight_points_ship():
    assert " ".join(recipes()) == "cispo dapo dr_grpo grpo grpo_deepseek gspo ppo_kl_reward rloo"


@pytest.mark.parametrize(
    "recipe", [name if name == "dapo" else pytest.param(name, marks=pytest.mark.slow) for name in recipes()]
)
def test_a_recipe_learns(stack, recipe):
    from launch.controller import Controller

    engines, run = stack
    ready = prepared(recipe)
    config = ready.config
    learner, rows = LocalLearner(config), Rows()
    stream = ready.train.stream(config)
    try:
        run(Controller(config, stream, ready.held_out, engines, LocalRewards(config), learner, rows).run())
    finally:
        learner.learner._sender.close()
    steps = [metrics for _, metrics, _ in rows.steps]
    assert steps[-1]["policy_version"] == STEPS
    assert all(np.isfinite([row["loss"], row["grad_norm"], row["entropy"]]).all() for row in steps)
    scores = [metrics["eval/reward"] for _, metrics in rows.evaluations]
    assert scores[-1] > scores[0] + 0.2


def test_the_learner_applies_the_engines_filter(stack):
    """Renormalised log-probs agree with the engine's; those of the whole distribution do not."""
    from rollout.engine import Sampling

    engines, run = stack
    gaps = []
    for handling in ("renormalise", "refuse"):
        ready = prepared("grpo", **TRUNCATED | {"rollout.truncated_sampling": "renormalise"})
        config = ready.config
        if handling == "refuse":
            whole = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
            config = config.model_copy(update={"rollout": config.rollout.model_copy(update=whole)})
        learner = LocalLearner(config)
        publication = run(learner.publish(np.array([1, 2, 3], np.int32)))
        run(engines.receive(publication))
        learner.learner._sender.close()

        sampling = Sampling.training(ready.config, 0)
        prompts = ready.train.prompts[:16]
        sampled = [run(engines.generate(i, prompt, sampling)) for i, prompt in enumerate(prompts)]
        rewards = np.arange(8, dtype=np.float32)
        groups = [RolloutGroup(i, p, c, rewards) for i, (p, c) in enumerate(zip(prompts, sampled, strict=True))]
        report, _ = run(learner.train_step(groups, np.array([1, 2, 3], np.int32)))
        gaps.append((report.metrics["sync/logprob_gap_max"], report.metrics.get("truncated_sampling/outside")))
    assert gaps[0][0] < 1e-3
    assert gaps[0][1] == 0
    assert gaps[1][0] > 0.02
