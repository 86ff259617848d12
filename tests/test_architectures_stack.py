"""The loop for many architectures: a real engine and a real learner, the proof at the start, two steps, proofs of each."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from shared.config import Config
from shared.types import Prompt, RolloutGroup
from tests.pace import scaled
from tests.tiny_models import ATTENTION_ALONE, write_tiny_model

pytestmark = pytest.mark.stack
CHEAP = ("Llama", "GPT2")
ENDS = [1, 3]
"""End tokens of every model here: the tokenizer's, and one that generation_config adds."""
CANARY = np.array([5, 6, 15, 7, 8, 16, 9, 9, 3, 4, 5, 11, 2, 7, 7, 6], np.int32)
PROMPTS = [np.array(ids, np.int32) for ids in ([5, 6, 15, 7, 8, 16], [9, 15, 5, 16], [8, 8], [7, 7, 15, 5, 5, 5, 16])]


def config_of(path, **model):
    return Config.model_validate(
        {
            "model": {"path": str(path), **model},
            "data": {"train": "unused"},
            "rollout": {
                "max_prompt_tokens": 16,
                "max_new_tokens": 32,
                "max_staleness": 0,
                "vllm": {"enforce_eager": True},
            },
            "reward": {"functions": [{"function": "exact_match"}]},
            "learner": {"lr": 1e-3, "prompts_per_step": len(PROMPTS)},
        }
    )


class EngineHost:
    """An engine and its event loop."""

    def __init__(self, config):
        from rollout.engine import Engine

        async def build():
            return Engine(config)

        self.events = asyncio.new_event_loop()
        self.engine = self.events.run_until_complete(build())

    def take(self, publication):
        """The engine's gap to the learner's log-probs of the canary, after it took ``publication``."""
        self.events.run_until_complete(self.engine.receive(publication))
        return self.events.run_until_complete(self.engine.prove(publication.canary, publication.version))

    def generate(self, ids, sampling, version):
        return self.events.run_until_complete(self.engine.generate(ids, sampling, version))

    def close(self):
        self.events.run_until_complete(self.engine.close())


class LearnerHost:
    """A learner, proved."""

    def __init__(self, config):
        from learner.learner import Learner

        self.learner = Learner(config)
        self.learner.open_sender(f"architectures-{os.getpid()}")

    def publish(self):
        return self.learner.publish(CANARY)

    def train(self, groups):
        return self.learner.train_and_publish(groups, CANARY)

    def close(self):
        self.learner._sender.close()


_HELD = {}


def _open(kind, config):
    _HELD["it"] = kind(config)


def _call(method, arguments):
    return getattr(_HELD["it"], method)(*arguments)


class Remote:
    """A process that holds one object after the other; as in a run, vLLM changes classes of transformers in its own."""

    def __init__(self, kind):
        self._kind, self._pool = kind, ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def open(self, config):
        """Begin to build the object; the next call waits for it."""
        self._opened = self._pool.submit(_open, self._kind, config)

    def __call__(self, method, *arguments):
        self._opened.result(timeout=scaled(200))
        return self._pool.submit(_call, method, arguments).result(timeout=scaled(200))

    def end(self):
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def hosts():
    learner, engine = Remote(LearnerHost), Remote(EngineHost)
    yield learner, engine
    learner.end()
    engine.end()


def sampled(engine, config, version):
    """Groups of ``PROMPTS`` with random rewards."""
    from rollout.engine import Sampling

    random, groups = np.random.default_rng(version), []
    for i, ids in enumerate(PROMPTS):
        completions = engine("generate", ids, Sampling.training(config, i), version)
        rewards = random.random(len(completions)).astype(np.float32)
        groups.append(RolloutGroup(i, Prompt(i, ids, ""), completions, rewards))
    return groups


def two_steps(hosts, config):
    """Gaps of versions 0, 1 and 2; the largest gap of a rollout token in each step; all completions."""
    learner, engine = hosts
    learner.open(config)
    engine.open(config)
    try:
        gaps, tokens, completions = [engine("take", learner("publish"))], [], []
        for version in range(2):
            groups = sampled(engine, config, version)
            completions += [completion for group in groups for completion in group.completions]
            report, publication = learner("train", groups)
            assert (report.applied, report.policy_version) == (True, version + 1)
            tokens.append(report.metrics["sync/logprob_gap_max"])
            gaps.append(engine("take", publication))
        return gaps, tokens, completions
    finally:
        engine("close")
        learner("close")


@pytest.mark.parametrize(
    "name", [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in ATTENTION_ALONE]
)
def test_two_steps_with_every_weight_proved(tmp_path, hosts, name):
    gaps, tokens, completions = two_steps(hosts, config_of(write_tiny_model(name, tmp_path / name, ENDS)))
    assert max(gaps) < 1e-3
    assert max(tokens) < 1e-3
    last = [int(completion.token_ids[-1]) for completion in completions if completion.finish_reason == "stop"]
    assert set(last) == set(ENDS)  # The end token, whichever, is part of the completion and trained on.
    for completion in completions:
        assert not set(completion.token_ids[:-1].tolist()) & set(ENDS)
        assert (completion.finish_reason == "length") == (int(completion.token_ids[-1]) not in ENDS)
