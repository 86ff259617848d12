"""The engine on real vLLM: weights arrive, are proved, and every log-prob belongs to the weights that its span names."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest

from shared.errors import WeightProofFailed
from tests.pace import scaled
from tests.policies import Policy

pytestmark = pytest.mark.stack


def engine_config(model_dir, **vllm):
    """The configuration of an engine with further arguments of vLLM."""
    from shared.config import Config

    return Config.model_validate(
        {
            "model": {"path": str(model_dir)},
            "data": {"train": "unused"},
            "rollout": {"max_prompt_tokens": 16, "max_new_tokens": 40, "vllm": {"enforce_eager": True} | vllm},
            "reward": {"functions": [{"function": "exact_match"}]},
        }
    )


@contextmanager
def running(model_dir, kind):
    """``(engine, policy, run)``: one engine on a loop of its own, over vLLM in this process or over ``AsyncLLM``."""
    from rollout import engine, vllm_setup

    config, loop, policy = engine_config(model_dir), asyncio.new_event_loop(), Policy(model_dir)

    async def build():
        with pytest.MonkeyPatch.context() as patch:
            if kind == "async":
                patch.setattr(
                    engine, "start_vllm", lambda *how: vllm_setup.start_async(vllm_setup.engine_arguments(*how))
                )
            return engine.Engine(config)

    made = loop.run_until_complete(build())
    assert (type(made._llm).__name__ == "AsyncLLM") == (kind == "async")
    yield made, policy, loop.run_until_complete
    loop.run_until_complete(made.close())
    for segment in policy.segments:
        segment.unlink()
    loop.close()


@pytest.fixture(scope="module", params=["in-process", pytest.param("async", marks=pytest.mark.slow)])
def stack(request):
    """``(engine, policy, run)``: one engine for the module, of the kind that serves on CPUs and of the kind on GPUs."""
    return request.getfixturevalue(f"{request.param.replace('-', '_')}_stack")


@pytest.fixture(scope="module")
def in_process_stack(model_dir):
    with running(model_dir, "in-process") as made:
        yield made


@pytest.fixture(scope="module")
def async_stack(model_dir):
    with running(model_dir, "async") as made:
        yield made


@pytest.fixture
def here(stack):
    """Leave out what is promised, or seen from this process, only where vLLM is in it."""
    if type(stack[0]._llm).__name__ == "AsyncLLM":
        pytest.skip("of vLLM in this process")


def test_an_engine_of_the_kind_on_gpus_takes_host_weights_in_mid_generation_and_proves_them(async_stack):
    engine, policy, run = async_stack
    first = policy.publish()
    assert first.version > 0 or run(engine.prove(first.canary, 0)) > 0.01
    assert run(engine.receive(first)).digests == {first.digest}
    assert run(engine.prove(first.canary, first.version)) < 1e-3
    policy.change(0.02)
    second = policy.publish()
    damaged = dataclasses.replace(second, digest="0" * 64)

    async def both():
        going = [asyncio.create_task(engine.generate(PROMPT, sampling(1, 40), first.version)) for _ in range(128)]
        await asyncio.wait(going, return_when=asyncio.FIRST_COMPLETED)  # Others are half way.
        with pytest.raises(WeightProofFailed, match="the learner sent 0000"):
            await engine.receive(damaged)
        await engine.receive(second)
        return [c for group in await asyncio.gather(*going) for c in group]

    completions = run(both())
    assert {s.version for c in completions for s in c.version_spans} == {first.version, second.version}
    assert run(engine.prove(second.canary, second.version)) < 1e-3
    assert run(engine.health())


def test_a_link_is_joined_by_the_workers_of_either_kind(stack, monkeypatch):
    from shared.weights import Link

    engine, _, run = stack
    asked = []

    async def rpc(method, *positional, **keywords):
        asked.append((method, positional, keywords))

    monkeypatch.setattr(engine._llm, "collective_rpc", rpc)
    run(engine.connect(Link("host", 7, 4), 3))
    ((method, positional, keywords),) = asked
    where = {"master_address": "host", "master_port": 7, "rank_offset": 3, "world_size": 5, "packed": True}
    assert method == "init_weight_transfer_engine"
    assert {"init_info": where} in [*positional, *keywords.values()]


def sampling(n=4, tokens=8, temperature=1.0):
    from rollout.engine import Sampling

    return Sampling(n, tokens, temperature)


PROMPT = np.array([5, 6, 15, 7, 8, 16], np.int32)
LONG = [np.random.default_rng(seed).integers(4, 20, 50).astype(np.int32) for seed in range(100)]
"""Prompts with more tokens together than a step of vLLM has."""


def seeded(engine, number, salt):
    """Four completions of a long prompt, by a seed of its own; nothing is in the cache under a new ``salt``."""
    return engine.generate(LONG[number], dataclasses.replace(sampling(4, 6), seed=1000 + number), salt)


def bits(completions):
    return [(c.token_ids.tobytes(), c.logprobs.tobytes()) for c in completions]


def test_a_fresh_engine_holds_no_policy_until_version_0_is_published(here, stack):
    engine, policy, run = stack
    publication = policy.publish()
    assert run(engine.prove(publication.canary, 0)) > 0.01
    taken = run(engine.receive(publication))
    assert run(engine.prove(publication.canary, 0)) < 1e-3
    assert run(engine.weight_version()) == "0"
    assert taken.seconds["paused"] > taken.seconds["transfer"] > 0
    assert taken.digests == {publication.digest}
    assert {"start", "pause", "receive"} <= {state for state, *_ in taken.times.intervals}


def test_seeded_completions_are_the_same_bits_however_many_prompts_come_at_once(here, stack):
    engine, policy, run = stack
    run(engine.receive(policy.publish()))

    async def all_at_once():
        return await asyncio.gather(*(seeded(engine, number, 100) for number in range(len(LONG))))

    assert sum(map(len, LONG)) > 4096
    together = run(all_at_once())
    for number in range(0, len(LONG), 9):
        assert bits(together[number]) == bits(run(seeded(engine, number, 101)))


CUTS = {"enable_chunked_prefill": True, "long_prefill_token_threshold": 16, "max_num_scheduled_tokens": 24}


def test_no_table_of_vllm_s_own_cuts_a_prompt_of_a_seeded_request(model_dir):
    from rollout.engine import Engine
    from rollout.vllm_setup import engine_arguments

    config = engine_config(model_dir, **CUTS, max_num_batched_tokens=24, max_num_seqs=8)
    assert engine_arguments(config, 1, "dummy")["max_num_batched_tokens"] == config.max_model_len + 8

    async def go():
        engine = Engine(config, 1, "safetensors")
        try:
            together = await asyncio.gather(*(seeded(engine, number, 0) for number in range(6)))
            assert [bits(one) for one in together] == [bits(await seeded(engine, number, 1)) for number in range(6)]
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(go(), scaled(120)))


@pytest.mark.parametrize(("longest", "running", "tokens"), [(13, 256, None), (4000, 256, 4256), (5000, 1, 5000)])
def test_a_step_has_room_for_the_longest_prompt_beside_all_that_runs(longest, running, tokens):
    from rollout.vllm_setup import _room_for_whole_prompts

    room = _room_for_whole_prompts({"max_model_len": longest, "max_num_seqs": running})
    assert room.get("max_num_batched_tokens") == tokens


@pytest.fixture(params=["made ready", "reloaded"])
def way(request, stack, monkeypatch):
    """How weights get in: packed beside the live ones, or by vLLM's own reload."""
    if type(stack[0]._llm).__name__ == "AsyncLLM":
        return "out of sight"
    if request.param == "reloaded":
        monkeypatch.setattr("rollout.weight_receiver.plan", lambda model, names: None)
    return request.param


