"""Policy losses, KL estimators, aggregations, importance weights: worked values, gradients, safety, composition."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from learner.advantages import grpo
from learner.losses import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES, LossInputs, LossSettings, grpo_loss
from learner.off_policy import importance_weights

CLIP = {"low": 0.2, "high": 0.28}

# One token of log-prob -0.7: (name, arguments, rho, A, loss, gradient). maths.md section 14, rows 7-10.
TOKEN = [
    *[("clip", CLIP, *row) for row in [
        (0.5, 2, -1, -1), (0.9, 2, -1.8, -1.8), (1.25, 2, -2.5, -2.5), (2, 2, -2.56, 0),
        (0.5, -2, 1.6, 0), (0.9, -2, 1.8, 1.8), (1.25, -2, 2.5, 2.5), (2, -2, 4, 4), (6, -2, 12, 12),
    ]],
    ("clip", CLIP | {"delta": 4.0}, 6, -2, 8, 0),
    ("clip", CLIP | {"delta": 4.0}, 2, -2, 4, 4),
    ("dual_clip", CLIP | {"c": 3.0}, 6, -2, 6, 0),
    ("dual_clip", CLIP | {"c": 3.0}, 2, -2, 4, 4),
    ("dual_clip", CLIP | {"c": 3.0}, 6, 2, -2.56, 0),
    ("reinforce", {}, 6, 2, 1.4, -2),
    ("cispo", {"cap": 2.0}, 1.5, 2, 2.1, -3),
    ("cispo", {"cap": 2.0}, 4, 2, 2.8, -4),
    ("cispo", {"cap": 2.0}, 4, -2, -2.8, 4),
    ("cispo", {"cap": 2.0, "floor": 0.8}, 0.5, 2, 1.12, -1.6),
    ("sapo", {}, 1, 1, -2, -1),
    ("sapo", {}, 1, -1, 1.904762, 1),
    ("sapo", {}, 2, 1, -2.924234, -1.572895),
    ("sapo", {}, 2, -1, 2.822000, 1.536220),
    # p = 0.496585; the old probability 0.331057, 0.248293, 0.993171 for rho 1.5, 2, 0.5.
    ("dppo_tv", {}, 1.5, 2, 2.1, -3),  # Moved by 0.1655.
    ("dppo_tv", {}, 2, 2, 0, 0),  # By 0.2483.
    ("dppo_tv", {"high": 0.25}, 2, 2, 2.8, -4),
    ("dppo_tv", {}, 2, -2, -2.8, 4),  # Back again: never gated.
    ("dppo_tv", {}, 0.5, -2, 0, 0),  # By -0.4966.
    ("dppo_tv", {}, 0.5, 2, 0.7, -1),
    ("dppo_tv", {"low": 0.5}, 0.5, -2, -0.7, 1),
    ("dppo_tv", {"cap": 1.2}, 1.5, 2, 1.68, -2.4),
    ("dppo_kl", {}, 1.2, 2, 1.68, -2.4),  # KL 0.4138 ln(0.4138/0.4966) + 0.5862 ln(0.5862/0.5034) = 0.013772.
    ("dppo_kl", {"high": 0.0137}, 1.2, 2, 0, 0),
    ("dppo_kl", {"high": 0.0138}, 1.2, 2, 1.68, -2.4),
    ("dppo_kl", {}, 2, 2, 0, 0),  # 0.129245.
    ("dppo_kl", {}, 2, -2, -2.8, 4),
    ("dppo_kl", {}, 0.5, -2, 0, 0),  # 0.659047.
    ("dppo_kl", {}, 0.5, 2, 0.7, -1),
    ("dppo_kl", {"cap": 1.1}, 1.2, -2, -1.54, 2.2),
]  # fmt: skip

# One sequence of log-probs -1, its columns averaged: (name, arguments, log_ratio, mask, A, loss, gradient). Rows 11-12.
SEQUENCE = [
    ("sequence_clip", {"low": 0.2, "high": 0.3}, [0.3, -0.1, 0.4, 9.9], [1, 1, 1, 0], 1.5, -1.832104,
     [-0.610701, -0.610701, -0.610701, 0]),
    ("sequence_clip", {"low": 0.2, "high": 0.2}, [0.3, -0.1, 0.4, 9.9], [1, 1, 1, 0], 1.5, -1.8, [0, 0, 0, 0]),
    ("sequence_clip", {"low": 0.2, "high": 0.3, "delta": 4.0}, [2.0, 2.0], [1, 1], -1, 4, [0, 0]),
    ("vespo", {}, [0.1, 0.2], [1, 1], 1, 0.637898, [-0.318949, -0.318949]),
    ("vespo", {}, [0.1, 0.2], [1, 1], -1, -1.221748, [0.610874, 0.610874]),
    ("gmpo", {"low": 0.4, "high": 0.4}, [0.5, -0.1], [1, 1], 1, -1.161834, [0, -0.580917]),
    ("gmpo", {"low": 0.4, "high": 0.4}, [0.5, -0.1], [1, 1], -1, 1.221403, [0.610701, 0.610701]),
    ("gspo_token", {"low": 0.2, "high": 0.3}, [0.3, -0.1, 0.4, 9.9], [1, 1, 1, 0], 1.5, -1.832104,
     [-0.610701, -0.610701, -0.610701, 0]),
    ("gspo_token", {"low": 0.2, "high": 0.2}, [0.3, -0.1, 0.4], [1, 1, 1], 1.5, -1.8, [0, 0, 0]),
    # The row's ratio exp(0.2) = 1.221403; sigmoid(0.221403) = 0.555126, of 1.05 times that 0.557858.
    ("cispo", {"unit": "sequence"}, [0.3, -0.1, 0.4, 9.9], [1, 1, 1, 0], 1.5, 1.832104, [-0.610701] * 3 + [0]),
    ("cispo", {"unit": "sequence", "cap": 1.1}, [0.3, -0.1, 0.4], [1, 1, 1], -1.5, -1.65, [0.55] * 3),
    ("sapo", {"unit": "sequence"}, [0.3, -0.1, 0.4, 9.9], [1, 1, 1, 0], 1.5, -3.330754, [-0.603278] * 3 + [0]),
    ("sapo", {"unit": "sequence"}, [0.3, -0.1, 0.4], [1, 1, 1], -1, 2.125173, [0.401683] * 3),
]  # fmt: skip

# Row 13: log-prob -1 against -1.5. (name, corrected by rho = exp(0.2), value, gradient)
KL = [
    ("k1", False, 0.5, 1), ("k2", False, 0.125, 0.5), ("mse", False, 0.125, 0.5),
    ("k3", False, 0.106531, 0.393469), ("abs", False, 0.5, 1), ("k3", True, 0.130117, 0.610701),
]  # fmt: skip

# Row 15, lengths 2, 3, 5 with token losses that sum to 3, 3, 10; then lengths 2, 0, 3. (name, arguments, loss, weights)
AGGREGATION = [
    ("token_mean", {}, 1.6, [1 / 5, 0, 1 / 5]),
    ("sequence_mean", {}, 1.5, [1 / 6, 0, 1 / 9]),
    ("constant", {"length": 8}, 0.666667, [1 / 24, 0, 1 / 24]),
    ("sequence_sum", {}, 5.333333, [1 / 3, 0, 1 / 3]),
    ("prompt_mean", {"groups": tensor([0, 1, 1])}, 1.5625, [1 / 4, 0, 1 / 6]),
    ("sequence_mean", {"skip_empty": True}, 1.5, [1 / 4, 0, 1 / 6]),
    ("constant", {"length": 8, "skip_empty": True}, 0.666667, [1 / 16, 0, 1 / 16]),
    ("sequence_sum", {"skip_empty": True}, 5.333333, [1 / 2, 0, 1 / 2]),
    ("token_sum", {}, 16, [1, 0, 1]),
    ("batch_token_mean", {"batch_tokens": 20.0}, 0.8, [1 / 20, 0, 1 / 20]),
    ("batch_token_mean", {}, 1.6, [1 / 5, 0, 1 / 5]),
    ("chunk_token_mean", {"sequences": 1}, 1.5, [1 / 6, 0, 1 / 9]),
    ("chunk_token_mean", {"sequences": 2}, 1.6, [1 / 4, 0, 1 / 6]),  # Chunks of 6/5 and 10/5.
    ("chunk_token_mean", {"sequences": 8}, 1.6, [1 / 5, 0, 1 / 5]),
]

# Row 16 and the bounds of section 9: differences 0.2, -0.1, 1.5. (level, mode, low, high, weights)
IMPORTANCE = [
    ("token", "truncate", None, 3.0, [1.221403, 0.904837, 3]),
    ("token", "mask", None, 3.0, [1.221403, 0.904837, 0]),
    ("sequence", "truncate", None, None, [4.953032]),
    ("sequence", "truncate", None, 3.0, [3]),
    ("sequence", "mask", None, 3.0, [0]),
    ("sequence_geometric", "truncate", None, 3.0, [1.704605]),
    ("token", "truncate", 1.0, None, [1.221403, 1, 4.481689]),
    ("token", "mask", 1.0, None, [1.221403, 0, 4.481689]),
]

PER_TOKEN_KL = sorted(set(KL_ESTIMATORS) - {"full"})
DETACHED = {"reinforce", "cispo", "vespo", "dppo_tv", "dppo_kl"}  # their ratio carries no gradient
GARBAGE = [1e9, -1e9, float("nan"), float("inf"), -float("inf")]
every_loss = pytest.mark.parametrize("name", POLICY_LOSSES)


def f64(values):
    return torch.as_tensor(values, dtype=torch.float64)


def loss_and_gradient(name, args, log_ratio, advantage, mask, logprobs):
    """``[B, T]`` losses on the mask, and the gradient of their row means with respect to each log-prob."""
    logprobs = f64(logprobs).requires_grad_()
    log_ratio = logprobs - (logprobs.detach() - f64(log_ratio))
    loss = POLICY_LOSSES[name](log_ratio, f64(advantage), mask, logprobs=logprobs, **args)
    loss = torch.where(mask, loss, 0.0)
    (gradient,) = torch.autograd.grad((loss / mask.sum(1, keepdim=True).clamp(min=1)).sum(), logprobs)
    return loss.detach(), gradient


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found.double(), f64(expected), rtol=0, atol=atol)


def inputs(logprobs, **changes):
    """``LossInputs`` of one or more rows, on policy, A = 0 and weight 1 where not told otherwise."""
    column, fixed = torch.zeros(len(logprobs), 1, dtype=logprobs.dtype), logprobs.detach()
    filled = {"logprobs": logprobs, "old_logprobs": fixed, "rollout_logprobs": fixed, "ref_logprobs": None}
    filled |= {"advantages": column, "weights": column + 1, "mask": torch.ones_like(fixed)}
    return LossInputs(**filled | changes)


def plain(**changes):
    return LossSettings(**{"policy_loss": POLICY_LOSSES["clip"], "kl_estimator": KL_ESTIMATORS["k3"]} | changes)


# --- policy losses ---


@pytest.mark.parametrize(("name", "args", "rho", "advantage", "loss", "gradient"), TOKEN)
def test_token_loss(name, args, rho, advantage, loss, gradient):
    mask = torch.ones(1, 1, dtype=torch.bool)
    found = loss_and_gradient(name, args, [[math.log(rho)]], [[advantage]], mask, [[-0.7]])
    close(found[0], [[loss]])
    close(found[1], [[gradient]])


@pytest.mark.parametrize(("name", "args", "log_ratio", "mask", "advantage", "loss", "gradient"), SEQUENCE)
def test_sequence_loss(name, args, log_ratio, mask, advantage, loss, gradient):
    mask = tensor([mask]).bool()
    found = loss_and_gradient(name, args, [log_ratio], [[advantage]], mask, [[-1.0] * len(log_ratio)])
    close(found[0], torch.where(mask, loss, 0.0))
    close(found[1], [gradient])


def test_every_entry_has_worked_values():
    assert {row[0] for row in TOKEN + SEQUENCE} == set(POLICY_LOSSES)
    assert {row[0] for row in KL} | {"full"} == set(KL_ESTIMATORS)  # See test_kl.py.
    assert {row[0] for row in AGGREGATION} == set(AGGREGATIONS)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        *((name, {}) for name in POLICY_LOSSES if name != "gspo_token"),
        ("cispo", {"unit": "sequence"}),
        ("sapo", {"unit": "sequence"}),
    ],
)
def test_gradient_is_the_finite_difference(name, args):
    mask = tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]).bool()
    log_ratio = f64([[-0.6, -0.1, 0.05, 3.0, 0.13], [0.7, 0.11, -0.5, 0.6, -0.04]]).requires_grad_()
    logprobs = f64([[-0.6, -1.1, -2.0, -3.0, -0.3], [-0.7, -0.1, -0.5, -1.6, -4.0]]).requires_grad_()
    advantages = f64([[1.5], [-0.8]])

    def loss(log_ratio, logprobs):
        return torch.where(mask, POLICY_LOSSES[name](log_ratio, advantages, mask, logprobs=logprobs, **args), 0.0)

    if name in DETACHED:
        assert torch.autograd.gradcheck(lambda x: loss(log_ratio.detach(), x), logprobs)
        assert not loss(log_ratio, logprobs.detach()).requires_grad
    else:
        assert torch.autograd.gradcheck(lambda x: loss(x, logprobs.detach()), log_ratio)
        assert not loss(log_ratio.detach(), logprobs).requires_grad


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("log_ratio", [[0.3, -0.1, 0.4, 9.9], [-0.3, -0.5, 0.1, 2.0], [3.0, 1.0, 0.5, 0.0]])
def test_per_token_a_sequence_ratio_has_its_value_and_each_tokens_own_gradient(log_ratio, advantage):
    """Summed over a row the gradients are equal; with a weight on one token alone, its own is what it gets."""
    mask = tensor([[1, 1, 1, 0]]).bool()
    found = []
    for name in ("sequence_clip", "gspo_token"):
        current = f64([log_ratio]).requires_grad_()
        loss = POLICY_LOSSES[name](current, f64([[advantage]]), mask, low=0.2, high=0.3)
        found.append((loss.detach(), *(torch.autograd.grad(loss[0, t], current, retain_graph=True)[0] for t in (0, 1))))
    (by_row, first, _), (by_token, own, other) = found
    close(by_token, by_row)
    close(own, [[first.sum(), 0, 0, 0]])
    close(other, [[0, first.sum(), 0, 0]])
    close(first, [[first.sum() / 3] * 3 + [0]])


@every_loss
def test_the_ratio_serves_where_no_logprobs_are_given(name):
    log_ratio, mask = f64([[0.1, -0.1, 0.05]]).requires_grad_(), torch.ones(1, 3).bool()
    by_ratio = POLICY_LOSSES[name](log_ratio, f64([[2.0]]), mask).sum()
    by_logprobs = POLICY_LOSSES[name](log_ratio, f64([[2.0]]), mask, logprobs=log_ratio - 1).sum()
    close(*torch.autograd.grad(by_ratio, log_ratio), *torch.autograd.grad(by_logprobs, log_ratio))


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"vespo"}))
@pytest.mark.parametrize("advantage", [1.5, -0.8])
def test_on_policy_every_loss_is_plain_policy_gradient(name, advantage):
    mask = tensor([[1, 1, 0, 1]]).bool()
    _, gradient = loss_and_gradient(name, {}, [[0.0] * 4], [[advantage]], mask, [[-1.0, -2.0, -3.0, -4.0]])
    close(gradient, [[-advantage / 3, -advantage / 3, 0, -advantage / 3]])


@every_loss
@pytest.mark.parametrize("garbage", GARBAGE)
def test_entries_outside_the_mask_have_no_influence(name, garbage):
    mask = tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    log_ratio = f64([[0.1, 0.2, -0.1, 0.3]] * 2)
    logprobs = f64([[-1.0, -2.0, -3.0, -4.0]] * 2)
    clean = loss_and_gradient(name, {}, log_ratio, [[1.0], [-1.0]], mask, logprobs)
    found = loss_and_gradient(
        name, {}, log_ratio.where(mask, f64(garbage)), [[1.0], [-1.0]], mask, logprobs.where(mask, f64(garbage))
    )
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1], clean[1])
    assert torch.equal(found[1][~mask], torch.zeros(6))
    assert found[1][0, [0, 2]].abs().max() > 0 or name in ("sequence_clip", "gspo_token")


@every_loss
@given(
    log_ratio=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=4),
    advantage=st.floats(-10, 10, width=32),
)
def test_extreme_ratios_stay_finite(name, log_ratio, advantage):
    current = tensor([log_ratio], requires_grad=True)
    mask = torch.ones(1, len(log_ratio)).bool()
    loss = POLICY_LOSSES[name](current, tensor([[advantage]]), mask, logprobs=current)
    (gradient,) = torch.autograd.grad(loss.sum(), current)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


# --- KL estimators ---


@pytest.mark.parametrize(("name", "corrected", "value", "gradient"), KL)
def test_kl(name, corrected, value, gradient):
    logprobs = f64([[-1.0]]).requires_grad_()
    x = inputs(logprobs, old_logprobs=f64([[-1.2]]), ref_logprobs=f64([[-1.5]]))
    chosen = plain(kl_estimator=KL_ESTIMATORS[name], kl_coef=0.5, kl_corrected=corrected)
    loss, metrics = grpo_loss(x, chosen)
    close(loss, 0.5 * value)
    close(metrics["kl_sum"], value)
    close(torch.autograd.grad(loss, logprobs)[0], [[0.5 * gradient]])


@pytest.mark.parametrize("name", PER_TOKEN_KL)
def test_kl_gradient_is_the_finite_difference(name):
    ref = f64([[-1.0, -2.0, -0.5, -3.0]])
    logprobs = f64([[-1.5, -0.3, -0.4, -8.0]]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KL_ESTIMATORS[name](x, ref), logprobs)


@pytest.mark.parametrize(("name", "mean"), [("k1", 0.173287), ("k3", 0.173287), ("k2", 0.180170)])
def test_kl_estimators_average_to_the_full_sum(name, mean):
    p, q = f64([[0.5, 0.25, 0.25]]), f64([[0.25, 0.25, 0.5]])
    close((p * KL_ESTIMATORS[name](p.log(), q.log())).sum(), mean)


@pytest.mark.parametrize("name", PER_TOKEN_KL)
@given(gap=st.floats(-1e6, 1e6, width=32))
def test_extreme_kl_stays_finite(name, gap):
    logprobs = tensor([[gap]], requires_grad=True)
    value = KL_ESTIMATORS[name](logprobs, torch.zeros(1, 1))
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), logprobs)[0].isfinite().all()


# --- aggregations ---


@pytest.mark.parametrize(("name", "args", "loss", "weights"), AGGREGATION)
def test_aggregation(name, args, loss, weights):
    found = AGGREGATIONS[name](tensor([2, 3, 5]), **args)
    assert found.shape == (3,)
    assert found.dtype == torch.float32
    close((found * tensor([3.0, 3.0, 10.0])).sum(), loss)
    if "groups" in args:
        args = {"groups": tensor([0, 0, 1])}
    close(AGGREGATIONS[name](tensor([2, 0, 3]), **args), weights)


@pytest.mark.parametrize(("name", "args"), [row[:2] for row in AGGREGATION])
def test_nothing_to_train_weighs_nothing(name, args):
    assert torch.equal(AGGREGATIONS[name](tensor([0, 0, 0]), **args), torch.zeros(3))


# --- importance weights ---


@pytest.mark.parametrize(("level", "mode", "low", "high", "weights"), IMPORTANCE)
def test_importance_weights(level, mode, low, high, weights):
    old = f64([[-1.0, -2.0, -3.0, float("nan")]]).requires_grad_()
    rollout = f64([[-1.2, -1.9, -4.5, 1e9]])
    found = importance_weights(old, rollout, tensor([[1, 1, 1, 0]]), level=level, mode=mode, low=low, high=high)
    assert not found.requires_grad
    close(found[:, : len(weights)], [weights])


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_geometric"])
@pytest.mark.parametrize("garbage", GARBAGE[2:])
def test_a_non_finite_rollout_logprob_weighs_one(level, garbage):
    old, rollout = f64([[-1.0, -2.0]]), f64([[-1.2, garbage]])
    found = importance_weights(old, rollout, torch.ones(1, 2), level=level, mode="truncate", low=None, high=3.0)
    expected = {"token": [1.221403, 1], "sequence": [1.221403], "sequence_geometric": [1.105171]}[level]
    close(found, [expected])


# --- composition ---


def test_importance_weights_act_on_the_policy_term_alone():
    logprobs = f64([[-1.0, -2.0], [-1.0, -2.0]]).requires_grad_()
    rollout = f64([[-1.2, -4.0], [-1.2, -4.0]])
    ref = f64([[-1.5, -2.5], [-1.5, -2.5]])
    mask = tensor([[1, 1], [1, 0]])
    scored = {"advantages": f64([[2.0], [-1.0]]), "weights": f64([[0.25], [0.5]])}
    x = inputs(logprobs, rollout_logprobs=rollout, ref_logprobs=ref, mask=mask, **scored)
    sampling = {"level": "token", "mode": "truncate", "low": None, "high": 3.0}
    loss, metrics = grpo_loss(x, plain(kl_coef=0.1, importance_sampling=sampling))
    r, kl, slope = 1.221403, 0.1 * 0.106531, 0.1 * 0.393469
    close(loss, 0.25 * (-2 * r + kl - 2 * 3 + kl) + 0.5 * (r + kl))
    close(metrics["policy_loss"], 0.25 * -4 + 0.5)
    close(metrics["importance_sampling/mean_sum"], 2 * r + 3)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    close(gradient, [[0.25 * (-2 * r + slope), 0.25 * (-6 + slope)], [0.5 * (r + slope), 0]])


def careless(log_ratio, advantages, mask, *, logprobs):
    """Somebody's own policy loss, which trusts its inputs and leaves NaN outside the mask."""
    return torch.where(mask, -advantages * torch.exp(log_ratio) + logprobs**2, float("nan"))


