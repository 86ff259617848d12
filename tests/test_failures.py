"""The failure budget: what may be dropped, and the message when it was one too many."""

from __future__ import annotations

import pickle

import pytest

from launch.failures import FailureBudget, TooManyFailures, sample_file
from shared.config_reward import Reward
from shared.errors import GroupFailed, InputError
from tests.fakes import make_prompt

FUNCTIONS = [{"function": "exact_match"}]


kept: list = []
PROMPT = make_prompt(7)


def budget(**limits) -> FailureBudget:
    return FailureBudget(Reward(functions=FUNCTIONS, **limits), lambda failure, prompt: kept.append((failure, prompt)))


def dropped(group_id: int = 0, cause: str = "timeout", detail: str = "> 10 s", **evidence) -> GroupFailed:
    return GroupFailed(group_id, cause, detail, **evidence)


@pytest.mark.parametrize("most", [0, 3])
def test_as_many_may_fail_as_configured_and_not_one_more(most):
    failures = budget(max_failed_groups=most, max_failed_share=1.0)
    for i in range(most):
        failures.failed(dropped(i), PROMPT)
    with pytest.raises(TooManyFailures, match=f"Found {most + 1} dropped groups"):
        failures.failed(dropped(most), PROMPT)


@pytest.mark.parametrize(("share", "allowed"), [(0.0, 0), (0.1, 20), (0.5, 100)])
def test_the_share_is_of_the_last_two_hundred(share, allowed):
    failures = budget(max_failed_groups=10_000, max_failed_share=share)
    for i in range(allowed):
        failures.failed(dropped(i), PROMPT)
    with pytest.raises(TooManyFailures):
        failures.failed(dropped(allowed), PROMPT)


def test_every_dropped_group_is_kept_also_the_one_too_many():
    failures = budget(max_failed_groups=1, max_failed_share=1.0)
    kept.clear()
    failures.failed(dropped(3), PROMPT)
    with pytest.raises(TooManyFailures):
        failures.failed(dropped(4), PROMPT)
    assert [(failure.group_id, prompt) for failure, prompt in kept] == [(3, PROMPT), (4, PROMPT)]


def test_a_tenth_of_the_last_two_hundred_may_fail():
    failures = budget(max_failed_groups=10_000)
    for round_ in range(5):  # 20 of every 200, for as long as one likes.
        for i in range(200):
            failures.failed(dropped(round_ * 200 + i), PROMPT) if i % 10 == 0 else failures.succeeded()
    failures.failed(dropped(), PROMPT)  # It takes the place of one that leaves the window.
    with pytest.raises(TooManyFailures, match=r"Found 102 dropped groups \(102 timeout\).*10% of the last 200"):
        failures.failed(dropped(), PROMPT)


def test_early_failures_are_a_share_of_the_whole_window():
    failures = budget(max_failed_groups=10_000)
    for i in range(20):
        failures.failed(dropped(i), PROMPT)
    with pytest.raises(TooManyFailures):
        failures.failed(dropped(20), PROMPT)


def test_old_failures_leave_the_window():
    failures = budget(max_failed_groups=10_000)
    for _ in range(3):
        for i in range(20):
            failures.failed(dropped(i), PROMPT)
        for _ in range(200):
            failures.succeeded()
    assert failures.causes.total() == 60


def test_the_message_counts_causes_and_names_the_last_sample_and_the_first_traceback():
    failures = budget(max_failed_groups=2, max_failed_share=1.0)
    failures.failed(dropped(1, "timeout"), PROMPT)
    failures.failed(dropped(2, "E304", "ValueError: first", sample=0, trace="first trace\n"), PROMPT)
    with pytest.raises(InputError) as excinfo:
        failures.failed(
            dropped(4711, "E304", "ValueError: last", sample=3, text="secret text", trace="last trace"), PROMPT
        )
    error = excinfo.value
    assert (error.code, error.exit_code) == ("E310", 2)
    lines = str(error).split("\n")
    assert lines[0] == (
        "error[E310] too many reward failures — reward. Found 3 dropped groups (2 E304, 1 timeout), expected "
        "<= reward.max_failed_groups = 2 and <= 100% of the last 200. Fix: correct the function or raise timeout_s"
    )
    assert lines[1] == "last: group 4711 failed (E304): ValueError: last (saved: failed/4711-3.json)"
    assert lines[2:] == ["first failure: first trace"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(("sample", "name"), [(3, "failed/12-3.json"), (-1, "failed/12-0.json")])
def test_the_file_of_a_failed_group(sample, name):
    assert sample_file(dropped(12, sample=sample)) == name
