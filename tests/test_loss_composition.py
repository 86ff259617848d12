"""How the pieces of the loss compose: keep masks, entropy, corrected KL, folded weights, and who counts what."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from learner.losses import KL_ESTIMATORS, POLICY_LOSSES, ROW_RATIO, SEQUENCE_LEVEL, LossInputs, LossSettings, grpo_loss

SAMPLING = {"level": "token", "mode": "truncate", "low": None, "high": 3.0}


def f64(values):
    return torch.as_tensor(values, dtype=torch.float64)


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found.double(), f64(expected), rtol=0, atol=atol)


def evaluate(logprobs, settings=None, **changes):
    """Loss, gradient on the log-probs, metrics; on policy, k3 to -1.5, A = -1 and weight 1 where not told otherwise."""
    logprobs = f64(logprobs).requires_grad_()
    fixed, column = logprobs.detach(), torch.ones(len(logprobs), 1, dtype=torch.float64)
    filled = {"old_logprobs": fixed, "rollout_logprobs": fixed, "ref_logprobs": torch.full_like(fixed, -1.5)}
    filled |= {"advantages": -column, "weights": column, "mask": torch.ones_like(fixed)}
    chosen = {"policy_loss": POLICY_LOSSES["clip"], "kl_estimator": KL_ESTIMATORS["k3"]} | (settings or {})
    loss, metrics = grpo_loss(LossInputs(logprobs=logprobs, **filled | changes), LossSettings(**chosen))
    gradient = torch.autograd.grad(loss, logprobs, allow_unused=True)[0]
    return loss.detach(), torch.zeros_like(fixed) if gradient is None else gradient, metrics


KL, SLOPE = math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)  # k3 of -1 against -1.5 is 0.106531, its gradient 0.393469.


# --- keep masks act on the policy term alone ---


def test_off_policy_rows_lose_their_policy_term_and_keep_their_kl():
    rollout = f64([[-0.4, -0.4], [-0.4, -0.4], [-0.6, -0.6]])  # The first two have drifted by 0.6.
    changes = {"rollout_logprobs": rollout, "advantages": f64([[-1.0], [2.0], [-1.0]])}
    changes["weights"] = f64([[0.25], [0.5], [1.0]])
    settings = {"off_policy_threshold": 0.5, "kl_coef": 0.1}
    loss, gradient, metrics = evaluate([[-1.0, -1.0]] * 3, settings, **changes)
    close(loss, 0.5 * -2 * 2 + 1.0 * 2 + 0.1 * KL * 2 * 1.75)
    tenth = 0.1 * SLOPE
    close(gradient, [[0.25 * tenth] * 2, [0.5 * (-2 + tenth)] * 2, [1 + tenth] * 2])
    assert metrics["off_policy/kept_frac_sum"] == 4
    close(metrics["policy_loss"], 0.25 * 2 + 0.5 * -4 + 2)  # Reported before any mask.
    without, _, metrics = evaluate([[-1.0, -1.0]] * 3, settings | {"off_policy_threshold": None}, **changes)
    close(without, loss + 0.25 * 2)
    assert "off_policy/kept_frac_sum" not in metrics


def test_low_entropy_tokens_lose_their_policy_term_and_nothing_else():
    keep = tensor([[True, False, False, True]])
    mask = tensor([[1, 1, 1, 0]])
    loss, gradient, metrics = evaluate(
        [[-1.0] * 4], {"kl_coef": 0.1}, entropy_keep=keep, mask=mask, weights=f64([[1 / 3]])
    )
    close(loss, (1 + 0.1 * KL * 3) / 3)  # One token of three, still divided by three; all three have a KL.
    tenth = 0.1 * SLOPE
    close(gradient, [[(1 + tenth) / 3, tenth / 3, tenth / 3, 0]])
    assert metrics["entropy_kept_frac_sum"] == 1


@pytest.mark.parametrize("name", ["sequence_clip", "gmpo", "vespo"])
def test_a_sequences_ratio_sees_also_the_tokens_that_are_not_kept(name):
    old, keep = f64([[-1.1, -1.3]]), tensor([[True, False]])
    settings = {"policy_loss": POLICY_LOSSES[name]}
    all_of_it, kept = (
        evaluate([[-1.0, -1.0]], settings, old_logprobs=old, entropy_keep=entropy_keep)[0]
        for entropy_keep in (None, keep)
    )
    close(kept, all_of_it / 2)


# --- the entropy bonus ---


@pytest.mark.parametrize(
    ("keep", "covered"), [(None, [1, 1, 1, 0]), ([True, False, True, True], [1, 0, 1, 0])], ids=["all", "kept"]
)
def test_the_entropy_bonus_is_a_mean_over_the_steps_tokens(keep, covered):
    entropy = f64([[0.5, 1.0, 2.0, float("nan")]]).requires_grad_()
    settings = {"entropy_coef": 0.01}
    changes = {"mask": tensor([[1, 1, 1, 0]]), "advantages": f64([[0.0]]), "weights": f64([[7.0]])}
    changes |= {"entropy": entropy, "entropy_keep": None if keep is None else tensor([keep]), "entropy_weight": 1 / 10}
    chosen = LossSettings(POLICY_LOSSES["clip"], KL_ESTIMATORS["k3"], **settings)
    fixed = f64([[-1.0] * 4])
    x = LossInputs(logprobs=fixed, old_logprobs=fixed, rollout_logprobs=fixed, ref_logprobs=None, **changes)
    loss, _ = grpo_loss(x, chosen)
    close(loss, -0.01 / 10 * sum(c * h for c, h in zip(covered, [0.5, 1.0, 2.0, 0.0], strict=True)))
    close(torch.autograd.grad(loss, entropy)[0], [[-0.001 * c for c in covered]])


# --- KL ---


def test_a_corrected_kl_takes_the_rows_ratio_where_the_policy_loss_does():
    # Two rows: log-ratios 0.3, 0.1 (the row's 0.2) and 0.5 alone on its mask.
    old, mask = f64([[-1.3, -1.1], [-1.5, -9.0]]), tensor([[1, 1], [1, 0]])
    settings = {"kl_coef": 1.0, "kl_corrected": True, "sequence_level": True}
    changes = {"old_logprobs": old, "mask": mask, "advantages": f64([[0.0], [0.0]])}
    loss, gradient, metrics = evaluate([[-1.0, -1.0]] * 2, settings, **changes)
    s, t = math.exp(0.2), math.exp(0.5)
    close(loss, 2 * KL * s + KL * t)
    close(metrics["kl_sum"], 2 * KL * s + KL * t)
    # d(s k_t) = s k' + k s/n for each of the row's tokens.
    close(gradient, [[s * SLOPE + 2 * KL * s / 2] * 2, [t * SLOPE + KL * t, 0]])
    by_token, gradient, _ = evaluate([[-1.0, -1.0]] * 2, settings | {"sequence_level": False}, **changes)
    close(by_token, KL * (math.exp(0.3) + math.exp(0.1) + t))
    close(gradient, [[0.5 * math.exp(0.3), 0.5 * math.exp(0.1)], [0.5 * t, 0]])  # Exactly rho d.


@pytest.mark.parametrize(("by_row", "value"), [(False, [0.3, 0.1]), (True, [0.2, 0.2])])
def test_whose_ratio_corrects_a_kl_is_a_choice_of_its_own(by_row, value):
    """vespo's policy term is of the row; its KL is corrected by the token's ratio, as each token's estimate needs it."""
    old = f64([[-1.3, -1.1]])
    settings = VESPO | {"kl_coef": 1.0, "kl_corrected": True, "sequence_level": True, "kl_by_row": by_row}
    loss, gradient, _ = evaluate([[-1.0, -1.0]], settings, old_logprobs=old, advantages=f64([[0.0]]))
    ratios = [math.exp(x) for x in value]
    close(loss, KL * sum(ratios))
    if not by_row:
        close(gradient, [[0.5 * ratio for ratio in ratios]])  # Exactly rho d.


