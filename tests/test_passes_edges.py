"""What an independent second implementation found in the passes: each was a wrong number or a crash once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.losses import KL_ESTIMATORS, POLICY_LOSSES, LossInputs, LossSettings, grpo_loss
from learner.passes import Given, plan_batch
from learner.reference import Reference
from shared.errors import LearnerFailed
from tests.fakes import make_config
from tests.test_passes import CPU, Numbers, by_sequence, columns, flat, groups_of, prepare


@pytest.mark.parametrize(
    "aggregation", [{"name": "constant", "length": 4}, {"name": "prompt_mean"}, {"name": "token_mean"}]
)
def test_a_step_that_no_group_is_left_for_is_empty(aggregation):
    changes = {"algorithm.zero_variance": "drop", "learner.steps_per_batch": 2, "algorithm.aggregation": aggregation}
    steps, _, _ = prepare(groups_of([(1, 0)] + [(1, 1)] * 5), **changes)
    assert [bool(step.batches) for step in steps] == [True, False]


@pytest.mark.parametrize(
    "advantage", [{"name": "grpo", "scale": "batch"}, {"name": "reinforce_pp"}, {"name": "reinforce_pp_baseline"}]
)
def test_statistics_over_the_step_are_those_of_one_optimizer_step(advantage):
    groups = groups_of()
    both, _, _ = prepare(groups, **{"learner.steps_per_batch": 2, "algorithm.advantage": advantage})
    first, _, _ = prepare(groups[:3], **{"algorithm.advantage": advantage})
    second, _, _ = prepare(groups[3:], **{"algorithm.advantage": advantage})
    expected = columns(first, "advantages") | {i + 6: a for i, a in columns(second, "advantages").items()}
    assert columns(both, "advantages") == pytest.approx(expected)


def test_given_old_logprobs_leave_what_else_the_pass_tells():
    groups = groups_of()
    numbers, other = Numbers(groups), Numbers(groups, seed=5)
    changes = {"algorithm.top_entropy_quantile": 0.5}
    own, _, _ = prepare(groups, numbers=numbers, **changes)
    steps, _, _ = prepare(groups, Given(old_logprobs=other.logprobs_), numbers=numbers, **changes)
    assert by_sequence(steps, "entropy_keep") == by_sequence(own, "entropy_keep")
    kept = [mark for marks in by_sequence(steps, "entropy_keep").values() for mark in marks]
    assert 0 < sum(kept) < len(kept)
    for i, values in by_sequence(steps, "old_logprobs").items():
        assert values == pytest.approx(flat(other.logprobs_)[i].tolist())


def test_given_numbers_belong_to_the_groups_that_were_handed_over():
    groups = groups_of([(1, 1), (0, 1), (2, 2), (0, 2)])
    _, scored = plan_batch(make_config(**{"algorithm.zero_variance": "drop"}), groups, 0, 1, CPU)
    assert scored.kept == [1, 3]
    given = Given(torch.arange(8.0).view(4, 2), [["a"], ["b"], ["c"], ["d"]], None).of(scored.kept)
    assert given.advantages.tolist() == [[2, 3], [6, 7]]
    assert given.old_logprobs == [["b"], ["d"]]
    assert given.ref_logprobs is None


def test_reference_logprobs_cannot_stand_for_whole_distributions():
    groups = groups_of()
    given = Given(ref_logprobs=Numbers(groups).ref)
    with pytest.raises(ValueError, match="full KL"):
        prepare(groups, given, **{"algorithm.kl.coef": 0.1, "algorithm.kl.estimator": "full"})


def test_masked_tokens_do_not_weigh_in_a_baseline():
    """Trainable tokens are what opo's lengths count."""
    changes = {"algorithm.advantage": {"name": "opo"}, "algorithm.mask_truncated": True}
    groups = groups_of([(1.0, 0.0)], lengths=[(4, -3)])
    steps, scored, _ = prepare(groups, **changes)
    assert scored.lengths.tolist() == [[4, 0]]
    assert columns(steps, "advantages") == {0: 0.0}


def test_tokens_of_one_entropy_are_kept_or_dropped_together():
    groups = groups_of()
    numbers = Numbers(groups)
    step = np.float32(1e-7)
    numbers.entropy = [
        [np.full(len(c.token_ids), 1 + step * i, np.float32) for i, c in enumerate(g.completions)] for g in groups
    ]
    steps, _, _ = prepare(groups, numbers=numbers, **{"algorithm.top_entropy_quantile": 0.3})
    assert all(mark for marks in by_sequence(steps, "entropy_keep").values() for mark in marks)