@pytest.mark.parametrize(
    ("policy_loss", "kl"),
    [*itertools.product([*POLICY_LOSSES.values(), careless], [KL_ESTIMATORS["k3"]]),
     *itertools.product([POLICY_LOSSES["clip"]], KL_ESTIMATORS.values())],
)  # fmt: skip
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_outside_the_mask_never_reaches_the_loss(policy_loss, kl, garbage):
    mask = tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    generator = torch.Generator().manual_seed(0)
    current, old, rollout, ref = (-torch.rand(3, 4, generator=generator) - 1e-3 for _ in range(4))
    sampling = {"level": "sequence", "mode": "truncate", "low": 0.5, "high": 3.0}
    chosen = LossSettings(
        policy_loss, kl, kl_coef=0.1, kl_corrected=True, kl_straight_through=True, importance_sampling=sampling,
        off_policy_threshold=0.1, entropy_coef=0.1,
    )  # fmt: skip
    results = []
    for filler in (0.0, garbage):
        current_, old_, rollout_, ref_ = (x.where(mask, tensor(filler)) for x in (current, old, rollout, ref))
        current_.requires_grad_()
        x = inputs(
            current_, old_logprobs=old_, rollout_logprobs=rollout_, ref_logprobs=ref_, mask=mask,
            advantages=tensor([[1.0], [-1.0], [2.0]]), full_kl=(current_**2).where(mask, tensor(filler)),
            entropy=current_ * 2, entropy_keep=tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]]).bool(),
        )  # fmt: skip
        loss, metrics = grpo_loss(x, chosen)
        results.append([loss, torch.autograd.grad(loss, current_)[0], *metrics.values()])
    for clean, found in zip(*results, strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, clean)
    assert torch.equal(results[1][1][~mask], torch.zeros(8))