def test_a_tied_head_follows_its_embedding(stack, way):
    """The packed head of a tied model keeps its old values unless it is treated apart."""
    engine, policy, run = stack
    with policy.torch.no_grad():
        policy.model.get_input_embeddings().weight *= 1.5
    publication = policy.publish()
    run(engine.receive(publication))
    assert run(engine.prove(publication.canary, publication.version)) < 1e-3


def test_every_publication_is_taken_whole(stack, way, monkeypatch):
    from rollout import weight_receiver

    engine, policy, run = stack
    placed, put_in_place = [], weight_receiver.put_in_place
    monkeypatch.setattr(weight_receiver, "put_in_place", lambda ready: placed.append(put_in_place(ready)))
    for _ in range(3):
        policy.change(0.05)
        publication = policy.publish()
        run(engine.receive(publication))
        policy.segments[-1].bytes[:] = 255  # The learner will write the next one there.
        assert run(engine.prove(publication.canary, publication.version)) < 1e-3
        assert run(engine.weight_version()) == str(publication.version)
    assert way == "out of sight" or len(placed) == (3 if way == "made ready" else 0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rollout_logprobs_are_those_of_the_sampling_distribution(stack, temperature):
    engine, policy, run = stack
    completions = run(engine.generate(PROMPT, sampling(8, 8, temperature), policy.version))
    assert len(completions) == 8
    assert len({c.token_ids.tobytes() for c in completions}) > 1
    for completion in completions:
        whole = [*PROMPT.tolist(), *completion.token_ids.tolist()]
        expected = policy.logprobs(whole, temperature)[len(PROMPT) - 1 :]
        assert np.abs(expected - completion.logprobs).max() < 1e-3
        assert completion.finish_reason in ("stop", "length")
        assert (completion.token_ids[-1] == 1) == (completion.finish_reason == "stop")
        assert completion.version_spans == ((policy.version, 0, len(completion.token_ids)),)
        assert "<|end|>" not in completion.text


@pytest.fixture
def flat(stack):
    """The engine under weights that sample every token about equally often."""
    engine, policy, run = stack
    weights = {name: value.clone() for name, value in policy.model.state_dict().items()}
    with policy.torch.no_grad():
        policy.model.get_input_embeddings().weight *= 0.05
    run(engine.receive(policy.publish()))
    yield lambda **how: run(engine.generate(PROMPT, dataclasses.replace(sampling(256, 34), **how), policy.version))
    policy.model.load_state_dict(weights)
    run(engine.receive(policy.publish()))


@pytest.mark.parametrize(
    ("stop", "tokens", "texts"),
    [
        ((), {1}, ()),
        (("<|user|>",), {1, 3}, ()),  # No text: found as a token.
        (("<|user|>", "<|system|>", "7"), {1, 2, 3}, ("7",)),
        (("<|user|>7", "=="), {1}, ("<|user|>7", "==")),  # Text that a special token is part of.
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_stop_string_ends_a_completion_whatever_tokens_it_is(stack, flat, stop, tokens, texts, temperature):
    decode, met = stack[0]._tokenizer.decode, set()
    for completion in flat(stop=stop, temperature=temperature):
        ids = completion.token_ids.tolist()
        assert len(completion.logprobs) == len(ids)
        ends = [
            ({token} & tokens or {text for text in texts if text in decode(ids[: i + 1])})
            for i, token in enumerate(ids)
        ]
        assert not any(ends[:-1])  # No token follows an end token.
        assert completion.finish_reason == ("stop" if ends[-1] else "length")
        met |= ends[-1]
    assert met == tokens | set(texts)


def test_the_full_blocks_of_a_prompt_are_shared(stack):
    from vllm import SamplingParams

    engine, _, run = stack
    prompt = np.tile(PROMPT, 7)  # 42 tokens, 32 of them in a full block.
    cached = [run(engine._run(prompt, SamplingParams(max_tokens=1), "shared")).num_cached_tokens for _ in range(2)]
    assert cached == [0, 32]


def test_greedy_is_the_argmax(stack):
    engine, policy, run = stack
    (completion,) = run(engine.generate(PROMPT, sampling(1, 4, 0.0), policy.version))
    ids = PROMPT.tolist()
    for token in completion.token_ids.tolist():
        with policy.torch.no_grad():
            logits = policy.model(input_ids=policy.torch.tensor([ids])).logits[0, -1]
        assert int(logits.argmax()) == token
        ids.append(token)


def test_a_damaged_publication_is_refused_before_the_engine_is_touched(stack):
    engine, policy, run = stack
    policy.change(0.05)
    publication = policy.publish()
    before = run(engine.weight_version())
    with pytest.raises(Exception, match="the learner sent 0000"):
        run(engine.receive(dataclasses.replace(publication, digest="0" * 64)))
    assert not run(engine._llm.is_paused())
    assert run(engine.weight_version()) == before


def test_a_publication_of_another_shape_is_refused_before_the_engine_is_touched(stack):
    engine, policy, run = stack
    publication = policy.publish()
    first = publication.tensors[0]
    flat = dataclasses.replace(first, shape=(first.shape[0] // 2, first.shape[1] * 2))
    with pytest.raises(Exception, match=r"embed_tokens.weight: shape \(.*\), the engine's is"):
        run(engine.receive(dataclasses.replace(publication, tensors=(flat, *publication.tensors[1:]))))
    assert not run(engine._llm.is_paused())
    run(engine.receive(publication))


def test_generation_stands_still_only_while_ready_weights_are_put_in_place(stack):
    engine, policy, run = stack
    publications = [policy.publish() for _ in range(4)]
    taken = [run(engine.receive(p)).seconds for p in publications]
    assert min(t["paused"] for t in taken) < min(t["prepare"] for t in taken)


def test_a_round_that_fails_half_way_stays_paused_and_a_repeated_one_recovers(stack):
    engine, policy, run = stack
    policy.change(0.05)
    publication = policy.publish()
    strange = dataclasses.replace(publication.tensors[-1], name="model.layers.99.strange")
    half = dataclasses.replace(publication, tensors=(*publication.tensors[:-1], strange))
    with pytest.raises(Exception, match="99"):
        run(engine.receive(half))
    assert run(engine._llm.is_paused())
    run(engine.receive(publication))
    assert not run(engine._llm.is_paused())
    assert run(engine.prove(publication.canary, publication.version)) < 1e-3


def test_generation_goes_on_across_a_publication_and_every_token_names_its_weights(stack):
    engine, policy, run = stack
    before = policy.version
    policy.change(0.02)
    publication = policy.publish()

    async def both():
        running = [asyncio.create_task(engine.generate(PROMPT, sampling(8, 40), before)) for _ in range(64)]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)  # Others are half way.
        await engine.receive(publication)
        return [c for group in await asyncio.gather(*running) for c in group]

    completions = run(both())
    for completion in completions:
        spans = completion.version_spans
        assert [s.start for s in spans] == [0, *(s.end for s in spans[:-1])]
        assert spans[-1].end == len(completion.token_ids)
        assert [s.version for s in spans] == sorted({s.version for s in spans})
    assert {s.version for c in completions for s in c.version_spans} == {before, publication.version}
    assert any(len(c.version_spans) == 2 for c in completions)
    assert run(engine.prove(publication.canary, publication.version)) < 1e-3


@pytest.mark.parametrize(
    ("limit", "dropped"), [(0.0, [True, True]), (0.01, [False, True]), (float("inf"), [False, False])]
)
def test_a_stale_kv_cache_is_measured_and_dropped_when_it_matters(stack, limit, dropped):
    from rollout.stale_kv import StaleKV

    engine, policy, run = stack
    run(engine.receive(policy.publish()))
    before, engine._stale_kv = policy.version, StaleKV(limit)
    weights = {name: value.clone() for name, value in policy.model.state_dict().items()}
    publications = []
    for _ in range(2):
        policy.change(0.1)
        publications.append(policy.publish())

    async def across(publication, version):
        """Completions that began before ``publication`` and ended after it; the gap measured on one of them."""
        # A core in another process samples on while this one finds out that the first has ended.
        groups = 64 if type(engine._llm).__name__ == "InProcessLLM" else 192
        running = [asyncio.create_task(engine.generate(PROMPT, sampling(8, 40), version)) for _ in range(groups)]
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)  # Others are half way.
        taken = await engine.receive(publication)
        completions = [c for group in await asyncio.gather(*running) for c in group]
        assert any(len(c.version_spans) == 2 for c in completions)
        return taken

    taken = [run(across(publications[0], before)), run(across(publications[1], before + 1))]
    last = run(engine.receive(policy.publish()))
    assert [t.recomputed for t in taken] == dropped
    assert taken[0].stale_kv_gap == 0.0  # Nothing had crossed a publication yet.
    for gap, fresh in zip([taken[1].stale_kv_gap, last.stale_kv_gap], dropped, strict=True):
        assert gap < 1e-4 if fresh else gap > 0.01
    policy.model.load_state_dict(weights)  # Small again for the tests to come.
    run(engine.receive(policy.publish()))
