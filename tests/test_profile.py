"""The profile: the fit of its seconds, rewards, and all of it on parts whose timings are known."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import launch.profile
from launch import virtual_time
from launch.parts import Parts
from launch.plan_model import predict
from launch.profile import Measurement, _fit
from launch.profile_loop import WARMING, _Watch, undisturbed
from launch.simulated import SimulatedPlaces
from launch.timings import Lengths, Timings
from learner.learner_group import LearnerGroup
from rollout.engine_pool import EnginePool
from rollout.prompts import PromptStream
from rollout.reward_pool import RewardPool
from rollout.scores import Scores
from shared.ledger import TimeSlice
from tests.fakes import make_completion, make_config, make_prompt


def test_a_fit_finds_what_made_the_seconds():
    rng = np.random.default_rng(0)
    rows = rng.uniform(1, 100, (40, 3))
    for seconds, expected in (
        (rows @ [0.5, 0.02, 0.003], pytest.approx([0.5, 0.02, 0.003])),
        (rows[:, 1] * 0.1 + rng.normal(0, 1e-4, 40), pytest.approx([0, 0.1, 0], abs=1e-3)),
    ):
        assert _fit(list(zip(rows.tolist(), seconds))) == expected
    assert (_fit(list(zip(rows.tolist(), np.maximum(rows @ [1.0, -0.02, 0.0], 0.1)))) >= 0).all()


async def test_a_profile_measures_what_a_reward_takes():
    class Answers:
        """Engines that answer at once, and a reward that takes its time."""

        def __init__(self):
            self.engines = self.rewards = self

        async def generate(self, number, *_):
            await asyncio.sleep(0.001)
            return (make_completion(tokens=3 + number % 5), make_completion(tokens=4))

        async def score(self, *_):
            await asyncio.sleep(0.03)
            self.slices.append(TimeSlice("reward-0", 0.0, 1.0, (("wait_for_groups", 0.0, 0.99), ("score", 0.99, 1.0))))
            return Scores({"exact_match": np.zeros(2, np.float32)})

    parts, prompts = Answers(), PromptStream([make_prompt(i) for i in range(4)], 0)
    parts.slices = []
    profile = Measurement(make_config(), prompts, parts)
    await profile._rollouts()
    timings = profile._rewards(profile._engine(Timings()))
    assert timings.score_s == pytest.approx(0.01)
    assert timings.score_call_s == pytest.approx(0.02, abs=0.02)
    assert Lengths(timings).mean == pytest.approx(4.5, abs=0.5)


KNOWN = Timings(
    decode_step_s=0.01,
    decode_sequence_s=0.001,
    prefill_token_s=0.0,
    request_s=0.02,
    train_step_s=1.0,
    train_token_s=0.001,
    publish_s=0.1,
    prepare_s=0.05,
    pause_s=0.02,
    prove_s=0.01,
    score_call_s=0.02,
    score_s=0.03,
    lengths=(20, 30, 40, 50, 60),
    prompt_tokens=3.0,
)


def profiled(monkeypatch, known, measure, **changes):
    """What ``measure`` finds of simulated parts that take what ``known`` says, in virtual time."""
    monkeypatch.setattr(launch.profile, "nodes", lambda: [])
    settings = {"learner.prompts_per_step": 8, "rollout.group_size": 4, "rollout.max_staleness": 2, "reward.workers": 8}
    config = undisturbed(make_config(**settings | changes))

    async def run():
        places = SimulatedPlaces(known, config)
        rewards = RewardPool(config, places.rewards, {})
        engines, learners = EnginePool(config, places, {}), LearnerGroup(config, "simulated", places.ranks, {})
        await asyncio.gather(engines.start(), learners.start(), rewards.start())
        prompts = PromptStream([make_prompt(i) for i in range(50)], 0)
        try:
            return await measure(Measurement(config, prompts, Parts(engines, rewards, learners, False)))
        finally:
            await engines.close()
            rewards.close()

    return config, virtual_time.run(run())


def test_a_profile_finds_timings_that_are_known(monkeypatch):
    config, found = profiled(monkeypatch, KNOWN, lambda profile: profile.everything(Timings()))
    for name in ("publish_s", "prepare_s", "pause_s", "prove_s", "score_call_s", "score_s"):
        assert getattr(found, name) == pytest.approx(getattr(KNOWN, name), rel=0.02), name
    for name in ("train_step_s", "train_token_s", "request_s", "decode_step_s", "decode_sequence_s", "prompt_tokens"):
        assert getattr(found, name) == pytest.approx(getattr(KNOWN, name), rel=0.15), name
    assert Lengths(found).mean == pytest.approx(40, rel=0.05)
    assert found.together == pytest.approx(1, abs=0.05)
    for split in ((1, 1), (2, 1), (2, 2)):
        assert predict(config, found, *split).step_s == pytest.approx(predict(config, KNOWN, *split).step_s, rel=0.05)


def test_what_the_loop_takes_longer_is_found(monkeypatch):
    """Parts that are 1.5 times as slow as their timings say, as they would be where something else takes their cores."""
    slow = {name: 1.5 * seconds for name, seconds in vars(KNOWN).items() if name.endswith("_s")}
    _, found = profiled(monkeypatch, replace(KNOWN, **slow), lambda profile: profile._calibrated(KNOWN))
    assert found.together == pytest.approx(1.5, rel=0.03)


def test_what_is_lost_between_ranks_is_found(monkeypatch):
    known, config = replace(KNOWN, ranks_s=0.3), {"learner.num_ranks": 2}
    _, found = profiled(monkeypatch, known, lambda profile: profile.of_ranks(KNOWN), **config)
    assert found.ranks_s == pytest.approx(0.3, rel=0.1)
    assert (found.together, found.ranks_together) == (1, pytest.approx(1, abs=0.05))


@pytest.mark.slow
def test_the_first_loop_alone_says_what_the_driver_takes(monkeypatch):
    one = SimpleNamespace(count=lambda resource: 0)
    for known, kept in ((replace(KNOWN, control_s=0.123), 0.123), (KNOWN, None)):

        async def measure(profile, known=known):
            monkeypatch.setattr(launch.profile, "nodes", lambda: [one])
            return await profile._calibrated(known)

        _, found = profiled(monkeypatch, known, measure, **{"learner.num_ranks": 2})
        assert found.cores > 0
        assert found.control_s == kept or (kept is None and 0 < found.control_s < 1)


def test_a_profiled_run_does_nothing_but_steps():
    changes = {"rollout.max_engines": 4, "run.sinks": ["tensorboard"], "eval.every_steps": 3, "learner.lr": 1e-3}
    found = undisturbed(make_config(**changes | {"run.trace": True, "algorithm.zero_variance": "resample"}))
    assert (found.rollout.max_engines, found.run.sinks, found.eval.every_steps, found.run.trace) == (0, [], 0, False)
    assert (found.run.checkpoint_every, found.run.samples_every, found.algorithm.zero_variance) == (0, 0, "keep")
    assert found.learner.lr < 1e-9


async def test_the_first_steps_and_the_worst_are_not_counted():
    watch = _Watch(20)
    for seconds in [9.0] * WARMING + [1.0] * 19 + [50.0]:
        assert not watch.enough.done()
        watch.step(1, {"time/step": seconds}, 0.0)
    assert watch.enough.done()
    assert watch.seconds()[0] == 1.0


def test_a_loop_that_fails_fails_the_profile(monkeypatch):
    async def measure(profile):
        profile._parts.learners.train_step = None
        await profile._calibrated(KNOWN)

    with pytest.raises(TypeError):
        profiled(monkeypatch, KNOWN, measure)
