"""How the learner's numbers add up: over micro-batches, over the updates on one batch, over groups."""

from __future__ import annotations

import numpy as np
import pytest

from learner.step_metrics import over_updates, reduce_metrics, token_means
from shared.metrics import group_metrics
from shared.types import RolloutGroup
from tests.fakes import make_completion, make_group, make_prompt

NAN = float("nan")


def test_sums_over_tokens_become_token_means():
    sums = {"tokens": 4.0, "kl_sum": 2.0, "clip_ratio/low_mean_sum": 1.0, "loss": 3.0, "sync/logprob_gap_max": 9.0}
    assert token_means(sums) == {"kl": 0.5, "clip_ratio/low_mean": 0.25, "loss": 3.0, "sync/logprob_gap_max": 9.0}


def test_without_tokens_nothing_is_divided_by_zero():
    assert token_means({"tokens": 0.0, "kl_sum": 0.0, "loss": 0.0}) == {"kl": 0.0, "loss": 0.0}


@pytest.mark.parametrize("kind", ["importance_sampling", "off_policy"])
@pytest.mark.parametrize(("weights", "share"), [([1, 1, 1, 1], 1), ([2, 2], 1), ([1, 0, 0, 0], 0.25), ([3, 1], 0.8)])
def test_the_effective_sample_size_is_a_share_of_the_tokens(kind, weights, share):
    r = np.array(weights, float)
    sums = {"tokens": float(len(r)), f"{kind}/mean_sum": r.sum()}
    metrics = token_means(sums | {f"{kind}/square_sum": (r**2).sum()})
    assert metrics[f"{kind}/ess"] == pytest.approx(r.sum() ** 2 / (r**2).sum() / len(r)) == share
    assert metrics[f"{kind}/mean"] == pytest.approx(r.mean())
    assert f"{kind}/square" not in metrics


def test_updates_are_averaged_and_extremes_are_extremes():
    reports = [{"loss": 1.0, "gap_max": 3.0, "ratio_min": 0.5}, {"loss": 3.0, "gap_max": 2.0, "ratio_min": 0.25}]
    assert over_updates(reports) == {"loss": 2.0, "gap_max": 3.0, "ratio_min": 0.25}
    assert over_updates(reports[:1]) == reports[0]


def test_one_rank_reduces_to_itself():
    sums = {"a_sum": 1.0, "b_max": 2.0, "c_min": 3.0}
    reduced = reduce_metrics(sums)
    assert reduced == sums
    assert reduced is not sums


# --- groups without variance ---


@pytest.mark.parametrize(
    ("used", "replaced", "share", "all_best", "all_worst"),
    [
        ([(0, 1)], [], 0, 0, 0),
        ([(0, 1), (1, 1)], [], 1 / 2, 1 / 2, 0),
        ([(0, 1), (0, 0)], [], 1 / 2, 0, 1 / 2),
        ([(0, 1)], [(1, 1), (0, 0), (0, 0)], 3 / 4, 1 / 4, 2 / 4),
        ([(0, 1)], [(0.5, 0.5)], 1 / 2, 0, 0),  # Neither best nor worst.
        ([(0, 2), (1, 1)], [(2, 2)], 2 / 3, 1 / 3, 0),
        ([(0, 1), (NAN, NAN)], [(1, NAN)], 1 / 2, 1 / 2, 0),  # Without any reward a group says nothing.
        ([(NAN, NAN)], [], 0, 0, 0),
    ],
)
def test_the_share_of_groups_without_variance(used, replaced, share, all_best, all_worst):
    groups = [make_group(i, rewards) for i, rewards in enumerate(used)]
    others = [make_group(100 + i, rewards) for i, rewards in enumerate(replaced)]
    metrics = group_metrics(groups, 0, others)
    names = ["frac_reward_zero_std", "frac_reward_zero_std/all_best", "frac_reward_zero_std/all_worst"]
    assert [metrics[name] for name in names] == pytest.approx([share, all_best, all_worst])
    used_rewards = np.array(used, float)
    if np.isfinite(used_rewards).any():
        assert metrics["reward"] == pytest.approx(np.nanmean(used_rewards))  # Replaced groups are nowhere else.


@pytest.mark.parametrize(
    ("rewards", "parts", "summed", "by_part"),
    [
        ((1, 1), {"a": (1, 0), "b": (0, 1)}, False, True),
        ((1, 1), {"a": (1, 1), "b": (0, 0)}, False, False),
        ((0, 1), {"a": (0, 1)}, True, True),
        ((0, 1), {"a": (0, NAN), "b": (NAN, 1)}, True, False),  # No function differs between two completions.
        ((1, 1), {"a": (NAN, NAN), "b": (1, 0)}, False, True),
        ((0, 1), {}, True, False),
    ],
)
def test_a_signal_by_part_is_in_any_function(rewards, parts, summed, by_part):
    values = {name: np.float32(column) for name, column in parts.items()}
    completions = (make_completion(), make_completion())
    group = RolloutGroup(0, make_prompt(), completions, np.float32(rewards), values)
    assert group.has_signal() is summed
    assert group.has_signal(by_part=True) is by_part
