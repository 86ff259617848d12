"""KL beyond the estimators' table: over the vocabulary, straight-through gradients, the penalty inside the reward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.coefficients import AdaptiveKl
from learner.kl import KL_ESTIMATORS, full, k2, penalised_rewards, straight_through

NAN, INF = float("nan"), float("inf")
# maths.md section 14, row 14: one row of log-probs, its third token the last trainable one.
OLD, REF, MASK = [[-1.0, -0.5, -2.0, -9.0]], [[-1.2, -0.5, -1.5, -1.0]], [[1, 1, 1, 0]]


def f64(values):
    return torch.as_tensor(values, dtype=torch.float64)


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, f64(expected), rtol=0, atol=atol)


# --- over the vocabulary ---


@pytest.mark.parametrize(
    ("p", "q", "value"),
    [
        ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5], 0.173287),  # Row 13.
        ([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], 0),
        ([0.5, 0.5, 0], [0.25, 0.25, 0.5], 0.693147),  # 0 ln 0 = 0.
        ([1, 0, 0], [0.5, 0.5, 0], 0.693147),  # Also where both are 0.
        ([0.5, 0.5, 0], [1, 0, 0], INF),
    ],
)
def test_full_is_the_sum_over_the_vocabulary(p, q, value):
    found = full(f64([[p, p]]).log(), f64([[q, q]]).log())
    assert found.shape == (1, 2)
    close(found, [[value, value]])


def test_full_has_the_exact_gradient():
    logits, reference = f64([[0.3, -1.0, 2.0, 0.1]]).requires_grad_(), f64([[1.0, 0.2, -0.4, 0.0]])
    assert torch.autograd.gradcheck(lambda x: full(x.log_softmax(-1), reference.log_softmax(-1)), logits)


@given(logits=st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=2, max_size=6))
def test_full_is_the_expectation_of_k1_and_never_negative(logits):
    log_p, log_q = f64(logits).log_softmax(0).T
    found = full(log_p, log_q)
    assert found >= -1e-12
    close((log_p.exp() * KL_ESTIMATORS["k1"](log_p, log_q)).sum(), found)


# --- straight-through ---


@pytest.mark.parametrize("name", ["k1", "k3", "abs"])
def test_straight_through_has_the_value_of_one_and_the_gradient_of_k2(name):
    logprobs, ref = f64([[-1.0, -2.0, -0.1]]).requires_grad_(), f64([[-1.5, -0.5, -0.1]])
    value = KL_ESTIMATORS[name](logprobs, ref)
    found = straight_through(value, logprobs, ref)
    close(found, value.detach())
    close(torch.autograd.grad(found.sum(), logprobs)[0], [[0.5, -1.5, 0]])
    close(torch.autograd.grad(k2(logprobs, ref).sum(), logprobs)[0], [[0.5, -1.5, 0]])


# --- in the reward ---


@pytest.mark.parametrize(
    ("name", "rewards", "total"),
    [
        ("k1", [-0.02, 0, 2.05, 0], 2.03),
        ("abs", [-0.02, 0, 1.95, 0], 1.93),
        ("mse", [-0.002, 0, 1.9875, 0], 1.9855),
    ],
)
def test_row_14(name, rewards, total):
    kl = KL_ESTIMATORS[name](f64(OLD), f64(REF))
    found = penalised_rewards(kl, torch.tensor(MASK), f64([2.0]), 0.1)
    close(found, [rewards])
    close(found.sum(1), [total])


@pytest.mark.parametrize(
    ("mask", "rewards"),
    [
        ([1, 1, 1, 1], [-1, -2, -3, 1]),
        ([1, 1, 0, 0], [-1, 3, 0, 0]),
        ([0, 1, 0, 0], [0, 3, 0, 0]),
        ([1, 0, 1, 0], [-1, 0, 2, 0]),  # A tool's token in between.
        ([1, 0, 0, 0], [4, 0, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),  # No trainable token, no token reward.
    ],
)
@pytest.mark.parametrize("garbage", [None, NAN, INF])
def test_the_score_lies_on_the_last_trainable_token(mask, rewards, garbage):
    mask = torch.tensor([mask, [1, 1, 1, 1]]).bool()
    kl = f64([[1, 2, 3, 4]] * 2).requires_grad_()
    given_kl = kl if garbage is None else torch.where(mask, kl, garbage)
    found = penalised_rewards(given_kl, mask, f64([5.0, 0.0]), 1.0)
    assert not found.requires_grad
    close(found, [rewards, [-1, -2, -3, -4]])


def test_row_14_of_the_controller():
    control, found = AdaptiveKl(0.1, target=4.0, horizon=2000.0), []
    for kl in (2.0, 8.0, 4.2):
        control.observe(kl, NAN, 100)
        found.append(control.value)
    assert found == pytest.approx([0.099, 0.09999, 0.10023998], abs=1e-8)
