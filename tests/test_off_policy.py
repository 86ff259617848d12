"""What keeps off-policy tokens in check: keep masks and the metrics of importance weights."""

from __future__ import annotations

import pytest
import torch

from learner.off_policy import bounded_exp, importance_weights, masked, off_policy_keep, weight_metrics

NAN, INF = float("nan"), float("inf")


def f64(values):
    return torch.as_tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("drift", "mask", "advantage", "keep"),
    [
        # rollout - current: how much less likely the policy finds its own old tokens.
        ([0.6, 0.6], [1, 1], -1, 0),
        ([0.6, 0.6], [1, 1], 1, 1),
        ([0.6, 0.6], [1, 1], 0, 1),
        ([0.5, 0.5], [1, 1], -1, 1),  # At the threshold it stays.
        ([0.9, 0.0], [1, 1], -1, 1),  # The mean counts, not the sum,
        ([1.2, 0.0], [1, 1], -1, 0),
        ([0.9, 0.0], [1, 0], -1, 0),  # over the trainable tokens.
        ([0.4, 99.0], [1, 0], -1, 1),
        ([-5.0, -5.0], [1, 1], -1, 1),  # Likelier than before is no reason.
        ([0.6, NAN], [1, 0], -1, 0),
        # The engine gave no number for a token: it counts as 0, the others as they are.
        ([0.6, NAN], [1, 1], -1, 1),
        ([1.2, NAN], [1, 1], -1, 0),
        ([NAN, 1.0], [1, 1], -1, 1),
        ([NAN, 1.1], [1, 1], -1, 0),
        ([1.1, -INF], [1, 1], -1, 0),
        ([1.1, -INF], [1, 1], 1, 1),
        ([NAN, NAN], [1, 1], -1, 1),
        ([9.0, 9.0], [0, 0], -1, 1),
        ([INF, 0.0], [1, 1], -1, 0),
        ([INF, NAN], [1, 1], -1, 0),
    ],
)
def test_off_policy_keep(drift, mask, advantage, keep):
    logprobs = f64([[-1.0, -2.0]]).requires_grad_()
    found = off_policy_keep(logprobs, logprobs.detach() + f64([drift]), f64([[advantage]]), torch.tensor([mask]), 0.5)
    assert not found.requires_grad
    assert found.tolist() == [[keep]]


def test_rows_are_kept_one_by_one():
    drift, advantages = f64([[0.6, 0.6], [0.6, 0.6], [0.4, 0.4]]), f64([[-1.0], [1.0], [-1.0]])
    found = off_policy_keep(torch.zeros(3, 2), drift, advantages, torch.ones(3, 2), 0.5)
    assert found.tolist() == [[0], [1], [1]]


def test_one_unknown_token_does_not_keep_a_sequence_that_has_drifted():
    logprobs, rollout = f64([[-1.0, -2.0]]), f64([[NAN, -1.0]])
    assert off_policy_keep(logprobs, rollout, f64([[-1.0]]), torch.ones(1, 2), 0.1).tolist() == [[0]]  # 0.5.
    assert off_policy_keep(logprobs, rollout, f64([[-1.0]]), torch.ones(1, 2), 0.5).tolist() == [[1]]


SAMPLING = {"level": "token", "mode": "truncate", "low": None, "high": 3.0}


@pytest.mark.parametrize(
    ("changes", "total", "squares", "bounded", "least", "most"),
    [
        # Row 16: r = 1.221403, 0.904837, 4.481689 and one token outside the mask.
        ({}, 5.12624, 11.310555, 1, 0.904837, 3),
        ({"mode": "mask"}, 2.12624, 2.310555, 1, 0, 1.221403),
        ({"high": None}, 6.607929, 22.396091, 0, 0.904837, 4.481689),
        ({"low": 1.0}, 5.221403, 11.491825, 2, 1, 3),
        ({"level": "sequence"}, 9, 27, 3, 3, 3),  # exp(1.6) for every token of the row.
        ({"level": "sequence", "high": 5.0}, 14.859097, 73.597592, 0, 4.953032, 4.953032),
    ],
)
def test_weight_metrics(changes, total, squares, bounded, least, most):
    old, rollout, mask = f64([[0.2, -0.1, 1.5, NAN]]), torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]])
    settings = SAMPLING | changes
    weight = importance_weights(old, rollout, mask, **settings)
    found = weight_metrics(weight, old, rollout, mask, settings)
    names = ["mean_sum", "square_sum", "bounded_frac_sum", "ratio_min", "ratio_max"]
    assert [float(found[f"importance_sampling/{name}"]) for name in names] == pytest.approx(
        [total, squares, bounded, least, most], abs=2e-5
    )


def test_a_row_without_tokens_is_in_no_extreme():
    old, mask = f64([[0.2, 0.3], [9.0, -9.0]]), torch.tensor([[1, 1], [0, 0]])
    weight = importance_weights(old, torch.zeros(2, 2), mask, **SAMPLING)
    found = weight_metrics(weight, old, torch.zeros(2, 2), mask, SAMPLING)
    assert float(found["importance_sampling/ratio_min"]) == pytest.approx(1.221403, abs=1e-6)
    assert float(found["importance_sampling/ratio_max"]) == pytest.approx(1.349859, abs=1e-6)
    nothing = weight_metrics(weight, old, torch.zeros(2, 2), torch.zeros(2, 2), SAMPLING)
    assert [float(value) for value in nothing.values()] == [0, 0, 0, 1, 1]


def test_exp_and_mask_guard_value_and_gradient():
    x = f64([-1e9, -21.0, 0.0, 21.0, 1e9]).requires_grad_()
    y = bounded_exp(x)
    assert y.tolist() == pytest.approx([2.061154e-9, 2.061154e-9, 1, 485165195.4, 485165195.4])
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0, 0, 1, 0, 0]
    x = f64([NAN, 2.0]).requires_grad_()
    y = masked(x * x, torch.tensor([0, 1]))
    assert y.tolist() == [0, 4]
