"""Memory of a training step at a vocabulary of 150,000: what a learner has to hold, and little more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from launch.builtin import TASKS, make_tokenizer, random_qwen2
from launch.memory import Sizes, learner_bytes, total
from learner import logprobs
from learner.learner import Learner
from learner.passes import plan_batch
from shared.types import Completion, Prompt, RolloutGroup
from tests.fakes import make_config

pytestmark = [pytest.mark.process, pytest.mark.slow]
VOCABULARY, TOKENS, PROMPT = 150_000, 8192, 16
SLACK = 1.15


def live_peak(call):
    """Most bytes of tensors that ``call`` had alive at once, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def groups(tokens):
    """Two groups of eight whose packed form, each prompt once, has ``tokens`` tokens."""
    rng = np.random.default_rng(0)
    length = (tokens // 2 - PROMPT) // 8

    def completion():
        return Completion(
            rng.integers(0, VOCABULARY, length).astype(np.int32), np.full(length, -12.0, np.float32), "", "stop"
        )

    return [
        RolloutGroup(
            i,
            Prompt(i, rng.integers(0, VOCABULARY, PROMPT).astype(np.int32), ""),
            tuple(completion() for _ in range(8)),
            rng.normal(size=8).astype(np.float32),
        )
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = random_qwen2(
        make_tokenizer(TASKS["addition"]),
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    model.save_pretrained(folder)
    changes = {"model.path": str(folder), "learner.max_tokens_per_microbatch": TOKENS, "learner.cpu_threads": 2}
    learner = Learner(make_config(**changes, **{"algorithm.kl": {"coef": 0.0}}))
    learner.train_step(groups(256))  # The optimizer's state comes with the first step.
    return learner


def bound(learner):
    """Parameters, gradients, optimizer, and the activations that the backward pass of one micro-batch needs."""
    (step,), _ = plan_batch(learner.config, groups(TOKENS), 0, 1, learner.device)
    (batch,) = step.batches
    assert len(batch.tokens.token_ids) == TOKENS
    parameters = list(learner.engine.module.parameters())
    own = {parameter.data_ptr() for parameter in parameters}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learner.engine.module(batch.tokens, hidden_only=True)
    activations = sum(size for place, size in saved.items() if place not in own)
    state = nbytes(v for values in learner.optimizer.state.values() for v in values.values() if torch.is_tensor(v))
    held = nbytes(parameters) + state
    return held, held + nbytes(parameters) + activations


def test_a_step_needs_what_it_must_hold_and_little_more(learner):
    held, limit = bound(learner)
    assert all(parameter.grad is None for parameter in learner.engine.module.parameters())
    used = held + live_peak(lambda: learner.train_step(groups(TOKENS)))
    print(f"{used / 1e6:.0f} MB of {limit / 1e6:.0f} MB")
    assert limit * 0.8 < used < limit * SLACK


def test_the_model_of_bytes_is_true_within_15_percent(learner):
    held, _ = bound(learner)
    used = held + live_peak(lambda: learner.train_step(groups(TOKENS)))
    told = total(learner_bytes(learner.config, Sizes.of(learner.config), on_gpu=False))
    print(f"{used / 1e6:.0f} MB, told {told / 1e6:.0f} MB")
    assert told == pytest.approx(used, rel=0.15)


def test_the_whole_matrix_of_logits_breaks_the_bound_with_an_eighth_of_the_tokens(learner, monkeypatch):
    held, limit = bound(learner)
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 1 << 40)
    assert held + live_peak(lambda: learner.train_step(groups(TOKENS // 8))) > 3 * limit