def test_broken_weights_are_not_blamed_on_the_engine():
    nan, ones = torch.full((1, 2), torch.nan), torch.ones(1, 2)
    column = torch.ones(1, 1)
    x = LossInputs(nan, nan, -ones, None, column, column, ones.bool())
    _, metrics = grpo_loss(x, LossSettings(POLICY_LOSSES["clip"], KL_ESTIMATORS["k3"]))
    assert metrics["rollout_logprobs_not_finite"] == 0
    x = LossInputs(-ones, -ones, nan, None, column, column, ones.bool())
    _, metrics = grpo_loss(x, LossSettings(POLICY_LOSSES["clip"], KL_ESTIMATORS["k3"]))
    assert metrics["rollout_logprobs_not_finite"] == 2


def test_too_many_unknown_rollout_logprobs_end_the_run_before_anything_is_computed():
    groups = groups_of()
    answers = [c for g in groups for c in g.completions]
    tokens = sum(len(c.token_ids) for c in answers)
    trainable = sum(len(c.token_ids) for c in answers if c.finish_reason == "stop")
    groups[0].completions[0].logprobs[0] = np.nan
    limit = "algorithm.importance_sampling.max_nonfinite"
    plan_batch(make_config(**{limit: 1 / tokens}), groups, 0, 1, CPU)
    with pytest.raises(LearnerFailed, match=f"1 of {trainable} rollout log-probs.*{limit}"):
        plan_batch(make_config(**{limit: 0.0, "algorithm.mask_truncated": True}), groups, 0, 1, CPU)


@pytest.mark.parametrize(
    ("kl", "logprobs", "hidden"),
    [
        ({"coef": 0.1}, True, False),
        ({"coef": 0.1, "estimator": "full"}, False, True),
        ({"coef": 0.1, "estimator": "full", "straight_through": True}, True, True),
        ({"reward_coef": 0.1, "reward_estimator": "full"}, False, False),  # Used up before the update.
        ({"coef": 0.1, "reward_coef": 0.1, "reward_estimator": "full"}, True, False),
    ],
)
def test_the_reference_is_asked_for_what_is_compared_and_no_more(kl, logprobs, hidden):
    steps, _, numbers = prepare(eta=0.1 if "reward_coef" in kl else 0.0, **{"algorithm.kl": kl})
    batches = [batch for step in steps for batch in step.batches]
    assert {batch.ref_logprobs is not None for batch in batches} == {logprobs}
    assert {batch.ref_hidden is not None for batch in batches} == {hidden}
    assert numbers.hiddens == (len(batches) if "full" in kl.values() else 0)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_a_reference_moves_by_its_share_of_the_policy(alpha):
    def model(value):
        inner = torch.nn.Linear(2, 3).bfloat16()
        torch.nn.init.constant_(inner.weight, value)
        torch.nn.init.constant_(inner.bias, -value)
        return torch.nn.ModuleDict({"model": inner})

    reference = Reference(make_config(), model(1.0), CPU, with_head=False)
    engine = type("Engine", (), {"module": model(5.0)})()
    reference.follow(engine, alpha)
    weight, bias = reference._model["model"].parameters()
    assert torch.equal(weight, torch.full((3, 2), 1 + 4 * alpha).bfloat16())
    assert torch.equal(bias, -torch.full((3,), 1 + 4 * alpha).bfloat16())
    assert not weight.requires_grad
    assert torch.equal(engine.module["model"].weight, torch.full((3, 2), 5.0).bfloat16())


def test_tokens_of_every_step_of_a_batch_can_be_equal():
    changes = {"learner.steps_per_batch": 2, "algorithm.aggregation.name": "batch_token_mean"}
    steps, _, _ = prepare(**changes)
    assert [int(step.lengths.sum()) for step in steps] == [16, 17]
    assert [*columns(steps, "weights").values()] == pytest.approx([1 / 16.5] * len(columns(steps, "weights")))
    steps, _, _ = prepare(**changes | {"learner.steps_per_batch": 1})
    assert [*columns(steps, "weights").values()] == pytest.approx([1 / 33] * len(columns(steps, "weights")))


