"""The layout of packed rows, and causal attention in bfloat16 on CPUs against float64: values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner import attention
from learner.attention import Layout
from shared.errors import ModelRefused


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


@pytest.mark.parametrize(("length", "window"), [(1, 1), (9, 1), (9, 2), (9, 4), (9, 8), (33, 7), (33, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_band_is_attention_to_the_last_tokens(length, window, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in block(length)]
    found = attention._banded(*inputs, window, None, 0.0)
    q, k, v = (x.double() for x in inputs)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    seen = torch.ones(length, length).tril().bool() & torch.ones(length, length).triu(1 - window).bool()
    wanted = (q @ k.transpose(2, 3) * 0.25).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    bound = 1e-5 if dtype == torch.float32 else 0.03
    assert found.dtype == dtype
    assert (found - wanted).abs().max() < bound
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for ours, theirs in zip(gradients, torch.autograd.grad((wanted * weights).sum(), inputs), strict=True):
        assert (ours.double() - theirs.double()).norm() <= bound * (theirs.double().norm() + 1)


def test_a_band_gets_the_scale_and_the_dropout():
    inputs = block(9)
    assert (attention._banded(*inputs, 4, 1e-6, 0.0) - attention._banded(*inputs, 4, None, 0.0)).abs().max() > 0.1
    assert (attention._banded(*inputs, 4, None, 0.9) == 0).float().mean() > 0.1


def test_only_blocks_beyond_the_window_are_banded(monkeypatch):
    taken = []
    monkeypatch.setattr(attention, "_banded", lambda q, k, v, window, *_: taken.append(q.shape[2]) or q)
    monkeypatch.setattr(attention, "_causal", lambda q, *_: q)
    query, layout = torch.randn(1, 4, 30, 16), Layout.of([[range(20)], [range(20, 30)]])
    attention.packed_attention(None, query, query, query, None, layout=layout, sliding_window=10)
    attention.packed_attention(None, query, query, query, None, layout=layout, sliding_window=20)
    attention.packed_attention(None, query, query, query, None, layout=layout)
    assert taken == [20]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"softcap": 50.0}, "needs softcap"),
        ({"s_aux": torch.zeros(4)}, "needs s_aux"),
        ({"position_bias": torch.zeros(1), "softcap": 2.0}, "needs position_bias, softcap"),
        ({"attention_mask": torch.ones(1)}, "needs attention_mask"),
        ({"something_new": False}, "needs something_new"),
        ({"is_causal": False}, "is not causal"),
        ({"layout": None}, "does not hand on"),
        ({"softcap": None, "s_aux": None, "is_causal": True, "position_ids": torch.zeros(1)}, None),
    ],
)
def test_what_would_change_attention_is_refused_and_not_swallowed(arguments, said):
    query = torch.randn(1, 4, 5, 16)
    keywords = {"attention_mask": None, "layout": Layout.of([[range(5)]])} | arguments
    if said is None:
        attention.packed_attention(torch.nn.Linear(1, 1), query, query, query, **keywords)
        return
    with pytest.raises(ModelRefused, match=f"attention of Linear {said}"):
        attention.packed_attention(torch.nn.Linear(1, 1), query, query, query, **keywords)


def test_a_module_that_is_not_causal_is_refused():
    query, module = torch.randn(1, 4, 5, 16), torch.nn.Linear(1, 1)
    module.is_causal = False
    with pytest.raises(ModelRefused, match="is not causal"):
        attention.packed_attention(module, query, query, query, None, layout=Layout.of([[range(5)]]))
