"""The engine on real vLLM: weights arrive, are proved, and every log-prob belongs to the weights that its span names."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from tests.policies import Policy

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def stack(model_dir):
    """``(engine, policy, run)``: one engine for the module, on a loop of its own."""
    from rollout.engine import Engine
    from shared.config import Config

    config = Config.model_validate(
        {
            "model": {"path": str(model_dir)},
            "data": {"train": "unused"},
            "rollout": {"max_prompt_tokens": 16, "max_new_tokens": 40, "vllm": {"enforce_eager": True}},
            "reward": {"functions": [{"function": "exact_match"}]},
        }
    )
    loop = asyncio.new_event_loop()
    policy = Policy(model_dir)

    async def build():
        return Engine(config)

    engine = loop.run_until_complete(build())
    yield engine, policy, loop.run_until_complete
    loop.run_until_complete(engine.close())
    for segment in policy.segments:
        segment.unlink()
    loop.close()


def sampling(n=4, tokens=8, temperature=1.0):
    from rollout.engine import Sampling

    return Sampling(n, tokens, temperature)


PROMPT = np.array([5, 6, 15, 7, 8, 16], np.int32)


def test_a_fresh_engine_holds_no_policy_until_version_0_is_published(stack):
    engine, policy, run = stack
    publication = policy.publish()
    assert run(engine.prove(publication.canary, 0)) > 0.01
    taken = run(engine.receive(publication))
    assert run(engine.prove(publication.canary, 0)) < 1e-3
    assert run(engine.weight_version()) == "0"
    assert taken.seconds["paused"] > taken.seconds["transfer"] > 0
    assert taken.digests == {publication.digest}
    assert {"start", "pause", "receive"} <= {state for state, *_ in taken.times.intervals}


@pytest.fixture(params=["made ready", "reloaded"])
def way(request, monkeypatch):
    """How weights get in: packed beside the live ones, or by vLLM's own reload."""
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
    assert len(placed) == (3 if way == "made ready" else 0)


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
    with pytest.raises(ValueError, match=r"embed_tokens.weight: shape \(.*\), the engine's is"):
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
        running = [asyncio.create_task(engine.generate(PROMPT, sampling(8, 40), version)) for _ in range(64)]
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