@pytest.mark.parametrize("by_row", [False, True])
def test_the_gradient_of_a_corrected_kl_is_the_finite_difference(by_row):
    ref, old, mask = f64([[-1.5, -0.4, -2.0]]), f64([[-1.2, -0.7, -3.0]]), tensor([[1, 1, 0]])

    def loss(logprobs):
        x = LossInputs(logprobs, old, old, ref, f64([[0.0]]), f64([[1.0]]), mask)
        chosen = LossSettings(POLICY_LOSSES["clip"], KL_ESTIMATORS["k3"], 1.0, kl_corrected=True, kl_by_row=by_row)
        return grpo_loss(x, chosen)[0]

    assert torch.autograd.gradcheck(loss, f64([[-1.0, -1.1, -0.3]]).requires_grad_())


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_plain_kl_can_have_the_gradient_of_the_corrected_one(name, corrected):
    given = {"advantages": f64([[0.0]]), "old_logprobs": f64([[-1.2, -0.7]])}
    settings = {"kl_estimator": KL_ESTIMATORS[name], "kl_coef": 0.1}
    plain, _, _ = evaluate([[-1.0, -1.0]], settings | {"kl_corrected": corrected}, **given)
    _, exact, _ = evaluate([[-1.0, -1.0]], settings | {"kl_corrected": True}, **given)
    mixed = settings | {"kl_corrected": corrected, "kl_straight_through": "corrected"}
    loss, gradient, metrics = evaluate([[-1.0, -1.0]], mixed, **given)
    close(loss, plain)
    close(gradient, exact)
    close(metrics["kl_sum"], 10 * plain)
    if name == "k3":
        close(gradient, [[0.1 * 0.5 * math.exp(0.2), 0.1 * 0.5 * math.exp(-0.3)]])  # rho d.


