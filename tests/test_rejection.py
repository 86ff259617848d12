"""Rejections: worked values, an independent formula in numpy, unknown numbers, and that the policy term alone is dropped."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantages import ADVANTAGES
from learner.losses import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES, LossInputs, LossSettings, grpo_loss
from learner.rejection import REJECTIONS, binary_kl

NAN, INF = float("nan"), float("inf")


def f64(values):
    return torch.as_tensor(values, dtype=torch.float64)


# log-ratios 0.2, -0.1, 1.5 and one token outside the mask; by hand. (name, bounds, kept)
# k2: 0.02, 0.005, 1.125; k3: 0.021403, 0.004837, 1.981689.
WORKED = [
    ("none", {}, [1, 1, 1]),
    ("token_k1", {}, [1, 1, 0]),  # Ratios 1.2214, 0.9048, 4.4817.
    ("token_k1", {"low": 0.95, "high": 5.0}, [1, 0, 1]),
    ("token_k2", {"high": 0.01}, [0, 1, 0]),
    ("token_k3", {"high": 0.0214}, [0, 1, 0]),
    ("token_k3", {"high": 0.0215}, [1, 1, 0]),
    ("seq_sum_k1", {"high": 4.9}, [0]),  # exp(1.6) = 4.9530.
    ("seq_sum_k1", {"high": 5.0}, [1]),
    ("seq_mean_k1", {"high": 1.7}, [0]),  # exp(1.6 / 3) = 1.7046.
    ("seq_mean_k1", {"high": 1.71}, [1]),
    ("seq_mean_k1", {"low": 0.99, "high": 1.71}, [1]),
    ("seq_sum_k2", {"high": 1.149}, [0]),  # 1.15.
    ("seq_sum_k2", {"high": 1.151}, [1]),
    ("seq_mean_k2", {"high": 0.383}, [0]),  # 0.38333.
    ("seq_mean_k2", {"high": 0.384}, [1]),
    ("seq_max_k2", {"high": 1.12}, [0]),
    ("seq_max_k2", {"high": 1.13}, [1]),
    ("seq_sum_k3", {"high": 2.0}, [0]),  # 2.007929.
    ("seq_sum_k3", {"high": 2.01}, [1]),
    ("seq_mean_k3", {"high": 0.669}, [0]),  # 0.669310.
    ("seq_mean_k3", {"high": 0.67}, [1]),
    ("seq_max_k3", {"high": 1.98}, [0]),
    ("seq_max_k3", {"high": 1.99}, [1]),
    # Probabilities 0.3679, 0.1353, 0.0498 of the learner, 0.3012, 0.1496, 0.0111 of the engine.
    ("token_tv", {"high": 0.05}, [0, 1, 1]),  # Distances 0.066685, 0.014233, 0.038678.
    ("token_tv", {"high": 0.0387}, [0, 1, 1]),
    ("token_tv", {"high": 0.0386}, [0, 1, 0]),
    ("seq_sum_tv", {"high": 0.1195}, [0]),  # 0.119596.
    ("seq_sum_tv", {"high": 0.1197}, [1]),
    ("seq_mean_tv", {"high": 0.0398}, [0]),  # 0.039865.
    ("seq_mean_tv", {"high": 0.0399}, [1]),
    ("seq_max_tv", {"high": 0.0666}, [0]),
    ("seq_max_tv", {"high": 0.0667}, [1]),
    # 0.3012 ln(0.3012/0.3679) + 0.6988 ln(0.6988/0.6321) = 0.009846; 0.000841; 0.022791.
    ("token_binary_kl", {"high": 0.0098}, [0, 1, 0]),
    ("token_binary_kl", {"high": 0.0099}, [1, 1, 0]),
    ("seq_sum_binary_kl", {"high": 0.0334}, [0]),
    ("seq_sum_binary_kl", {"high": 0.0335}, [1]),
    ("seq_mean_binary_kl", {"high": 0.01115}, [0]),
    ("seq_mean_binary_kl", {"high": 0.01117}, [1]),
    ("seq_max_binary_kl", {"high": 0.0227}, [0]),
    ("seq_max_binary_kl", {"high": 0.0228}, [1]),
]


@pytest.mark.parametrize(("name", "bounds", "kept"), WORKED)
@pytest.mark.parametrize("outside", [99.0, NAN, -INF])
def test_worked_values(name, bounds, kept, outside):
    old = f64([[-1.0, -2.0, -3.0, outside]]).requires_grad_()
    rollout = f64([[-1.2, -1.9, -4.5, -1.0]])
    found = REJECTIONS[name](old, rollout, torch.tensor([[1, 1, 1, 0]]), **bounds)
    assert (found.dtype, found.requires_grad) == (torch.bool, False)
    assert found.int().tolist()[0][: len(kept)] == kept
    assert found.shape == ((1, 4) if len(kept) == 3 else (1, 1))


def test_every_entry_has_a_worked_value():
    assert {row[0] for row in WORKED} == set(REJECTIONS)


def by_numpy(name, old, rollout, mask):
    """What a bound is compared with, ``[B, T]``, from the definitions: a row and a token at a time."""
    unit, measure = next((u, name[len(u) + 1 :]) for u in ("token", "seq_sum", "seq_mean", "seq_max") if u in name)
    found = np.zeros(old.shape)
    for i in range(len(old)):
        values = []
        for a, b in zip(old[i], rollout[i], strict=True):
            p, q = np.exp(a), np.exp(b)
            each = {"k1": a - b, "k2": (a - b) ** 2 / 2, "k3": p / q - 1 - (a - b), "tv": abs(p - q)}
            each["binary_kl"] = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
            values.append(each[measure])
        inside = [value for value, m in zip(values, mask[i], strict=True) if m]
        row = {"token": values, "seq_sum": sum(inside), "seq_max": max(inside, default=0.0)}
        found[i] = (row | {"seq_mean": sum(inside) / max(len(inside), 1)})[unit]
    return np.exp(found) if measure == "k1" else found


@pytest.mark.parametrize("name", sorted(set(REJECTIONS) - {"none"}))
@pytest.mark.parametrize("seed", range(4))
def test_the_definitions_in_numpy(name, seed):
    random = np.random.default_rng(seed)
    old = -random.random((6, 5)) * 3 - 0.01
    rollout = np.minimum(old + random.normal(0, 0.4, (6, 5)), -0.01)
    mask = random.random((6, 5)) < 0.7
    measured = by_numpy(name, old, rollout, mask)
    low, high = np.quantile(measured, [0.25, 0.75]) + 1e-9
    bounds = {"high": high} | ({"low": low} if name.endswith("k1") else {})
    found = REJECTIONS[name](f64(old), f64(rollout), torch.tensor(mask), **bounds)
    expected = (measured <= high) & ((measured >= low) | ~np.array(name.endswith("k1")))
    assert np.array_equal(found.expand(6, 5).numpy()[mask], expected[mask])
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize("name", REJECTIONS)
@pytest.mark.parametrize("unknown", [NAN, INF, -INF])
def test_a_token_that_the_engine_gave_no_number_for_counts_as_no_gap(name, unknown):
    old, mask = f64([[-1.0, -2.0]]), torch.ones(1, 2)
    found = REJECTIONS[name](old, f64([[unknown, -2.0]]), mask)
    assert found.all()
    # The other tokens of the row are judged as before.
    far = REJECTIONS[name](old, f64([[unknown, -12.0]]), mask)
    assert not far.all() or name in ("none", "seq_mean_tv", "seq_max_tv", "token_tv", "seq_sum_tv")


@settings(max_examples=50, deadline=None)
@given(p=st.floats(-40, 0), q=st.floats(-40, 0))
def test_a_binary_kl_is_finite_and_never_negative(p, q):
    value = binary_kl(f64(p), f64(q)).item()
    assert 0 <= value < 14
    assert binary_kl(f64(p), f64(p)) == 0


def test_a_rejected_token_loses_its_policy_term_and_nothing_else():
    logprobs = f64([[-1.0, -1.0, -1.0]]).requires_grad_()
    rollout = f64([[-1.2, -2.0, -1.0]])  # Ratios 1.221403, 2.718282, 1.
    column = torch.ones(1, 1, dtype=torch.float64)
    x = LossInputs(
        logprobs,
        logprobs.detach(),
        rollout,
        torch.full_like(rollout, -1.5),
        column,
        column / 3,
        torch.tensor([[1, 1, 0]]),
    )
    chosen = LossSettings(
        POLICY_LOSSES["clip"], KL_ESTIMATORS["k3"], kl_coef=0.1, rejection=REJECTIONS["token_k1"],
        importance_sampling={"level": "token", "mode": "truncate", "low": None, "high": 3.0},
    )  # fmt: skip
    loss, metrics = grpo_loss(x, chosen)
    kl, slope = 0.1 * (math.exp(-0.5) - 0.5), 0.1 * (1 - math.exp(-0.5))
    assert loss.item() == pytest.approx((-math.exp(0.2) + 2 * kl) / 3)
    gradient = torch.autograd.grad(loss, logprobs)[0].tolist()[0]
    assert gradient == pytest.approx([(-math.exp(0.2) + slope) / 3, slope / 3, 0])
    assert metrics["rejection/kept_frac_sum"] == 1
    assert metrics["importance_sampling/mean_sum"].item() == pytest.approx(math.exp(0.2) + math.exp(1.0))


def test_survivors_of_a_sequence_gate_keep_the_weights_of_their_tokens():
    """The mask goes by the row's geometric mean, the weights by the token."""
    logprobs = f64([[-1.0, -1.0], [-1.0, -1.0]]).requires_grad_()
    rollout = f64([[-1.5, -0.7], [-2.0, -2.0]])  # Geometric means exp(0.1) and exp(1).
    column = torch.ones(2, 1, dtype=torch.float64)
    x = LossInputs(logprobs, logprobs.detach(), rollout, None, column, column, torch.ones(2, 2))
    chosen = LossSettings(
        POLICY_LOSSES["clip"], KL_ESTIMATORS["k3"], rejection=REJECTIONS["seq_mean_k1"],
        importance_sampling={"level": "token", "mode": "truncate", "low": None, "high": None},
    )  # fmt: skip
    loss, _ = grpo_loss(x, chosen)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    assert gradient.flatten().tolist() == pytest.approx([-math.exp(0.5), -math.exp(-0.3), 0, 0])


