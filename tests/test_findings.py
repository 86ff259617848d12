"""Findings in words: each rule on rows that show it, and silence on rows that do not."""

from __future__ import annotations

import pytest

from launch.report.findings import GOOD, NOTICE, PROBLEM, findings
from tests.fakes import make_config


def rows(count=20, **columns):
    """``count`` steps; a column is a constant, or a function of the step's share of the run."""
    return [
        {"step": i + 1}
        | {name: value(i / (count - 1)) if callable(value) else value for name, value in columns.items()}
        for i in range(count)
    ]


def found(recorded, **settings):
    return {finding.title: finding for finding in findings(recorded, make_config(**settings))}


def test_nothing_recorded_gives_no_finding():
    assert found([]) == {}
    assert found(rows(20, unknown=1.0)) == {}


@pytest.mark.parametrize(
    ("reward", "title", "level"),
    [
        (lambda x: 0.2 + 0.6 * x, "The reward rose", GOOD),
        (lambda x: 0.8 - 0.6 * x, "The reward fell", PROBLEM),
        (lambda x: 0.4, "The reward did not move", PROBLEM),
    ],
)
def test_the_reward_rises_falls_or_stays(reward, title, level):
    finding = found(rows(reward=reward))[title]
    assert finding.level == level
    assert "first 5 steps" in finding.text
    assert (level == GOOD) == (finding.change == "")


def test_a_change_within_the_noise_is_none():
    noisy = [{"step": i, "reward": 0.5 + (0.2 if i % 2 else -0.2) + i / 1000} for i in range(20)]
    assert "The reward did not move" in found(noisy)


def test_a_few_steps_tell_no_trend():
    assert found(rows(7, reward=lambda x: x, kl=lambda x: x, entropy=lambda x: 1 - x)) == {}


def test_a_solved_task_is_no_flat_reward():
    recorded = rows(reward=1.0, frac_reward_zero_std=0.9)
    for row in recorded:
        row["frac_reward_zero_std/all_best"] = 0.9
    assert [f.title for f in findings(recorded, make_config())] == ["Most prompts are solved: little is left to learn"]


def test_rewards_that_are_all_the_same_are_not_solved():
    shares = dict.fromkeys(("", "/all_best", "/all_worst"), 1.0)
    recorded = rows(reward=0.25)
    for row in recorded:
        row |= {f"frac_reward_zero_std{name}": share for name, share in shares.items()}
    told = found(recorded)
    assert set(told) == {"The reward did not move", "All completions have the same reward"}
    finding = told["All completions have the same reward"]
    assert finding.level == PROBLEM
    assert "mean reward is 0.25" in finding.text
    assert "millrace doctor" in finding.change


CASES = [
    ({"frac_reward_zero_std": 0.8, "frac_reward_zero_std/all_worst": 0.7}, {}, "Most groups carry no signal", "80%"),
    ({"completions/clipped_ratio": 0.6}, {}, "Many completions are truncated", "limit of 4 tokens"),
    ({"kl": lambda x: 4 * x * x}, {}, "The KL grows fast", "over the last quarter"),
    ({"entropy": lambda x: 1 - 0.95 * x}, {}, "The entropy collapses", "fell from"),
    ({"staleness/mean": 2.0}, {"rollout.max_staleness": 2}, "Staleness is at its bound", "the bound is 2"),
    ({"importance_sampling/ess": 0.3}, {}, "The effective sample size is low", "0.30"),
    ({"off_policy/ess": 0.3}, {}, "The effective sample size is low", "off_policy/ess"),
    ({"clip_ratio/region_mean": 0.4}, {}, "Many tokens are clipped", "40%"),
    ({"grad_norm": 3.0}, {}, "Nearly every gradient is scaled down", "20 of 20 steps (median 3)"),
    ({"sync/canary_gap": 9e-4}, {}, "Engines and learner drift apart", "0.0009 nats; 0.001"),
    ({"groups/failed": 5.0, "groups/trained": 95.0}, {}, "Groups failed", "5 groups (5.0%)"),
    ({"engines/restarts": 2.0}, {}, "Engines were restarted", "2 times"),
    ({"samples/lost": 8.0, "samples/trained": 92.0}, {}, "Completions were lost", "8 completions (8.0%)"),
    ({"groups/step_refused": 4.0}, {}, "Steps were refused", "4 groups"),
    (
        {"reward_pool/timeouts": 3.0, "reward_pool/retries": 1.0},
        {},
        "Calls of the reward failed",
        "3 timeouts, 1 retries",
    ),
    ({"goodput/work": 0.3}, {}, "Most sampled tokens teach nothing", "30%"),
]


@pytest.mark.parametrize(("columns", "settings", "title", "said"), CASES)
def test_a_rule_speaks_with_its_numbers(columns, settings, title, said):
    finding = found(rows(**columns), **settings)[title]
    assert said in finding.text
    assert finding.level in (PROBLEM, NOTICE)


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ({"frac_reward_zero_std": 0.4}, {}),
        ({"completions/clipped_ratio": 0.1}, {}),
        ({"kl": lambda x: 0.4 * x}, {}),
        ({"entropy": lambda x: 1 - 0.5 * x}, {}),
        ({"staleness/mean": 1.0}, {"rollout.max_staleness": 2}),
        ({"staleness/mean": 0.0}, {"rollout.max_staleness": 0}),
        ({"importance_sampling/ess": 0.9, "off_policy/ess": 0.8}, {}),
        ({"clip_ratio/region_mean": 0.1}, {}),
        ({"grad_norm": lambda x: 2 * x}, {}),
        ({"sync/canary_gap": 1e-5}, {}),
        ({"groups/failed": 0.0, "engines/restarts": 0.0, "samples/lost": 0.0, "groups/step_refused": 0.0}, {}),
        ({"reward_pool/timeouts": 0.0, "goodput/work": 0.9}, {}),
    ],
)
def test_a_sound_run_is_left_alone(columns, settings):
    assert found(rows(**columns), **settings) == {}


def test_failures_are_a_problem_from_one_in_a_hundred():
    few, many = ({"groups/failed": float(n), "groups/trained": 1000.0} for n in (1, 50))
    assert found(rows(**few))["Groups failed"].level == NOTICE
    assert found(rows(**many))["Groups failed"].level == PROBLEM


def test_evaluations_tell_whether_held_out_rows_improve():
    def evaluated(*scores):
        return [{"step": 10 * i, "eval/reward": score} for i, score in enumerate(scores)]

    assert found(evaluated(0.2, 0.6))["Held-out rows improved"].level == GOOD
    assert "best at step 10, 0.9" in found(evaluated(0.2, 0.9, 0.5))["The best evaluation is not the last"].text
    assert found(evaluated(0.5)) == {}
    assert found(evaluated(0.5, 0.5)) == {}


def test_problems_come_first_and_name_settings_with_their_values():
    columns = {"reward": lambda x: x, "completions/clipped_ratio": 0.9, "staleness/mean": 1.0}
    listed = findings(rows(**columns), make_config(**{"rollout.max_staleness": 1}))
    assert [finding.level for finding in listed] == [PROBLEM, NOTICE, GOOD]
    assert "rollout.max_new_tokens (now 4)" in listed[0].change


def test_values_that_are_no_numbers_do_not_count():
    recorded = rows(kl=lambda x: None if x < 0.5 else 9.0, grad_norm=None)
    assert "Nearly every gradient is scaled down" not in found(recorded)
    assert "The KL grows fast" in found(recorded)
