"""The layout of packed rows, and causal attention in bfloat16 on CPUs against float64: values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner import attention
from learner.attention import Layout


def test_layout_repeats_a_shared_prompt():
    layout = Layout.of([[range(2), range(4, 5)], [range(2), range(2, 4)], [range(5, 6), range(6, 7)]])
    assert layout.blocks == ((2, 4), (1, 2))
    assert layout.gather.tolist() == [0, 1, 2, 3, 0, 1, 4, 7, 5, 6]
    assert layout.scatter.tolist() == [0, 1, 2, 3, 6, 8, 9]


def test_rows_of_similar_length_share_a_block():
    lengths = [100, 20, 76, 19, 75, 74, 1]
    ends = np.cumsum(lengths)
    layout = Layout.of([[range(end - n, end)] for n, end in zip(lengths, ends, strict=True)])
    assert layout.blocks == ((3, 100), (1, 74), (2, 20), (1, 1))
    assert layout.longest == 100
    found = layout.gather[layout.scatter]
    assert torch.equal(found, torch.arange(ends[-1]))


def block(length, heads=4, kv_heads=2, spread=1.0):
    torch.manual_seed(length)
    shapes = [(3, heads, length, 16), (3, kv_heads, length, 16), (3, kv_heads, length, 16)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    return [x.bfloat16().requires_grad_() for x in (spread * q, k, v)]


def exact(query, key, value, scale):
    """Attention written out in float64."""
    q, k, v = (x.double() for x in (query, key, value))
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    seen = torch.ones(q.shape[2], q.shape[2]).tril().bool()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(("length", "kv_heads"), [(1, 2), (7, 1), (33, 2), (33, 4)])
@pytest.mark.parametrize("spread", [1.0, 6.0])  # The second has scores of 20 and more.
@pytest.mark.parametrize("short", [0, 512])
def test_bfloat16_attention_is_exact_up_to_its_rounding(monkeypatch, length, kv_heads, spread, short):
    monkeypatch.setattr(attention, "SHORT", short)
    inputs = block(length, kv_heads=kv_heads, spread=spread)
    weights = torch.randn(3, 4, length, 16).bfloat16()
    found = attention._causal(*inputs, None, 0.0)
    assert found.dtype == torch.bfloat16
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    wanted = exact(*inputs, 0.25)
    assert (found - wanted).abs().max() < 0.03  # Of values up to 4: eight bits of mantissa.
    for ours, theirs in zip(gradients, torch.autograd.grad((wanted * weights).sum(), inputs), strict=True):
        assert (ours.double() - theirs.double()).norm() <= 0.02 * theirs.double().norm() + 1e-6


def test_scores_are_in_float32():
    """Scores of 60 that differ by 0.1, which bfloat16 cannot tell apart."""
    query = torch.zeros(1, 1, 2, 16).bfloat16()
    query[..., 0], query[..., 1] = 240.0, 0.4
    key = torch.zeros(1, 1, 2, 16).bfloat16()
    key[..., 0], key[0, 0, 1, 1] = 1.0, 1.0
    value = torch.zeros(1, 1, 2, 16).bfloat16()
    value[0, 0, 1] = 1.0
    assert attention._causal(query, key, value, None, 0.0)[0, 0, 1, 0].item() == pytest.approx(0.525, abs=0.003)


def test_the_scale_and_the_kernel_are_chosen(monkeypatch):
    inputs = block(9)
    flat = attention._causal(*inputs, 1e-6, 0.0)
    seen = torch.ones(9, 9).tril()
    mean = (seen / seen.sum(1, keepdim=True)) @ inputs[2].float().repeat_interleave(2, dim=1)
    assert (flat - mean).abs().max() < 0.02
    calls = []
    monkeypatch.setattr(attention._ShortAttention, "apply", lambda *a: calls.append(a) or a[0])
    attention._causal(*inputs, None, 0.0)
    assert len(calls) == 1
    attention._causal(*inputs, None, 0.5)  # Dropout.
    attention._causal(*(x.float() for x in inputs), None, 0.0)
    attention._causal(*block(attention.SHORT + 1), None, 0.0)
    monkeypatch.setattr(attention, "SCORES", 3 * 4 * 9 * 9 - 1)
    attention._causal(*inputs, None, 0.0)
    assert len(calls) == 1
    monkeypatch.setattr(attention, "SCORES", 3 * 4 * 9 * 9)
    attention._causal(*inputs, None, 0.0)
    assert len(calls) == 2


def test_torchs_kernel_gets_the_scale_the_dropout_and_float32(monkeypatch):
    inputs, calls = block(9), []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "SHORT", 0)
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *tensors, **options: calls.append((tensors[0].dtype, options)) or kernel(*tensors, **options),
    )
    assert (attention._causal(*inputs, 1e-6, 0.0) - attention._causal(*inputs, None, 0.0)).abs().max() > 0.1
    attention._causal(*(x.double() for x in inputs), None, 0.25)
    given = [(dtype, options["scale"], options["dropout_p"]) for dtype, options in calls]
    assert given == [(torch.float32, 1e-6, 0.0), (torch.float32, None, 0.0), (torch.float64, None, 0.25)]


def test_rows_of_exactly_the_limit_are_short(monkeypatch):
    calls = []
    monkeypatch.setattr(attention._ShortAttention, "apply", lambda *a: calls.append(a) or a[0])
    monkeypatch.setattr(attention, "SHORT", 9)
    attention._causal(*block(9), None, 0.0)
    attention._causal(*block(10), None, 0.0)
    assert len(calls) == 1


def test_packed_attention_passes_scaling_and_dropout_on(monkeypatch):
    given = []
    monkeypatch.setattr(attention, "_causal", lambda q, k, v, scale, dropout: given.append((scale, dropout)) or q)
    query = torch.randn(1, 4, 5, 16)
    layout = Layout.of([[range(5)]])
    attention.packed_attention(None, query, query, query, None, layout=layout, scaling=0.5, dropout=0.1)
    attention.packed_attention(None, query, query, query, None, layout=layout)
    assert given == [(0.5, 0.1), (None, 0.0)]
