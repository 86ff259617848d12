"""Packed log-probs and entropy against the plain model on one sequence at a time: values, gradients, no leaks."""

import copy

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from learner import logprobs as under_test
from learner.attention import ATTENTION_NAME, register_attention
from learner.batching import Row, collate
from learner.logprobs import PolicyModel, Sampled
from shared.types import Completion, Prompt

VOCABULARY = 61
CPU = torch.device("cpu")
torch.set_num_threads(1)  # for matrices this small a second thread costs a hundred times what it saves
# Completions of each prompt, as (prompt tokens, completion tokens of each row); some of length 1, one prompt of 1.
GROUPS = [(5, [3, 7, 1]), (1, [4]), (9, [2, 6])]


def qwen2(*, tied: bool = False) -> Qwen2ForCausalLM:
    """A random Qwen2 with grouped heads whose outputs depend strongly on every token."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model


def packed(model: Qwen2ForCausalLM, temperature: float = 1.0) -> PolicyModel:
    register_attention()
    model = copy.deepcopy(model)
    model.config._attn_implementation = ATTENTION_NAME
    return PolicyModel(model, Sampled(temperature))


def rows_of(groups=GROUPS, seed: int = 0) -> list[Row]:
    random = np.random.default_rng(seed)

    def tokens(count):
        return random.integers(0, VOCABULARY, count).astype(np.int32)

    rows = []
    for index, (prompt_length, lengths) in enumerate(groups):
        prompt = Prompt(index, tokens(prompt_length), "")
        rows += [row_of(prompt, tokens(n), index) for n in lengths]
    return rows


def row_of(prompt: Prompt, token_ids: np.ndarray, group: int) -> Row:
    completion = Completion(token_ids, np.zeros(len(token_ids), np.float32), "", "stop")
    return Row(prompt, completion, 0, group, len(token_ids))


def one_by_one(model: Qwen2ForCausalLM, row: Row, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropy ``[C]`` of the plain model on this sequence alone."""
    prompt, answer = row.prompt.token_ids, row.completion.token_ids
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].float() / temperature
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(1, ids[len(prompt) :, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def run(policy: PolicyModel, rows: list[Row]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probs and entropy ``[C]`` of each row, padding cut off."""
    outputs = policy(collate(rows, CPU).tokens)[:2]
    return [tuple(x[i, : len(row.completion.token_ids)] for x in outputs) for i, row in enumerate(rows)]


def gradients(model: torch.nn.Module, results, coefficients=(1.0, 0.3)) -> dict[str, torch.Tensor]:
    """Gradients of a sum of log-probs and entropies, each token with a factor of its own."""
    model.zero_grad()
    total = sum(
        c * (x * torch.linspace(-1, 2, len(x)) * (i + 1)).sum()
        for i, result in enumerate(results)
        for c, x in zip(coefficients, result, strict=True)
    )
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_same_gradients(found, expected, relative=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < relative, f"{name}: {error:g}"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_equals_one_by_one(temperature):
    model, rows = qwen2(), rows_of()
    for row, found in zip(rows, run(packed(model, temperature), rows), strict=True):
        for x, expected in zip(found, one_by_one(model, row, temperature), strict=True):
            assert x.dtype == torch.float32
            close(x, expected)


def test_cells_outside_the_completions_hold_zero():
    rows = rows_of()
    outside = torch.arange(7) >= torch.tensor([[len(row.completion.token_ids)] for row in rows])
    logprobs, entropy, kl = packed(qwen2())(collate(rows, CPU).tokens)
    for x in (logprobs, entropy):
        assert x.shape == (6, 7)
        assert torch.equal(x == 0, outside)
    assert torch.equal(kl, torch.zeros(6, 7))  # There is no reference.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_equal_autograd_on_unshared_sequences(temperature, tied):
    model, rows = qwen2(tied=tied), rows_of()
    policy = packed(model, temperature)
    expected = gradients(model, [one_by_one(model, row, temperature) for row in rows])
    assert_same_gradients(gradients(policy.model, run(policy, rows)), expected)


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.0, 1.0)], ids=["logprobs", "entropy"])
def test_each_output_has_its_own_gradient(coefficients):
    model, rows = qwen2(), rows_of()
    policy = packed(model, 0.6)
    expected = gradients(model, [one_by_one(model, row, 0.6) for row in rows], coefficients)
    assert_same_gradients(gradients(policy.model, run(policy, rows), coefficients), expected)


def test_a_shared_prompt_is_packed_once_and_changes_nothing():
    rows = rows_of()
    alone = [Row(r.prompt, r.completion, r.index, i, r.trainable) for i, r in enumerate(rows)]
    assert len(collate(rows, CPU).tokens.token_ids) == (5 + 1 + 9) + 23
    assert len(collate(alone, CPU).tokens.token_ids) == (3 * 5 + 1 + 2 * 9) + 23
    policy = packed(qwen2())
    for shared, unshared in zip(run(policy, rows), run(policy, alone), strict=True):
        close(shared, unshared)
    shared, unshared = (gradients(policy.model, run(policy, x)) for x in (rows, alone))
    assert_same_gradients(shared, unshared)


@pytest.mark.parametrize("chunk_rows", [1, 4])
def test_chunks_change_nothing(monkeypatch, chunk_rows):
    policy, rows = packed(qwen2(), 0.6), rows_of()
    whole = run(policy, rows)
    whole_gradients = gradients(policy.model, whole)
    monkeypatch.setitem(under_test.CHUNK_BYTES, "cpu", 4 * VOCABULARY * chunk_rows)
    assert len(under_test._chunks(23, VOCABULARY, CPU)) == -(-23 // chunk_rows)
    parts = run(policy, rows)
    for found, expected in zip(parts, whole, strict=True):
        close(found, expected, atol=2e-6)
    assert_same_gradients(gradients(policy.model, parts), whole_gradients)


@pytest.mark.parametrize("changed", range(6))
def test_a_neighbour_never_leaks(changed):
    policy, rows = packed(qwen2()), rows_of()
    before = run(policy, rows)
    row = rows[changed]
    other = row_of(row.prompt, (row.completion.token_ids + 7) % VOCABULARY, row.group)
    after = run(policy, [*rows[:changed], other, *rows[changed + 1 :]])
    for i, (x, y) in enumerate(zip(after, before, strict=True)):
        if i == changed:
            assert (x[0] - y[0]).abs().max() > 1e-2
        else:
            close(x, y, atol=1e-6)


def test_another_prompt_never_leaks():
    policy, rows = packed(qwen2()), rows_of()
    before = run(policy, rows)
    prompt = Prompt(9, (rows[0].prompt.token_ids + 7) % VOCABULARY, "")
    after = run(policy, [row_of(prompt, row.completion.token_ids, 0) for row in rows[:3]] + rows[3:])
    for x, y in zip(after[3:], before[3:], strict=True):
        close(x, y, atol=1e-6)
    for x, y in zip(after[:3], before[:3], strict=True):
        assert (x[0] - y[0]).abs().max() > 1e-2


def test_later_tokens_do_not_reach_earlier_ones():
    policy, rows = packed(qwen2()), rows_of()
    before = run(policy, rows)[1]
    tokens = rows[1].completion.token_ids.copy()
    tokens[4:] = (tokens[4:] + 7) % VOCABULARY
    after = run(policy, [rows[0], row_of(rows[1].prompt, tokens, 0), *rows[2:]])[1]
    close(after[0][:4], before[0][:4], atol=1e-6)
    close(after[1][:5], before[1][:5], atol=1e-6)
    assert (after[0][4:] - before[0][4:]).abs().max() > 1e-2


def test_order_of_rows_only_orders_the_results():
    policy, rows = packed(qwen2()), rows_of()
    order = [4, 1, 5, 0, 3, 2]
    before, after = run(policy, rows), run(policy, [rows[i] for i in order])
    for i, found in zip(order, after, strict=True):
        close(found, before[i])


def test_an_empty_completion_is_legal():
    policy, rows = packed(qwen2()), rows_of()
    empty = row_of(rows[0].prompt, np.zeros(0, np.int32), 0)
    found = run(policy, [empty, *rows])
    assert len(found[0][0]) == 0
    for x, y in zip(found[1:], run(policy, rows), strict=True):
        close(x, y, atol=1e-6)


def test_bfloat16_weights_give_float32_logprobs_and_bfloat16_gradients():
    model, rows = qwen2(), rows_of()
    policy = packed(model).to(torch.bfloat16)
    results = run(policy, rows)
    assert any((x.bfloat16().float() != x).any() for x, _ in results)
    for found, exact in zip(results, run(packed(model), rows), strict=True):
        close(found[0], exact[0], atol=0.2)
    for gradient in gradients(policy.model, results).values():
        assert gradient.dtype == torch.bfloat16
        assert gradient.isfinite().all()


@pytest.mark.parametrize("window", [2, 5, 14, 15, 16])
def test_a_sliding_window_is_kept(window):
    """Sequences of up to 15 tokens, each on its own side of the window."""
    config = {name: getattr(qwen2().config, name) for name in ("vocab_size", "hidden_size", "head_dim")}
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            **config,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
            sliding_window=window,
            attn_implementation="eager",
        )
    )
    policy, rows = packed(model), rows_of()
    found, expected = run(policy, rows), [one_by_one(model, row, 1.0) for row in rows]
    for ours, theirs in zip(found, expected, strict=True):
        close(ours[0], theirs[0])
    assert_same_gradients(gradients(policy.model, found), gradients(model, expected))


def test_without_entropies_the_rest_is_the_same():
    policy, tokens = packed(qwen2()), collate(rows_of(), CPU).tokens
    parameters = list(policy.parameters())
    with_them, without = (policy(tokens, with_entropy=wanted) for wanted in (True, False))
    assert torch.equal(with_them[0], without[0])
    assert with_them[1].any()
    assert not without[1].any()
    for one, other in zip(*(torch.autograd.grad(x[0].sum(), parameters) for x in (with_them, without)), strict=True):
        assert torch.equal(one, other)


def test_without_entropies_a_kl_stays():
    policy, tokens = packed(qwen2()), collate(rows_of(), CPU).tokens
    reference = packed(qwen2(), 0.6)
    against = (policy(tokens, hidden_only=True)[0].detach() + 0.1, reference.head)
    with_them, without = (policy(tokens, against, with_entropy=wanted) for wanted in (True, False))
    assert without[2].any()
    assert torch.equal(with_them[2], without[2])


@pytest.mark.parametrize(("device", "limit"), [("cpu", 16 << 20), ("cuda", 512 << 20)])
def test_a_chunk_of_logits_stays_within_its_limit(device, limit):
    parts = under_test._chunks(100_000, 150_000, torch.device(device))
    assert limit / 2 < 4 * 150_000 * (parts[0].stop - parts[0].start) <= limit
    assert (parts[0].start, parts[-1].start < 100_000 <= parts[-1].stop) == (0, True)
    assert under_test._chunks(2, limit, torch.device(device)) == [slice(0, 1), slice(1, 2)]  # A row at least.