def test_the_loss_is_zero_while_the_model_learns():
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(logits, 0)[tensor([[0], [0], [0], [1]])]
    advantages = grpo(tensor([[1.0, 1.0, 1.0, 0.0]])).T
    weights = AGGREGATIONS["sequence_mean"](tensor([1, 1, 1, 1]))[:, None]
    loss, _ = grpo_loss(inputs(logprobs, advantages=advantages, weights=weights), plain())
    close(loss, 0.0)
    close(torch.autograd.grad(loss, logits)[0], [-0.374925, 0.374925])


def test_under_token_mean_the_loss_says_whether_good_answers_are_long():
    lengths = tensor([10, 2, 2, 2])
    mask = torch.arange(10) < lengths[:, None]
    weights = AGGREGATIONS["token_mean"](lengths)[:, None]
    x = inputs(torch.full((4, 10), -1.0), mask=mask, advantages=grpo(tensor([[1.0, 0, 0, 0]])).T, weights=weights)
    close(grpo_loss(x, plain())[0], -0.749850)


def test_metrics_count_what_clipping_stops_and_how_far_the_engine_is():
    old = f64([[-1.0, -1.0, -1.0, -1.0]] * 2)
    logprobs = old + f64([[0.5, -0.5, 0.1, 0.5], [0.5, -0.5, -0.6, 0.1]])
    rollout = old - f64([[0.1, -0.3, 0, 9]] * 2)
    mask = tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    x = inputs(logprobs, old_logprobs=old, rollout_logprobs=rollout, advantages=f64([[1.0], [-1.0]]), mask=mask)
    _, metrics = grpo_loss(x, plain())
    assert metrics["clip_ratio/high_mean_sum"] == 1
    assert metrics["clip_ratio/low_mean_sum"] == 2
    assert metrics["clip_ratio/region_mean_sum"] == 3
    close(metrics["sync/logprob_gap_sum"], 0.4 + 9.4)
    close(metrics["sync/logprob_gap_max"], 9)
    weights = [math.exp(gap) for gap in (0.1, -0.3, 0, 0.1, -0.3, 0, 9)]
    close(metrics["off_policy/mean_sum"], sum(weights))
    close(metrics["off_policy/square_sum"], sum(weight**2 for weight in weights))