@pytest.mark.parametrize(("name", "value", "slope"), [("k1", 20, 1), ("k2", 200, 20), ("k3", 19, 1), ("abs", 20, 1)])
def test_a_token_that_the_references_filter_leaves_out_is_twenty_nats_away(name, value, slope):
    settings = {"kl_estimator": KL_ESTIMATORS[name], "kl_coef": 1.0}
    given = {"ref_logprobs": f64([[-1.0, -math.inf]]), "advantages": f64([[0.0]])}
    loss, gradient, _ = evaluate([[-1.0, -1.0]], settings, **given)
    close(loss, value)
    close(gradient[0, 1], slope)
    broken, _, _ = evaluate([[-1.0, -1.0]], settings, **given | {"ref_logprobs": f64([[-1.0, math.nan]])})
    assert broken.isnan()  # No filter does that: the update is not made.


def test_sequence_level_losses_are_those_with_one_ratio_per_row():
    assert {"sequence_clip", "gspo_token", "gmpo", "vespo"} == SEQUENCE_LEVEL
    assert set(POLICY_LOSSES) >= SEQUENCE_LEVEL
    assert SEQUENCE_LEVEL - {"vespo"} == ROW_RATIO


@pytest.mark.parametrize(
    ("name", "corrected", "value"), [("k3", False, KL), ("k1", False, 0.5), ("k3", True, KL * 1.221403)]
)
def test_a_straight_through_kl_has_k2s_gradient(name, corrected, value):
    settings = {"kl_estimator": KL_ESTIMATORS[name], "kl_coef": 0.1, "kl_straight_through": True}
    loss, gradient, metrics = evaluate(
        [[-1.0]], settings | {"kl_corrected": corrected}, advantages=f64([[0.0]]), old_logprobs=f64([[-1.2]])
    )
    close(loss, 0.1 * value)
    close(gradient, [[0.1 * 0.5]])
    close(metrics["kl_sum"], value)


def test_a_kl_over_the_vocabulary_is_passed_through_with_its_gradient():
    full_kl = f64([[0.3, 0.2, float("nan")], [0.1, 0.4, 0.5]]).requires_grad_()
    mask, weights = tensor([[1, 1, 0], [1, 1, 1]]), f64([[0.25], [0.5]])
    fixed = f64([[-1.0] * 3] * 2)
    x = LossInputs(
        logprobs=fixed, old_logprobs=fixed, rollout_logprobs=fixed, ref_logprobs=None,
        advantages=f64([[0.0], [0.0]]), weights=weights, mask=mask, full_kl=full_kl,
    )  # fmt: skip
    loss, metrics = grpo_loss(x, LossSettings(POLICY_LOSSES["clip"], KL_ESTIMATORS["full"], kl_coef=0.1))
    close(loss, 0.1 * (0.25 * 0.5 + 0.5 * 1.0))
    close(metrics["kl_sum"], 1.5)
    close(torch.autograd.grad(loss, full_kl)[0], [[0.025, 0.025, 0], [0.05, 0.05, 0.05]])


def test_without_a_coefficient_no_reference_is_needed():
    loss, _, metrics = evaluate([[-1.0]], ref_logprobs=None)
    close(loss, 1)
    assert "kl_sum" not in metrics


# --- weights that a policy loss takes itself ---

VESPO = {"policy_loss": POLICY_LOSSES["vespo"], "folds_weights": True}
OFF = {"old_logprobs": f64([[-1.1, -1.2]]), "advantages": f64([[1.0]])}  # log-ratios 0.1 and 0.2


def gamma(s, k=2.0, lam=3.0):
    return math.exp(lam + k * s - lam * math.exp(s))