def test_masked_and_filtered_tokens_are_none_of_the_batchs():
    groups = groups_of()
    numbers = Numbers(groups)
    numbers.logprobs_[0][0][1] = -np.inf
    changes = {"learner.steps_per_batch": 3, "algorithm.aggregation.name": "batch_token_mean"}
    changes |= {"algorithm.mask_truncated": True, "rollout.top_p": 0.9, "rollout.truncated_sampling": "renormalise"}
    steps, _, _ = prepare(groups, numbers=numbers, **changes)
    left = 4 - 1 + 2 + 3, 1 + 5 + 2 + 2, 6 + 4
    assert [int(step.lengths.sum()) for step in steps] == list(left)
    assert [*columns(steps, "weights").values()] == pytest.approx([3 / sum(left)] * len(columns(steps, "weights")))


@pytest.mark.parametrize("budget", [8, 12, 1000])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_geometric"])
def test_normalised_weights_have_a_mean_of_one_over_the_step(level, budget):
    groups = groups_of()
    numbers = Numbers(groups)
    changes = {"algorithm.importance_sampling": {"level": level, "high": 1.5, "normalise": True}}
    changes |= {"learner.steps_per_batch": 2, "learner.max_tokens_per_microbatch": budget}
    steps, _, _ = prepare(groups, numbers=numbers, **changes)
    old, rollout = flat(numbers.logprobs_), [c.logprobs for g in groups for c in g.completions]
    for step, members in zip(steps, (range(6), range(6, 12)), strict=True):
        gaps = [old[i].astype(np.float64) - rollout[i] for i in members if len(old[i])]
        if level != "token":
            gaps = [gap.sum(keepdims=True) / (1 if level == "sequence" else len(gap)) for gap in gaps]
        weights = np.minimum(np.exp(np.concatenate(gaps)), 1.5)
        scales = [batch.importance_scale for batch in step.batches]
        assert scales == pytest.approx([1 / weights.mean()] * len(scales), rel=1e-5)


def test_without_normalising_weights_stay():
    steps, _, _ = prepare(**{"algorithm.old_logprobs": "recompute"})
    assert {batch.importance_scale for step in steps for batch in step.batches} == {1.0}


def test_weights_that_are_all_masked_are_not_scaled_to_infinity():
    sampling = {"mode": "mask", "high": 1e-6, "normalise": True}
    steps, _, _ = prepare(**{"algorithm.importance_sampling": sampling})
    assert {batch.importance_scale for step in steps for batch in step.batches} == {1.0}


@pytest.mark.parametrize("name", ["k1", "abs", "mse"])
def test_a_token_outside_the_references_filter_is_twenty_nats_in_the_reward(name):
    groups = groups_of()
    numbers = Numbers(groups)
    numbers.ref[0][0][1] = -np.inf
    kl = {"reward_coef": 0.1, "reward_estimator": name}
    _, scored, _ = prepare(groups, eta=0.1, numbers=numbers, **{"algorithm.kl": kl})
    policy, ref = flat(numbers.logprobs_)[0].astype(np.float64), flat(numbers.ref)[0].astype(np.float64)
    gaps = np.where(np.isinf(ref), 20.0, policy - ref)
    by_hand = {"k1": gaps, "abs": np.abs(gaps), "mse": gaps**2 / 2}[name].sum()
    assert float(scored.rewards[0, 0]) == pytest.approx(1.0 - 0.1 * by_hand, rel=1e-5)
    assert torch.isfinite(scored.rewards).all()


def test_a_broken_reference_ends_the_run_instead_of_taking_every_reward_away():
    groups = groups_of()
    numbers = Numbers(groups)
    numbers.ref[2][1][3] = np.nan
    with pytest.raises(LearnerFailed, match="KL in the reward is not a number"):
        prepare(groups, eta=0.1, numbers=numbers, **{"algorithm.kl.reward_coef": 0.1})


def test_whitening_by_token_sees_the_trainable_tokens():
    changes = {"algorithm.advantage.name": "reinforce_pp", "algorithm.mask_truncated": True}
    steps, scored, _ = prepare(groups_of([(1.0, 0.0), (0.0, 1.0)], [(3, 1), (2, 2)]), **changes)
    assert columns(steps, "advantages") == pytest.approx(
        {0: 0.724569, 1: -1.207615, 2: -1.207615, 3: 0.724569}, abs=1e-6
    )
    steps, scored, _ = prepare(groups_of([(1.0, 0.0, 9.0)], [(3, 1, -5)]), **changes)
    assert scored.lengths.tolist() == [[3, 1, 0]]
    assert columns(steps, "advantages") == pytest.approx({0: 0.5, 1: -1.5}, abs=1e-6)