@pytest.mark.parametrize("seed", range(3))
def test_a_trust_region_by_sequence_is_a_point_of_the_choices(seed):
    """FlashREINFORCE: token ratios as weights, sequences admitted by their mean binary KL, every sequence equal."""
    random = np.random.default_rng(seed)
    rewards, shape = random.normal(size=(4, 1)), (4, 6)
    lengths = random.integers(1, 7, 4)
    mask = np.arange(6) < lengths[:, None]
    current = np.log(random.uniform(0.05, 0.9, shape))
    rollout = np.log(np.clip(np.exp(current) + random.normal(0, 0.1, shape), 0.02, 0.95))
    p, q = np.exp(rollout), np.exp(current)
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    mean = (divergence * mask).sum(1, keepdims=True) / lengths[:, None]
    delta = float(np.sort(mean.flatten())[1:3].mean())
    advantage = rewards - rewards.mean()
    by_hand = -1.0 * (mean <= delta) * mask * advantage * (q / p) / (4 * lengths[:, None])

    logprobs = f64(current).requires_grad_()
    advantages = ADVANTAGES["batch_mean"](torch.tensor(rewards, dtype=torch.float32)).double()
    weights = AGGREGATIONS["sequence_mean"](torch.tensor(lengths)).double()[:, None]
    chosen = LossSettings(
        POLICY_LOSSES["reinforce"], KL_ESTIMATORS["k3"],
        importance_sampling={"level": "token", "mode": "truncate", "low": None, "high": None},
        rejection=functools.partial(REJECTIONS["seq_mean_binary_kl"], high=delta),
    )  # fmt: skip
    x = LossInputs(logprobs, logprobs.detach(), f64(rollout), None, advantages, weights, torch.tensor(mask))
    loss, metrics = grpo_loss(x, chosen)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    assert np.allclose(gradient.numpy(), by_hand, atol=1e-6)
    assert 0 < metrics["rejection/kept_frac_sum"] < lengths.sum()


def test_broken_weights_are_not_rejected_in_silence():
    logprobs = f64([[NAN, -1.0]]).requires_grad_()
    column = torch.ones(1, 1, dtype=torch.float64)
    x = LossInputs(logprobs, logprobs.detach(), f64([[-1.0, -1.0]]), None, column, column, torch.ones(1, 2))
    for name in REJECTIONS:
        loss, _ = grpo_loss(x, LossSettings(POLICY_LOSSES["clip"], KL_ESTIMATORS["k3"], rejection=REJECTIONS[name]))
        assert loss.isnan()
