"""Schedules: the table of the maths, their ends, and purity in the policy version."""

import pytest

from learner.schedules import SCHEDULES

# maths.md section 11: (name, arguments, policy version, planned steps, factor)
TABLE = [
    ("constant", {}, 0, 100, 1),
    ("constant", {}, 99, 100, 1),
    ("constant", {"warmup_steps": 4}, 0, 100, 0.25),
    ("constant", {"warmup_steps": 4}, 3, 100, 1),
    ("constant", {"warmup_steps": 4}, 4, 100, 1),
    ("linear", {}, 0, 10, 1),
    ("linear", {}, 4, 10, 0.6),
    ("linear", {}, 10, 10, 0),
    ("linear", {"warmup_steps": 4}, 1, 10, 0.5),
    ("linear", {"warmup_steps": 4}, 4, 10, 1),
    ("linear", {"warmup_steps": 4}, 7, 10, 0.5),
    ("linear", {"warmup_steps": 4, "final_fraction": 0.2}, 7, 10, 0.6),
    ("linear", {"final_fraction": 0.1}, 50, 10, 0.1),
    ("cosine", {}, 0, 12, 1),
    ("cosine", {}, 4, 12, 0.75),
    ("cosine", {}, 6, 12, 0.5),
    ("cosine", {}, 12, 12, 0),
    ("cosine", {"warmup_steps": 2}, 0, 14, 0.5),
    ("cosine", {"warmup_steps": 2}, 6, 14, 0.75),
    ("cosine", {"final_fraction": 0.2}, 8, 12, 0.4),
    ("cosine", {"final_fraction": 0.2}, 99, 12, 0.2),
    *[(name, {"warmup_steps": 4, "warmup_from_zero": True}, s, 10, s / 4)
      for name in ("constant", "linear", "cosine") for s in range(5)],
    ("linear", {"warmup_steps": 4, "warmup_from_zero": True}, 7, 10, 0.5),
    ("linear", {"warmup_from_zero": True}, 0, 10, 1),
]  # fmt: skip
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


@pytest.mark.parametrize(("name", "args", "version", "total", "factor"), TABLE)
def test_factor(name, args, version, total, factor):
    assert SCHEDULES[name](version, total, **args) == pytest.approx(factor, abs=1e-12)


def test_every_schedule_is_in_the_table():
    assert {row[0] for row in TABLE} == set(SCHEDULES)


@every_schedule
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_it_rises_to_one_and_never_again(name, warmup):
    factors = [SCHEDULES[name](s, 20, warmup_steps=warmup) for s in range(25)]
    top = max(warmup - 1, 0)
    assert factors[0] > 0
    assert factors[top] == 1
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert min(factors) >= 0


@every_schedule
@pytest.mark.parametrize(("warmup", "total"), [(10, 10), (20, 10), (1, 1)])
def test_a_run_no_longer_than_its_warm_up(name, warmup, total):
    factors = [SCHEDULES[name](s, total, warmup_steps=warmup) for s in range(total)]
    assert factors == [(s + 1) / warmup for s in range(total)]