@pytest.mark.parametrize(("rho", "advantage", "clipped"), [(1.21, 1.0, 1), (0.81, -1.0, 0)])
def test_clip_metrics_use_the_ratio(rho, advantage, clipped):
    x = inputs(f64([[math.log(rho)]]), old_logprobs=f64([[0.0]]), advantages=f64([[advantage]]))
    _, metrics = grpo_loss(x, plain())
    assert metrics["clip_ratio/high_mean_sum"] + metrics["clip_ratio/low_mean_sum"] == clipped
    assert metrics["clip_ratio/region_mean_sum"] == clipped


@pytest.mark.parametrize("unknown", GARBAGE[2:])
def test_metrics_leave_out_tokens_whose_rollout_logprob_is_unknown(unknown):
    old = f64([[-1.0, -1.0, -1.0]])
    x = inputs(old.clone(), old_logprobs=old, rollout_logprobs=f64([[-1.5, unknown, -1.0]]))
    _, metrics = grpo_loss(x, plain())
    close(metrics["sync/logprob_gap_sum"], 0.5)
    close(metrics["sync/logprob_gap_max"], 0.5)
    close(metrics["off_policy/mean_sum"], math.exp(0.5) + 1)
    close(metrics["off_policy/square_sum"], math.exp(1.0) + 1)
    assert metrics["rollout_logprobs_not_finite"] == 1