@pytest.mark.parametrize(
    ("rollout", "changes", "s"),
    [
        ([-1.15, -1.1], {}, 0.3 + 0.05 - 0.1),
        ([-1.15, -1.1], {"high": 1.02}, 0.3 + math.log(1.02) - 0.1),
        ([-1.15, -1.1], {"low": 1.0}, 0.3 + 0.05),
        ([-1.15, float("nan")], {}, 0.3 + 0.05),
        ([-1.15, -1.1], {"mode": "mask", "high": 1.02}, -18.420681),  # ln 0, bounded by ln 1e-8.
        (None, None, 0.3),
    ],
)
def test_token_weights_enter_vespos_ratio_and_are_not_multiplied_on(rollout, changes, s):
    sampling = {"importance_sampling": None if changes is None else SAMPLING | changes}
    given = OFF if rollout is None else OFF | {"rollout_logprobs": f64([rollout])}
    loss, gradient, metrics = evaluate([[-1.0, -1.0]], VESPO | sampling, **given)
    close(loss, 2 * gamma(s))  # -phi A logprob, with log-probs of -1.
    close(gradient, [[-gamma(s)] * 2])
    assert ("importance_sampling/mean_sum" in metrics) is (changes is not None)


def test_a_token_without_a_number_does_not_take_its_row_out_of_vespo():
    """Its ratio counts as 1; only a log-prob of the policy itself that is no number is the update's end."""
    given = OFF | {"old_logprobs": f64([[-1.1, math.nan]])}
    loss, gradient, _ = evaluate([[-1.0, -1.0]], VESPO, **given)
    close(loss, 2 * gamma(0.1))
    close(gradient, [[-gamma(0.1)] * 2])
    broken, _, _ = evaluate([[-1.0, math.nan]], VESPO, **OFF)
    assert broken.isnan()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_normalised_weights_are_scaled_after_their_bounds(scale):
    sampling, changes = {"importance_sampling": SAMPLING}, {"rollout_logprobs": f64([[-1.2, -3.0]])}
    loss, gradient, metrics = evaluate([[-1.0, -1.0]], sampling, importance_scale=scale, **changes)
    close(gradient, [[scale * math.exp(0.2), scale * 3]])
    close(loss, scale * (math.exp(0.2) + 3))
    close(metrics["importance_sampling/mean_sum"], math.exp(0.2) + 3)  # As they were.
    folded, _, _ = evaluate([[-1.0, -1.0]], VESPO | sampling, importance_scale=scale, **OFF)
    close(folded, 2 * gamma(0.3 - 0.3 + 2 * math.log(scale)))  # The ratios 0.1 and 0.2, the weights -0.1 and -0.2.


@pytest.mark.parametrize("level", ["sequence", "sequence_geometric"])
def test_a_rows_weight_is_multiplied_on_also_for_vespo(level):
    settings = VESPO | {"importance_sampling": SAMPLING | {"level": level}}
    loss, _, _ = evaluate([[-1.0, -1.0]], settings, rollout_logprobs=f64([[-1.15, -1.3]]), **OFF)
    r = math.exp(0.15 if level == "sequence" else 0.075)
    close(loss, 2 * gamma(0.3) * r)


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"vespo"}))
def test_every_other_loss_is_multiplied_by_its_weight(name):
    settings = {"policy_loss": POLICY_LOSSES[name]}
    changes = {"rollout_logprobs": f64([[-1.2, -1.2]])}
    without, plain, _ = evaluate([[-1.0, -1.0]], settings, **changes)
    loss, gradient, _ = evaluate([[-1.0, -1.0]], settings | {"importance_sampling": SAMPLING}, **changes)
    close(loss, math.exp(0.2) * without)
    close(gradient, math.exp(0.2) * plain)


# --- what is counted ---


@pytest.mark.parametrize(
    ("sequence_level", "low", "high"),
    [(False, 1, 1), (True, 2, 0)],
)
def test_clip_metrics_count_tokens_of_the_ratio_in_use(sequence_level, low, high):
    # Log-ratios -0.9, 0.1 (their mean -0.4) with A < 0; 0.5, -0.5 (mean 0) with A > 0.
    old = f64([[-0.1, -1.1], [-1.5, -0.5]])
    settings = {"sequence_level": sequence_level}
    _, _, metrics = evaluate([[-1.0, -1.0]] * 2, settings, old_logprobs=old, advantages=f64([[-1.0], [1.0]]))
    assert metrics["clip_ratio/low_mean_sum"] == low
    assert metrics["clip_ratio/high_mean_sum"] == high
    assert metrics["clip_ratio/region_mean_sum"] == low + high


def test_saturated_ratios_and_unknown_rollout_logprobs_are_counted_on_the_mask():
    old = f64([[-22.0, 20.0, -1.0, -99.0]])
    rollout = f64([[-1.0, float("nan"), float("-inf"), float("nan")]])
    mask = tensor([[1, 1, 1, 0]])
    _, _, metrics = evaluate([[-1.0] * 4], old_logprobs=old, rollout_logprobs=rollout, mask=mask)
    assert metrics["clip_ratio/saturated"] == 2
    assert metrics["rollout_logprobs_not_finite"] == 2
    close(metrics["sync/logprob_gap_sum"], 21)
    close(metrics["sync/logprob_gap_max"], 21)
